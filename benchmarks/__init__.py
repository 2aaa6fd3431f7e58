"""Benchmarks: checked before they are timed, interleaved, in ratios. ``python -m benchmarks``."""
