// Computes tiles of W_eff = W + scale * C*U*R, all slices at once, for a consumer that decides what
// happens to the numbers.
//
// One task computes some rows and columns of every slice. First it computes P_k = Ĉ_k Û_k of its
// rows. Then, for each strip of columns and every block of rows, it computes S_k = P_k R̂_k in
// registers and does the inverse DFT of the packed planes, which stay in the first-level cache.
// When a tile is full, a sweep goes over it slice by slice, adds the base, and passes the numbers
// on. host.h says how large a tile is.
//
// A consumer provides a sink for each slice of a tile, and finishes the task:
//     Sink sink(int64_t slice, int64_t first, int64_t stride) const   number `first` of the slice
//                                                                      is the sink's number 0
//     void finish() const
// A sink takes the numbers of W_eff from registers, block by block:
//     bool takes_whole_blocks() const              or it takes them row by row too
//     void put_whole(int64_t at, Vec<T> v) const   numbers at … of a whole block
//     Row row(int64_t at) const                    for a row of any other block from `at` on
// and a row takes them in order, `at` counted from where it begins:
//     void put(int64_t at, Vec<T> v) const
//     void put(int64_t at, T value) const
// materialize_kernel.h has the consumer that writes them. Members carry TCUR_TARGET; lambdas would
// not inherit it.
#pragma once

#include "compiled_kernels.h"
#include "convert_kernel.h"

namespace tcur::TCUR_ISA {

// P = Ĉ Û for the rows of one block, packed: products[plane][b][row]; zeros past the last row.
template <class T>
TCUR_TARGET void lateral_core_products(
    const WEffArgs<T>& m,
    int64_t row,
    int64_t rows,
    T* products,  // [n3, rank, kRowBlock]
    T* lines) {   // scratch: 2 * kRowBlock vectors
  constexpr int lanes = Simd<T>::lanes;
  const int64_t r = m.f.rank, size = r * m.core_stride;
  const T* c[kRowBlock];
  for (int64_t i = 0; i < kRowBlock; ++i) {
    c[i] = m.f.lateral_hat + (i < rows ? row + i : row) * m.f.q();
  }
  for (Bin bin(m.f.n3); bin.is_there(); bin.next()) {
    const int64_t plane = bin.plane;
    const bool pair = bin.is_pair;
    for (int64_t first = 0; first < r; first += lanes) {
      const T* u = m.core_hat + plane * size + first;
      Vec<T> re[kRowBlock], im[kRowBlock];
      for (int i = 0; i < kRowBlock; ++i) {
        re[i] = im[i] = Vec<T>{};
      }
      for (int64_t a = 0; a < r; ++a, u += m.core_stride) {
        const Vec<T> u_re = load(u), u_im = pair ? load(u + size) : Vec<T>{};
        for (int i = 0; i < kRowBlock; ++i) {
          const T c_re = c[i][plane * r + a];
          re[i] += c_re * u_re;
          im[i] += c_re * u_im;
          // Only now: beside 12 sums, 16 registers have no room for both.
          const T c_im = pair ? c[i][(plane + 1) * r + a] : T(0);
          re[i] -= c_im * u_im;
          im[i] += c_im * u_re;
        }
      }
      for (int i = 0; i < kRowBlock; ++i) {
        const T keep = i < rows ? T(1) : T(0);
        store(lines + i * lanes, Vec<T>(keep * re[i]));
        store(lines + (kRowBlock + i) * lanes, Vec<T>(keep * im[i]));
      }
      const int64_t last = r - first < lanes ? r - first : lanes;
      for (int64_t part = 0; part < bin.planes(); ++part) {
        T* target = products + ((plane + part) * r + first) * kRowBlock;
        for (int64_t b = 0; b < last; ++b) {
          for (int i = 0; i < kRowBlock; ++i) {
            target[b * kRowBlock + i] = lines[(part * kRowBlock + i) * lanes + b];
          }
        }
      }
    }
  }
}

// S = P R̂ of one real bin, at as many columns of a strip as registers hold.
template <class T>
TCUR_INLINE void real_bin(
    const T* p,      // [rank, kRowBlock]
    const T* r_hat,  // [rank, kStrip]
    int64_t rank,
    T* s) {  // [kRowBlock, kStrip]
  constexpr int lanes = Simd<T>::lanes, columns = kRegisterColumns;
  Vec<T> acc[kRowBlock][columns];
  for (int i = 0; i < kRowBlock; ++i) {
    for (int v = 0; v < columns; ++v) {
      acc[i][v] = Vec<T>{};
    }
  }
  for (int64_t b = 0; b < rank; ++b) {
    for (int v = 0; v < columns; ++v) {
      const Vec<T> x = load(r_hat + b * kStrip<T> + v * lanes);
      for (int i = 0; i < kRowBlock; ++i) {
        acc[i][v] += p[b * kRowBlock + i] * x;
      }
    }
  }
  for (int i = 0; i < kRowBlock; ++i) {
    for (int v = 0; v < columns; ++v) {
      store(s + i * kStrip<T> + v * lanes, acc[i][v]);
    }
  }
}

// The same of one complex bin. Its two planes follow each other in every array.
template <class T>
TCUR_INLINE void complex_bin(
    const T* p,      // [2, rank, kRowBlock]
    const T* r_hat,  // [2, rank, kStrip]
    int64_t rank,
    T* s) {  // [2, kRowBlock, kStrip], the planes kPlaneStride apart
  constexpr int lanes = Simd<T>::lanes, columns = kRegisterColumns;
  const T* p_im = p + rank * kRowBlock;
  const T* r_im = r_hat + rank * kStrip<T>;
  Vec<T> re[kRowBlock][columns], im[kRowBlock][columns];
  for (int i = 0; i < kRowBlock; ++i) {
    for (int v = 0; v < columns; ++v) {
      re[i][v] = im[i][v] = Vec<T>{};
    }
  }
  for (int64_t b = 0; b < rank; ++b) {
    for (int v = 0; v < columns; ++v) {
      const Vec<T> x = load(r_hat + b * kStrip<T> + v * lanes);
      const Vec<T> y = load(r_im + b * kStrip<T> + v * lanes);
      for (int i = 0; i < kRowBlock; ++i) {
        const T pr = p[b * kRowBlock + i], pi = p_im[b * kRowBlock + i];
        re[i][v] += pr * x;
        re[i][v] -= pi * y;
        im[i][v] += pr * y;
        im[i][v] += pi * x;
      }
    }
  }
  for (int i = 0; i < kRowBlock; ++i) {
    for (int v = 0; v < columns; ++v) {
      store(s + i * kStrip<T> + v * lanes, re[i][v]);
      store(s + kPlaneStride<T> + i * kStrip<T> + v * lanes, im[i][v]);
    }
  }
}

// What the products of one strip prefetch of the base of their block, elements of BYTES each: some
// rows of each slice, or a part of one. It arrives during the arithmetic and waits in the
// second-level cache for the sweep.
template <class T, int BYTES>
struct BaseShare {
  static constexpr int strips = kColumnBlock / kStrip<T>, row_lines = kColumnBlock * BYTES / 64;
  static constexpr int lines = kRowBlock * row_lines < strips ? 1 : kRowBlock * row_lines / strips;
  int64_t row, offset;  // of its first line, in the block, in bytes

  TCUR_TARGET explicit BaseShare(int strip)
      : row(strip * lines / row_lines), offset(strip * lines % row_lines * 64) {
  }
  TCUR_TARGET void fetch_slice(
      const WEffArgs<T>& m, int64_t slice, int64_t from, int64_t col) const {
    const int64_t stride = m.base[slice].stride * BYTES;
    const char* first = static_cast<const char*>(m.base[slice].data) + (from + row) * stride;
#pragma GCC unroll 16
    for (int line = 0; line < lines; ++line) {
      const int64_t within = col * BYTES + offset + line % row_lines * 64;
      fetch<Cache::second>(first + line / row_lines * stride + within);
    }
  }
};

template <class T>
struct BaseShare<T, 0> {  // nothing to fetch
  TCUR_TARGET explicit BaseShare(int) {
  }
  TCUR_TARGET void fetch_slice(const WEffArgs<T>&, int64_t, int64_t, int64_t) const {
  }
};

// planes: [n3, kRowBlock, kStrip], kPlaneStride apart, = P R̂ of a strip of the block at (row, col).
template <class T, int BASE_BYTES>
TCUR_TARGET void product_planes(
    const WEffArgs<T>& m, const T* products, int64_t row, int64_t col, int strip, T* planes) {
  const int64_t rank = m.f.rank;
  const T* panel = m.f.panel(col + strip * kStrip<T>);
  const BaseShare<T, BASE_BYTES> share(strip);
  for (Bin bin(m.f.n3); bin.is_there(); bin.next()) {
    const int64_t plane = bin.plane;
    const T* p = products + plane * rank * kRowBlock;
    const T* x = panel + plane * rank * kStrip<T>;
    T* s = planes + plane * kPlaneStride<T>;
    share.fetch_slice(m, plane, row, col);
    if (bin.is_pair) {
      share.fetch_slice(m, plane + 1, row, col);
    }
    for (int c = 0; c < kStrip<T>; c += kRegisterColumns * Simd<T>::lanes) {
      if (bin.is_pair) {
        complex_bin(p, x + c, rank, s + c);
      } else {
        real_bin(p, x + c, rank, s + c);
      }
    }
  }
}

template <class T>
using ProductPlanes =
    void (*)(const WEffArgs<T>&, const T*, int64_t row, int64_t col, int strip, T*);

template <class T>
ProductPlanes<T> product_planes_for(Element base) {
  if constexpr (kFetchesBase) {
    if (base != Element::none) {
      return with_any_element(base, [](auto element) -> ProductPlanes<T> {
        return &product_planes<T, sizeof(NumberOfConstant<decltype(element)>)>;
      });
    }
  }
  return &product_planes<T, 0>;
}

// The sweep prefetches the base this many bytes ahead into the first-level cache, from the second
// or from memory. They must be a fraction of the first-level cache.
constexpr int64_t kBytesAhead = 12 * 1024;

// Sweeps one whole block of a slice, kRowBlock rows that are row_stride apart. Line by line, it
// also prefetches the same block of the base of a later slice, because the pieces are too short for
// the processor to predict them.
template <bool BASE, class T, class S, class Sink>
TCUR_TARGET inline void sweep_block(
    const S* base,
    const S* later,
    int64_t later_stride,
    const T* tubes,
    int64_t row_stride,
    const Sink& sink,
    int64_t at) {
  constexpr int lanes = Simd<T>::lanes, line = 64 / sizeof(S);
#pragma GCC unroll 6
  for (int i = 0; i < kRowBlock; ++i) {
#pragma GCC unroll 4
    for (int j = 0; BASE && j < kColumnBlock; j += line) {
      fetch<Cache::first>(later + i * later_stride + j);
    }
#pragma GCC unroll 4
    for (int j = 0; j < kColumnBlock; j += lanes) {
      Vec<T> v = load(tubes + place_in_block<T>(i, j));
      if (BASE) {
        v += load_widened<T>(base + i * row_stride + j);
      }
      sink.put_whole(at + i * row_stride + j, v);
    }
  }
}

// Sweeps the first n numbers of row i of a block. There are few such rows, and conversions can make
// the code long, so all callers share one copy of it.
template <bool BASE, class T, class S, class Row>
TCUR_TARGET __attribute__((noinline)) void sweep_row(
    const S* base, const T* block, int i, int64_t n, const Row to) {
  constexpr int lanes = Simd<T>::lanes;
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    Vec<T> v = load(block + place_in_block<T>(i, j));
    if (BASE) {
      v += load_widened<T>(base + j);
    }
    to.put(j, v);
  }
  for (; j < n; ++j) {
    const T update = block[place_in_block<T>(i, j)];
    to.put(j, BASE ? widen<T>(base[j]) + update : update);
  }
}

// The update of a computed tile: rows x n values of every slice from (row, col) on.
template <class T>
struct UpdateTile {
  const T* tubes;
  int64_t row, rows, col, n;
};

// Computes W_eff of a tile from its update and a base of numbers S.
template <bool BASE, class T, class S, class Consumer>
TCUR_TARGET void sweep(const WEffArgs<T>& m, const UpdateTile<T>& tile, const Consumer& consumer) {
  const int64_t n3 = m.f.n3;
  const int64_t slice_bytes = tile.rows * tile.n * static_cast<int64_t>(sizeof(S));
  const int64_t ahead = ceil_div(kBytesAhead, slice_bytes);
  for (int64_t slice = 0; slice < n3; ++slice) {
    const BaseSlice own = m.base[slice];
    const BaseSlice then = m.base[slice + ahead < n3 ? slice + ahead : n3 - 1];
    const int64_t stride = own.stride;
    for (int64_t down = 0; down < tile.rows; down += kRowBlock) {
      const int64_t rows = tile.rows - down < kRowBlock ? tile.rows - down : kRowBlock;
      const int64_t here = (tile.row + down) * stride + tile.col;
      const int64_t there = (tile.row + down) * then.stride + tile.col;
      const S* base = BASE ? static_cast<const S*>(own.data) + here : nullptr;
      const S* later = BASE ? static_cast<const S*>(then.data) + there : nullptr;
      const auto sink = consumer.sink(slice, here, stride);
      const T* block =
          tile.tubes + down / kRowBlock * m.tile.row_size(n3) + slice * m.tile.stride();
      for (int64_t at = 0; at < tile.n; at += kColumnBlock, block += kBlock) {
        const int64_t width = tile.n - at < kColumnBlock ? tile.n - at : kColumnBlock;
        const S* from = BASE ? base + at : nullptr;
        if (rows == kRowBlock && width == kColumnBlock && sink.takes_whole_blocks()) {
          const S* next = BASE ? later + at : nullptr;
          sweep_block<BASE>(from, next, then.stride, block, stride, sink, at);
          continue;
        }
        for (int i = 0; i < rows; ++i) {
          const S* row = BASE ? from + i * stride : nullptr;
          sweep_row<BASE>(row, block, i, width, sink.row(i * stride + at));
        }
      }
    }
  }
}

template <class T, class Consumer>
using Sweep = void (*)(const WEffArgs<T>&, const UpdateTile<T>&, const Consumer&);

template <class T, class Consumer>
Sweep<T, Consumer> sweep_for(Element base) {
  if (base == Element::none) {
    return &sweep<false, T, float, Consumer>;
  }
  return with_any_element(base, [](auto element) -> Sweep<T, Consumer> {
    return &sweep<true, T, NumberOfConstant<decltype(element)>, Consumer>;
  });
}

// How many numbers of T a task needs as scratch memory.
template <class T>
TCUR_TARGET int64_t w_eff_scratch(const WEffArgs<T>& m) {
  const int64_t planes = m.f.n3 * kPlaneStride<T>, products = m.tile.rows * m.f.q() * kRowBlock;
  return planes + m.tile.size(m.f.n3) + products + 2 * kRowBlock * Simd<T>::lanes;
}

template <class T, class Consumer>
TCUR_TARGET void w_eff_tiles(
    const WEffArgs<T>& m, int64_t task, T* scratch, const Consumer& consumer) {
  const Factors<T>& f = m.f;
  T* planes = scratch;  // of one strip
  T* tubes = planes + f.n3 * kPlaneStride<T>;
  T* products = tubes + m.tile.size(f.n3);
  T* lines = products + m.tile.rows * f.q() * kRowBlock;

  const int64_t most_rows = m.tile.rows * kRowBlock, width = m.tile.columns * kColumnBlock;
  const int64_t row = task / m.column_chunks * most_rows;
  const int64_t rows = f.n1 - row < most_rows ? f.n1 - row : most_rows;
  const int64_t tiles = ceil_div(f.n2, width);
  const int64_t chunk = task % m.column_chunks;
  const int64_t first = tiles * chunk / m.column_chunks;
  const int64_t last = tiles * (chunk + 1) / m.column_chunks;
  const ProductPlanes<T> form_planes = product_planes_for<T>(m.base_element);
  const Sweep<T, Consumer> sweep_tile = sweep_for<T, Consumer>(m.base_element);

  for (int64_t down = 0; down < rows; down += kRowBlock) {
    const int64_t valid = rows - down < kRowBlock ? rows - down : kRowBlock;
    lateral_core_products(m, row + down, valid, products + down * f.q(), lines);
  }
  for (int64_t t = first; t < last; ++t) {
    const int64_t col = t * width;
    const int64_t n = f.n2 - col < width ? f.n2 - col : width;
    for (int64_t at = 0; at < n; at += kColumnBlock) {
      const int64_t columns = n - at < kColumnBlock ? n - at : kColumnBlock;
      for (int strip = 0; strip * kStrip<T> < columns; ++strip) {
        T* part = tubes + at * kRowBlock + strip * kStripSize<T>;
        for (int64_t down = 0; down < rows; down += kRowBlock, part += m.tile.row_size(f.n3)) {
          form_planes(m, products + down * f.q(), row + down, col + at, strip, planes);
          inverse_dft(*f.dft, planes, kPlaneStride<T>, part, m.tile.stride(), kStripSize<T>);
        }
      }
    }
    sweep_tile(m, {tubes, row, rows, col, n}, consumer);
  }
  consumer.finish();
}

}  // namespace tcur::TCUR_ISA
