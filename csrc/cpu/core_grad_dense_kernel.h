// ∂U = Cᵀ * G * Rᵀ from a dense G, read once.
//
// One task takes some row blocks. For each tile it does the forward DFT of all slices, and then
// Q_k += Ĝ_k R̂_kᴴ over the columns. For each row block it does ∂Û_k += Ĉ_kᴴ Q_k. The partial sums
// of the tasks are added in a fixed order, so the result does not depend on the number of threads.
#pragma once

#include "compiled_kernels.h"
#include "convert_kernel.h"

namespace tcur::TCUR_ISA {

// tubes: [n3, kRowBlock, kColumnBlock] = a block of G, zeros outside of it.
template <class T, class S>
TCUR_TARGET void gather_block(
    const CoreGradDenseArgs<T>& m,
    int64_t row,
    int64_t rows,
    int64_t col,
    int64_t n,
    T* tubes,
    int64_t tube_stride) {
  const S* grad = static_cast<const S*>(m.grad);
  for (int64_t l = 0; l < m.f.n3; ++l) {
    for (int64_t i = 0; i < kRowBlock; ++i) {
      T* values = tubes + l * tube_stride + i * kColumnBlock;
      const int64_t valid = i < rows ? n : 0;
      load_row(grad + (l * m.f.n1 + row + i) * m.f.n2 + col, values, valid);
      for (int64_t j = valid; j < kColumnBlock; ++j) {
        values[j] = T(0);
      }
    }
  }
}

template <class T>
using Gather = void (*)(
    const CoreGradDenseArgs<T>&,
    int64_t row,
    int64_t rows,
    int64_t col,
    int64_t n,
    T* tubes,
    int64_t tube_stride);

template <class T>
Gather<T> gather_for(Element grad) {
  return with_any_element(grad, [](auto element) -> Gather<T> {
    return &gather_block<T, NumberOfConstant<decltype(element)>>;
  });
}

// products[plane][b][row] += Σ_j Ĝ[plane][row][j] conj(R̂)[plane][b][j] over the blocks of a tile.
template <class T, bool PAIR>
TCUR_TARGET inline void adjoint_bin(
    const T* g,  // [1 or 2, blocks, kRowBlock, kColumnBlock], plane_stride apart
    int64_t plane_stride,
    const T* r_hat,  // [1 or 2, rank, kColumnBlock] of the first panel, panels panel_size apart
    int64_t panel_size,
    int64_t rank,
    int64_t blocks,
    T* products) {  // [1 or 2, rank, kRowBlock]
  constexpr int lanes = Simd<T>::lanes;
  const T* r_im = r_hat + rank * kColumnBlock;
  for (int64_t b = 0; b < rank; ++b) {
    Vec<T> re[kRowBlock], im[kRowBlock];
    for (int i = 0; i < kRowBlock; ++i) {
      re[i] = im[i] = Vec<T>{};
    }
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t j = 0; j < kColumnBlock; j += lanes) {
        const T* g_re = g + block * kBlock + j;
        const Vec<T> x = load(r_hat + block * panel_size + b * kColumnBlock + j);
        for (int i = 0; i < kRowBlock; ++i) {
          re[i] += load(g_re + i * kColumnBlock) * x;
        }
        if (PAIR) {
          const Vec<T> y = load(r_im + block * panel_size + b * kColumnBlock + j);
          for (int i = 0; i < kRowBlock; ++i) {
            const Vec<T> gi = load(g_re + plane_stride + i * kColumnBlock);
            re[i] += gi * y;
            im[i] += gi * x;
            im[i] -= load(g_re + i * kColumnBlock) * y;
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

// Does the step of adjoint_bin for all bins, on a run of blocks.
template <class T>
TCUR_TARGET void adjoint_planes(
    const Factors<T>& f,
    const T* planes,
    int64_t plane_stride,
    const T* r_hat,
    int64_t blocks,
    T* products) {
  const int64_t panel_size = f.q() * kColumnBlock;
  for (Bin bin(f.n3); bin.is_there(); bin.next()) {
    const int64_t plane = bin.plane;
    const T* g = planes + plane * plane_stride;
    const T* x = r_hat + plane * f.rank * kColumnBlock;
    T* p = products + plane * f.rank * kRowBlock;
    if (bin.is_pair) {
      adjoint_bin<T, true>(g, plane_stride, x, panel_size, f.rank, blocks, p);
    } else {
      adjoint_bin<T, false>(g, plane_stride, x, panel_size, f.rank, blocks, p);
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
  const int64_t tubes = m.f.n3 * (kBlock + kPad), planes = m.f.n3 * tile_stride(m.tile_blocks);
  return tubes + planes + m.f.q() * kRowBlock;
}

template <class T>
TCUR_TARGET void core_grad_dense(
    const CoreGradDenseArgs<T>& m, int64_t task, T* scratch, T* core_hat) {
  const Factors<T>& f = m.f;
  constexpr int64_t tube_stride = kBlock + kPad;
  const int64_t plane_stride = tile_stride(m.tile_blocks), tile = m.tile_blocks * kColumnBlock;
  T* tubes = scratch;  // of one block
  T* planes = tubes + f.n3 * tube_stride;
  T* products = planes + f.n3 * plane_stride;
  const Gather<T> gather = gather_for<T>(m.grad_element);

  for (int64_t step = 0; step < m.row_blocks_per_task; ++step) {
    const int64_t row = (task * m.row_blocks_per_task + step) * kRowBlock;
    if (row >= f.n1) {
      return;
    }
    const int64_t rows = f.n1 - row < kRowBlock ? f.n1 - row : kRowBlock;
    for (int64_t k = 0; k < f.q() * kRowBlock; ++k) {
      products[k] = T(0);
    }
    for (int64_t col = 0; col < f.n2; col += tile) {
      const int64_t n = f.n2 - col < tile ? f.n2 - col : tile;
      for (int64_t at = 0, block = 0; at < n; at += kColumnBlock, ++block) {
        const int64_t width = n - at < kColumnBlock ? n - at : kColumnBlock;
        gather(m, row, rows, col + at, width, tubes, tube_stride);
        forward_dft(*f.dft, tubes, tube_stride, planes + block * kBlock, plane_stride, kBlock);
      }
      const int64_t blocks = ceil_div(n, kColumnBlock);
      adjoint_planes(f, planes, plane_stride, f.panel(col), blocks, products);
    }
    add_core_block(f, row, rows, products, core_hat);
  }
}

template int64_t core_grad_dense_scratch(const CoreGradDenseArgs<float>&);
template int64_t core_grad_dense_scratch(const CoreGradDenseArgs<double>&);
template void core_grad_dense(const CoreGradDenseArgs<float>&, int64_t, float*, float*);
template void core_grad_dense(const CoreGradDenseArgs<double>&, int64_t, double*, double*);

}  // namespace tcur::TCUR_ISA
