// The core on tokens, in the real packed basis: block-diagonal, one block per bin.

namespace tcur::TCUR_ISA {

template <class T>
TCUR_TARGET void apply_core(
    const CoreBlock* blocks,
    int64_t n_blocks,
    const T* values,
    const T* in,
    int64_t in_stride,
    T* out,
    int64_t out_stride,
    bool accumulate,
    int64_t begin,
    int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t k = 0; k < n_blocks; ++k) {
      const CoreBlock& block = blocks[k];
      const T* x = in + t * in_stride + block.offset;
      T* y = out + t * out_stride + block.offset;
      const T* m = values + block.start;  // [width in, width out]
      if (!accumulate) {
        for (int64_t j = 0; j < block.width; ++j) {
          y[j] = T(0);
        }
      }
      for (int64_t i = 0; i < block.width; ++i) {
        const T xi = x[i];
#pragma omp simd
        for (int64_t j = 0; j < block.width; ++j) {
          y[j] += xi * m[i * block.width + j];
        }
      }
    }
  }
}

template <class T>
TCUR_TARGET void core_products(
    const CoreBlock& block,
    const T* p,
    int64_t p_stride,
    const T* z,
    int64_t z_stride,
    int64_t begin,
    int64_t end,
    T* products) {  // [width, width]
  const int64_t w = block.width;
  for (int64_t i = 0; i < w * w; ++i) {
    products[i] = T(0);
  }
  for (int64_t t = begin; t < end; ++t) {
    const T* x = p + t * p_stride + block.offset;
    const T* y = z + t * z_stride + block.offset;
    for (int64_t i = 0; i < w; ++i) {
      const T xi = x[i];
#pragma omp simd
      for (int64_t j = 0; j < w; ++j) {
        products[i * w + j] += xi * y[j];
      }
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
