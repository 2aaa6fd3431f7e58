"""Weights in safetensors files, and by which names models know them."""
