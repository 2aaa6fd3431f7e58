"""Benchmarks; run ``python -m benchmarks``.

Results are checked before they are timed. Contenders take turns, and ratios are reported.
"""
