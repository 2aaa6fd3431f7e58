// Packed half spectra of real tubes, and their discrete Fourier transform matrices.
//
// A tube x_0 … x_{n3-1} has the half spectrum x̂_k = Σ_l x_l e^{-2πikl/n3}, k = 0 … n3/2. Bin 0, and
// bin n3/2 where n3 is even, are real; every other bin is a (re, im) pair. That makes exactly n3
// real planes, stored in the order
//
//     0: x̂_0    2k-1: Re x̂_k    2k: Im x̂_k    (1 <= k <= pairs(n3))    n3-1: x̂_{n3/2}, n3 even
//
// so a packed spectrum takes the place of the tensor it came from, and no complex number leaves a
// kernel. The inverse transform weights each pair by 2/n3 and each real bin by 1/n3.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace tcur {

// Number of (re, im) pairs in the half spectrum of a tube of length n3.
inline int64_t pairs(int64_t n3) {
  return (n3 - 1) / 2;
}

inline bool has_nyquist(int64_t n3) {
  return n3 % 2 == 0;
}

// Weight of a packed plane in the inverse transform: how often its bin occurs in the full spectrum,
// over n3.
inline double inverse_weight(int64_t plane, int64_t n3) {
  const bool real_bin = plane == 0 || (has_nyquist(n3) && plane == n3 - 1);
  return (real_bin ? 1.0 : 2.0) / static_cast<double>(n3);
}

// cos and sin of 2πm/n3, m taken modulo n3 first: exact reduction keeps the error at one rounding
// for every product kl.
class UnitRoots {
 public:
  explicit UnitRoots(int64_t n3) : n3_(n3), cos_(n3), sin_(n3) {
    const double step = 2.0 * 3.14159265358979323846 / static_cast<double>(n3);
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

// cos(2πkl/n3) and sin(2πkl/n3) for k, l = 1 … pairs(n3), row-major. Symmetric in k and l, so the
// forward and the inverse transform share them.
template <class T>
struct FoldedDft {
  int64_t n3, size;         // size = pairs(n3)
  std::vector<T> cos, sin;  // [size, size]

  explicit FoldedDft(int64_t n3) : n3(n3), size(pairs(n3)), cos(size * size), sin(size * size) {
    const UnitRoots roots(n3);
    for (int64_t k = 1; k <= size; ++k) {
      for (int64_t l = 1; l <= size; ++l) {
        cos[(k - 1) * size + l - 1] = static_cast<T>(roots.cos(k * l));
        sin[(k - 1) * size + l - 1] = static_cast<T>(roots.sin(k * l));
      }
    }
  }
};

}  // namespace tcur
