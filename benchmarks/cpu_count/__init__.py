"""Counts what the CPU kernels execute, instruction by instruction, without counters in hardware.

`listing` reads the machine code of the library, `stepping` executes a call step by step and looks
up each instruction there, `cases` says what is counted, and `report` keeps rows and makes the
table. ``python -m benchmarks.cpu_count`` does all of it.
"""
