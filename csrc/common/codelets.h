// Discrete Fourier transforms of short length, as straight-line code in registers. Templates
// generate the code from the length. V is the type of what is transformed, a number or a vector of
// T. The compiler computes the constants, and the code leaves out products with 0 and ±1.
//
// All transforms use two sums, Σ_k cos(2πkl/N) a_k and Σ_k sin(2πkl/N) b_k. For even N, these split
// into sums of half the length (even l) and products of half the size (odd l).
#pragma once

#include "tubes.h"

#include <utility>

// Always inline, so that the caller decides for which instruction set they are compiled.
#define TCUR_CODELET TCUR_HOST_DEVICE inline __attribute__((always_inline))

namespace tcur {

// cos and sin of 2πm/n at compile time, from the series around the nearest axis, which is at most
// an eighth of the circle away.
TCUR_HOST_DEVICE constexpr double series(double x, int first) {
  double term = first == 0 ? 1 : x, total = term;
  for (int i = first + 1; i < 24; i += 2) {
    term *= -x * x / (i * (i + 1));
    total += term;
  }
  return total;
}

TCUR_HOST_DEVICE constexpr double unit_cos(int m, int n) {
  m = (m % n + n) % n;
  const int quarter = (4 * m + n / 2) / n;  // number of the axis nearest to 2πm/n
  const double x = 2 * kPi * (4 * m - quarter * n) / (4.0 * n);
  const double axis[4] = {series(x, 0), -series(x, 1), -series(x, 0), series(x, 1)};
  return axis[quarter % 4];
}

TCUR_HOST_DEVICE constexpr double unit_sin(int m, int n) {
  return unit_cos(4 * m - n, 4 * n);
}

// An integer in a type, like std::integral_constant, that also works on the device.
template <int I>
struct Constant {
  TCUR_HOST_DEVICE constexpr operator int() const {
    return I;
  }
};

// Calls f(0) … f(N-1), each with its index as a constant.
template <class F, int... I>
TCUR_CODELET void static_for(F&& f, std::integer_sequence<int, I...>) {
  (f(Constant<I>{}), ...);
}
template <int N, class F>
TCUR_CODELET void static_for(F&& f) {
  static_for(f, std::make_integer_sequence<int, N>{});
}

// A linear combination that is built one term at a time.
template <class T, class V>
struct Combination {
  V value;

  template <int NUMERATOR, int DENOMINATOR>  // += cos(2π NUMERATOR/DENOMINATOR) x
  TCUR_CODELET void add_cos(const V& x) {
    constexpr double c = unit_cos(NUMERATOR, DENOMINATOR);
    constexpr double size = c < 0 ? -c : c;
    if constexpr (size > 1 - 1e-12) {
      value = c > 0 ? V(value + x) : V(value - x);
    } else if constexpr (size > 1e-12) {
      value = value + T(c) * x;
    }
  }
};

// e[l] = Σ_{k=0}^{N/2} cos(2πkl/N) a[k], l = 0 … N/2
template <int N, class T, class V>
TCUR_CODELET void cosine_sums(const V (&a)[N / 2 + 1], V (&e)[N / 2 + 1]) {
  constexpr int half = N / 2;
  if constexpr (N == 1) {
    e[0] = a[0];
  } else if constexpr (N % 2 != 0) {
    static_for<half + 1>([&](auto l) __attribute__((always_inline)) {
      Combination<T, V> sum{a[0]};
      static_for<half>([&](auto k) __attribute__((always_inline)) {
        sum.template add_cos<(k + 1) * l, N>(a[k + 1]);
      });
      e[l] = sum.value;
    });
  } else {
    constexpr int folded = (half + 1) / 2;  // pairs (k, half-k)
    V sums[half / 2 + 1], even[half / 2 + 1];
    V differences[folded];
    static_for<folded>([&](auto k) __attribute__((always_inline)) {
      sums[k] = a[k] + a[half - k];
      differences[k] = a[k] - a[half - k];
    });
    if constexpr (half % 2 == 0) {
      sums[half / 2] = a[half / 2];
    }
    cosine_sums<half, T, V>(sums, even);
    static_for<half + 1>([&](auto l) __attribute__((always_inline)) {
      if constexpr (l % 2 == 0) {
        e[l] = even[l / 2];
      } else {
        Combination<T, V> sum{differences[0]};
        static_for<folded - 1>([&](auto k) __attribute__((always_inline)) {
          sum.template add_cos<(k + 1) * l, N>(differences[k + 1]);
        });
        e[l] = sum.value;
      }
    });
  }
}

// o[l] = Σ_k sin(2πkl/N) b[k], both 1 … (N-1)/2
template <int N, class T, class V>
TCUR_CODELET void sine_sums(const V (&b)[N / 2 + 1], V (&o)[N / 2 + 1]) {
  constexpr int half = N / 2, last = (N - 1) / 2;
  if constexpr (N % 2 != 0) {
    static_for<last>([&](auto i) __attribute__((always_inline)) {
      constexpr int l = i + 1;
      Combination<T, V> sum{V(T(unit_sin(l, N)) * b[1])};
      static_for<last - 1>([&](auto k) __attribute__((always_inline)) {
        sum.template add_cos<4 * (k + 2) * l - N, 4 * N>(b[k + 2]);
      });
      o[l] = sum.value;
    });
  } else if constexpr (half > 1) {
    constexpr int folded = (half - 1) / 2;  // pairs (k, half-k)
    V sums[half / 2 + 1], differences[half / 2 + 1], even[half / 2 + 1];
    static_for<folded>([&](auto i) __attribute__((always_inline)) {
      constexpr int k = i + 1;
      sums[k] = b[k] + b[half - k];
      differences[k] = b[k] - b[half - k];
    });
    if constexpr (half % 2 == 0) {
      sums[half / 2] = b[half / 2];
    }
    sine_sums<half, T, V>(differences, even);
    static_for<last>([&](auto i) __attribute__((always_inline)) {
      constexpr int l = i + 1;
      if constexpr (l % 2 == 0) {
        o[l] = even[l / 2];
      } else {
        constexpr double first = unit_sin(l, N);
        Combination<T, V> sum{first > 1 - 1e-12 ? sums[1] : V(T(first) * sums[1])};
        static_for<half / 2 - 1>([&](auto k) __attribute__((always_inline)) {
          sum.template add_cos<4 * (k + 2) * l - N, 4 * N>(sums[k + 2]);
        });
        o[l] = sum.value;
      }
    });
  }
}

// Turns a packed half spectrum, weighted as tubes.h says, into its tube.
template <int N, class T, class V>
TCUR_CODELET void real_inverse(V (&x)[N]) {
  constexpr int half = N / 2, last = (N - 1) / 2;
  V a[half + 1], b[half + 1], e[half + 1], o[half + 1];
  a[0] = x[0];
  static_for<last>([&](auto k) __attribute__((always_inline)) {
    a[k + 1] = x[2 * k + 1];
    b[k + 1] = x[2 * k + 2];
  });
  if constexpr (N % 2 == 0) {
    a[half] = x[N - 1];
  }
  cosine_sums<N, T, V>(a, e);
  sine_sums<N, T, V>(b, o);
  x[0] = e[0];
  static_for<last>([&](auto l) __attribute__((always_inline)) {
    x[l + 1] = e[l + 1] - o[l + 1];
    x[N - 1 - l] = e[l + 1] + o[l + 1];
  });
  if constexpr (N % 2 == 0) {
    x[half] = e[half];
  }
}

// The sums of a sequence: e[l] = Σ_k cos(2πkl/N) x[k], o[l] = Σ_k sin(2πkl/N) x[k], all k.
template <int N, class T, class V>
TCUR_CODELET void folded_sums(const V (&x)[N], V (&e)[N / 2 + 1], V (&o)[N / 2 + 1]) {
  constexpr int half = N / 2, last = (N - 1) / 2;
  V a[half + 1], b[half + 1];
  a[0] = x[0];
  static_for<last>([&](auto k) __attribute__((always_inline)) {
    a[k + 1] = x[k + 1] + x[N - 1 - k];
    b[k + 1] = x[k + 1] - x[N - 1 - k];
  });
  if constexpr (N % 2 == 0) {
    a[half] = x[half];
  }
  cosine_sums<N, T, V>(a, e);
  sine_sums<N, T, V>(b, o);
}

// Turns a tube into its packed half spectrum.
template <int N, class T, class V>
TCUR_CODELET void real_forward(V (&x)[N]) {
  constexpr int half = N / 2, last = (N - 1) / 2;
  V e[half + 1], o[half + 1];
  folded_sums<N, T, V>(x, e, o);
  x[0] = e[0];
  static_for<last>([&](auto k) __attribute__((always_inline)) {
    x[2 * k + 1] = e[k + 1];
    x[2 * k + 2] = -o[k + 1];
  });
  if constexpr (N % 2 == 0) {
    x[N - 1] = e[half];
  }
}

// Complex transform y_l = Σ_k x_k e^{2πikl/N}. With re and im exchanged, it is the transform with
// e^{-2πikl/N}.
template <int N, class T, class V>
TCUR_CODELET void complex_inverse(V (&re)[N], V (&im)[N]) {
  constexpr int half = N / 2, last = (N - 1) / 2;
  V e_re[half + 1], o_re[half + 1], e_im[half + 1], o_im[half + 1];
  folded_sums<N, T, V>(re, e_re, o_re);
  folded_sums<N, T, V>(im, e_im, o_im);
  re[0] = e_re[0];
  im[0] = e_im[0];
  static_for<last>([&](auto l) __attribute__((always_inline)) {
    re[l + 1] = e_re[l + 1] - o_im[l + 1];
    im[l + 1] = e_im[l + 1] + o_re[l + 1];
    re[N - 1 - l] = e_re[l + 1] + o_im[l + 1];
    im[N - 1 - l] = e_im[l + 1] - o_re[l + 1];
  });
  if constexpr (N % 2 == 0) {
    re[half] = e_re[half];
    im[half] = e_im[half];
  }
}

// Computes the real tube of bins that lie halfway between those of real_inverse. x holds N/2 pairs
// (re, im), and for odd N one real bin: y_l = Σ_k re_k cos(π(2k+1)l/N) - im_k sin(π(2k+1)l/N).
template <int N, class T, class V>
TCUR_CODELET void shifted_inverse(V (&x)[N]) {
  constexpr int half = N / 2;
  V y[N];
  static_for<half + 1>([&](auto l) __attribute__((always_inline)) {
    Combination<T, V> even{V{}}, odd{V{}};
    static_for<half>([&](auto k) __attribute__((always_inline)) {
      even.template add_cos<(2 * k + 1) * l, 2 * N>(x[2 * k]);
      odd.template add_cos<2 * (2 * k + 1) * l - N, 4 * N>(x[2 * k + 1]);
    });
    if constexpr (N % 2 != 0) {
      even.template add_cos<N * l, 2 * N>(x[N - 1]);
    }
    y[l] = even.value - odd.value;
    if constexpr (l > 0 && 2 * l < N) {
      y[N - l] = -even.value - odd.value;
    }
  });
  static_for<N>([&](auto l) __attribute__((always_inline)) { x[l] = y[l]; });
}

// The transpose of shifted_inverse:
// re_k = Σ_l cos(π(2k+1)l/N) x_l, im_k = -Σ_l sin(π(2k+1)l/N) x_l.
template <int N, class T, class V>
TCUR_CODELET void shifted_forward(V (&x)[N]) {
  constexpr int half = N / 2, last = (N - 1) / 2;
  V differences[half + 1], sums[half + 1], y[N];
  static_for<last>([&](auto l) __attribute__((always_inline)) {
    differences[l + 1] = x[l + 1] - x[N - 1 - l];
    sums[l + 1] = x[l + 1] + x[N - 1 - l];
  });
  if constexpr (N % 2 == 0) {
    differences[half] = sums[half] = x[half];
  }
  static_for<(N + 1) / 2>([&](auto k) __attribute__((always_inline)) {
    Combination<T, V> even{x[0]}, odd{V{}};
    static_for<half>([&](auto l) __attribute__((always_inline)) {
      even.template add_cos<(2 * k + 1) * (l + 1), 2 * N>(differences[l + 1]);
      odd.template add_cos<2 * (2 * k + 1) * (l + 1) - N, 4 * N>(sums[l + 1]);
    });
    y[2 * k] = even.value;
    if constexpr (2 * k + 1 < N) {
      y[2 * k + 1] = -odd.value;
    }
  });
  static_for<N>([&](auto k) __attribute__((always_inline)) { x[k] = y[k]; });
}

}  // namespace tcur
