// A tile of a stack is `rows` x `columns` numbers of every slice. In shared memory each of its
// planes is one row of positions.
#pragma once

#include "launch.h"

#include <algorithm>

namespace tcur {

// The most slices for which a block of spectrum.cu can transform a core. Two entries of so many
// slices and the roots take 64 KiB of shared memory, which every architecture from sm_80 on has.
constexpr int kMaxSlices = 2048;

struct Tile {
  int rows, log_columns;

  TCUR_HOST_DEVICE int columns() const {
    return 1 << log_columns;
  }
  TCUR_HOST_DEVICE int positions() const {
    return rows << log_columns;
  }
  // Where a column lies within its row. Without this, the eight rows that a warp writes together
  // would share banks. It moves groups of eight columns, and it is its own inverse.
  TCUR_HOST_DEVICE int swizzled(int row, int column) const {
    const int shift = log_columns < 5 ? 5 - log_columns : 0;
    const int mask = log_columns >= 5 ? 3 : log_columns == 4 ? 1 : 0;
    return column ^ ((row >> shift & mask) << 3);
  }
  TCUR_HOST_DEVICE int position(int row, int column) const {
    return (row << log_columns) + swizzled(row, column);
  }
};

// Planes of a tile. Either all of them, packed, or those of some bins with two rows for each bin;
// the second row of a real bin is zero.
struct Planes {
  float* rows;
  int stride;  // of rows
  int first;   // bin of the first row
  bool is_packed;

  // The row of the real part; the imaginary part is in the next row.
  TCUR_DEVICE float* real_row(int bin) const {
    const int packed = plane_of(bin);
    return rows + (is_packed ? packed : 2 * (bin - first)) * stride;
  }
};

// Start of a tile in its matrix.
struct Corner {
  int64_t row, column;
};
TCUR_DEVICE Corner corner_of(const Tile& tile, int64_t index, int64_t tiles_in_row) {
  return {index / tiles_in_row * tile.rows, index % tiles_in_row * tile.columns()};
}

// Where four positions of a tile lie in a slice, and how many of them are inside the slice.
struct Place {
  int64_t at, count;
  int64_t row_start;  // where the row of `at` begins
};
TCUR_DEVICE Place
place_of(const Tile& tile, const Corner& corner, int64_t n1, int64_t n2, int position) {
  const int tile_row = position >> tile.log_columns;
  const int64_t row = corner.row + tile_row;
  const int64_t column = corner.column + tile.swizzled(tile_row, position & (tile.columns() - 1));
  return {row * n2 + column, row < n1 ? n2 - column : 0, row * n2};
}

}  // namespace tcur
