// Projected tokens, which are rows of q = n3*rank numbers, and how blocks of threads share them.
//
// A row is a packed spectrum. Its bins lie side by side: a real bin is rank numbers, and a pair is
// rank real and rank imaginary ones. A thread takes four real numbers and four imaginary ones.
// Neighbouring threads take neighbouring numbers and bins, so that a warp reads and writes whole
// cache lines. If the rank is a multiple of four and rows start at multiples of 8 or 16 bytes,
// threads read vectors; otherwise they read number by number.
#pragma once

#include "divisor.h"
#include "operators.h"

#include <algorithm>

namespace tcur {

constexpr int kTokenThreads = 256;

struct Numbers {
  float v[4];
};

// Four neighbouring numbers as they lie in memory. Widening them is a separate step, so that a
// thread can start loads before it needs the numbers.
template <Element E>
struct Packed;
template <>
struct Packed<Element::f32> {
  using Number = float;
  float4 raw;
  TCUR_DEVICE Numbers widened() const {
    return {{raw.x, raw.y, raw.z, raw.w}};
  }
};
// Four numbers in two words, two in each.
template <Element E>
struct PackedHalves {
  using Number = unsigned short;
  uint2 raw;

  TCUR_DEVICE static float number(unsigned bits) {
    return widen(static_cast<unsigned short>(bits), E);
  }
  TCUR_DEVICE Numbers widened() const {
    return {{number(raw.x), number(raw.x >> 16), number(raw.y), number(raw.y >> 16)}};
  }
};
template <>
struct Packed<Element::bf16> : PackedHalves<Element::bf16> {};
template <>
struct Packed<Element::f16> : PackedHalves<Element::f16> {};

template <class Packed>
TCUR_DEVICE Packed pack(const float (&bits)[4]) {
  return {{bits[0], bits[1], bits[2], bits[3]}};
}
template <class Packed>
TCUR_DEVICE Packed pack(const unsigned short (&bits)[4]) {
  Packed made{};
  made.raw = {
      bits[0] | static_cast<unsigned>(bits[1]) << 16,
      bits[2] | static_cast<unsigned>(bits[3]) << 16};
  return made;
}

// Reads `count` numbers from `at` on; the rest of the four are zero.
template <Element E, bool VECTOR>
TCUR_DEVICE Packed<E> load_packed(const void* data, int64_t at, int count) {
  using Number = typename Packed<E>::Number;
  const Number* from = static_cast<const Number*>(data) + at;
  if constexpr (VECTOR) {
    Packed<E> made{};
    if (count > 0) {
      made.raw = *reinterpret_cast<const decltype(made.raw)*>(from);
    }
    return made;
  } else {
    Number bits[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) {
        bits[i] = from[i];
      }
    }
    return pack<Packed<E>>(bits);
  }
}

template <Element E, bool VECTOR>
TCUR_DEVICE void store_packed(void* data, int64_t at, int count, const Numbers& numbers) {
  using Number = typename Packed<E>::Number;
  Number* to = static_cast<Number*>(data) + at;
  Number bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (E == Element::f32) {
      bits[i] = numbers.v[i];
    } else {
      bits[i] = narrow(numbers.v[i], E);
    }
  }
  if constexpr (VECTOR) {
    if (count > 0) {
      const auto made = pack<Packed<E>>(bits);
      *reinterpret_cast<std::remove_const_t<decltype(made.raw)>*>(to) = made.raw;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) {
        to[i] = bits[i];
      }
    }
  }
}

// Four numbers of a bin: real and imaginary parts.
template <Element E>
struct PackedPair {
  Packed<E> re, im;
};

template <Element E, bool VECTOR>
TCUR_DEVICE PackedPair<E> load_pair(
    const void* data, int64_t at, int rank, int count, bool is_pair) {
  return {
      load_packed<E, VECTOR>(data, at, count),
      load_packed<E, VECTOR>(data, at + rank, is_pair ? count : 0)};
}

struct Pairs {
  Numbers re, im;

  // this += e^{i angle} pair, where `root` is the cosine and the sine.
  template <Element E>
  TCUR_DEVICE void add_turned(const PackedPair<E>& pair, const float2& root) {
    const Numbers a = pair.re.widened(), b = pair.im.widened();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      re.v[i] += root.x * a.v[i];
      re.v[i] -= root.y * b.v[i];
      im.v[i] += root.x * b.v[i];
      im.v[i] += root.y * a.v[i];
    }
  }
};

// Gives bin * slice modulo n3 for one slice after the other.
struct Turn {
  int bin, n3, at;

  TCUR_DEVICE Turn(int bin_, int64_t slice, int n3_)
      : bin(bin_), n3(n3_), at(bin_ * static_cast<int>(slice) % n3_) {
  }
  TCUR_DEVICE int next() {
    const int now = at;
    at = at + bin >= n3 ? at + bin - n3 : at + bin;
    return now;
  }
};

// How a grid of blocks of kTokenThreads threads shares rows of `row_length` tokens. A block works
// on `groups` tokens at a time and on `width` bins of each, with `tiles` threads for each bin.
struct TokenGrid {
  int bins, width, bin_blocks;
  int tiles_per_bin, tiles, tile_blocks;
  int groups, chunk, chunks;  // tokens of a block at a time, in all, and chunks in a row of tokens
  int64_t rows, row_length;
  Divisor by_bin_blocks, by_tile_blocks, by_chunks, by_threads_per_token, by_tiles;

  int64_t blocks() const {
    return rows * chunks * bin_blocks * tile_blocks;
  }
  TCUR_HOST_DEVICE int threads_per_token() const {
    return width * tiles;
  }
};

// Chooses the grid. A block takes at least 64 numbers of each token, so that it reads whole lines
// of 128 bytes. If a row has too few tokens to fill a block, the block takes more bins, up to all.
inline TokenGrid token_grid(
    int n3, int rank, int tiles_per_bin, int most_threads, const TokenCores& cores) {
  TokenGrid grid{};
  grid.bins = n3 / 2 + 1;
  grid.tiles_per_bin = tiles_per_bin;
  grid.tile_blocks = ceil_div(tiles_per_bin, most_threads);
  grid.tiles = ceil_div(tiles_per_bin, grid.tile_blocks);
  const int wanted = static_cast<int>(std::clamp<int64_t>(cores.row_length(), 1, 16));
  const int width = std::max(ceil_div(32, rank), kTokenThreads / (grid.tiles * wanted));
  const int widest = std::min(grid.bins, most_threads / grid.tiles);
  grid.bin_blocks = ceil_div(grid.bins, std::min(width, widest));
  grid.width = ceil_div(grid.bins, grid.bin_blocks);
  grid.groups = kTokenThreads / (grid.width * grid.tiles);
  grid.rows = cores.rows();
  grid.row_length = cores.row_length();
  return grid;
}

// Cuts rows of tokens into chunks, so that each thread of a block takes `per_thread` tokens.
inline void cut_rows(TokenGrid& grid, int64_t per_thread) {
  grid.chunk = static_cast<int>(grid.groups * per_thread);
  grid.chunks = static_cast<int>(ceil_div(grid.row_length, grid.chunk));
  grid.by_bin_blocks = Divisor(grid.bin_blocks);
  grid.by_tile_blocks = Divisor(grid.tile_blocks);
  grid.by_chunks = Divisor(std::max(grid.chunks, 1));
  grid.by_threads_per_token = Divisor(grid.threads_per_token());
  grid.by_tiles = Divisor(grid.tiles);
}

// What a block of the grid works on: its first bin and tile, its row of tokens, and its tokens.
struct Share {
  int first_bin, first_tile, chunk;
  int64_t row, begin, end;

  TCUR_DEVICE explicit Share(const TokenGrid& grid) {
    const int block = blockIdx.x;
    const int tile_block = grid.by_bin_blocks.quotient(block);
    const int part = grid.by_tile_blocks.quotient(tile_block);
    const int which = grid.by_chunks.quotient(part);
    first_bin = (block - tile_block * grid.bin_blocks) * grid.width;
    first_tile = (tile_block - part * grid.tile_blocks) * grid.tiles;
    chunk = part - which * grid.chunks;
    row = which;
    begin = row * grid.row_length + static_cast<int64_t>(chunk) * grid.chunk;
    const int64_t last = (row + 1) * grid.row_length;
    end = begin + grid.chunk < last ? begin + grid.chunk : last;
  }
};

// What the thread number `item`, of those that a block has for one token, works on.
struct Item {
  int bin, plane, tile;
  bool is_pair, is_there;

  TCUR_DEVICE Item(const TokenGrid& grid, const Share& share, int item, int n3) {
    const int local_bin = grid.by_tiles.quotient(item);
    bin = share.first_bin + local_bin;
    tile = share.first_tile + item - local_bin * grid.tiles;
    plane = plane_of(bin);
    is_pair = tcur::is_pair(bin, n3);
    is_there = bin < grid.bins && tile < grid.tiles_per_bin;
  }
};

}  // namespace tcur
