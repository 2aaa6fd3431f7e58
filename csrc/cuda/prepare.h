// Prepares the inputs of the kernels for tubes (tubes_in_registers.h) in the layout that their
// threads read: R̂, and for `materialize` also P_k = Ĉ_k Û_k, computed from the core itself.
#pragma once

#include "spectrum.h"

namespace tcur {

struct PrepareArgs {
  const float* horizontal_hat;  // [n3*rank, n2]
  float* tiles;                 // R̂: [tiles in a row, quads, n3, 4, columns], padded by zeros
  int64_t n2;
  int n3, rank, quads, columns;  // quads of the rank, columns of a tile
  bool vector;                   // rows of R̂ start at multiples of four numbers
  const float* lateral_hat;      // [n1, n3*rank]
  const float* core;             // [n3, rank, rank]
  // P: [tiles in a column, quads, n3, tile_rows, 4], padded by zeros. Null: make no P.
  float* mixed;
  int64_t n1, rows;  // rows: n1, rounded up to whole tiles
  int tile_rows;
  Tables tables;
  double scale;
};

// Makes one launch. The next launch may overlap it (`launch_early`).
void prepare(const PrepareArgs& args, Stream stream);

}  // namespace tcur
