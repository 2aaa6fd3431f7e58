// What the host side of an operator and its compiled variants share: argument structs and the table
// of entry points of one instruction set. Pointers only, no tensors: the variants stay free of
// torch.
#pragma once

#include "../codelets.h"
#include "../tubes.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <vector>

namespace tcur {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// Element type of a tensor in memory.
enum class Element { none, f32, f64, bf16, f16 };

constexpr int64_t bytes_of(Element element) {
  return element == Element::none  ? 0
         : element == Element::f64 ? 8
         : element == Element::f32 ? 4
                                   : 2;
}

// A block of all slices: as many rows as keep the rank-r products in registers, and as many columns
// as keep its spectrum in the first-level cache. A tile is some blocks side by side.
constexpr int kRowBlock = 4;
constexpr int kColumnBlock = 32;
constexpr int kBlock = kRowBlock * kColumnBlock;
// Rows of blocks lie this much further apart than they are long: powers of two would share a few
// sets of the first-level cache.
constexpr int kPad = 16;

// Sizes and tables of one call. Spectra are packed as tubes.h says.
template <class T>
struct Factors {
  int64_t n1, n2, n3, rank;
  const T* lateral_hat;  // [n1, n3*rank]
  // R̂ in panels of one column block, [panels, n3*rank, kColumnBlock], zeros past the last column: a
  // block reads one run of memory instead of a short piece of each of n3*rank rows.
  const T* panels;
  const TubeDft<T>* dft;

  int64_t q() const {
    return n3 * rank;
  }
  const T* panel(int64_t col) const {
    return panels + col * q();
  }
};

// One slice [n1, n2], its rows `stride` numbers apart in the base and in W_eff alike.
struct MaterializeSlice {
  const void* base;  // null without a base
  void* out;
  int64_t stride;
};

template <class T>
struct MaterializeArgs {
  Factors<T> f;
  const T* core_hat;                  // [n3, rank, core_stride], weighted by scale * inverse_weight
  int64_t core_stride;                // of rows, padded with zeros to whole vectors
  const MaterializeSlice* slices;     // n3
  Element base_element, out_element;  // base_element none: no base
  int64_t tile_blocks;                // blocks of a tile
  int64_t column_chunks;              // tasks per row block
  bool stream;                        // write past the caches
};

template <class T>
struct CoreGradDenseArgs {
  Factors<T> f;
  const void* grad;  // [n3, n1, n2]
  Element grad_element;
  int64_t tile_blocks;
  int64_t row_blocks_per_task;
};

// One diagonal block of the core in the real packed basis: `width` is rank for a real bin and
// 2*rank for a pair, `offset` its first column among the n3*rank. Its values are [width, stride],
// the stride padded to whole vectors, from `start` on in the array of all blocks.
struct CoreBlock {
  int64_t offset, width, stride, start;
};

struct CoreBlocks {
  std::vector<CoreBlock> all;
  int64_t size = 0, widest = 0;  // of all values together; the largest stride
};

constexpr int64_t kTokenGroup = 32;  // tokens whose part of a block is worked on together

// Tokens as rows of some element type.
struct TokenRows {
  const void* data;
  Element element;
  int64_t stride;
};

template <class T>
struct Kernels {
  const char* isa;
  int64_t lanes;  // of a vector; DFT widths are multiples of it

  // planes <-> tubes for `width` tubes side by side; the input is overwritten.
  void (*inverse_dft)(
      const TubeDft<T>&,
      T* planes,
      int64_t plane_stride,
      T* tubes,
      int64_t tube_stride,
      int64_t width);
  void (*forward_dft)(
      const TubeDft<T>&,
      T* tubes,
      int64_t tube_stride,
      T* planes,
      int64_t plane_stride,
      int64_t width);

  int64_t (*materialize_scratch)(const MaterializeArgs<T>&);
  void (*materialize)(const MaterializeArgs<T>&, int64_t task, T* scratch);

  int64_t (*core_grad_dense_scratch)(const CoreGradDenseArgs<T>&);
  // core_hat: [n3, rank, rank], the partial sum of this task
  void (*core_grad_dense)(const CoreGradDenseArgs<T>&, int64_t task, T* scratch, T* core_hat);

  // Both work in scratch of 2 * kTokenGroup * blocks.widest.
  // out[t, block] (+)= values(block)^T applied to in[t, block], tokens begin … end
  void (*apply_core)(
      const CoreBlocks& blocks,
      const T* values,
      const TokenRows& in,
      T* out,
      int64_t out_stride,
      bool accumulate,
      int64_t begin,
      int64_t end,
      T* scratch);
  // products(block) += Σ_t p[t, block]^T z[t, block], tokens begin … end, for all blocks
  void (*core_products)(
      const CoreBlocks& blocks,
      const TokenRows& p,
      const TokenRows& z,
      int64_t begin,
      int64_t end,
      T* products,
      T* scratch);
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
