"""The operators as Triton kernels, for NVIDIA and AMD GPUs. Importing it registers them."""

from .operators import INTERPRETED

__all__ = ["INTERPRETED"]
