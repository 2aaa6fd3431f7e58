"""Tiny random models from many libraries, and what an adapter promises on each of them."""
