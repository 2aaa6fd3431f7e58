// The arguments that the operator passes to the kernels of `materialize`.
#pragma once

#include "dft_matrix.h"
#include "divisor.h"
#include "fragments.h"
#include "lanes.h"
#include "spectrum.h"
#include "tile.h"
#include "tubes_in_registers.h"

namespace tcur {

// The most slices that one launch writes: all slices of a length that codelets transform, or two
// slices, l and n3-l, for each line.
constexpr int kMostBases = 2 * kMostLines;
static_assert(kLongestOuter * kLongestInner <= kMostBases, "codelets take more slices");

// Where a slice lies in a matrix [n1, count*n2], both in the base and in W_eff: it is the
// `index`-th of `count` slices side by side. A slice with a matrix of its own is {1, 0}.
struct Beside {
  unsigned short count, index;
};

struct MaterializeArgs {
  const float* mixed;           // P [n1, n3*rank]
  const float* horizontal_hat;  // R̂ [n3*rank, n2]; both as `prepare_kernel` leaves them for tubes
  Tables tables;
  void* out;  // the matrices of all slices, one after the other
  int64_t n1, n2;
  Divisor tiles_in_row;
  int n3, rank;
  int quads;        // of the rank, for tubes
  bool prefetches;  // for tubes: whether a block prefetches its bases when it begins
  Precision precision;
  Tile tile;
  Lines lines;                        // of the product with the matrix
  Element base_element, out_element;  // base_element none: no base
  bool vector;                        // rows start at multiples of four elements
  bool side_by_side;                  // whether any slices lie side by side in one matrix
  int bases;
  // With codelets, slot l is slice l. With the matrix, slot j is slice lines.first + j, and the
  // slots from lines.count on are the slices n3-l of the same lines. Null where there is none.
  const void* base[kMostBases];  // its first number
  Beside beside[kMostBases];

  // Offset of a number from the first number of its slice, which lies as `slot` says.
  TCUR_DEVICE int64_t within(int slot, int64_t row_start, int64_t column) const {
    return row_start * beside[slot].count + column;
  }
  // Offset of the first number of a slice in `out`.
  TCUR_DEVICE int64_t first(int slot, int slice) const {
    const int index = beside[slot].index;
    return (static_cast<int64_t>(slice - index) * n1 + index) * n2;
  }
};
static_assert(sizeof(MaterializeArgs) <= 4096, "what a launch takes at most");

// A kernel compiled for one length of tubes and short ranks, and the parameters of its launch.
struct TubesKernel {
  void (*kernel)(MaterializeArgs);
  int rows, columns;  // of its tile
  int threads;
  int64_t shared_bytes;
};

// Returns the kernel of a length that `has_tubes` and whose `tubes_part` is PART.
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
