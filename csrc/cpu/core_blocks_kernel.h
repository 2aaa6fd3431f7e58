// The core on tokens, in the real packed basis: block-diagonal, one block per bin. Tokens go in
// groups, whose part of a block is copied together, widened and padded, while it is used.

namespace tcur::TCUR_ISA {

// group[t][0 … stride) = columns `offset` … offset+width of tokens begin … begin+n, zeros after
// them.
template <class T>
TCUR_TARGET void gather_tokens(
    const TokenRows& rows, int64_t begin, int64_t n, const CoreBlock& block, T* group) {
  for (int64_t t = 0; t < n; ++t) {
    const int64_t at = (begin + t) * rows.stride + block.offset;
    T* target = group + t * block.stride;
    switch (rows.element) {
      case Element::f32:
        load_row(static_cast<const float*>(rows.data) + at, target, block.width);
        break;
      case Element::f64:
        load_row(static_cast<const double*>(rows.data) + at, target, block.width);
        break;
      case Element::bf16:
        load_row(static_cast<const BFloat16*>(rows.data) + at, target, block.width);
        break;
      case Element::f16:
        load_row(static_cast<const Half*>(rows.data) + at, target, block.width);
        break;
      case Element::none:
        break;
    }
    for (int64_t j = block.width; j < block.stride; ++j) {
      target[j] = T(0);
    }
  }
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
  T* x = scratch;
  T* y = scratch + kTokenGroup * blocks.widest;
  for (; begin < end; begin += kTokenGroup) {
    const int64_t n = end - begin < kTokenGroup ? end - begin : kTokenGroup;
    for (const CoreBlock& block : blocks.all) {
      gather_tokens(in, begin, n, block, x);
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
  T* x = scratch;
  T* y = scratch + kTokenGroup * blocks.widest;
  for (; begin < end; begin += kTokenGroup) {
    const int64_t n = end - begin < kTokenGroup ? end - begin : kTokenGroup;
    for (const CoreBlock& block : blocks.all) {
      gather_tokens(p, begin, n, block, x);
      gather_tokens(z, begin, n, block, y);
      block_product<T>(
          {x, 1, block.stride, y, products + block.start, block.width, n, block.stride, true});
    }
  }
}

template <class T, class O>
TCUR_TARGET inline void add_elements(void* y, const T* delta, int64_t begin, int64_t end) {
  O* target = static_cast<O*>(y);
  add_row(target + begin, delta + begin, target + begin, end - begin);
}

template <class T>
TCUR_TARGET void add_update(void* y, Element element, const T* delta, int64_t begin, int64_t end) {
  switch (element) {
    case Element::f32:
      return add_elements<T, float>(y, delta, begin, end);
    case Element::f64:
      return add_elements<T, double>(y, delta, begin, end);
    case Element::bf16:
      return add_elements<T, BFloat16>(y, delta, begin, end);
    case Element::f16:
      return add_elements<T, Half>(y, delta, begin, end);
    case Element::none:
      return;
  }
}

}  // namespace tcur::TCUR_ISA
