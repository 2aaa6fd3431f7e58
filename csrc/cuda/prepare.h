// Prepares the inputs of the kernels for tubes (tubes_in_registers.h) in the layout that their
// threads read: R̂, and for `materialize` also P_k = Ĉ_k Û_k, computed from the core itself.
#pragma once

#include "../common/check.h"
#include "divisor.h"
#include "spectrum.h"

namespace tcur {

struct PrepareArgs {
  const float* horizontal_hat;  // [n3*rank, n2]
  float* tiles;                 // R̂: [tiles in a row, quads, n3, 4, columns], padded by zeros
  int64_t n2;
  int n3, rank, quads, log_columns;  // quads of the rank, columns of a tile
  bool vector;                       // rows of R̂ start at multiples of four numbers
  // P: [tiles in a column, quads, n3, rows of a tile, 4], padded by zeros. Null: make no P.
  float* mixed;
  const float* lateral_hat;  // [n1, n3*rank]
  bool lateral_vector;       // rows of Ĉ_k start at multiples of four numbers
  const float* core;         // [n3, rank, rank]
  int64_t n1, rows;          // rows: n1, rounded up to whole tiles
  int log_rows;              // rows of a tile
  double weight;             // of a real bin in the inverse transform, scale included
  Tables tables;
};

// The arguments that lay out R̂ alone, in `tiles` of so many columns.
inline PrepareArgs laying_out(
    const float* horizontal_hat, const Tensor& tiles, const Sizes& sizes, int columns, int quads) {
  PrepareArgs args{};
  args.horizontal_hat = horizontal_hat;
  args.tiles = tiles.mutable_data_ptr<float>();
  args.n2 = sizes.n2;
  args.n3 = static_cast<int>(sizes.n3);
  args.rank = static_cast<int>(sizes.rank);
  args.quads = quads;
  args.log_columns = log2_of(columns);
  args.vector = sizes.n2 % 4 == 0 && is_aligned(horizontal_hat, 16);
  return args;
}

// Makes one launch. The next launch may overlap it (`launch_early`).
void prepare(const PrepareArgs& args, Stream stream);

}  // namespace tcur
