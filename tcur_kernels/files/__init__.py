"""Weights in safetensors files, and the names that models have for them."""
