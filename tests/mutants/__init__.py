"""The kernels in C++ and CUDA, broken on purpose: the suite must notice each way."""
