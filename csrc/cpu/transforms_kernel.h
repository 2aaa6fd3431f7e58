// Real DFT along tubes: by two factors or as a convolution (factors_kernel.h), or by the levels of
// tubes.h. `width` tubes lie side by side, a multiple of the vector length. The code works on one
// strip of a few vectors at a time, and does all levels while the strip is in the first-level
// cache. Both transforms overwrite their input.
#pragma once

#include "compiled_kernels.h"
#include "factors_kernel.h"

namespace tcur::TCUR_ISA {

// The rows A_k and B_k of one strip.
template <class T>
struct FoldedRows {
  T* first;  // A_0
  T* a;      // A_k = a + k * a_step, k >= 1
  T* b;      // B_k = b + k * b_step, k >= 1
  int64_t a_step, b_step;

  T* row_a(int64_t k) const {
    return k == 0 ? first : a + k * a_step;
  }
  T* row_b(int64_t k) const {
    return b + k * b_step;
  }
  FoldedRows from(int64_t column) const {
    return {first + column, a + column, b + column, a_step, b_step};
  }
};

// Where the outputs of a strip go: tubes x_l (inverse) or packed planes (forward).
template <class T, bool INVERSE>
struct DftOutput {
  T* data;
  int64_t stride, n3;

  T* single(int64_t l) const {  // l = 0 or n3/2
    return data + (INVERSE || l == 0 ? l : 2 * l - 1) * stride;
  }
  T* low(int64_t l) const {
    return data + (INVERSE ? l : 2 * l - 1) * stride;
  }
  T* high(int64_t l) const {
    return data + (INVERSE ? n3 - l : 2 * l) * stride;
  }
  DftOutput from(int64_t column) const {
    return {data + column, stride, n3};
  }
};

// Rows k and half-k become their sum and their difference.
template <class T, int COLUMNS>
TCUR_TARGET inline void fold_level(const DftLevel<T>& level, const FoldedRows<T>& rows) {
  constexpr int lanes = Simd<T>::lanes;
  for (int64_t k = 0; k < (level.half + 1) / 2; ++k) {
    T* low = rows.row_a(k);
    T* high = rows.row_a(level.half - k);
    for (int v = 0; v < COLUMNS; ++v) {
      const Vec<T> x = load(low + v * lanes), y = load(high + v * lanes);
      store(low + v * lanes, Vec<T>(x + y));
      store(high + v * lanes, Vec<T>(x - y));
    }
  }
  for (int64_t k = 1; k < (level.half + 1) / 2; ++k) {
    T* low = rows.row_b(k);
    T* high = rows.row_b(level.half - k);
    for (int v = 0; v < COLUMNS; ++v) {
      const Vec<T> x = load(low + v * lanes), y = load(high + v * lanes);
      store(low + v * lanes, Vec<T>(x - y));
      store(high + v * lanes, Vec<T>(x + y));
    }
  }
}

// The rows that a level multiplies. `cosine` is the row of A with coefficient 1, and `a` begins the
// `size` rows of A that follow. `sine` is the row of B with coefficient ±1, null if there is none,
// and `b` begins the other rows of B.
template <class T>
struct LevelRows {
  const T* cosine;
  const T* sine;
  const T* a;
  const T* b;
  int64_t a_step, b_step;
};

template <class T>
TCUR_TARGET inline LevelRows<T> rows_of(const DftLevel<T>& level, const FoldedRows<T>& rows) {
  const int64_t half = level.half;
  if (!level.is_even()) {
    return {rows.first, nullptr, rows.row_a(1), rows.row_b(1), rows.a_step, rows.b_step};
  }
  return {
      rows.row_a(half),
      half % 2 == 0 ? rows.row_b(half / 2) : nullptr,
      rows.row_a(half - 1),
      rows.row_b(half - 1),
      -rows.a_step,
      -rows.b_step};
}

// Levels of more terms are long. Added up one after another, terms of one sign would lose more
// digits than a fast transform does. So their sums are those of few terms, with the errors of
// adding these.
constexpr int64_t kLongLevel = 64, kTermsOfSum = 16;

// A sum that keeps what its additions round off.
template <class T>
struct ExactSum {
  Vec<T> total{}, rest{};

  TCUR_TARGET inline void add(const Vec<T>& part) {
    const Vec<T> sum = total + part, added = sum - total;
    rest += (total - (sum - added)) + (part - added);
    total = sum;
  }
  TCUR_TARGET inline Vec<T> value() const {
    return total + rest;
  }
};

// Begins the sums of some lines: what needs no product, of cosines and of sines.
template <class T, int LINES, int COLUMNS>
TCUR_TARGET inline void start_lines(
    const LevelRows<T>& rows,
    int64_t first,
    Vec<T> (&even)[LINES][COLUMNS],
    Vec<T> (&odd)[LINES][COLUMNS]) {
  constexpr int lanes = Simd<T>::lanes;
  for (int v = 0; v < COLUMNS; ++v) {
    const Vec<T> start = load(rows.cosine + v * lanes);
    const Vec<T> turned = rows.sine == nullptr ? Vec<T>{} : load(rows.sine + v * lanes);
    for (int i = 0; i < LINES; ++i) {
      even[i][v] = start;
      odd[i][v] = (first + i) % 2 == 0 ? turned : Vec<T>(-turned);
    }
  }
}

// Stores the outputs of some lines: their cosine sums minus and plus their sine sums.
template <class T, bool INVERSE, int LINES, int COLUMNS>
TCUR_TARGET inline void store_lines(
    const DftLevel<T>& level,
    int64_t first,
    const DftOutput<T, INVERSE>& out,
    const Vec<T> (&even)[LINES][COLUMNS],
    const Vec<T> (&odd)[LINES][COLUMNS]) {
  constexpr int lanes = Simd<T>::lanes;
  for (int i = 0; i < LINES; ++i) {
    const int64_t l = level.step * level.frequency(first + i);
    T* low = out.low(l);
    T* high = out.high(l);
    for (int v = 0; v < COLUMNS; ++v) {
      const Vec<T> e = even[i][v], o = odd[i][v];
      store(low + v * lanes, INVERSE ? Vec<T>(e - o) : e);
      store(high + v * lanes, INVERSE ? Vec<T>(e + o) : Vec<T>(-o));
    }
  }
}

// As dft_lines, for levels of more terms than are added up one after another. It is no part of that
// function, whose accumulators stay in registers.
template <class T, bool INVERSE, int LINES, int COLUMNS>
__attribute__((noinline)) TCUR_TARGET void long_dft_lines(
    const DftLevel<T>& level,
    const LevelRows<T>& rows,
    int64_t first,
    const DftOutput<T, INVERSE>& out) {
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> even[LINES][COLUMNS], odd[LINES][COLUMNS];
  start_lines<T, LINES, COLUMNS>(rows, first, even, odd);
  for (int i = 0; i < LINES; ++i) {
    const T* cos = level.cos.data() + (first + i) * level.size;
    const T* sin = level.sin.data() + (first + i) * level.size;
    for (int v = 0; v < COLUMNS; ++v) {
      ExactSum<T> cosines, sines;
      for (int64_t begin = 0; begin < level.size; begin += kTermsOfSum) {
        const int64_t end = begin + kTermsOfSum < level.size ? begin + kTermsOfSum : level.size;
        Vec<T> some_cosines{}, some_sines{};
        for (int64_t k = begin; k < end; ++k) {
          some_cosines += cos[k] * load(rows.a + k * rows.a_step + v * lanes);
          some_sines += sin[k] * load(rows.b + k * rows.b_step + v * lanes);
        }
        cosines.add(some_cosines);
        sines.add(some_sines);
      }
      even[i][v] += cosines.value();
      odd[i][v] += sines.value();
    }
  }
  store_lines<T, INVERSE, LINES, COLUMNS>(level, first, out, even, odd);
}

// Computes LINES outputs of a level from `first` on. The accumulators stay in registers.
template <class T, bool INVERSE, int LINES, int COLUMNS>
TCUR_TARGET inline void dft_lines(
    const DftLevel<T>& level,
    const LevelRows<T>& rows,
    int64_t first,
    const DftOutput<T, INVERSE>& out) {
  if (level.size > kLongLevel) {
    long_dft_lines<T, INVERSE, LINES, COLUMNS>(level, rows, first, out);
    return;
  }
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> even[LINES][COLUMNS], odd[LINES][COLUMNS];
  start_lines<T, LINES, COLUMNS>(rows, first, even, odd);
  const T* cos = level.cos.data() + first * level.size;
  const T* sin = level.sin.data() + first * level.size;
  const T* a = rows.a;
  const T* b = rows.b;
  for (int64_t k = 0; k < level.size; ++k, a += rows.a_step, b += rows.b_step) {
    for (int v = 0; v < COLUMNS; ++v) {
      const Vec<T> av = load(a + v * lanes), bv = load(b + v * lanes);
      for (int i = 0; i < LINES; ++i) {
        even[i][v] += cos[i * level.size + k] * av;
        odd[i][v] += sin[i * level.size + k] * bv;
      }
    }
  }
  store_lines<T, INVERSE, LINES, COLUMNS>(level, first, out, even, odd);
}

// The one output of a level that needs no sine: l = 0 of an odd length, l = half (of n3: n3/2) of
// an even length whose half is odd.
template <class T, int COLUMNS>
TCUR_TARGET inline void dft_single(const DftLevel<T>& level, const LevelRows<T>& rows, T* out) {
  constexpr int lanes = Simd<T>::lanes;
  for (int v = 0; v < COLUMNS; ++v) {
    ExactSum<T> total;
    Vec<T> part = load(rows.cosine + v * lanes);
    for (int64_t k = 1; k <= level.size; ++k) {
      const Vec<T> a = load(rows.a + (k - 1) * rows.a_step + v * lanes);
      part += level.is_even() && k % 2 != 0 ? Vec<T>(-a) : a;
      if (k % kTermsOfSum == 0 && level.size > kLongLevel) {
        total.add(part);
        part = Vec<T>{};
      }
    }
    total.add(part);
    store(out + v * lanes, total.value());
  }
}

template <class T, bool INVERSE, int COLUMNS>
TCUR_TARGET inline void dft_strip(
    const TubeDft<T>& dft, const FoldedRows<T>& rows, const DftOutput<T, INVERSE>& out) {
  // With 32 registers, 4 x 2 x 2 accumulators leave room for the operands; with 16, only 2 x 2 x 2.
  constexpr int lines = TCUR_REGISTERS == 32 ? 4 : 2;
  for (const DftLevel<T>& level : dft.levels) {
    if (level.is_even()) {
      fold_level<T, COLUMNS>(level, rows);
    }
    const LevelRows<T> inputs = rows_of(level, rows);
    int64_t i = 0;
    for (; i + lines <= level.outputs; i += lines) {
      dft_lines<T, INVERSE, lines, COLUMNS>(level, inputs, i, out);
    }
    for (; i < level.outputs; ++i) {
      dft_lines<T, INVERSE, 1, COLUMNS>(level, inputs, i, out);
    }
    if (!level.is_even()) {
      dft_single<T, COLUMNS>(level, inputs, out.single(0));
    } else if (level.half % 2 != 0) {
      dft_single<T, COLUMNS>(level, inputs, out.single(dft.n3 / 2));
    }
  }
}

template <class T, bool INVERSE>
TCUR_TARGET inline void dft_strips(
    const TubeDft<T>& dft,
    const FoldedRows<T>& rows,
    const DftOutput<T, INVERSE>& out,
    int64_t width) {
  constexpr int columns = 2;
  constexpr int lanes = Simd<T>::lanes;
  int64_t c = 0;
  for (; c + columns * lanes <= width; c += columns * lanes) {
    dft_strip<T, INVERSE, columns>(dft, rows.from(c), out.from(c));
  }
  for (; c < width; c += lanes) {
    dft_strip<T, INVERSE, 1>(dft, rows.from(c), out.from(c));
  }
}

// planes: packed spectrum, n3 rows -> tubes: n3 rows. It applies no weights: the planes already
// include the weights 1/n3 and 2/n3.
template <class T>
TCUR_TARGET void inverse_dft(
    const TubeDft<T>& dft,
    T* planes,
    int64_t plane_stride,
    T* tubes,
    int64_t tube_stride,
    int64_t width) {
  if (dft.factors.outer > 0) {
    inverse_by_factors(dft, planes, plane_stride, tubes, tube_stride, width);
    return;
  }
  if (dft.convolution) {
    by_convolution<T, true>(dft, planes, plane_stride, tubes, tube_stride, width);
    return;
  }
  const int64_t step = 2 * plane_stride;
  const FoldedRows<T> rows{planes, planes - plane_stride, planes, step, step};
  dft_strips<T, true>(dft, rows, {tubes, tube_stride, dft.n3}, width);
}

// tubes -> planes, in the layouts of inverse_dft.
template <class T>
TCUR_TARGET void forward_dft(
    const TubeDft<T>& dft,
    T* tubes,
    int64_t tube_stride,
    T* planes,
    int64_t plane_stride,
    int64_t width) {
  if (dft.factors.outer > 0) {
    forward_by_factors(dft, tubes, tube_stride, planes, plane_stride, width);
    return;
  }
  if (dft.convolution) {
    by_convolution<T, false>(dft, tubes, tube_stride, planes, plane_stride, width);
    return;
  }
  constexpr int lanes = Simd<T>::lanes;
  for (int64_t l = 1; l <= pairs(dft.n3); ++l) {
    T* low = tubes + l * tube_stride;
    T* high = tubes + (dft.n3 - l) * tube_stride;
    for (int64_t c = 0; c < width; c += lanes) {
      const Vec<T> a = load(low + c), b = load(high + c);
      store(low + c, Vec<T>(a + b));
      store(high + c, Vec<T>(a - b));
    }
  }
  const FoldedRows<T> rows{tubes, tubes, tubes + dft.n3 * tube_stride, tube_stride, -tube_stride};
  dft_strips<T, false>(dft, rows, {planes, plane_stride, dft.n3}, width);
}

template void inverse_dft(const TubeDft<float>&, float*, int64_t, float*, int64_t, int64_t);
template void inverse_dft(const TubeDft<double>&, double*, int64_t, double*, int64_t, int64_t);
template void forward_dft(const TubeDft<float>&, float*, int64_t, float*, int64_t, int64_t);
template void forward_dft(const TubeDft<double>&, double*, int64_t, double*, int64_t, int64_t);

}  // namespace tcur::TCUR_ISA
