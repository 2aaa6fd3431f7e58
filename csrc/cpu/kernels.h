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

// Size of a block of all slices. It has as many rows as let the rank-r products stay in registers
// (kRowBlock in simd.h), and as many columns as make whole cache lines of every element type. It is
// computed in strips of all its rows and as many columns as registers hold, so that the spectrum of
// a strip stays in the first-level cache. A block is stored as [strips, rows, columns of a strip].
constexpr int kColumnBlock = 32;
// Rows of blocks lie this much further apart than they are long. At distances that are powers of
// two, they would share a few sets of the first-level cache.
constexpr int kPad = 16;

// A tile is `rows` x `columns` blocks of all slices. Each panel of R̂ is read once for all its rows.
struct TileBlocks {
  int64_t rows, columns;
  int64_t row_block;  // rows of a block

  // Numbers of one slice or of one plane in one row of blocks, and how far apart these lie.
  int64_t stride() const {
    return columns * row_block * kColumnBlock + kPad;
  }
  // Numbers of one row of blocks, all slices, and of the whole tile.
  int64_t row_size(int64_t n3) const {
    return n3 * stride();
  }
  int64_t size(int64_t n3) const {
    return rows * row_size(n3);
  }
};

// Sizes and tables of one call. Spectra are packed as tubes.h says.
template <class T>
struct Factors {
  int64_t n1, n2, n3, rank;
  const T* lateral_hat;  // [n1, n3*rank]
  // R̂ in panels of one strip, [panels, n3*rank, columns of a strip], zeros past the last column: a
  // strip reads one run of memory instead of a short piece of each of n3*rank rows.
  const T* panels;
  const TubeDft<T>* dft;

  int64_t q() const {
    return n3 * rank;
  }
  const T* panel(int64_t col) const {  // col: where a strip begins
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
  TileBlocks tile;
  int64_t column_chunks;  // tasks per row of tiles
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
  TileBlocks tile;
  int64_t tile_rows_per_task;
};

constexpr int64_t kTokenGroup = 16;  // tokens that a kernel works on together

// The packed basis of tokens, in which a token has n3*rank numbers and a core acts on each bin
// alone. Kernels work on tokens in rows of scratch, with room for one vector more. Transformed
// cores are [n3, rank, rank], their planes padded to whole vectors.
template <class T>
struct TokenBasis {
  int64_t n3, rank, slices, lanes;
  // [slices, n3]: what slice l multiplies bin k by, e^{2πikl/n3} and weights, packed like a
  // spectrum
  const T* turns;
  const TubeDft<T>* dft;

  int64_t q() const {
    return n3 * rank;
  }
  int64_t row() const {
    return q() + lanes;
  }
  int64_t plane() const {
    return round_up(rank * rank, lanes);
  }
  int64_t planes() const {
    return n3 * plane() + lanes;
  }
  int64_t padded_rank() const {
    return round_up(rank, lanes);
  }
  int64_t scratch() const {  // of a kernel
    return (2 * kTokenGroup + slices) * row();
  }
};

template <class T>
struct Kernels {
  const char* isa;
  int64_t lanes;      // of a vector; DFT widths are multiples of it
  int64_t strip;      // columns of a strip
  int64_t row_block;  // rows of a block
  bool fetches_base;  // tiles of W_eff ask for their base before they need it

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

  // planes = the transform of a core [n3, rank, rank], each plane as kernels multiply rows of
  // tokens by it: [in, out]. tubes: scratch as large as planes.
  void (*transform_core)(const TokenBasis<T>&, const T* core, bool transposed, T* tubes, T* planes);
  // The map of tokens_kernel.h for tokens begin … end. The side that has slices, which is `in` if
  // transposed and else `out`, has them one after another in the row of a token.
  void (*apply_core)(
      const TokenBasis<T>&,
      const T* planes,
      bool transposed,
      const TokenRows& in,
      T* out,
      int64_t begin,
      int64_t end,
      T* scratch);
  // products (+)= conj(Σ_t p[t] z[t]ᵀ) of each bin, where p[t] is the sum of its turned slices;
  // tokens begin … end; [n3, rank, padded rank]
  void (*core_products)(
      const TokenBasis<T>&,
      const TokenRows& p,
      const TokenRows& z,
      int64_t begin,
      int64_t end,
      bool accumulate,
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
