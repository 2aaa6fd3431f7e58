// Packed half spectra of real tubes, and the tables of their discrete Fourier transforms.
//
// A tube x_0 … x_{n3-1} has the half spectrum x̂_k = Σ_l x_l e^{-2πikl/n3}, k = 0 … n3/2. Bin 0, and
// bin n3/2 if n3 is even, are real; every other bin is a (re, im) pair. That makes exactly n3
// real planes, stored in the order
//
//     0: x̂_0    2k-1: Re x̂_k    2k: Im x̂_k    (1 <= k <= pairs(n3))    n3-1: x̂_{n3/2}, n3 even
//
// A packed spectrum therefore takes exactly the space of its tensor, and no complex number leaves a
// kernel. The inverse transform weights each pair by 2/n3 and each real bin by 1/n3.
#pragma once

#include "host_device.h"

#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

namespace tcur {

constexpr double kPi = 3.14159265358979323846;

// Number of (re, im) pairs in the half spectrum of a tube of length n3.
TCUR_HOST_DEVICE inline int64_t pairs(int64_t n3) {
  return (n3 - 1) / 2;
}

// Whether a bin, 0 … n3/2, is such a pair; the plane where a bin begins; and the bin of a plane.
template <class Int>
TCUR_HOST_DEVICE constexpr bool is_pair(Int bin, Int n3) {
  return bin > 0 && 2 * bin < n3;
}
template <class Int>
TCUR_HOST_DEVICE constexpr Int plane_of(Int bin) {
  return bin == 0 ? 0 : 2 * bin - 1;
}
template <class Int>
TCUR_HOST_DEVICE constexpr Int bin_of(Int plane) {
  return (plane + 1) / 2;
}
// Whether a plane is a real bin of its own, 0 or n3/2.
template <class Int>
TCUR_HOST_DEVICE constexpr bool is_real_plane(Int plane, Int n3) {
  return plane == 0 || (n3 % 2 == 0 && plane == n3 - 1);
}

// Iterates over the bins in order: for (Bin bin(n3); bin.is_there(); bin.next()).
struct Bin {
  int64_t n3, plane = 0;  // plane: the first one of the bin
  bool is_pair = false;

  explicit Bin(int64_t n3) : n3(n3) {
  }
  bool is_there() const {
    return plane < n3;
  }
  int64_t planes() const {
    return is_pair ? 2 : 1;
  }
  void next() {
    plane += planes();
    is_pair = plane <= 2 * pairs(n3);
  }
};

// Weight of a packed plane in the inverse transform: how often its bin occurs in the full spectrum,
// over n3.
TCUR_HOST_DEVICE inline double inverse_weight(int64_t plane, int64_t n3) {
  return (is_real_plane(plane, n3) ? 1.0 : 2.0) / static_cast<double>(n3);
}

// cos and sin of 2πm/n3. m is first reduced modulo n3, which is exact, so the error is one rounding
// for every product kl.
class UnitRoots {
 public:
  explicit UnitRoots(int64_t n3) : n3_(n3), cos_(n3), sin_(n3) {
    const double step = 2.0 * kPi / static_cast<double>(n3);
    for (int64_t m = 0; m < n3; ++m) {
      cos_[m] = std::cos(step * static_cast<double>(m));
      sin_[m] = std::sin(step * static_cast<double>(m));
    }
  }
  double cos(int64_t m) const {
    return cos_[m % n3_];
  }
  double sin(int64_t m) const {
    return sin_[m % n3_];
  }

 private:
  int64_t n3_;
  std::vector<double> cos_, sin_;
};

// One step of the folded transform of a tube of some length. With half = length/2, rounded down,
// the inverse transform is x_l = E_l - O_l, x_{length-l} = E_l + O_l, where
//
//     E_l = Σ_{k=0}^{half} cos(2πkl/length) A_k    O_l = Σ_k sin(2πkl/length) B_k    l = 0 … half
//
// The forward transform is the same two sums over A_l = x_l + x_{length-l}, B_l = x_l -
// x_{length-l}. For an even length, the rows k and half-k have equal cosines at even l and opposite
// cosines at odd l; for sines it is the other way round. Sums and differences of the two rows
// therefore turn the even l into a transform of half the length, and the odd l into products of
// half the size. A level does the multiplications that remain: the odd l of an even length, or all
// l of an odd length, where the halving ends. All levels together take about n3/6 multiplications
// per output for a power of two, and n3/2 for a prime.
struct DftShape {
  int64_t length, half, step;  // step: frequency l of this length is step * l of n3; 1, 2, 4, …
  int64_t outputs;             // pairs (l, n3-l); l = step * frequency(i), i = 0 … outputs-1
  int64_t size;                // rows of A and of B that are multiplied by a table

  bool is_even() const {
    return length % 2 == 0;
  }
  int64_t frequency(int64_t i) const {
    return is_even() ? 2 * i + 1 : i + 1;
  }
};

inline DftShape dft_shape(int64_t length, int64_t step) {
  const int64_t half = length / 2;
  if (length % 2 != 0) {
    return {length, half, step, half, half};
  }
  // Odd l < half, from the differences of rows k and half-k, without those of k = 0.
  return {length, half, step, half / 2, (half + 1) / 2 - 1};
}

// A level with its tables.
template <class T>
struct DftLevel : DftShape {
  std::vector<T> cos, sin;  // [outputs, size]
};

// A length of two factors is transformed in two steps. outer * inner = n3, and both are short
// enough for codelets.h. Bins are k = outer * k2 + k1 and values are l = inner * l1 + l0. In the
// inverse transform, the inner step does a complex transform over k2 for every k1, and a rotation
// by e^{2πi k1 l0/n3}. Then the outer step does a real transform over k1 for every l0.
struct DftFactors {
  int64_t outer = 0, inner = 0;  // 0: none
};

constexpr int64_t kLongestOuter = 16, kLongestInner = 9;

// Chooses the smallest inner factor that leaves a short outer one. For lengths up to kLongestOuter
// it is 1.
TCUR_HOST_DEVICE constexpr DftFactors dft_factors(int64_t n3) {
  for (int64_t inner = 1; inner <= kLongestInner; ++inner) {
    if (n3 % inner == 0 && n3 / inner <= kLongestOuter) {
      return {n3 / inner, inner};
    }
  }
  return {};
}

// The next three functions give the planes of the bins outer * k2 + k1, k2 = 0 … inner-1.
//
// For k1 = 0 they are the packed half spectrum of a tube of length inner. This is the plane of its
// number i.
template <class Int>
TCUR_HOST_DEVICE constexpr Int first_plane(Int outer, Int i) {
  return (i + 1) / 2 * (2 * outer) - i % 2;
}
// For k1 = outer/2 they are pairs, and for an odd inner also the real bin n3/2. This is the plane
// of number i.
template <class Int>
TCUR_HOST_DEVICE constexpr Int last_plane(Int outer, Int i) {
  return (i / 2 * 2 + 1) * outer - 1 + i % 2;
}
// For any other k1 they are pairs. This is the plane of the real part of a bin. A bin beyond n3/2,
// which means 2 * k2 >= inner, is stored as n3 - bin, conjugate.
template <class Int>
TCUR_HOST_DEVICE constexpr Int pair_plane(Int n3, Int bin) {
  return 2 * (2 * bin < n3 ? bin : n3 - bin) - 1;
}

inline bool is_prime(int64_t n) {
  for (int64_t d = 2; d * d <= n; ++d) {
    if (n % d == 0) {
      return false;
    }
  }
  return n > 1;
}

// The smallest generator of the nonzero residues of an odd prime.
inline int64_t generator_of(int64_t p) {
  for (int64_t g = 2;; ++g) {
    int64_t order = 1;
    for (int64_t power = g; power > 1; power = power * g % p) {
      ++order;
    }
    if (order == p - 1) {
      return g;
    }
  }
}

// From this prime on, a convolution is faster than a table.
constexpr int64_t kShortestConvolution = 67;

// The transform of tubes of length n3. If n3 has two short factors, it uses them. If n3 is a prime
// and n3 - 1 has two short factors, it is a convolution of length n3 - 1. Otherwise it uses levels.
//
// The convolution (C. M. Rader, 1968) for real tubes: with z_k = Re x̂_k + Im x̂_k, both transforms
// are Σ_k z_k (cos - sin)(2πkl/n3). With k = g^q, l = g^-m for a generator g of the nonzero
// residues, that is the cyclic convolution of z with (cos - sin)(2π g^-j/n3).
template <class T>
struct TubeDft {
  int64_t n3;
  DftFactors factors;
  std::vector<T> rotations;              // [pairs(outer), inner, 2]: cos and sin of 2π k1 l0/n3
  std::unique_ptr<TubeDft> convolution;  // of length n3 - 1
  std::vector<int64_t> order;            // g^q, q = 0 … n3-2
  std::vector<T> kernel;                 // packed spectrum of half the kernel, weighted
  std::vector<DftLevel<T>> levels;       // even lengths first, the odd rest last

  explicit TubeDft(int64_t n3) : n3(n3), factors(dft_factors(n3)) {
    if (factors.outer > 0) {
      rotate();
    } else if (n3 >= kShortestConvolution && is_prime(n3) && dft_factors(n3 - 1).outer > 0) {
      convolve();
    } else {
      fold();
    }
  }

 private:
  void rotate() {
    const UnitRoots roots(n3);
    for (int64_t k = 1; k <= pairs(factors.outer); ++k) {
      for (int64_t l = 0; l < factors.inner; ++l) {
        rotations.push_back(static_cast<T>(roots.cos(k * l)));
        rotations.push_back(static_cast<T>(roots.sin(k * l)));
      }
    }
  }

  void convolve() {
    const int64_t length = n3 - 1, generator = generator_of(n3);
    convolution = std::make_unique<TubeDft>(length);
    const UnitRoots roots(n3), bins(length);
    for (int64_t q = 0, power = 1; q < length; ++q, power = power * generator % n3) {
      order.push_back(power);
    }
    kernel.resize(length);
    for (int64_t bin = 0; bin <= length / 2; ++bin) {
      double re = 0, im = 0;
      for (int64_t j = 0, at = 0; j < length; ++j, at = (at + bin) % length) {
        const int64_t power = order[j == 0 ? 0 : length - j];
        const double value = roots.cos(power) - roots.sin(power);
        re += value * bins.cos(at);
        im -= value * bins.sin(at);
      }
      const int64_t plane = plane_of(bin);
      const double weight = inverse_weight(plane, length) / 2;
      kernel[plane] = static_cast<T>(weight * re);
      if (bin > 0 && plane + 1 < length) {
        kernel[plane + 1] = static_cast<T>(weight * im);
      }
    }
  }

  void fold() {
    for (int64_t length = n3, step = 1;; length /= 2, step *= 2) {
      levels.push_back(level(length, step));
      if (length % 2 != 0) {
        return;
      }
    }
  }

  static DftLevel<T> level(int64_t length, int64_t step) {
    DftLevel<T> made{dft_shape(length, step), {}, {}};
    const UnitRoots roots(length);
    for (int64_t i = 0; i < made.outputs; ++i) {
      for (int64_t k = 1; k <= made.size; ++k) {
        made.cos.push_back(static_cast<T>(roots.cos(k * made.frequency(i))));
        made.sin.push_back(static_cast<T>(roots.sin(k * made.frequency(i))));
      }
    }
    return made;
  }
};

}  // namespace tcur
