// What the operator hands to the kernels of `materialize`.
#pragma once

#include "dft_matrix.h"
#include "fragments.h"
#include "lanes.h"
#include "spectrum.h"
#include "tile.h"
#include "tubes_in_registers.h"

namespace tcur {

// Slices that one launch writes, at most: all that codelets take, or both mirror images of lines.
constexpr int kMostBases = 2 * kMostLines;
static_assert(kLongestOuter * kLongestInner <= kMostBases, "codelets take more slices");

// Where a slice lies in a matrix [n1, count*n2], of the base and of W_eff alike: as the `index`-th
// of `count` slices side by side. A slice that has its matrix for itself is {1, 0}.
struct Beside {
  unsigned short count, index;
};

struct MaterializeArgs {
  const float* mixed;           // P [n1, n3*rank]
  const float* horizontal_hat;  // R̂ [n3*rank, n2]; both as `prepare_kernel` leaves them for tubes
  Tables tables;
  void* out;  // the matrices of all slices, one after the other
  int64_t n1, n2, tiles_in_row;
  int n3, rank;
  int quads;        // of the rank, for tubes
  bool prefetches;  // for tubes: whether a block asks for its bases as it begins
  Precision precision;
  Tile tile;
  Lines lines;                        // of the product with the matrix
  Element base_element, out_element;  // base_element none: no base
  bool vector;                        // rows start at multiples of four elements
  bool side_by_side;                  // whether any slices lie so
  int bases;
  // Of slice l; or of lines.first + j, then of their mirror images, null where there is none.
  const void* base[kMostBases];  // its first number
  Beside beside[kMostBases];

  // Number of a slice whose place is that of a slot, counted from its first number.
  TCUR_DEVICE int64_t within(int slot, int64_t row_start, int64_t column) const {
    return row_start * beside[slot].count + column;
  }
  // Its first number in `out`.
  TCUR_DEVICE int64_t first(int slot, int slice) const {
    const int index = beside[slot].index;
    return (static_cast<int64_t>(slice - index) * n1 + index) * n2;
  }
};
static_assert(sizeof(MaterializeArgs) <= 4096, "what a launch takes at most");

// A kernel made for one length of tubes and short ranks, and what it is launched with.
struct TubesKernel {
  void (*kernel)(MaterializeArgs);
  int rows, columns;  // of its tile
  int threads;
  int64_t shared_bytes;
};

// That of a length for which `has_tubes` and `tubes_part` is PART.
template <int PART>
TubesKernel materialize_tubes(int64_t n3);
template <>
TubesKernel materialize_tubes<0>(int64_t n3);
template <>
TubesKernel materialize_tubes<1>(int64_t n3);
template <>
TubesKernel materialize_tubes<2>(int64_t n3);
template <>
TubesKernel materialize_tubes<3>(int64_t n3);

}  // namespace tcur
