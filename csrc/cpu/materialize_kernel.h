// W_eff = W + scale * C*U*R, all slices at once.
//
// One task makes kRowBlock rows of every slice. P_k = Ĉ_k Û_k is formed once per row block; then,
// tile by tile of columns, S_k = P_k R̂_k in registers, the inverse DFT of the tile from the packed
// planes, and a sweep slice by slice that adds the base and rounds. A tile of all slices stays in
// the second-level cache; nothing the size of W is written but the result.

namespace tcur::TCUR_ISA {

// P = Ĉ Û for the rows of one block, packed: products[plane][b][row].
template <class T>
TCUR_TARGET void lateral_core_products(
    const Factors<T>& f,
    const T* core_hat,  // [n3, rank, rank]
    int64_t row,
    int64_t rows,
    T* products,  // [n3, rank, kRowBlock]
    T* line) {    // scratch: 2 * rank
  const int64_t r = f.rank, square = r * r;
  T* re = line;
  T* im = line + r;
  for (int64_t i = 0; i < kRowBlock; ++i) {
    const T* c = f.lateral_hat + (row + (i < rows ? i : 0)) * f.q();
    const T keep = i < rows ? T(1) : T(0);  // rows past the end are zero
    for (int64_t plane = 0; plane < f.n3;) {
      const bool pair = plane > 0 && plane <= 2 * pairs(f.n3);
      const T* u_re = core_hat + plane * square;
      const T* u_im = u_re + square;
      for (int64_t b = 0; b < r; ++b) {
        re[b] = im[b] = T(0);
      }
      for (int64_t a = 0; a < r; ++a) {
        const T c_re = keep * c[plane * r + a];
        const T c_im = pair ? keep * c[(plane + 1) * r + a] : T(0);
        if (pair) {
#pragma omp simd
          for (int64_t b = 0; b < r; ++b) {
            re[b] += c_re * u_re[a * r + b] - c_im * u_im[a * r + b];
            im[b] += c_re * u_im[a * r + b] + c_im * u_re[a * r + b];
          }
        } else {
#pragma omp simd
          for (int64_t b = 0; b < r; ++b) {
            re[b] += c_re * u_re[a * r + b];
          }
        }
      }
      for (int64_t b = 0; b < r; ++b) {
        products[(plane * r + b) * kRowBlock + i] = re[b];
        if (pair) {
          products[((plane + 1) * r + b) * kRowBlock + i] = im[b];
        }
      }
      plane += pair ? 2 : 1;
    }
  }
}

// S = P R̂ of one real bin at COLUMNS vectors.
template <class T, int COLUMNS>
TCUR_TARGET inline void real_bin(
    const T* p,  // [rank, kRowBlock]
    const T* r_hat,
    int64_t stride,
    int64_t rank,
    int64_t tile,
    T* s) {
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> acc[kRowBlock][COLUMNS] = {};
  for (int64_t b = 0; b < rank; ++b) {
    for (int v = 0; v < COLUMNS; ++v) {
      const Vec<T> x = load(r_hat + b * stride + v * lanes);
      for (int i = 0; i < kRowBlock; ++i) {
        acc[i][v] += p[b * kRowBlock + i] * x;
      }
    }
  }
  for (int i = 0; i < kRowBlock; ++i) {
    for (int v = 0; v < COLUMNS; ++v) {
      store(s + i * tile + v * lanes, acc[i][v]);
    }
  }
}

// S = P R̂ of one complex bin; its two planes follow each other in every array.
template <class T, int COLUMNS>
TCUR_TARGET inline void complex_bin(
    const T* p,  // [2, rank, kRowBlock]
    const T* r_hat,
    int64_t stride,
    int64_t rank,
    int64_t tile,
    T* s) {
  constexpr int lanes = Simd<T>::lanes;
  const T* p_im = p + rank * kRowBlock;
  const T* r_im = r_hat + rank * stride;
  Vec<T> re[kRowBlock][COLUMNS] = {}, im[kRowBlock][COLUMNS] = {};
  for (int64_t b = 0; b < rank; ++b) {
    for (int v = 0; v < COLUMNS; ++v) {
      const Vec<T> x = load(r_hat + b * stride + v * lanes);
      const Vec<T> y = load(r_im + b * stride + v * lanes);
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
    for (int v = 0; v < COLUMNS; ++v) {
      store(s + i * tile + v * lanes, re[i][v]);
      store(s + kRowBlock * tile + i * tile + v * lanes, im[i][v]);
    }
  }
}

// planes: [n3, kRowBlock, tile] = P R̂ at the columns r_hat points to.
template <class T>
TCUR_TARGET void product_planes(
    const Factors<T>& f,
    const T* products,
    const T* r_hat,
    int64_t stride,
    int64_t tile,
    T* planes) {
  constexpr int columns = TCUR_REGISTERS == 32 ? 2 : 1;  // 8 accumulators per column vector
  constexpr int step = columns * Simd<T>::lanes;
  for (int64_t plane = 0; plane < f.n3;) {
    const bool pair = plane > 0 && plane <= 2 * pairs(f.n3);
    const T* p = products + plane * f.rank * kRowBlock;
    const T* x = r_hat + plane * f.rank * stride;
    T* s = planes + plane * kRowBlock * tile;
    for (int64_t c = 0; c < tile; c += step) {
      if (pair) {
        complex_bin<T, columns>(p, x + c, stride, f.rank, tile, s + c);
      } else {
        real_bin<T, columns>(p, x + c, stride, f.rank, tile, s + c);
      }
    }
    plane += pair ? 2 : 1;
  }
}

template <class T, class O>
TCUR_TARGET inline void write_row(
    const void* base, Element element, int64_t offset, const T* values, O* target, int64_t n) {
  switch (element) {
    case Element::none:
      return store_row(values, target, n);
    case Element::f32:
      return add_row(static_cast<const float*>(base) + offset, values, target, n);
    case Element::f64:
      return add_row(static_cast<const double*>(base) + offset, values, target, n);
    case Element::bf16:
      return add_row(static_cast<const BFloat16*>(base) + offset, values, target, n);
    case Element::f16:
      return add_row(static_cast<const Half*>(base) + offset, values, target, n);
  }
}

template <class T, class O>
TCUR_TARGET void sweep(
    const MaterializeArgs<T>& m,
    const T* tubes,
    int64_t row,
    int64_t rows,
    int64_t col,
    int64_t n) {
  const int64_t slice_size = m.f.n1 * m.f.n2;
  for (int64_t l = 0; l < m.f.n3; ++l) {
    const void* base = m.base_element == Element::none ? nullptr : m.base[l];
    O* out = static_cast<O*>(m.out) + l * slice_size;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t offset = (row + i) * m.f.n2 + col;
      const T* values = tubes + (l * kRowBlock + i) * m.tile;
      write_row(base, m.base_element, offset, values, out + offset, n);
    }
  }
}

template <class T>
TCUR_TARGET int64_t materialize_scratch(const MaterializeArgs<T>& m) {
  const int64_t tiles = 2 * m.f.n3 * kRowBlock * m.tile;
  return m.f.q() * kRowBlock + 2 * m.f.rank + tiles + m.f.q() * m.tile;
}

template <class T>
TCUR_TARGET void materialize(const MaterializeArgs<T>& m, int64_t task, T* scratch) {
  const Factors<T>& f = m.f;
  const int64_t width = kRowBlock * m.tile;
  T* planes = scratch;
  T* tubes = planes + f.n3 * width;
  T* edge = tubes + f.n3 * width;  // [q, tile]: the last columns of R̂, padded with zeros
  T* products = edge + f.q() * m.tile;
  T* line = products + f.q() * kRowBlock;

  const int64_t row = task / m.column_chunks * kRowBlock;
  const int64_t rows = f.n1 - row < kRowBlock ? f.n1 - row : kRowBlock;
  const int64_t tiles = (f.n2 + m.tile - 1) / m.tile;
  const int64_t chunk = task % m.column_chunks;
  const int64_t first = tiles * chunk / m.column_chunks;
  const int64_t last = tiles * (chunk + 1) / m.column_chunks;

  lateral_core_products(f, m.core_hat, row, rows, products, line);
  for (int64_t t = first; t < last; ++t) {
    const int64_t col = t * m.tile;
    const int64_t n = f.n2 - col < m.tile ? f.n2 - col : m.tile;
    if (n == m.tile) {
      product_planes(f, products, f.horizontal_hat + col, f.n2, m.tile, planes);
    } else {
      pad_columns(f, col, n, m.tile, edge);
      product_planes(f, products, edge, m.tile, m.tile, planes);
    }
    inverse_dft(*f.dft, planes, width, tubes);
    switch (m.out_element) {
      case Element::f32:
        sweep<T, float>(m, tubes, row, rows, col, n);
        break;
      case Element::f64:
        sweep<T, double>(m, tubes, row, rows, col, n);
        break;
      case Element::bf16:
        sweep<T, BFloat16>(m, tubes, row, rows, col, n);
        break;
      case Element::f16:
        sweep<T, Half>(m, tubes, row, rows, col, n);
        break;
      case Element::none:
        break;
    }
  }
}

}  // namespace tcur::TCUR_ISA
