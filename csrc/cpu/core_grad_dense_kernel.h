// ∂U = Cᵀ * G * Rᵀ from a dense G, read once.
//
// One task takes some row blocks. Per tile: forward DFT of the tile of all slices, then
// Q_k += Ĝ_k R̂_kᴴ over the columns; per row block: ∂Û_k += Ĉ_kᴴ Q_k. The tasks' partial sums are
// added in a fixed order, so the result does not depend on the number of threads.

namespace tcur::TCUR_ISA {

// tubes: [n3, kRowBlock, tile] = the tile of G, zeros outside of it.
template <class T, class S>
TCUR_TARGET void gather_tile(
    const CoreGradDenseArgs<T>& m, int64_t row, int64_t rows, int64_t col, int64_t n, T* tubes) {
  const S* grad = static_cast<const S*>(m.grad);
  for (int64_t l = 0; l < m.f.n3; ++l) {
    for (int64_t i = 0; i < kRowBlock; ++i) {
      T* values = tubes + (l * kRowBlock + i) * m.tile;
      int64_t valid = 0;
      if (i < rows) {
        valid = n;
        load_row(grad + (l * m.f.n1 + row + i) * m.f.n2 + col, values, n);
      }
      for (int64_t j = valid; j < m.tile; ++j) {
        values[j] = T(0);
      }
    }
  }
}

// products[plane][b][row] += Σ_j Ĝ[plane][row][j] conj(R̂)[plane][b][j] over one tile.
template <class T, bool PAIR>
TCUR_TARGET inline void adjoint_bin(
    const T* g,  // [1 or 2, kRowBlock, tile]
    const T* r_hat,
    int64_t stride,
    int64_t rank,
    int64_t tile,
    T* products) {  // [1 or 2, rank, kRowBlock]
  constexpr int lanes = Simd<T>::lanes;
  const T* g_im = g + kRowBlock * tile;
  const T* r_im = r_hat + rank * stride;
  for (int64_t b = 0; b < rank; ++b) {
    Vec<T> re[kRowBlock] = {}, im[kRowBlock] = {};
    for (int64_t j = 0; j < tile; j += lanes) {
      const Vec<T> x = load(r_hat + b * stride + j);
      for (int i = 0; i < kRowBlock; ++i) {
        re[i] += load(g + i * tile + j) * x;
      }
      if (PAIR) {
        const Vec<T> y = load(r_im + b * stride + j);
        for (int i = 0; i < kRowBlock; ++i) {
          const Vec<T> gi = load(g_im + i * tile + j);
          re[i] += gi * y;
          im[i] += gi * x;
          im[i] -= load(g + i * tile + j) * y;
        }
      }
    }
    for (int i = 0; i < kRowBlock; ++i) {
      products[b * kRowBlock + i] += sum<T>(re[i]);
      if (PAIR) {
        products[(rank + b) * kRowBlock + i] += sum<T>(im[i]);
      }
    }
  }
}

// core_hat[plane][a][b] += Σ_i conj(Ĉ)[row i][plane][a] Q[plane][b][i]
template <class T>
TCUR_TARGET void add_core_block(
    const Factors<T>& f, int64_t row, int64_t rows, const T* products, T* core_hat) {
  const int64_t r = f.rank, square = r * r;
  for (int64_t plane = 0; plane < f.n3;) {
    const bool pair = plane > 0 && plane <= 2 * pairs(f.n3);
    const T* q_re = products + plane * r * kRowBlock;
    const T* q_im = q_re + r * kRowBlock;
    T* u_re = core_hat + plane * square;
    T* u_im = u_re + square;
    for (int64_t i = 0; i < rows; ++i) {
      const T* c = f.lateral_hat + (row + i) * f.q() + plane * r;
      for (int64_t a = 0; a < r; ++a) {
        for (int64_t b = 0; b < r; ++b) {
          const T qr = q_re[b * kRowBlock + i];
          if (pair) {
            const T qi = q_im[b * kRowBlock + i];
            u_re[a * r + b] += c[a] * qr + c[r + a] * qi;
            u_im[a * r + b] += c[a] * qi - c[r + a] * qr;
          } else {
            u_re[a * r + b] += c[a] * qr;
          }
        }
      }
    }
    plane += pair ? 2 : 1;
  }
}

template <class T>
TCUR_TARGET int64_t core_grad_dense_scratch(const CoreGradDenseArgs<T>& m) {
  return 2 * m.f.n3 * kRowBlock * m.tile + m.f.q() * (m.tile + kRowBlock);
}

template <class T>
TCUR_TARGET void core_grad_dense(
    const CoreGradDenseArgs<T>& m, int64_t task, T* scratch, T* core_hat) {
  const Factors<T>& f = m.f;
  const int64_t width = kRowBlock * m.tile;
  T* planes = scratch;
  T* tubes = planes + f.n3 * width;
  T* edge = tubes + f.n3 * width;
  T* products = edge + f.q() * m.tile;

  for (int64_t step = 0; step < m.row_blocks_per_task; ++step) {
    const int64_t row = (task * m.row_blocks_per_task + step) * kRowBlock;
    if (row >= f.n1) {
      return;
    }
    const int64_t rows = f.n1 - row < kRowBlock ? f.n1 - row : kRowBlock;
    for (int64_t k = 0; k < f.q() * kRowBlock; ++k) {
      products[k] = T(0);
    }
    for (int64_t col = 0; col < f.n2; col += m.tile) {
      const int64_t n = f.n2 - col < m.tile ? f.n2 - col : m.tile;
      switch (m.grad_element) {
        case Element::f32:
          gather_tile<T, float>(m, row, rows, col, n, tubes);
          break;
        case Element::f64:
          gather_tile<T, double>(m, row, rows, col, n, tubes);
          break;
        case Element::bf16:
          gather_tile<T, BFloat16>(m, row, rows, col, n, tubes);
          break;
        case Element::f16:
          gather_tile<T, Half>(m, row, rows, col, n, tubes);
          break;
        case Element::none:
          break;
      }
      forward_dft(*f.dft, tubes, width, planes);
      const T* r_hat = f.horizontal_hat + col;
      int64_t stride = f.n2;
      if (n != m.tile) {
        pad_columns(f, col, n, m.tile, edge);
        r_hat = edge;
        stride = m.tile;
      }
      for (int64_t plane = 0; plane < f.n3;) {
        const bool pair = plane > 0 && plane <= 2 * pairs(f.n3);
        const T* g = planes + plane * width;
        const T* x = r_hat + plane * f.rank * stride;
        T* p = products + plane * f.rank * kRowBlock;
        if (pair) {
          adjoint_bin<T, true>(g, x, stride, f.rank, m.tile, p);
        } else {
          adjoint_bin<T, false>(g, x, stride, f.rank, m.tile, p);
        }
        plane += pair ? 2 : 1;
      }
    }
    add_core_block(f, row, rows, products, core_hat);
  }
}

}  // namespace tcur::TCUR_ISA
