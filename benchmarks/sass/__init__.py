"""Counts what a GPU would execute, from machine code alone: ``python -m benchmarks.sass``.

`listing` reads the machine code (SASS) of a kernel, `machine` executes its integers and branches
for one warp, `launches` says how operators launch kernels at given shapes, and `count` puts these
together. Everything is counted and nothing is measured. No GPU is needed.
"""
