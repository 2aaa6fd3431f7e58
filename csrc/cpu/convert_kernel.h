// Element types in memory against the type of the arithmetic. The 16-bit conversions are written on
// integers so that every compiler vectorises them; rounding is to nearest even, and NaN stays NaN.

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
    const uint32_t quiet = (bits >> 16) | 0x40u;
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    return BFloat16(static_cast<uint16_t>(nan ? quiet : rounded), BFloat16::from_bits());
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

// target[0 … n) = values[0 … n) + base[0 … n); one pass, one rounding.
template <class T, class S, class O>
TCUR_TARGET inline void add_row(const S* base, const T* values, O* target, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    target[j] = Narrow<O, T>::from(widen<T>(base[j]) + values[j]);
  }
}

// target[0 … n) = values[0 … n)
template <class T, class O>
TCUR_TARGET inline void store_row(const T* values, O* target, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    target[j] = Narrow<O, T>::from(values[j]);
  }
}

}  // namespace tcur::TCUR_ISA
