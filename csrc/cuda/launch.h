// The only header that knows whether the kernels are compiled by nvcc, or by g++ for the host.
//
// The kernels use this much of CUDA: threadIdx.x, blockIdx.x, blockDim.x, gridDim.x, dynamic shared
// memory through `shared_memory<T>()`, __syncthreads(), and the matrix product of fragments.h. On
// the host, emulator/ replaces all of it. There every CUDA thread is a fiber, so machines without a
// GPU can test the same source of the kernels. Blocks and grids are one-dimensional.
#pragma once

#include "../common/integers.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

namespace tcur {

// Bytes of shared memory that a multiprocessor has, and how many of them one block may use.
struct SharedLimits {
  int64_t multiprocessor, block;
};

}  // namespace tcur

#ifndef __CUDACC__
#include "emulator/launch.h"
#else

namespace tcur {

#define TCUR_DEVICE __device__ __forceinline__
// Limits a kernel to 65536 / (threads * blocks) registers, which gives it its planned occupancy.
#define TCUR_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define TCUR_PARAMETER __grid_constant__

using Stream = cudaStream_t;

template <class T>
TCUR_DEVICE T* shared_memory() {
  extern __shared__ __align__(16) unsigned char tcur_shared[];
  return reinterpret_cast<T*>(tcur_shared);
}

// Returns the `x` of the lane whose index differs from this lane's in `bits`. All lanes of the warp
// must call this.
TCUR_DEVICE float exchange(float x, int bits) {
  return __shfl_xor_sync(0xFFFFFFFFU, x, bits);
}

// Starts a copy of 16 bytes from device to shared memory; the thread does not wait for it. Both
// places are AHEAD numbers behind the pointers. `wait_for_copies` waits for the copies of this
// thread. To read what other threads copied, a barrier must follow.
template <int AHEAD>
TCUR_DEVICE void copy_later(float* to_shared, const float* from) {
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %2], 16;"
               :
               : "r"(to), "l"(from), "n"(AHEAD * 4)
               : "memory");
}
TCUR_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_all;" : : : "memory");
}

// Returns the same number, but the compiler does not know that. So it computes what depends on the
// number where it is needed, and keeps it in no register meanwhile.
TCUR_DEVICE int concealed(int number) {
  asm volatile("mov.b32 %0, %0;" : "+r"(number));
  return number;
}

// Prefetches the cache line of this address into the second-level cache.
TCUR_DEVICE void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(address));
}

// Waits until the previous launch has finished and its results can be read. Only kernels that are
// launched early (`launch_early`) need this; in other kernels it does no harm.
TCUR_DEVICE void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

// Allows the next launch, if it is an early one, to begin while this one still runs.
TCUR_DEVICE void let_next_launch_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
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

inline SharedLimits shared_limits(int device) {
  return {
      device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
}

inline bool can_launch_early(int device) {
  return device_attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9;
}

// With `begins_early` the kernel may start before the previous launch ends. The kernel then waits
// for that launch with `wait_for_launch_before`.
template <class... Params, class... Args>
void launch_kernel(
    bool begins_early,
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
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = begins_early ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args...), "kernel launch");
}

}  // namespace tcur

#endif

namespace tcur {

template <class Kernel, class... Args>
void launch(
    Kernel* kernel,
    int64_t blocks,
    int threads,
    int64_t shared_bytes,
    Stream stream,
    const Args&... args) {
  launch_kernel(false, kernel, blocks, threads, shared_bytes, stream, args...);
}

// Where the device supports it, the kernel may start while the previous launch still runs.
template <class Kernel, class... Args>
void launch_early(
    int device,
    Kernel* kernel,
    int64_t blocks,
    int threads,
    int64_t shared_bytes,
    Stream stream,
    const Args&... args) {
  launch_kernel(can_launch_early(device), kernel, blocks, threads, shared_bytes, stream, args...);
}

}  // namespace tcur
