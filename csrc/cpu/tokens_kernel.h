// Applies the core to tokens in the real packed basis, where it is block-diagonal with one block
// per bin. The kernels work on groups of tokens. For each block they copy the columns that a group
// needs, widened and padded, into scratch memory.
#pragma once

#include "compiled_kernels.h"
#include "convert_kernel.h"

namespace tcur::TCUR_ISA {

// group[t][0 … stride) = columns `offset` … offset+width of tokens begin … begin+n, zeros after
// them.
template <class T, class S>
TCUR_TARGET void gather_tokens(
    const TokenRows& rows, int64_t begin, int64_t n, const CoreBlock& block, T* group) {
  const S* data = static_cast<const S*>(rows.data);
  for (int64_t t = 0; t < n; ++t) {
    T* target = group + t * block.stride;
    load_row(data + (begin + t) * rows.stride + block.offset, target, block.width);
    for (int64_t j = block.width; j < block.stride; ++j) {
      target[j] = T(0);
    }
  }
}

template <class T>
using GatherTokens = void (*)(const TokenRows&, int64_t, int64_t, const CoreBlock&, T*);

template <class T>
GatherTokens<T> gather_tokens_for(Element tokens) {
  return with_any_element(tokens, [](auto element) -> GatherTokens<T> {
    return &gather_tokens<T, NumberOfConstant<decltype(element)>>;
  });
}

// out[i][:] (+)= Σ_k left[i * left_row + k * left_step] right[k][:], right and out `stride` wide.
template <class T>
struct BlockProduct {
  const T* left;
  int64_t left_row, left_step;
  const T* right;
  T* out;
  int64_t rows, inner, stride;
  bool accumulate;
};

// ROWS rows from `row` on, one vector from `column` on.
template <class T, int ROWS>
TCUR_TARGET inline void product_rows(const BlockProduct<T>& p, int64_t row, int64_t column) {
  const T* left = p.left + row * p.left_row;
  const T* right = p.right + column;
  T* out = p.out + row * p.stride + column;
  Vec<T> acc[ROWS];
  for (int i = 0; i < ROWS; ++i) {
    acc[i] = p.accumulate ? load(out + i * p.stride) : Vec<T>{};
  }
  for (int64_t k = 0; k < p.inner; ++k) {
    const Vec<T> v = load(right + k * p.stride);
    for (int i = 0; i < ROWS; ++i) {
      acc[i] += left[i * p.left_row + k * p.left_step] * v;
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    store(out + i * p.stride, acc[i]);
  }
}

template <class T>
TCUR_TARGET void block_product(const BlockProduct<T>& p) {
  constexpr int64_t many = 8;
  for (int64_t column = 0; column < p.stride; column += Simd<T>::lanes) {
    int64_t row = 0;
    for (; row + many <= p.rows; row += many) {
      product_rows<T, many>(p, row, column);
    }
    for (; row < p.rows; ++row) {
      product_rows<T, 1>(p, row, column);
    }
  }
}

template <class T>
TCUR_TARGET void apply_core(
    const CoreBlocks& blocks,
    const T* values,
    const TokenRows& in,
    T* out,
    int64_t out_stride,
    bool accumulate,
    int64_t begin,
    int64_t end,
    T* scratch) {
  const GatherTokens<T> gather = gather_tokens_for<T>(in.element);
  T* x = scratch;
  T* y = scratch + kTokenGroup * blocks.widest;
  for (; begin < end; begin += kTokenGroup) {
    const int64_t n = end - begin < kTokenGroup ? end - begin : kTokenGroup;
    for (const CoreBlock& block : blocks.all) {
      gather(in, begin, n, block, x);
      block_product<T>(
          {x, block.stride, 1, values + block.start, y, n, block.width, block.stride, false});
      for (int64_t t = 0; t < n; ++t) {
        T* target = out + (begin + t) * out_stride + block.offset;
        const T* source = y + t * block.stride;
        for (int64_t j = 0; j < block.width; ++j) {
          target[j] = accumulate ? target[j] + source[j] : source[j];
        }
      }
    }
  }
}

template <class T>
TCUR_TARGET void core_products(
    const CoreBlocks& blocks,
    const TokenRows& p,
    const TokenRows& z,
    int64_t begin,
    int64_t end,
    T* products,
    T* scratch) {
  const GatherTokens<T> gather_p = gather_tokens_for<T>(p.element);
  const GatherTokens<T> gather_z = gather_tokens_for<T>(z.element);
  T* x = scratch;
  T* y = scratch + kTokenGroup * blocks.widest;
  for (; begin < end; begin += kTokenGroup) {
    const int64_t n = end - begin < kTokenGroup ? end - begin : kTokenGroup;
    for (const CoreBlock& block : blocks.all) {
      gather_p(p, begin, n, block, x);
      gather_z(z, begin, n, block, y);
      block_product<T>(
          {x, 1, block.stride, y, products + block.start, block.width, n, block.stride, true});
    }
  }
}

template <class T, class O>
TCUR_TARGET void add_elements(void* y, const T* delta, int64_t begin, int64_t end) {
  constexpr int lanes = Simd<T>::lanes;
  O* target = static_cast<O*>(y);
  int64_t j = begin;
  for (; j + lanes <= end; j += lanes) {
    put<false, O, T>(target + j, Vec<T>(load(delta + j) + load_widened<T>(target + j)));
  }
  for (; j < end; ++j) {
    target[j] = Narrow<O, T>::from(widen<T>(target[j]) + delta[j]);
  }
}

template <class T>
using AddElements = void (*)(void*, const T*, int64_t, int64_t);

template <class T>
TCUR_TARGET void add_update(void* y, Element element, const T* delta, int64_t begin, int64_t end) {
  const auto add = with_any_element(element, [](auto constant) -> AddElements<T> {
    return &add_elements<T, NumberOfConstant<decltype(constant)>>;
  });
  add(y, delta, begin, end);
}

#define TCUR_INSTANTIATE(T)                                                                    \
  template void apply_core(                                                                    \
      const CoreBlocks&, const T*, const TokenRows&, T*, int64_t, bool, int64_t, int64_t, T*); \
  template void core_products(                                                                 \
      const CoreBlocks&, const TokenRows&, const TokenRows&, int64_t, int64_t, T*, T*);        \
  template void add_update(void*, Element, const T*, int64_t, int64_t);
TCUR_INSTANTIATE(float)
TCUR_INSTANTIATE(double)
#undef TCUR_INSTANTIATE

}  // namespace tcur::TCUR_ISA
