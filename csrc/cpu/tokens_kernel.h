// Applies cores to tokens in the packed basis, and sums the gradient of a core over tokens.
//
// At bin k a token has r numbers z_k = re + i im, or r real ones. The core at slice l maps them to
//
//     forward     conj(e^{2πikl/n3} w_k Û_k z_k)         transposed: with Û_k transposed
//
// The phase and the weight w_k are one factor for all r numbers: the turn of the bin. So the core
// itself is never turned: a token is, where it has r numbers in r² products. And all slices share
// the products: a forward map turns what comes out, once for each slice, and a transposed map adds
// up the turned slices before it multiplies.
//
// A row of scratch is a token, n3*rank numbers and room for one vector more. Planes are written in
// whole vectors. What a vector writes past the end of its plane is overwritten by what belongs
// there: planes are written in order, and the last vector of a plane before its others.
#pragma once

#include "compiled_kernels.h"
#include "convert_kernel.h"

namespace tcur::TCUR_ISA {

// The first column of the last vector of a plane, which may reach past its end.
template <class T>
TCUR_TARGET inline int64_t last_column(int64_t rank) {
  constexpr int64_t lanes = Simd<T>::lanes;
  return (rank - 1) / lanes * lanes;
}

// out[j] = Σ_s turn of slice s * rows[s][j], complex for pairs.
template <class T>
TCUR_TARGET void sum_turned(
    const TokenBasis<T>& basis, const T* turns, const T* rows, int64_t count, T* out) {
  constexpr int64_t lanes = Simd<T>::lanes;
  const int64_t n3 = basis.n3, rank = basis.rank, row = basis.row();
  for (Bin bin(n3); bin.is_there(); bin.next()) {
    for (int64_t column = last_column<T>(rank); column >= 0; column -= lanes) {
      const int64_t at = bin.plane * rank + column;
      Vec<T> re = {}, im = {};
      for (int64_t s = 0; s < count; ++s) {
        const T* turn = turns + s * n3 + bin.plane;
        const Vec<T> x = load(rows + s * row + at);
        re += turn[0] * x;
        if (bin.is_pair) {
          const Vec<T> y = load(rows + s * row + at + rank);
          re -= turn[1] * y;
          im += turn[0] * y;
          im += turn[1] * x;
        }
      }
      store(out + at, re);
      if (bin.is_pair) {
        store(out + at + rank, im);
      }
    }
  }
}

// One bin of ROWS tokens, one vector from `column` on: out = conj(x times the core of the bin).
template <class T, int ROWS, bool PAIR>
TCUR_TARGET inline void bin_products(
    const TokenBasis<T>& basis, const T* core, const T* x, T* out, int64_t column) {
  const int64_t rank = basis.rank, row = basis.row();
  Vec<T> rr[ROWS] = {}, ri[ROWS] = {}, ir[ROWS] = {}, ii[ROWS] = {};
  for (int64_t k = 0; k < rank; ++k) {
    const Vec<T> re = load(core + k * rank + column);
    const Vec<T> im = PAIR ? load(core + basis.plane() + k * rank + column) : Vec<T>{};
    for (int i = 0; i < ROWS; ++i) {
      const T a = x[i * row + k];
      rr[i] += a * re;
      if constexpr (PAIR) {
        const T b = x[i * row + rank + k];
        ri[i] += a * im;
        ir[i] += b * re;
        ii[i] += b * im;
      }
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    T* target = out + i * row + column;
    store(target, PAIR ? Vec<T>(rr[i] - ii[i]) : rr[i]);
    if constexpr (PAIR) {
      store(target + rank, Vec<T>(-(ri[i] + ir[i])));
    }
  }
}

template <class T, int ROWS>
TCUR_TARGET inline void row_products(
    const TokenBasis<T>& basis, const Bin& bin, const T* core, const T* x, T* out) {
  for (int64_t column = last_column<T>(basis.rank); column >= 0; column -= Simd<T>::lanes) {
    if (bin.is_pair) {
      bin_products<T, ROWS, true>(basis, core, x, out, column);
    } else {
      bin_products<T, ROWS, false>(basis, core, x, out, column);
    }
  }
}

// All bins of n tokens. The core of a bin stays in the first-level cache for all of them.
template <class T>
TCUR_TARGET void token_products(
    const TokenBasis<T>& basis, const T* planes, const T* x, int64_t n, T* out) {
  constexpr int many = TCUR_REGISTERS == 32 ? 4 : 2;  // four accumulators a token
  const int64_t row = basis.row();
  for (Bin bin(basis.n3); bin.is_there(); bin.next()) {
    const T* core = planes + bin.plane * basis.plane();
    const int64_t at = bin.plane * basis.rank;
    int64_t t = 0;
    for (; t + many <= n; t += many) {
      row_products<T, many>(basis, bin, core, x + t * row + at, out + t * row + at);
    }
    for (; t < n; ++t) {
      row_products<T, 1>(basis, bin, core, x + t * row + at, out + t * row + at);
    }
  }
}

// target[b][a] = source[a][b], both rank x rank. Four numbers are stored at a time.
template <class T>
TCUR_TARGET inline void transpose(const T* source, int64_t rank, T* target) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T))));
  for (int64_t b = 0; b < rank; ++b, target += rank) {
    const T* column = source + b;
    int64_t a = 0;
    for (; a + 4 <= rank; a += 4, column += 4 * rank) {
      const Four four = {column[0], column[rank], column[2 * rank], column[3 * rank]};
      __builtin_memcpy(target + a, &four, sizeof(four));
    }
    for (; a < rank; ++a, column += rank) {
      target[a] = *column;
    }
  }
}

template <class T>
TCUR_TARGET void transform_core(
    const TokenBasis<T>& basis, const T* core, bool transposed, T* tubes, T* planes) {
  const int64_t rank = basis.rank, square = rank * rank, width = basis.plane();
  for (int64_t l = 0; l < basis.n3; ++l) {
    if (transposed) {
      load_row(core + l * square, tubes + l * width, square);
    } else {
      transpose(core + l * square, rank, tubes + l * width);
    }
  }
  forward_dft(*basis.dft, tubes, width, planes, width, width);
}

// values[0 … n) = the numbers of a tensor from `first` on, widened.
template <class T, class S>
TCUR_TARGET void load_elements(const void* data, int64_t first, T* values, int64_t n) {
  load_row(static_cast<const S*>(data) + first, values, n);
}

template <class T>
using LoadElements = void (*)(const void*, int64_t, T*, int64_t);

template <class T>
LoadElements<T> load_elements_of(Element element) {
  return with_any_element(element, [](auto constant) -> LoadElements<T> {
    return &load_elements<T, NumberOfConstant<decltype(constant)>>;
  });
}

// out = tokens begin … begin+n
template <class T>
TCUR_TARGET void gather(
    const TokenBasis<T>& basis, const TokenRows& tokens, int64_t begin, int64_t n, T* out) {
  const LoadElements<T> load_from = load_elements_of<T>(tokens.element);
  for (int64_t t = 0; t < n; ++t) {
    load_from(tokens.data, (begin + t) * tokens.stride, out + t * basis.row(), basis.q());
  }
}

// The same of tokens with slices, turned and added up. `slices` is scratch of a row for each.
template <class T>
TCUR_TARGET void gather_turned(
    const TokenBasis<T>& basis,
    const TokenRows& tokens,
    int64_t begin,
    int64_t n,
    T* slices,
    T* out) {
  const LoadElements<T> load_from = load_elements_of<T>(tokens.element);
  const int64_t q = basis.q(), row = basis.row();
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t s = 0; s < basis.slices; ++s) {
      load_from(tokens.data, (begin + t) * tokens.stride + s * q, slices + s * row, q);
    }
    sum_turned(basis, basis.turns, slices, basis.slices, out + t * row);
  }
}

template <class T>
TCUR_TARGET void apply_core(
    const TokenBasis<T>& basis,
    const T* planes,
    bool transposed,
    const TokenRows& in,
    T* out,
    int64_t begin,
    int64_t end,
    T* scratch) {
  const int64_t q = basis.q(), row = basis.row(), slices = basis.slices;
  T* x = scratch;
  T* y = x + kTokenGroup * row;
  T* rows = y + kTokenGroup * row;
  for (; begin < end; begin += kTokenGroup) {
    const int64_t n = end - begin < kTokenGroup ? end - begin : kTokenGroup;
    if (transposed) {
      gather_turned(basis, in, begin, n, rows, x);
    } else {
      gather(basis, in, begin, n, x);
    }
    token_products(basis, planes, x, n, y);
    for (int64_t t = 0; t < n; ++t) {
      if (transposed) {
        load_row(y + t * row, out + (begin + t) * q, q);
        continue;
      }
      for (int64_t s = 0; s < slices; ++s) {
        sum_turned(basis, basis.turns + s * basis.n3, y + t * row, 1, rows);
        load_row(rows, out + ((begin + t) * slices + s) * q, q);
      }
    }
  }
}

// One bin, ROWS rows of the gradient, one vector from `column` on, n tokens:
// out (+)= conj(Σ_t p_t z_tᵀ)
template <class T, int ROWS, bool PAIR>
TCUR_TARGET inline void bin_gradients(
    const TokenBasis<T>& basis,
    const T* p,
    const T* z,
    int64_t n,
    bool accumulate,
    T* out,
    int64_t column) {
  const int64_t rank = basis.rank, row = basis.row(), stride = basis.padded_rank();
  T* real = out + column;
  T* imaginary = real + rank * stride;
  Vec<T> re[ROWS], im[ROWS];
  for (int i = 0; i < ROWS; ++i) {
    re[i] = accumulate ? load(real + i * stride) : Vec<T>{};
    im[i] = PAIR && accumulate ? load(imaginary + i * stride) : Vec<T>{};
  }
  for (int64_t t = 0; t < n; ++t) {
    const Vec<T> x = load(z + t * row + column);
    const Vec<T> y = PAIR ? load(z + t * row + rank + column) : Vec<T>{};
    for (int i = 0; i < ROWS; ++i) {
      const T a = p[t * row + i];
      re[i] += a * x;
      if constexpr (PAIR) {
        const T b = p[t * row + rank + i];
        re[i] -= b * y;
        im[i] -= a * y;
        im[i] -= b * x;
      }
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    store(real + i * stride, re[i]);
    if constexpr (PAIR) {
      store(imaginary + i * stride, im[i]);
    }
  }
}

template <class T, bool PAIR>
TCUR_TARGET inline void bin_gradient(
    const TokenBasis<T>& basis, const T* p, const T* z, int64_t n, bool accumulate, T* out) {
  constexpr int many = TCUR_REGISTERS == 32 ? 8 : 4;  // two accumulators a row
  const int64_t rank = basis.rank, stride = basis.padded_rank();
  for (int64_t column = 0; column < rank; column += Simd<T>::lanes) {
    int64_t a = 0;
    for (; a + many <= rank; a += many) {
      bin_gradients<T, many, PAIR>(basis, p + a, z, n, accumulate, out + a * stride, column);
    }
    for (; a < rank; ++a) {
      bin_gradients<T, 1, PAIR>(basis, p + a, z, n, accumulate, out + a * stride, column);
    }
  }
}

template <class T>
TCUR_TARGET void core_products(
    const TokenBasis<T>& basis,
    const TokenRows& p,
    const TokenRows& z,
    int64_t begin,
    int64_t end,
    bool accumulate,
    T* products,
    T* scratch) {
  const int64_t row = basis.row(), stride = basis.padded_rank();
  T* turned = scratch;
  T* inputs = turned + kTokenGroup * row;
  T* rows = inputs + kTokenGroup * row;
  for (; begin < end; begin += kTokenGroup, accumulate = true) {
    const int64_t n = end - begin < kTokenGroup ? end - begin : kTokenGroup;
    gather_turned(basis, p, begin, n, rows, turned);
    gather(basis, z, begin, n, inputs);
    for (Bin bin(basis.n3); bin.is_there(); bin.next()) {
      const int64_t at = bin.plane * basis.rank;
      const auto add = bin.is_pair ? &bin_gradient<T, true> : &bin_gradient<T, false>;
      add(basis, turned + at, inputs + at, n, accumulate, products + at * stride);
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

#define TCUR_INSTANTIATE(T)                                                                      \
  template void transform_core(const TokenBasis<T>&, const T*, bool, T*, T*);                    \
  template void apply_core(                                                                      \
      const TokenBasis<T>&, const T*, bool, const TokenRows&, T*, int64_t, int64_t, T*);         \
  template void core_products(                                                                   \
      const TokenBasis<T>&, const TokenRows&, const TokenRows&, int64_t, int64_t, bool, T*, T*); \
  template void add_update(void*, Element, const T*, int64_t, int64_t);
TCUR_INSTANTIATE(float)
TCUR_INSTANTIATE(double)
#undef TCUR_INSTANTIATE

}  // namespace tcur::TCUR_ISA
