// AVX2 with FMA.
#pragma once

#if defined(__x86_64__)
#define TCUR_ISA avx2
#define TCUR_TARGET __attribute__((target("avx2,fma")))
#define TCUR_VECTOR_BYTES 32
#define TCUR_REGISTERS 16
#define TCUR_RUNS_HERE (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#endif
