"""Merges an adapter into the weights of a model directory."""
