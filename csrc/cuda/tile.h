// A tile of a stack: all n3 slices of `rows` x `columns` numbers in shared memory, one row of
// positions per plane. And the host's choice of its size.
#pragma once

#include "launch.h"

#include <algorithm>

namespace tcur {

// Slices that kernels on tiles can hold, at 4 bytes and 8 x 8 positions and more, twice for the
// adjoint with 4 columns, on every architecture from sm_80 on.
constexpr int kMaxSlices = 384;

struct Tile {
  int rows, log_columns;

  TCUR_HOST_DEVICE int columns() const {
    return 1 << log_columns;
  }
  TCUR_HOST_DEVICE int positions() const {
    return rows << log_columns;
  }
  // Where a column of a row lies in the row: eight rows that a warp writes together would share
  // banks otherwise. Groups of eight columns move, and a swizzled column swizzled is the column.
  TCUR_HOST_DEVICE int swizzled(int row, int column) const {
    const int shift = log_columns < 5 ? 5 - log_columns : 0;
    const int mask = log_columns >= 5 ? 3 : log_columns == 4 ? 1 : 0;
    return column ^ ((row >> shift & mask) << 3);
  }
  TCUR_HOST_DEVICE int position(int row, int column) const {
    return (row << log_columns) + swizzled(row, column);
  }
};

// Start of a tile in its matrix.
struct Corner {
  int64_t row, column;
};
TCUR_DEVICE Corner corner_of(const Tile& tile, int64_t index, int64_t tiles_in_row) {
  return {index / tiles_in_row * tile.rows, index % tiles_in_row * tile.columns()};
}

}  // namespace tcur
