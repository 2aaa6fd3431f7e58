"""The operators: their contract, plain mathematics, kernels in several languages, entry points."""

from . import definitions as definitions  # which registers them, whatever is imported first
