// What the host side of an operator and its compiled variants share: argument structs and the table
// of entry points of one instruction set. Pointers only, no tensors: the variants stay free of
// torch.
#pragma once

#include "../tubes.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace tcur {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// Element type of a tensor in memory.
enum class Element { none, f32, f64, bf16, f16 };

constexpr int kRowBlock = 4;  // rows of a tile: as many as keep the rank-r products in registers

// Sizes and tables of one call. Spectra are packed as tubes.h says.
template <class T>
struct Factors {
  int64_t n1, n2, n3, rank;
  const T* lateral_hat;     // [n1, n3*rank]
  const T* horizontal_hat;  // [n3*rank, n2]
  const FoldedDft<T>* dft;

  int64_t q() const {
    return n3 * rank;
  }
};

template <class T>
struct MaterializeArgs {
  Factors<T> f;
  const T* core_hat;        // [n3, rank, rank], weighted by scale * inverse_weight
  const void* const* base;  // n3 pointers to [n1, n2]; unused if base_element is none
  Element base_element;
  void* out;  // [n3, n1, n2]
  Element out_element;
  int64_t tile;           // columns of a tile, a multiple of tile_step
  int64_t column_chunks;  // tasks per row block
};

template <class T>
struct CoreGradDenseArgs {
  Factors<T> f;
  const void* grad;  // [n3, n1, n2]
  Element grad_element;
  int64_t tile;
  int64_t row_blocks_per_task;
};

// One diagonal block of the core in the real packed basis: `width` is rank for a real bin and
// 2*rank for a pair, `offset` its first column among the n3*rank.
struct CoreBlock {
  int64_t offset, width, start;  // start: of the block's values in the array of all blocks
};

template <class T>
struct Kernels {
  const char* isa;
  int64_t tile_step;  // tiles and DFT widths are multiples of this

  // planes <-> tubes for `width` tubes side by side, width a multiple of tile_step.
  void (*inverse_dft)(const FoldedDft<T>&, const T* planes, int64_t width, T* tubes);
  void (*forward_dft)(const FoldedDft<T>&, T* tubes, int64_t width, T* planes);

  int64_t (*materialize_scratch)(const MaterializeArgs<T>&);
  void (*materialize)(const MaterializeArgs<T>&, int64_t task, T* scratch);

  int64_t (*core_grad_dense_scratch)(const CoreGradDenseArgs<T>&);
  // core_hat: [n3, rank, rank], the partial sum of this task
  void (*core_grad_dense)(const CoreGradDenseArgs<T>&, int64_t task, T* scratch, T* core_hat);

  // out[t, block] (+)= values(block)^T applied to in[t, block], tokens begin … end
  void (*apply_core)(
      const CoreBlock* blocks,
      int64_t n_blocks,
      const T* values,
      const T* in,
      int64_t in_stride,
      T* out,
      int64_t out_stride,
      bool accumulate,
      int64_t begin,
      int64_t end);
  // products(block) = Σ_t p[t, block]^T z[t, block], tokens begin … end
  void (*core_products)(
      const CoreBlock& block,
      const T* p,
      int64_t p_stride,
      const T* z,
      int64_t z_stride,
      int64_t begin,
      int64_t end,
      T* products);
  // y += delta, elements begin … end
  void (*add_update)(void* y, Element element, const T* delta, int64_t begin, int64_t end);
};

// The variant chosen for this machine, or by use_isa.
template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>();
template <>
const Kernels<double>& kernels<double>();

// Names of the variants compiled into the library, best first, and of those this processor runs.
std::vector<const char*> compiled_isas();
std::vector<const char*> runnable_isas();
const char* chosen_isa();
// Selects a variant by name; false if it was not compiled or this processor lacks it.
bool use_isa(const char* name);

}  // namespace tcur
