// Real DFT along the tubes of a tile in shared memory, for lengths that are a product of two short
// factors (DftFactors in tubes.h). The codelets of codelets.h transform both factors in registers.
//
// The rows of a tile are its packed planes. For each k1, the inner step replaces the planes of the
// bins outer * k2 + k1 by as many middle planes, one or a pair for each l0. The outer step turns
// the middle planes of one l0 into the slices inner * l1 + l0, or back. A thread does the outer
// step for four positions, between shared memory and device memory, so shared memory never holds a
// slice. Lengths up to kLongestOuter have no inner step.
#pragma once

#include "../common/codelets.h"
#include "lanes.h"
#include "spectrum.h"

namespace tcur {

template <int OUTER, int INNER>
constexpr bool are_factors = dft_factors(OUTER * INNER).outer == OUTER;

// For one l0, the middle planes are a packed half spectrum over k1. Calls f(j, row) for each of
// its numbers: number j is in `row`.
//
// The pairs are those of the bins OUTER * l0 + 1, OUTER * l0 + 2, …, of which all lie before n3/2
// or all behind it. So the rows go up from the first one, or down, and their distances are
// constants.
template <int OUTER, class F>
TCUR_DEVICE void for_middle_rows(int n3, int l0, F&& f) {
  constexpr int kPairs = (OUTER - 1) / 2;
  const unsigned number = l0, outer = OUTER;  // unsigned numbers are halved by one shift
  f(0, static_cast<int>(first_plane(outer, number)));
  const int pair = pair_plane(n3, OUTER * l0 + 1);
  if (2 * OUTER * l0 < n3) {
    static_for<kPairs>([&](auto k) __attribute__((always_inline)) {
      f(2 * k + 1, pair + 2 * k);
      f(2 * k + 2, pair + 2 * k + 1);
    });
  } else {
    static_for<kPairs>([&](auto k) __attribute__((always_inline)) {
      f(2 * k + 1, pair - 2 * k);
      f(2 * k + 2, pair - 2 * k + 1);
    });
  }
  if constexpr (OUTER % 2 == 0) {
    f(OUTER - 1, static_cast<int>(last_plane(outer, number)));
  }
}

// Does the inner step in place, for one k1 and the W positions at `column`.
template <bool INVERSE, int INNER, int W>
TCUR_DEVICE void inner_step(float* column, int stride, int k1, const Tables& tables) {
  using V = Lanes<W>;
  const int n3 = tables.n3, outer = n3 / INNER;
  const auto get = [&](int plane) __attribute__((always_inline)) {
    return load_lanes<W>(column + plane * stride);
  };
  const auto set = [&](int plane, const V& x)
                       __attribute__((always_inline)) { store_lanes(column + plane * stride, x); };
  if (k1 == 0 || 2 * k1 == outer) {
    const auto plane = [&](int i) __attribute__((always_inline)) {
      return k1 == 0 ? first_plane(outer, i) : last_plane(outer, i);
    };
    V x[INNER];
    static_for<INNER>([&](auto i) __attribute__((always_inline)) { x[i] = get(plane(i)); });
    if (k1 == 0) {
      INVERSE ? real_inverse<INNER, float>(x) : real_forward<INNER, float>(x);
    } else {
      INVERSE ? shifted_inverse<INNER, float>(x) : shifted_forward<INNER, float>(x);
    }
    static_for<INNER>([&](auto i) __attribute__((always_inline)) { set(plane(i), x[i]); });
    return;
  }
  const auto plane = [&](int k2)
                         __attribute__((always_inline)) { return pair_plane(n3, outer * k2 + k1); };
  V re[INNER], im[INNER];
  static_for<INNER>([&](auto i) __attribute__((always_inline)) {
    const int at = plane(i);
    re[i] = get(at);
    im[i] = get(at + 1);
  });
  if constexpr (INVERSE) {
    static_for<INNER>([&](auto k2) __attribute__((always_inline)) {
      im[k2] = 2 * k2 >= INNER ? -im[k2] : im[k2];
    });
    complex_inverse<INNER, float>(re, im);
  }
  static_for<INNER - 1>([&](auto i) __attribute__((always_inline)) {
    constexpr int l0 = i + 1;
    const float2 root = tables.root(k1 * l0);
    const float sin = INVERSE ? root.y : -root.y;
    const V x = re[l0], y = im[l0];
    re[l0] = root.x * x - sin * y;
    im[l0] = root.x * y + sin * x;
  });
  if constexpr (!INVERSE) {
    complex_inverse<INNER, float>(im, re);  // exchanging re and im makes it the forward transform
    static_for<INNER>([&](auto k2) __attribute__((always_inline)) {
      im[k2] = 2 * k2 >= INNER ? -im[k2] : im[k2];
    });
  }
  static_for<INNER>([&](auto i) __attribute__((always_inline)) {
    const int at = plane(i);
    set(at, re[i]);
    set(at + 1, im[i]);
  });
}

// Does the inner step on a whole tile, with all threads of the block. The caller needs a barrier
// before, so that the rows are complete, and one after.
template <bool INVERSE, int OUTER>
TCUR_DEVICE void inner_steps(float* rows, int positions, const Tables& tables) {
  static_for<kLongestInner - 1>([&](auto which) __attribute__((always_inline)) {
    constexpr int INNER = which + 2, W = INNER > 6 ? 1 : 2;  // W: as registers allow
    if constexpr (are_factors<OUTER, INNER>) {
      if (tables.n3 == OUTER * INNER) {
        const int width = positions / W;
        for (int i = threadIdx.x; i < (OUTER / 2 + 1) * width; i += blockDim.x) {
          const int k1 = i / width;
          inner_step<INVERSE, INNER, W>(rows + W * (i - k1 * width), positions, k1, tables);
        }
      }
    }
  });
}

}  // namespace tcur
