// AVX-512, as Skylake servers have it.
#pragma once

#if defined(__x86_64__)
#define TCUR_ISA avx512
#define TCUR_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#define TCUR_VECTOR_BYTES 64
#define TCUR_REGISTERS 32
#define TCUR_RUNS_HERE                                                         \
  (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&  \
   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && \
   __builtin_cpu_supports("fma"))
#endif
