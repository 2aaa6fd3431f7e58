// The arguments that the operator passes to the kernels of `core_grad_dense`.
#pragma once

#include "dft_matrix.h"
#include "divisor.h"
#include "fragments.h"
#include "lanes.h"
#include "spectrum.h"
#include "tile.h"
#include "tubes_in_registers.h"

namespace tcur {

struct ProjectArgs {
  const void* grad;             // [n3, n1, n2]
  const float* horizontal_hat;  // R̂ [n3*rank, n2], or as `prepare` leaves it for tubes
  Tables tables;
  float* z;  // [splits, n1, n3*rank]
  int64_t n1, n2;
  int n3, rank;
  Divisor splits;
  int quads, first_quad;  // of the rank, for tubes: how many, and the first one of a launch
  int tiles_per_split;
  Precision precision;
  Tile tile;
  Lines lines;  // of the product with the matrix: bins
  Element element;
  bool vector;  // rows start at multiples of four elements
};

// A kernel compiled for one length of tubes and short ranks, and the parameters of its launch.
struct ProjectTubesKernel {
  void (*kernel)(ProjectArgs);
  int rows, columns;  // of its tile
  int quads;          // of the rank that one launch takes
  int threads;
  int64_t shared_bytes;
};

// Returns the kernel of a length that `has_tubes` and whose `tubes_part` is PART.
template <int PART>
ProjectTubesKernel project_tubes(int64_t n3);
template <>
ProjectTubesKernel project_tubes<0>(int64_t n3);
template <>
ProjectTubesKernel project_tubes<1>(int64_t n3);
template <>
ProjectTubesKernel project_tubes<2>(int64_t n3);
template <>
ProjectTubesKernel project_tubes<3>(int64_t n3);

}  // namespace tcur
