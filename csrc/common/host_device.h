// The mark of functions that CUDA kernels call too.
#pragma once

#ifdef __CUDACC__
#define TCUR_HOST_DEVICE __host__ __device__
#else
#define TCUR_HOST_DEVICE
#endif
