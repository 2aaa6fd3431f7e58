// Real DFT along the tubes of a tile as a product with its matrix on tensor cores, for lengths that
// have no two short factors: primes, and long ones. Folded as tubes.h says, it is two products of
// half the size,
//     E_l = Σ_k cos(2πkl/n3) A_k    O_l = Σ_k sin(2πkl/n3) B_k    k, l = 0 … n3/2
// with A and B the parts of the planes (inverse), or sums and differences of slices k and n3-k
// (forward). A launch makes a part of the lines l, 16 for each warp or a few warps; a tile is as
// wide as its warps allow. Rows 2j and 2j+1 of shared memory are A and B of its bins first, then
// E and O of its lines.
#pragma once

#include "fragments.h"
#include "lanes.h"
#include "spectrum.h"
#include "tile.h"

namespace tcur {

constexpr int kWarps = 8, kWarpLines = 16, kWarpFragments = 8;
constexpr int kMostLines = kWarps * kWarpLines;

// Lines first … first+count-1 of one launch; `count` bins are in shared memory at a time.
struct Lines {
  int first, count;  // count: kWarpLines times a power of two

  TCUR_HOST_DEVICE int end(int n3) const {
    const int all = n3 / 2 + 1;
    return first + count < all ? first + count : all;
  }
};

inline Lines first_lines(int n3) {
  int count = kWarpLines;
  while (count < n3 / 2 + 1 && count < kMostLines) {
    count *= 2;
  }
  return {0, count};
}

// Eight rows high; what warps are not needed for lines makes it wider.
inline Tile matrix_tile(const Lines& lines) {
  int log_columns = 3;
  while (lines.count << (log_columns - 3) < kMostLines) {
    ++log_columns;
  }
  return {8, log_columns};
}

// Rows this far apart: 8 more than a multiple of 32 from A_k to A_{k+1}, so that the fragments that
// a warp reads share no bank.
TCUR_HOST_DEVICE inline int matrix_stride(const Tile& tile) {
  return tile.positions() + 4;
}

inline int64_t matrix_bytes(const Lines& lines, const Tile& tile) {
  return 2 * lines.count * static_cast<int64_t>(matrix_stride(tile) * sizeof(float));
}

// Bins of a chunk that begins with this one, rounded up to whole fragments.
TCUR_DEVICE int chunk_bins(int n3, const Lines& lines, int first) {
  const int rest = round_up(n3 / 2 + 1 - first, 8);
  return rest < lines.count ? rest : lines.count;
}

// E and O of a warp: 16 lines, 64 positions.
class LineSums {
 public:
  TCUR_DEVICE explicit LineSums(const Lines& lines) {
    const int warp = threadIdx.x / 32, warps = lines.count / kWarpLines;
    line_ = warp % warps * kWarpLines;
    column_ = warp / warps * 8 * kWarpFragments;
  }

  // `bins` of A and B are in shared memory, from bin `first` on.
  TCUR_DEVICE void add(
      const float* rows,
      int stride,
      int first,
      int bins,
      const Lines& lines,
      const Tables& tables) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int line = lines.first + line_ + g;
    const float* column = rows + 2 * t * stride + column_ + g;
    for (int k0 = 0; k0 < bins; k0 += 8, column += 16 * stride) {
      int turns[4];  // of the roots, as a fragment lies in a warp
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        turns[i] = (line + 8 * (i % 2)) * (first + k0 + t + 4 * (i / 2)) % tables.n3;
      }
      add_part(even_, 0, turns, column, stride, tables);
      add_part(odd_, 1, turns, column + stride, stride, tables);
    }
  }

  // Rows 2j and 2j+1: E and `sign` O of line j. Nobody reads A and B any more; a barrier follows.
  TCUR_DEVICE void store(float* rows, int stride, float sign) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < kWarpFragments; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float* to = rows + 2 * (line_ + g + 8 * h) * stride + column_ + 8 * n + 2 * t;
        store_lanes<2>(to, {even_[n][2 * h], even_[n][2 * h + 1]});
        store_lanes<2>(to + stride, {sign * odd_[n][2 * h], sign * odd_[n][2 * h + 1]});
      }
    }
  }

 private:
  // Eight bins: cosines (0) or sines (1) times rows.
  TCUR_DEVICE static void add_part(
      float (&sums)[kWarpFragments][4],
      int part,
      const int (&turns)[4],
      const float* column,
      int stride,
      const Tables& tables) {
    FragmentA roots;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      roots.set(i, tables.data[2 * turns[i] + part], Precision::ieee);
    }
#pragma unroll
    for (int n = 0; n < kWarpFragments; ++n) {
      FragmentB values;
      values.set(0, column[8 * n], Precision::ieee);
      values.set(1, column[8 * n + 8 * stride], Precision::ieee);
      multiply(sums[n], roots, values, Precision::ieee);
    }
  }

  int line_, column_;
  float even_[kWarpFragments][4] = {}, odd_[kWarpFragments][4] = {};
};

}  // namespace tcur
