// The one header between the kernels and what runs them: nvcc, or g++ on the host.
//
// Kernels use from CUDA: threadIdx.x, blockIdx.x, blockDim.x, gridDim.x, dynamic shared memory by
// `shared_memory<T>()`, __syncthreads(), and the warp's matrix product of fragments.h. On the host
// every CUDA thread is a fiber (fibers.h), so that the very source of the kernels is tested on
// machines without a GPU. Blocks are one-dimensional, grids too.
#pragma once

#include "../tubes.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "fibers.h"
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

namespace tcur {

#ifdef __CUDACC__

#define TCUR_DEVICE __device__ __forceinline__
// At most 65536 / (threads * blocks) registers: the occupancy a kernel is planned for.
#define TCUR_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define TCUR_PARAMETER __grid_constant__

using Stream = cudaStream_t;

template <class T>
TCUR_DEVICE T* shared_memory() {
  extern __shared__ __align__(16) unsigned char tcur_shared[];
  return reinterpret_cast<T*>(tcur_shared);
}

// Asks for the line of this address, into the second-level cache.
TCUR_DEVICE void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(address));
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("tcur: ") + what + ": " + cudaGetErrorString(error));
  }
}

inline int64_t device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// Bytes of shared memory of a multiprocessor, and how many of them one block may have.
struct SharedLimits {
  int64_t multiprocessor, block;
};

inline SharedLimits shared_limits(int device) {
  return {
      device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
}

template <class... Params, class... Args>
void launch(
    void (*kernel)(Params...),
    int64_t blocks,
    int threads,
    int64_t shared_bytes,
    Stream stream,
    const Args&... args) {
  if (blocks > INT32_MAX) {
    throw std::runtime_error("tcur: too many blocks for one launch");
  }
  if (shared_bytes > 48 * 1024) {
    check(
        cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        "cudaFuncSetAttribute");
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(args...);
  check(cudaGetLastError(), "kernel launch");
}

#else

#define TCUR_DEVICE inline
#define TCUR_KERNEL(threads, blocks) void
#define TCUR_PARAMETER

struct Stream {};

inline void prefetch(const void*) {
}

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(fibers::shared_memory());
}

struct SharedLimits {
  int64_t multiprocessor, block;
};

// Those of compute capability 9.0.
inline SharedLimits shared_limits(int) {
  return {228 * 1024, 227 * 1024};
}

template <class... Params, class... Args>
void launch(
    void (*kernel)(Params...),
    int64_t blocks,
    int threads,
    int64_t shared_bytes,
    Stream,
    const Args&... args) {
  fibers::run(blocks, threads, shared_bytes, [&] { kernel(args...); });
}

#endif

}  // namespace tcur
