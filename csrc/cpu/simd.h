// Portable vectors of one instruction set. Its isa.h comes first and defines TCUR_ISA (a
// namespace), TCUR_TARGET (a function attribute), TCUR_VECTOR_BYTES and TCUR_REGISTERS. Everything
// in this header and in the *_kernel.h beside it lives in that namespace: the same inline function
// compiled for two instruction sets under one name would let the linker keep the wrong one.
#pragma once

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// For functions whose results would otherwise leave the registers.
#define TCUR_INLINE TCUR_TARGET inline __attribute__((always_inline))

namespace tcur::TCUR_ISA {

template <class T>
struct Simd {
  typedef T Vec __attribute__((vector_size(TCUR_VECTOR_BYTES)));
  static constexpr int lanes = TCUR_VECTOR_BYTES / sizeof(T);
};
template <class T>
using Vec = typename Simd<T>::Vec;

// Rows and vectors of columns that products work on together. A complex product adds to every sum
// twice in a row, and an addition takes up to five cycles in which a core begins ten. So there are
// 16 sums in 32 registers, and in 16 registers the 12 that leave room for four operands.
constexpr int kRowBlock = TCUR_REGISTERS == 32 ? 4 : 6;
constexpr int kRegisterColumns = TCUR_REGISTERS == 32 ? 2 : 1;
constexpr int kBlock = kRowBlock * kColumnBlock;
// Whether tiles of W_eff ask for their base while they compute, so that it waits in the
// second-level cache. Cores with AVX-512 do so beside their arithmetic. On one with AVX2 it cost
// the products as much as it saved the sweep, or more.
constexpr bool kFetchesBase = TCUR_REGISTERS == 32;
// Columns of a strip (kernels.h).
template <class T>
constexpr int kStrip = 2 * Simd<T>::lanes;
// Numbers of a strip of one slice or plane, and the distance between its planes.
template <class T>
constexpr int kStripSize = kRowBlock * kStrip<T>;
template <class T>
constexpr int kPlaneStride = kStripSize<T> + kPad;

// Where row i, column j of a block is stored in it.
template <class T>
constexpr int64_t place_in_block(int64_t i, int64_t j) {
  return j / kStrip<T> * kStripSize<T> + i * kStrip<T> + j % kStrip<T>;
}

// A vector with as many elements E as a vector of T has lanes.
template <class E, class T>
struct LanesOf {
  typedef E Vec __attribute__((vector_size(sizeof(E) * Simd<T>::lanes)));
};

template <class T>
TCUR_TARGET inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
TCUR_TARGET inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// Stores a vector without caching it. Use it where nothing reads the line soon: an ordinary store
// would first load the line that it is about to overwrite. p must be aligned to the size of the
// vector.
template <class V>
TCUR_TARGET inline void stream(void* p, V v) {
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
  } else if constexpr (sizeof(V) == 32) {
    _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
  } else if constexpr (sizeof(V) == 16) {
    _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
  } else {
    static_assert(sizeof(V) == 8);
    long long bits;
    __builtin_memcpy(&bits, &v, sizeof(bits));
    _mm_stream_si64(static_cast<long long*>(p), bits);
  }
#else
  __builtin_memcpy(p, &v, sizeof(v));
#endif
}

// Makes all streamed stores complete before any later store.
TCUR_TARGET inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

enum class Cache { first = 3, second = 2 };

// Prefetches a cache line. GCC does not count a prefetch as an effect. It would drop calls of a
// function that only prefetches, and calls of functions that only call such a function. The empty
// asm statement counts as an effect.
template <Cache LEVEL>
TCUR_TARGET inline void fetch(const void* p) {
  __builtin_prefetch(p, 0, static_cast<int>(LEVEL));
  asm volatile("");
}

template <class T>
TCUR_TARGET inline T sum(Vec<T> v) {
  T total = 0;
  for (int i = 0; i < Simd<T>::lanes; ++i) {
    total += v[i];
  }
  return total;
}

}  // namespace tcur::TCUR_ISA
