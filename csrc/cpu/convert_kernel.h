// Converts between the element types in memory and the type of the arithmetic. The 16-bit
// conversions use integer operations, so that every compiler vectorises them. They round to nearest
// even, and NaN stays NaN.
#pragma once

#include "simd.h"

namespace tcur::TCUR_ISA {

TCUR_TARGET inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

TCUR_TARGET inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <class T>
TCUR_TARGET inline T widen(double x) {
  return static_cast<T>(x);
}
template <class T>
TCUR_TARGET inline T widen(float x) {
  return static_cast<T>(x);
}
template <class T>
TCUR_TARGET inline T widen(BFloat16 x) {
  return static_cast<T>(bits_to_float(static_cast<uint32_t>(x.x) << 16));
}
template <class T>
TCUR_TARGET inline T widen(Half x) {
  return static_cast<T>(static_cast<float>(x));
}

// Rounds to nearest, ties to even. A NaN that arithmetic gave is a quiet one, so its upper half is
// one, too.
template <class O, class T>
struct Narrow {
  TCUR_TARGET static inline O from(T x) {
    return static_cast<O>(x);
  }
};
template <class T>
struct Narrow<BFloat16, T> {
  TCUR_TARGET static inline BFloat16 from(T x) {
    const uint32_t bits = float_to_bits(static_cast<float>(x));
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    return BFloat16(static_cast<uint16_t>(nan ? bits >> 16 : rounded), BFloat16::from_bits());
  }
};
template <class T>
struct Narrow<Half, T> {
  TCUR_TARGET static inline Half from(T x) {
    return Half(static_cast<float>(x));
  }
};

// values[0 … n) = source[0 … n)
template <class T, class S>
TCUR_TARGET inline void load_row(const S* source, T* values, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    values[j] = widen<T>(source[j]);
  }
}

// Loads a vector of T from elements of another type, and converts it back to that type.
template <class T, class S>
TCUR_TARGET inline Vec<T> load_widened(const S* p) {
  typename LanesOf<S, T>::Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, Vec<T>);
}
template <class T>
TCUR_TARGET inline Vec<T> load_widened(const BFloat16* p) {
  typename LanesOf<uint16_t, T>::Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  const auto bits = __builtin_convertvector(v, typename LanesOf<uint32_t, T>::Vec) << 16;
  return __builtin_convertvector((typename LanesOf<float, T>::Vec)bits, Vec<T>);
}
template <class T>
TCUR_TARGET inline Vec<T> load_widened(const Half* p) {
  Vec<T> v;
  for (int i = 0; i < Simd<T>::lanes; ++i) {
    v[i] = widen<T>(p[i]);
  }
  return v;
}

template <class O, class T>
struct NarrowVec {
  using Vector = typename LanesOf<O, T>::Vec;
  TCUR_TARGET static inline Vector from(Vec<T> v) {
    return __builtin_convertvector(v, Vector);
  }
};
template <class T>
struct NarrowVec<BFloat16, T> {
  using Vector = typename LanesOf<uint16_t, T>::Vec;
  TCUR_TARGET static inline Vector from(Vec<T> v) {
    using Bits = typename LanesOf<uint32_t, T>::Vec;
    const Bits bits = (Bits) __builtin_convertvector(v, typename LanesOf<float, T>::Vec);
    const Bits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const Bits kept = (bits & 0x7FFFFFFFu) > 0x7F800000u ? bits >> 16 : rounded;
    return __builtin_convertvector(kept, Vector);
  }
};
template <class T>
struct NarrowVec<Half, T> {
  using Vector = typename LanesOf<uint16_t, T>::Vec;
  TCUR_TARGET static inline Vector from(Vec<T> v) {
    Vector bits;
    for (int i = 0; i < Simd<T>::lanes; ++i) {
      bits[i] = Narrow<Half, T>::from(v[i]).x;
    }
    return bits;
  }
};

// Writes one vector to memory, rounded to O. STREAM writes it without caching, and needs an aligned
// target.
template <bool STREAM, class O, class T>
TCUR_TARGET inline void put(O* target, Vec<T> v) {
  using Vector = typename NarrowVec<O, T>::Vector;
  const Vector narrow = NarrowVec<O, T>::from(v);
  if constexpr (STREAM && sizeof(Vector) >= 8 && sizeof(Vector) <= TCUR_VECTOR_BYTES) {
    stream(target, narrow);
  } else {
    __builtin_memcpy(target, &narrow, sizeof(narrow));
  }
}

}  // namespace tcur::TCUR_ISA
