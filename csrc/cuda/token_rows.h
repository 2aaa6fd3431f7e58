// Projected tokens, rows of q = n3*rank numbers, and how blocks of threads share them.
//
// A row is a packed spectrum: bins side by side, each rank numbers, or rank real and rank imaginary
// ones. Threads take four of each; the threads of neighbouring numbers and bins are neighbours, so
// that a warp reads and writes whole lines. Rows of a multiple of four numbers that start at
// multiples of 8 or 16 bytes are read by vectors, others number by number.
#pragma once

#include "operators.h"

#include <algorithm>

namespace tcur {

constexpr int kTokenThreads = 256;

struct Numbers {
  float v[4];
};

// Four neighbours as they lie in memory, so that loads can be asked for before they are needed.
template <Element E>
struct Packed;
template <>
struct Packed<Element::f32> {
  using Number = float;
  float4 raw;

  TCUR_DEVICE static Packed of(const float (&bits)[4]) {
    return {{bits[0], bits[1], bits[2], bits[3]}};
  }
  TCUR_DEVICE Numbers widened() const {
    return {{raw.x, raw.y, raw.z, raw.w}};
  }
};
template <>
struct Packed<Element::bf16> {
  using Number = unsigned short;
  uint2 raw;

  TCUR_DEVICE static Packed of(const unsigned short (&bits)[4]) {
    return {
        {bits[0] | static_cast<unsigned>(bits[1]) << 16,
         bits[2] | static_cast<unsigned>(bits[3]) << 16}};
  }
  TCUR_DEVICE static float number(unsigned bits) {
    float made;
    memcpy(&made, &bits, sizeof made);
    return made;
  }
  TCUR_DEVICE Numbers widened() const {
    return {
        {number(raw.x << 16),
         number(raw.x & 0xFFFF0000U),
         number(raw.y << 16),
         number(raw.y & 0xFFFF0000U)}};
  }
};

// `count` numbers from `at` on, zeros behind them.
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
    return Packed<E>::of(bits);
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
      const Packed<E> made = Packed<E>::of(bits);
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

// Number of bin * slice modulo n3 for one slice after the other.
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

// How a grid of blocks of kTokenThreads threads shares rows of tokens, row_length each: a block has
// `groups` tokens side by side, each with `width` bins, and for each of them `tiles` threads.
struct TokenGrid {
  int bins, width, bin_blocks;
  int tiles_per_bin, tiles, tile_blocks;
  int groups, chunk, chunks;  // tokens side by side, of a block, and blocks for a row of tokens
  int64_t rows, row_length;

  int64_t blocks() const {
    return rows * chunks * bin_blocks * tile_blocks;
  }
  TCUR_HOST_DEVICE int threads_per_token() const {
    return width * tiles;
  }
};

// Pieces of rows of at least 64 numbers, so that lines of 128 bytes are read whole, and of all bins
// where a row of tokens is shorter than a block is wide.
inline TokenGrid token_grid(
    int n3, int rank, int tiles_per_bin, int most_threads, const TokenCores& cores) {
  TokenGrid grid{};
  grid.bins = n3 / 2 + 1;
  grid.tiles_per_bin = tiles_per_bin;
  grid.tile_blocks = (tiles_per_bin + most_threads - 1) / most_threads;
  grid.tiles = (tiles_per_bin + grid.tile_blocks - 1) / grid.tile_blocks;
  const int wanted = static_cast<int>(std::clamp<int64_t>(cores.row_length, 1, 16));
  const int width = std::max((32 + rank - 1) / rank, kTokenThreads / (grid.tiles * wanted));
  const int widest = std::min(grid.bins, most_threads / grid.tiles);
  grid.bin_blocks = (grid.bins + std::min(width, widest) - 1) / std::min(width, widest);
  grid.width = (grid.bins + grid.bin_blocks - 1) / grid.bin_blocks;
  grid.groups = kTokenThreads / (grid.width * grid.tiles);
  grid.rows = cores.rows;
  grid.row_length = cores.row_length;
  return grid;
}

// Cuts rows into chunks of `per_thread` tokens for each of the groups.
inline void cut_rows(TokenGrid& grid, int64_t per_thread) {
  grid.chunk = static_cast<int>(grid.groups * per_thread);
  grid.chunks = static_cast<int>(tiles_of(grid.row_length, grid.chunk));
}

// What a thread of such a grid works on.
struct Seat {
  int bin, plane, tile, item, group;  // item: its number among those of one token
  bool is_pair, works;
  int chunk;
  int64_t row, begin, end;  // row of tokens, and the tokens of the block

  TCUR_DEVICE Seat(const TokenGrid& grid, int n3) {
    int block = blockIdx.x;
    int next = block / grid.bin_blocks;
    const int bin_block = block - next * grid.bin_blocks;
    block = next;
    next = block / grid.tile_blocks;
    const int tile_block = block - next * grid.tile_blocks;
    block = next;
    next = block / grid.chunks;
    chunk = block - next * grid.chunks;
    row = next;
    const int thread = threadIdx.x, per_token = grid.threads_per_token();
    group = thread / per_token;
    item = thread - group * per_token;
    const int local_bin = item / grid.tiles;
    bin = bin_block * grid.width + local_bin;
    tile = tile_block * grid.tiles + item - local_bin * grid.tiles;
    plane = bin == 0 ? 0 : 2 * bin - 1;
    is_pair = bin > 0 && bin <= pairs(n3);
    works = group < grid.groups && bin < grid.bins && tile < grid.tiles_per_bin;
    begin = row * grid.row_length + static_cast<int64_t>(chunk) * grid.chunk;
    const int64_t last = (row + 1) * grid.row_length;
    end = begin + grid.chunk < last ? begin + grid.chunk : last;
  }
};

}  // namespace tcur
