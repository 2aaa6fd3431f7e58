// Real DFT along tubes whose length is a product of two short factors (DftFactors in tubes.h); the
// codelets of codelets.h transform both. Primes use two such transforms. The code works on one
// vector of tubes at a time. Between the two steps these are n3 vectors in the first-level cache,
// [inner, outer]: for every l0 the packed half spectrum over k1.
#pragma once

#include "../common/codelets.h"
#include "simd.h"

namespace tcur::TCUR_ISA {

// Rows of vectors, `step` elements apart.
template <class T>
struct Rows {
  T* data;
  int64_t step;

  TCUR_TARGET Vec<T> get(int64_t i) const {
    return load(data + i * step);
  }
  TCUR_TARGET void set(int64_t i, Vec<T> v) const {
    store(data + i * step, v);
  }
};

// Does `count` real transforms of length N. From one transform to the next, the rows lie in_apart
// and out_apart further on.
template <class T, bool INVERSE, int N>
TCUR_TARGET void real_rows(
    Rows<T> in, int64_t in_apart, Rows<T> out, int64_t out_apart, int64_t count) {
  for (; count > 0; --count, in.data += in_apart, out.data += out_apart) {
    Vec<T> x[N];
    static_for<N>([&](auto i) __attribute__((always_inline)) { x[i] = in.get(i); });
    if constexpr (INVERSE) {
      real_inverse<N, T>(x);
    } else {
      real_forward<N, T>(x);
    }
    static_for<N>([&](auto i) __attribute__((always_inline)) { out.set(i, x[i]); });
  }
}

// The pairs of planes of the bins outer * k2 + k1 (pair_plane in tubes.h), for k1 = 1, 2, … as
// next() goes on. Which of them are beyond n3/2 depends on k2 alone, so that it costs nothing at
// run time.
template <class T, int INNER>
struct PairRows {
  T* first;        // the pair of k2 = 0
  T* last;         // the pair of k2 = INNER-1, which lies before that of INNER-2
  int64_t apart;   // from a pair to the next
  int64_t planes;  // from a plane to the next

  TCUR_TARGET PairRows(const Rows<T>& all, int64_t n3, int64_t outer)
      : first(all.data + all.step),
        last(all.data + (2 * (n3 - outer * (INNER - 1)) - 3) * all.step),
        apart(2 * outer * all.step),
        planes(all.step) {
  }
  TCUR_TARGET static constexpr bool is_conjugate(int k2) {
    return 2 * k2 >= INNER;
  }
  TCUR_TARGET Rows<T> bin(int k2) const {
    return {is_conjugate(k2) ? last + (INNER - 1 - k2) * apart : first + k2 * apart, planes};
  }
  TCUR_TARGET void next() {
    first += 2 * planes;
    last -= 2 * planes;
  }
};

// The inner step: planes -> between (inverse) or back. It does k1 = 0 first, then the pairs, then
// k1 = outer/2 if outer is even.
template <class T, bool INVERSE, int INNER>
TCUR_TARGET void inner_rows(const TubeDft<T>& dft, Rows<T> planes, T* between) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t outer = dft.factors.outer;
  const Rows<T> middle{between, outer * lanes};  // row l0 of one k1
  {
    Vec<T> x[INNER];
    const auto plane = [&](int64_t i) { return first_plane(outer, i); };
    static_for<INNER>([&](auto i) __attribute__((always_inline)) {
      x[i] = INVERSE ? planes.get(plane(i)) : middle.get(i);
    });
    if constexpr (INVERSE) {
      real_inverse<INNER, T>(x);
    } else {
      real_forward<INNER, T>(x);
    }
    static_for<INNER>([&](auto i) __attribute__((always_inline)) {
      INVERSE ? middle.set(i, x[i]) : planes.set(plane(i), x[i]);
    });
  }
  const T* rotation = dft.rotations.data();
  PairRows<T, INNER> pair(planes, dft.n3, outer);
  for (int64_t k1 = 1; k1 <= pairs(outer); ++k1, rotation += 2 * INNER, pair.next()) {
    const Rows<T> reals{between + (2 * k1 - 1) * lanes, middle.step};
    const Rows<T> imaginaries{between + 2 * k1 * lanes, middle.step};
    Vec<T> re[INNER], im[INNER];
    if constexpr (INVERSE) {
      static_for<INNER>([&](auto k2) __attribute__((always_inline)) {
        const Rows<T> bin = pair.bin(k2);
        re[k2] = bin.get(0);
        im[k2] = pair.is_conjugate(k2) ? Vec<T>(-bin.get(1)) : bin.get(1);
      });
      complex_inverse<INNER, T>(re, im);
    }
    static_for<INNER>([&](auto l0) __attribute__((always_inline)) {
      const T cos = rotation[2 * l0], sin = rotation[2 * l0 + 1];
      if constexpr (INVERSE) {
        reals.set(l0, l0 == 0 ? re[0] : Vec<T>(cos * re[l0] - sin * im[l0]));
        imaginaries.set(l0, l0 == 0 ? im[0] : Vec<T>(cos * im[l0] + sin * re[l0]));
      } else {
        const Vec<T> x = reals.get(l0), y = imaginaries.get(l0);
        re[l0] = l0 == 0 ? x : Vec<T>(cos * x + sin * y);
        im[l0] = l0 == 0 ? y : Vec<T>(cos * y - sin * x);
      }
    });
    if constexpr (!INVERSE) {
      complex_inverse<INNER, T>(im, re);  // exchanging re and im: the forward transform
      static_for<INNER>([&](auto k2) __attribute__((always_inline)) {
        const Rows<T> bin = pair.bin(k2);
        bin.set(0, re[k2]);
        bin.set(1, pair.is_conjugate(k2) ? Vec<T>(-im[k2]) : im[k2]);
      });
    }
  }
  if (outer % 2 == 0) {
    const Rows<T> last{between + (outer - 1) * lanes, middle.step};
    Vec<T> x[INNER];
    const auto plane = [&](int64_t i) { return last_plane<int64_t>(outer, i); };
    static_for<INNER>([&](auto i) __attribute__((always_inline)) {
      x[i] = INVERSE ? planes.get(plane(i)) : last.get(i);
    });
    if constexpr (INVERSE) {
      shifted_inverse<INNER, T>(x);
    } else {
      shifted_forward<INNER, T>(x);
    }
    static_for<INNER>([&](auto i) __attribute__((always_inline)) {
      INVERSE ? last.set(i, x[i]) : planes.set(plane(i), x[i]);
    });
  }
}

template <class T>
using RealRows = void (*)(Rows<T>, int64_t, Rows<T>, int64_t, int64_t);
template <class T>
using InnerRows = void (*)(const TubeDft<T>&, Rows<T>, T*);

template <class T, bool INVERSE, int... I>
RealRows<T> real_rows_for(int64_t length, std::integer_sequence<int, I...>) {
  static constexpr RealRows<T> all[] = {&real_rows<T, INVERSE, I + 1>...};
  return all[length - 1];
}

template <class T, bool INVERSE, int... I>
InnerRows<T> inner_rows_for(int64_t length, std::integer_sequence<int, I...>) {
  static constexpr InnerRows<T> all[] = {&inner_rows<T, INVERSE, I + 2>...};
  return all[length - 2];
}

template <class T>
TCUR_TARGET void inverse_by_factors(
    const TubeDft<T>& dft,
    T* planes,
    int64_t plane_stride,
    T* tubes,
    int64_t tube_stride,
    int64_t width) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t outer = dft.factors.outer, inner = dft.factors.inner;
  const auto outer_step =
      real_rows_for<T, true>(outer, std::make_integer_sequence<int, kLongestOuter>{});
  if (inner == 1) {
    outer_step({planes, plane_stride}, lanes, {tubes, tube_stride}, lanes, width / lanes);
    return;
  }
  const auto inner_step =
      inner_rows_for<T, true>(inner, std::make_integer_sequence<int, kLongestInner - 1>{});
  alignas(64) T between[kLongestOuter * kLongestInner * lanes];
  for (int64_t c = 0; c < width; c += lanes) {
    inner_step(dft, {planes + c, plane_stride}, between);
    const Rows<T> out{tubes + c, inner * tube_stride};
    outer_step({between, lanes}, outer * lanes, out, tube_stride, inner);
  }
}

template <class T>
TCUR_TARGET void forward_by_factors(
    const TubeDft<T>& dft,
    T* tubes,
    int64_t tube_stride,
    T* planes,
    int64_t plane_stride,
    int64_t width) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t outer = dft.factors.outer, inner = dft.factors.inner;
  const auto outer_step =
      real_rows_for<T, false>(outer, std::make_integer_sequence<int, kLongestOuter>{});
  if (inner == 1) {
    outer_step({tubes, tube_stride}, lanes, {planes, plane_stride}, lanes, width / lanes);
    return;
  }
  const auto inner_step =
      inner_rows_for<T, false>(inner, std::make_integer_sequence<int, kLongestInner - 1>{});
  alignas(64) T between[kLongestOuter * kLongestInner * lanes];
  for (int64_t c = 0; c < width; c += lanes) {
    const Rows<T> in{tubes + c, inner * tube_stride};
    outer_step(in, tube_stride, {between, lanes}, outer * lanes, inner);
    inner_step(dft, {planes + c, plane_stride}, between);
  }
}

// Transforms one vector of tubes of prime length: planes to values (inverse), or values to planes.
template <class T, bool INVERSE>
TCUR_TARGET inline void convolve_rows(const TubeDft<T>& dft, Rows<T> in, Rows<T> out) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t length = dft.n3 - 1, half = length / 2;
  const TubeDft<T>& by = *dft.convolution;
  alignas(64) T first[kLongestOuter * kLongestInner * lanes];
  alignas(64) T second[kLongestOuter * kLongestInner * lanes];
  const Rows<T> values{first, lanes}, bins{second, lanes};

  // The residues g^q and g^(q + half) are each other's negative.
  for (int64_t q = 0; q < half; ++q) {
    const int64_t k = dft.order[q], negative = dft.order[q + half];
    if (INVERSE) {
      const int64_t plane = 2 * (k < negative ? k : negative) - 1;
      const Vec<T> re = in.get(plane), im = in.get(plane + 1);
      values.set(k < negative ? q : q + half, re + im);
      values.set(k < negative ? q + half : q, re - im);
    } else {
      values.set(q, in.get(k));
      values.set(q + half, in.get(negative));
    }
  }
  forward_by_factors(by, first, lanes, second, lanes, lanes);
  const Vec<T> zero = in.get(0), sum = bins.get(0);
  out.set(0, Vec<T>(zero + (INVERSE ? T(0.5) : T(1)) * sum));
  const T* kernel = dft.kernel.data();
  bins.set(0, Vec<T>(kernel[0] * sum));
  for (int64_t plane = 1; plane < length - 1; plane += 2) {
    const Vec<T> re = bins.get(plane), im = bins.get(plane + 1);
    const T kernel_re = kernel[plane], kernel_im = kernel[plane + 1];
    bins.set(plane, Vec<T>(kernel_re * re - kernel_im * im));
    bins.set(plane + 1, Vec<T>(kernel_re * im + kernel_im * re));
  }
  bins.set(length - 1, Vec<T>(kernel[length - 1] * bins.get(length - 1)));
  inverse_by_factors(by, second, lanes, first, lanes, lanes);
  for (int64_t m = 0; m < half; ++m) {
    const int64_t k = dft.order[m == 0 ? 0 : length - m], negative = dft.n3 - k;
    const Vec<T> here = values.get(m), there = values.get(m + half);
    if (INVERSE) {
      out.set(k, zero + here);
      out.set(negative, zero + there);
    } else {
      const int64_t plane = 2 * (k < negative ? k : negative) - 1;
      out.set(plane, zero + (here + there));
      out.set(plane + 1, k < negative ? Vec<T>(here - there) : Vec<T>(there - here));
    }
  }
}

template <class T, bool INVERSE>
TCUR_TARGET void by_convolution(
    const TubeDft<T>& dft, T* in, int64_t in_stride, T* out, int64_t out_stride, int64_t width) {
  for (int64_t c = 0; c < width; c += Simd<T>::lanes) {
    convolve_rows<T, INVERSE>(dft, {in + c, in_stride}, {out + c, out_stride});
  }
}

}  // namespace tcur::TCUR_ISA
