"""The operators: their contract, plain mathematics, kernels in several languages, entry points."""
