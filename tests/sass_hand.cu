// Kernels whose instructions tests/test_sass.py counts by hand.
#include <cstdint>
extern "C" __global__ void hand(
    const float* from, float* to, int turns, int n, int divisor, int64_t stride) {
  __shared__ float tile[2048];
  const int thread = threadIdx.x;
  float sum = 0.0f;
#pragma unroll 1
  for (int i = 0; i < turns; ++i) {
    sum += from[thread + i * stride];
  }
  tile[thread % 32 * 32 + thread / 32] = sum;
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < thread / divisor; ++i) {
    sum += tile[i * 33];
  }
  if (blockIdx.x * blockDim.x + thread < n) {
    to[blockIdx.x * blockDim.x + thread] = sum;
  }
}

extern "C" __global__ void divide(float* to, uint64_t a, uint64_t b) {
#pragma unroll 1
  for (uint64_t i = 0; i < a / b; ++i) {
    to[i] = 0.0f;
  }
}

extern "C" __global__ void depends(const int* turns, float* to) {
#pragma unroll 1
  for (int i = 0; i < turns[1]; ++i) {
    to[i] = 0.0f;
  }
}

extern "C" __global__ void chooses(volatile float* to, int n) {
  switch (n) {
    case 0: to[1] = 1.0f; break;
    case 1: to[2] = to[3] + 1.0f; break;
    case 2: to[4] = to[5] * 2.0f; break;
    case 3: to[6] = to[7]; to[7] = 1.0f; break;
    case 4: to[8] = to[8] + to[9]; break;
    case 5: to[1] = to[2]; to[3] = to[5]; to[4] = 2.0f; break;
    case 6: to[11] = to[1] - to[2] - to[3]; break;
  }
}

extern "C" __global__ void inverse(double* to, int n) {
  to[threadIdx.x] = 2.0 / n;
}

extern "C" __global__ void copies(const float4* from, float4* to) {
  extern __shared__ float4 tile[];
  const float4 first = from[threadIdx.x], second = from[threadIdx.x + 32];
  const unsigned to_shared = __cvta_generic_to_shared(tile + threadIdx.x);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to_shared), "l"(from));
  asm volatile("prefetch.global.L2 [%0];" : : "l"(from + 64 + 8 * threadIdx.x));
  asm volatile("cp.async.wait_all;" : : : "memory");
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to_shared), "l"(from));
  asm volatile("cp.async.wait_all;" : : : "memory");
  to[threadIdx.x] = first;
  to[threadIdx.x + 32] = second;
}
