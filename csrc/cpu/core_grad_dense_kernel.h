// ∂U = Cᵀ * G * Rᵀ from a dense G, read once.
//
// One task takes some rows of tiles. For each tile it does the forward DFT of all slices, and then
// Q_k += Ĝ_k R̂_kᴴ over the columns. For each row of tiles it does ∂Û_k += Ĉ_kᴴ Q_k. The partial
// sums of the tasks are added in a fixed order, so the result does not depend on the number of
// threads.
#pragma once

#include "compiled_kernels.h"
#include "convert_kernel.h"

namespace tcur::TCUR_ISA {

// A strip of G: `rows` x `n` numbers of every slice from (row, col) on.
struct StripOfG {
  int64_t row, rows, col, n;
};

// tubes: [n3, kRowBlock, kStrip], kPlaneStride apart, = a strip of G, zeros outside of it.
template <class T, class S>
TCUR_TARGET void gather_strip(const CoreGradDenseArgs<T>& m, const StripOfG& strip, T* tubes) {
  const S* grad = static_cast<const S*>(m.grad);
  for (int64_t l = 0; l < m.f.n3; ++l) {
    for (int64_t i = 0; i < kRowBlock; ++i) {
      T* values = tubes + l * kPlaneStride<T> + i * kStrip<T>;
      const int64_t valid = i < strip.rows ? strip.n : 0;
      load_row(grad + (l * m.f.n1 + strip.row + i) * m.f.n2 + strip.col, values, valid);
      for (int64_t j = valid; j < kStrip<T>; ++j) {
        values[j] = T(0);
      }
    }
  }
}

template <class T>
using Gather = void (*)(const CoreGradDenseArgs<T>&, const StripOfG&, T* tubes);

template <class T>
Gather<T> gather_for(Element grad) {
  return with_any_element(grad, [](auto element) -> Gather<T> {
    return &gather_strip<T, NumberOfConstant<decltype(element)>>;
  });
}

// products[plane][b][row] += Σ_j Ĝ[plane][row][j] conj(R̂)[plane][b][j] over the strips of a tile.
template <class T, bool PAIR>
TCUR_INLINE void adjoint_bin(
    const T* g,  // [1 or 2, strips, kRowBlock, kStrip], plane_stride apart
    int64_t plane_stride,
    const T* r_hat,  // [1 or 2, rank, kStrip] of the first panel, panels panel_size apart
    int64_t panel_size,
    int64_t rank,
    int64_t strips,
    T* products) {  // [1 or 2, rank, kRowBlock]
  constexpr int lanes = Simd<T>::lanes;
  const T* r_im = r_hat + rank * kStrip<T>;
  for (int64_t b = 0; b < rank; ++b) {
    Vec<T> re[kRowBlock], im[kRowBlock];
    for (int i = 0; i < kRowBlock; ++i) {
      re[i] = im[i] = Vec<T>{};
    }
    for (int64_t strip = 0; strip < strips; ++strip) {
      for (int64_t j = 0; j < kStrip<T>; j += lanes) {
        const T* g_re = g + strip * kStripSize<T> + j;
        const Vec<T> x = load(r_hat + strip * panel_size + b * kStrip<T> + j);
        for (int i = 0; i < kRowBlock; ++i) {
          re[i] += load(g_re + i * kStrip<T>) * x;
        }
        if (PAIR) {
          const Vec<T> y = load(r_im + strip * panel_size + b * kStrip<T> + j);
          for (int i = 0; i < kRowBlock; ++i) {
            const Vec<T> gi = load(g_re + plane_stride + i * kStrip<T>);
            re[i] += gi * y;
            im[i] += gi * x;
            im[i] -= load(g_re + i * kStrip<T>) * y;
          }
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

// Does the step of adjoint_bin for all bins and rows of a tile.
template <class T>
TCUR_TARGET void adjoint_planes(
    const CoreGradDenseArgs<T>& m,
    const T* planes,
    int64_t row_blocks,
    int64_t col,
    int64_t strips,
    T* products) {
  const Factors<T>& f = m.f;
  const int64_t panel_size = f.q() * kStrip<T>, stride = m.tile.stride();
  for (Bin bin(f.n3); bin.is_there(); bin.next()) {
    const T* x = f.panel(col) + bin.plane * f.rank * kStrip<T>;
    for (int64_t block = 0; block < row_blocks; ++block) {
      const T* g = planes + block * m.tile.row_size(f.n3) + bin.plane * stride;
      T* p = products + (block * f.n3 + bin.plane) * f.rank * kRowBlock;
      if (bin.is_pair) {
        adjoint_bin<T, true>(g, stride, x, panel_size, f.rank, strips, p);
      } else {
        adjoint_bin<T, false>(g, stride, x, panel_size, f.rank, strips, p);
      }
    }
  }
}

// core_hat[plane][a][b] += Σ_i conj(Ĉ)[row i][plane][a] Q[plane][b][i]
template <class T>
TCUR_TARGET void add_core_block(
    const Factors<T>& f, int64_t row, int64_t rows, const T* products, T* core_hat) {
  const int64_t r = f.rank, square = r * r;
  for (Bin bin(f.n3); bin.is_there(); bin.next()) {
    const int64_t plane = bin.plane;
    const bool pair = bin.is_pair;
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
  }
}

template <class T>
TCUR_TARGET int64_t core_grad_dense_scratch(const CoreGradDenseArgs<T>& m) {
  const int64_t tubes = m.f.n3 * kPlaneStride<T>, products = m.tile.rows * m.f.q() * kRowBlock;
  return tubes + m.tile.size(m.f.n3) + products;
}

template <class T>
TCUR_TARGET void core_grad_dense(
    const CoreGradDenseArgs<T>& m, int64_t task, T* scratch, T* core_hat) {
  const Factors<T>& f = m.f;
  T* tubes = scratch;  // of one strip
  T* planes = tubes + f.n3 * kPlaneStride<T>;
  T* products = planes + m.tile.size(f.n3);
  const Gather<T> gather = gather_for<T>(m.grad_element);
  const int64_t most_rows = m.tile.rows * kRowBlock, width = m.tile.columns * kColumnBlock;

  for (int64_t step = 0; step < m.tile_rows_per_task; ++step) {
    const int64_t row = (task * m.tile_rows_per_task + step) * most_rows;
    if (row >= f.n1) {
      return;
    }
    const int64_t rows = f.n1 - row < most_rows ? f.n1 - row : most_rows;
    const int64_t row_blocks = ceil_div(rows, kRowBlock);
    for (int64_t k = 0; k < row_blocks * f.q() * kRowBlock; ++k) {
      products[k] = T(0);
    }
    for (int64_t col = 0; col < f.n2; col += width) {
      const int64_t n = f.n2 - col < width ? f.n2 - col : width;
      for (int64_t at = 0; at < n; at += kStrip<T>) {
        T* part = planes + at * kRowBlock;
        const int64_t columns = n - at < kStrip<T> ? n - at : kStrip<T>;
        for (int64_t down = 0; down < rows; down += kRowBlock, part += m.tile.row_size(f.n3)) {
          gather(m, {row + down, rows - down, col + at, columns}, tubes);
          forward_dft(*f.dft, tubes, kPlaneStride<T>, part, m.tile.stride(), kStripSize<T>);
        }
      }
      adjoint_planes(m, planes, row_blocks, col, ceil_div(n, kStrip<T>), products);
    }
    for (int64_t down = 0; down < rows; down += kRowBlock) {
      const int64_t valid = rows - down < kRowBlock ? rows - down : kRowBlock;
      add_core_block(f, row + down, valid, products + down * f.q(), core_hat);
    }
  }
}

template int64_t core_grad_dense_scratch(const CoreGradDenseArgs<float>&);
template int64_t core_grad_dense_scratch(const CoreGradDenseArgs<double>&);
template void core_grad_dense(const CoreGradDenseArgs<float>&, int64_t, float*, float*);
template void core_grad_dense(const CoreGradDenseArgs<double>&, int64_t, double*, double*);

}  // namespace tcur::TCUR_ISA
