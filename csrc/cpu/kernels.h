// What the host side of an operator and its kernels share: argument structs, and the table of the
// kernels of one instruction set. The structs hold pointers and no tensors. Kernels use only the
// number types of torch, so that they compile quickly.
#pragma once

#include "../common/elements.h"
#include "../common/integers.h"
#include "../common/token_rows.h"
#include "../common/tubes.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <vector>

namespace tcur {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// The numbers of an element type.
template <Element E>
struct NumberOf;
template <>
struct NumberOf<Element::f32> {
  using Type = float;
};
template <>
struct NumberOf<Element::f64> {
  using Type = double;
};
template <>
struct NumberOf<Element::bf16> {
  using Type = BFloat16;
};
template <>
struct NumberOf<Element::f16> {
  using Type = Half;
};

// Calls f with the constant of any element type. For none it passes f32; kernels then read nothing.
template <class F>
constexpr auto with_any_element(Element element, F&& f) {
  return with_element<Element::f64, Element::bf16, Element::f16, Element::f32>(element, f);
}
// The number type of such a constant.
template <class Constant>
using NumberOfConstant = typename NumberOf<Constant::value>::Type;

// Size of a block of all slices. It has as many rows as let the rank-r products stay in registers,
// and as many columns as let its spectrum stay in the first-level cache. A tile is some blocks side
// by side.
constexpr int kRowBlock = 4;
constexpr int kColumnBlock = 32;
constexpr int kBlock = kRowBlock * kColumnBlock;
// Rows of blocks lie this much further apart than they are long. At distances that are powers of
// two, they would share a few sets of the first-level cache.
constexpr int kPad = 16;

// Distance between the rows of a tile. A row is [tile_blocks, kRowBlock, kColumnBlock] numbers of
// one slice or of one plane.
inline int64_t tile_stride(int64_t tile_blocks) {
  return tile_blocks * kBlock + kPad;
}

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
struct BaseSlice {
  const void* data;  // null without a base
  int64_t stride;
};

// The inputs of tiles of W_eff = W + scale * C*U*R, for any consumer of the tiles.
template <class T>
struct WEffArgs {
  Factors<T> f;
  const T* core_hat;      // [n3, rank, core_stride], weighted by scale * inverse_weight
  int64_t core_stride;    // of rows, padded with zeros to whole vectors
  const BaseSlice* base;  // n3
  Element base_element;   // none: no base
  int64_t tile_blocks;    // blocks of a tile
  int64_t column_chunks;  // tasks per row block
};

template <class T>
struct MaterializeArgs {
  WEffArgs<T> w_eff;
  void* const* out;  // n3 slices
  Element out_element;
  bool stream;  // write without caching
};

template <class T>
struct CoreGradDenseArgs {
  Factors<T> f;
  const void* grad;  // [n3, n1, n2]
  Element grad_element;
  int64_t tile_blocks;
  int64_t row_blocks_per_task;
};

// One diagonal block of the core in the real packed basis. `width` is rank for a real bin and
// 2*rank for a pair. `offset` is its first column among the n3*rank. Its values are
// [width, stride], with the stride padded to whole vectors, and begin at `start` in the array of
// all blocks.
struct CoreBlock {
  int64_t offset, width, stride, start;
};

struct CoreBlocks {
  std::vector<CoreBlock> all;
  int64_t size = 0, widest = 0;  // of all values together; the largest stride
};

constexpr int64_t kTokenGroup = 32;  // tokens that a kernel works on together

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

// The kernels of the variant that was chosen for this machine, or by use_isa.
template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>();
template <>
const Kernels<double>& kernels<double>();

// A variant of all kernels, for one instruction set.
struct IsaVariant {
  const char* name;
  int vector_bytes;  // the more, the better the variant
  bool (*runs_here)();
  const Kernels<float>* f32;
  const Kernels<double>* f64;
};

// Adds a variant to those that isa.h chooses among.
bool register_variant(const IsaVariant& variant);

}  // namespace tcur
