// Real DFT along the tubes of a tile, as a product with the DFT matrix on tensor cores. It is for
// lengths that are not a product of two short factors: primes and long lengths. After the folding
// that tubes.h describes, it is two products of half the size:
//     E_l = Σ_k cos(2πkl/n3) A_k    O_l = Σ_k sin(2πkl/n3) B_k    k, l = 0 … n3/2
// In the inverse transform, A and B are the real and imaginary planes. In the forward transform,
// they are the sums and differences of slices k and n3-k. One launch computes some of the lines l.
// Each group of 16 lines belongs to one warp, or to a few warps that share the columns; the tile is
// as wide as the warps can cover. Rows 2j and 2j+1 of shared memory hold first A and B of bin j,
// then E and O of line j.
#pragma once

#include "fragments.h"
#include "lanes.h"
#include "spectrum.h"
#include "tile.h"

namespace tcur {

constexpr int kWarps = 8, kWarpLines = 16, kWarpFragments = 8;
constexpr int kMostLines = kWarps * kWarpLines;

// One launch computes lines first … first+count-1. Shared memory holds `count` bins at a time.
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

// A tile has eight rows. Where the lines need fewer than all warps, the other warps make it wider.
inline Tile matrix_tile(const Lines& lines) {
  int log_columns = 3;
  while (lines.count << (log_columns - 3) < kMostLines) {
    ++log_columns;
  }
  return {8, log_columns};
}

// Distance between rows. It makes A_k and A_{k+1} lie 8 more than a multiple of 32 numbers apart,
// so that a warp reads a fragment without bank conflicts.
TCUR_HOST_DEVICE inline int matrix_stride(const Tile& tile) {
  return tile.positions() + 4;
}

inline int64_t matrix_bytes(const Lines& lines, const Tile& tile) {
  return 2 * lines.count * static_cast<int64_t>(matrix_stride(tile) * sizeof(float));
}

// Number of bins in the chunk that starts at bin `first`, rounded up to whole fragments.
TCUR_DEVICE int chunk_bins(int n3, const Lines& lines, int first) {
  const int rest = round_up(n3 / 2 + 1 - first, 8);
  return rest < lines.count ? rest : lines.count;
}

// The E and O that one warp computes, for 16 lines and 64 positions.
class LineSums {
 public:
  TCUR_DEVICE explicit LineSums(const Lines& lines) {
    const int warp = threadIdx.x / 32, warps = lines.count / kWarpLines;
    line_ = warp % warps * kWarpLines;
    column_ = warp / warps * 8 * kWarpFragments;
  }

  // Adds the products with A and B of `bins` bins, from bin `first` on, which are in shared memory.
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
      int turns[4];  // indices of the roots that this lane holds of the fragment
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        turns[i] = (line + 8 * (i % 2)) * (first + k0 + t + 4 * (i / 2)) % tables.n3;
      }
      add_part(even_, 0, turns, column, stride, tables);
      add_part(odd_, 1, turns, column + stride, stride, tables);
    }
  }

  // Writes E of line j to row 2j and sign * O to row 2j+1. This overwrites A and B, so all threads
  // must have finished reading them. The caller needs a barrier before it reads the rows.
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
  // Adds eight bins: their rows times cosines (part 0) or sines (part 1).
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
