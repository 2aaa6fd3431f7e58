// Portable vectors of one instruction set. Included once per instruction set, by isa_*.cpp, which
// define TCUR_ISA (a namespace), TCUR_TARGET (a function attribute), TCUR_VECTOR_BYTES and
// TCUR_REGISTERS; so this header and the *_kernel.h beside it have no include guard. Everything in
// them lives in that namespace: the same inline function compiled for two instruction sets under
// one name would let the linker keep the wrong one.

namespace tcur::TCUR_ISA {

template <class T>
struct Simd {
  typedef T Vec __attribute__((vector_size(TCUR_VECTOR_BYTES)));
  static constexpr int lanes = TCUR_VECTOR_BYTES / sizeof(T);
};
template <class T>
using Vec = typename Simd<T>::Vec;

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

template <class T>
TCUR_TARGET inline T sum(Vec<T> v) {
  T total = 0;
  for (int i = 0; i < Simd<T>::lanes; ++i) {
    total += v[i];
  }
  return total;
}

}  // namespace tcur::TCUR_ISA
