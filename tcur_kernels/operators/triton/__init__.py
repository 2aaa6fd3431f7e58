"""The operators as Triton kernels, for NVIDIA and AMD; imported when the first of them runs."""

from .operators import INTERPRETED

__all__ = ["INTERPRETED"]
