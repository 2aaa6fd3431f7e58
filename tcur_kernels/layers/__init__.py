"""Layers of a model that compute through a stack, and what a stack keeps for them."""
