"""Layers of a model that compute through a stack, and what the stack keeps for them."""
