// One warp multiplies small matrices on tensor cores, D [16, 8] += A [16, 8] B [8, 8]. It uses
// mma.sync.m16n8k8 in TF32, which every architecture from sm_80 on has.
//
// A lane holds, with g = lane/4 and t = lane%4,
//     A: (g, t) (g+8, t) (g, t+4) (g+8, t+4)    B: (t, g) (t+4, g)
//     D: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1)
//
// TF32 has 11 significant bits. Each operand is split into two parts: the nearest TF32, and the
// TF32 nearest to the rest. The split loses at most 2^-23 of the operand. A product is the sum of
// all four products of parts. The usual three (3xTF32) leave out up to 2^-22 of the product, twice
// the eps of fp32, which is too much when a sum is short. On request, operands are rounded to TF32
// or bf16 instead, and one product is enough.
#pragma once

#include "launch.h"

#include <cmath>
#include <cstring>

namespace tcur {

// The nearest TF32; NaN stays NaN.
TCUR_DEVICE float to_tf32(float x) {
#ifdef __CUDACC__
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
#else
  if (!std::isfinite(x)) {
    return x;
  }
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x1000U) & ~0x1FFFU;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
#endif
}

// The nearest bf16, ties to even. Every bf16 is also a TF32. NaN stays NaN.
TCUR_DEVICE float to_bf16(float x) {
  if (x != x) {
    return x;
  }
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7FFFU + ((bits >> 16) & 1U)) & 0xFFFF0000U;
  memcpy(&x, &bits, sizeof bits);
  return x;
}

// Precision of the operands of rank-r products: as exact as fp32, or rounded to TF32 or bf16. Sums
// are always fp32.
enum class Precision { ieee, tf32, bf16 };

// Calls f with the precision, which the compiler then knows: what rounds and multiplies is compiled
// for each, and does not decide again for every number.
template <class F>
TCUR_DEVICE void with_precision(Precision precision, F&& f) {
  if (precision == Precision::ieee) {
    f(Precision::ieee);
  } else if (precision == Precision::tf32) {
    f(Precision::tf32);
  } else {
    f(Precision::bf16);
  }
}

template <int N>
struct Fragment {
  float big[N], small[N];

  TCUR_DEVICE void set(int i, float x, Precision precision) {
    big[i] = precision == Precision::bf16 ? to_bf16(x) : to_tf32(x);
    small[i] = precision == Precision::ieee ? to_tf32(x - big[i]) : 0.0f;
  }
};
using FragmentA = Fragment<4>;
using FragmentB = Fragment<2>;

TCUR_DEVICE void multiply_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])),
        "r"(__float_as_uint(a[1])),
        "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])),
        "r"(__float_as_uint(b[1])));
#else
  multiply_on_host(a, b, d);
#endif
}

// d += a b. With `Precision::ieee`, the tensor cores sum the four products of one step, the
// smallest first, and an fp32 addition adds the step to d. Tensor cores truncate their sums, while
// fp32 additions round, and the difference shows in long sums (H. Ootomo, R. Yokota, 2022).
TCUR_DEVICE void multiply(
    float (&d)[4], const FragmentA& a, const FragmentB& b, Precision precision) {
  if (precision != Precision::ieee) {
    multiply_tf32(d, a.big, b.big);
    return;
  }
  float step[4] = {};
  multiply_tf32(step, a.small, b.small);
  multiply_tf32(step, a.small, b.big);
  multiply_tf32(step, a.big, b.small);
  multiply_tf32(step, a.big, b.big);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    d[i] += step[i];
  }
}

}  // namespace tcur
