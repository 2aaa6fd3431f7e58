// Real DFT along the tubes of a tile in shared memory, by the levels of tubes.h.
//
// A tile has n3 rows of `positions` numbers, four of which, a quad, one thread works on at a time.
// First all levels are folded, rows in place. Then the lines of all levels, kLines of them and a
// quad per thread: the two rows of a step are read once for the kLines outputs and their mirror
// images, 32 multiplications for two reads of 16 bytes, and the coefficients are the same for all
// threads that work on the same lines. Outputs never go back to the rows: they leave in registers.
#pragma once

#include "launch.h"

namespace tcur {

constexpr int kLines = 4;

// Outputs of a level: its pairs (l, n3-l), and the one output without a mirror image that an odd
// length, or an even one with an odd half, has. That one is a line without sines.
TCUR_HOST_DEVICE inline bool has_single(const DftShape& level) {
  return !level.is_even() || level.half % 2 != 0;
}
TCUR_HOST_DEVICE inline int level_lines(const DftShape& level) {
  return static_cast<int>(level.outputs) + (has_single(level) ? 1 : 0);
}
TCUR_HOST_DEVICE inline int line_frequency(const DftShape& level, int line) {
  if (line < level.outputs) {
    return static_cast<int>(level.frequency(line));
  }
  return level.is_even() ? static_cast<int>(level.half) : 0;
}

// kLines lines of one level, or fewer at its end.
struct LineBlock {
  DftShape level;
  int first, lines;
  int offset;  // of its coefficients in the table: [size][cos, sin] of kLines each

  TCUR_HOST_DEVICE bool is_pair(int i) const {
    return first + i < level.outputs;
  }
  // The output l, and n3 - l for a pair.
  TCUR_HOST_DEVICE int output(int i) const {
    return static_cast<int>(level.step) * line_frequency(level, first + i);
  }
};

TCUR_HOST_DEVICE inline int blocks_of(const DftShape& level) {
  return (level_lines(level) + kLines - 1) / kLines;
}

TCUR_HOST_DEVICE inline int line_blocks(int n3) {
  int count = 0;
  for (DftShape level = dft_shape(n3, 1);; level = dft_shape(level.length / 2, 2 * level.step)) {
    count += blocks_of(level);
    if (!level.is_even()) {
      return count;
    }
  }
}

// The block of this index; past the last one it has no lines, and its offset is the table's length.
TCUR_HOST_DEVICE inline LineBlock line_block(int n3, int index) {
  int offset = 0;
  for (DftShape level = dft_shape(n3, 1);; level = dft_shape(level.length / 2, 2 * level.step)) {
    const int blocks = blocks_of(level), stride = 2 * kLines * static_cast<int>(level.size);
    if (index < blocks) {
      const int first = index * kLines, rest = level_lines(level) - first;
      return {level, first, rest < kLines ? rest : kLines, offset + index * stride};
    }
    index -= blocks;
    offset += blocks * stride;
    if (!level.is_even()) {
      return {level, 0, 0, offset};
    }
  }
}

// Rows A_k and B_k of a tile, as tubes.h names them: packed planes for the inverse transform, tubes
// for the forward one.
template <bool INVERSE>
TCUR_DEVICE int row_a(int, int k) {
  return INVERSE && k > 0 ? 2 * k - 1 : k;
}
template <bool INVERSE>
TCUR_DEVICE int row_b(int n3, int k) {
  return INVERSE ? 2 * k : n3 - k;
}

// Rows k and half-k of every even level become their sum and their difference. All threads of the
// block take part; the rows are complete before, and afterwards.
template <bool INVERSE>
TCUR_DEVICE void fold_tile(float* rows, int n3, int quads) {
  const int stride = 4 * quads;
  for (DftShape level = dft_shape(n3, 1); level.is_even();
       level = dft_shape(level.length / 2, 2 * level.step)) {
    const int half = static_cast<int>(level.half), pairs_a = (half + 1) / 2;
    __syncthreads();
    for (int i = threadIdx.x; i < (2 * pairs_a - 1) * quads; i += blockDim.x) {
      const int pair = i / quads, column = 4 * (i - pair * quads);
      const bool is_a = pair < pairs_a;
      const int k = is_a ? pair : pair - pairs_a + 1;
      const int low = is_a ? row_a<INVERSE>(n3, k) : row_b<INVERSE>(n3, k);
      const int high = is_a ? row_a<INVERSE>(n3, half - k) : row_b<INVERSE>(n3, half - k);
      float4* to_low = reinterpret_cast<float4*>(rows + low * stride + column);
      float4* to_high = reinterpret_cast<float4*>(rows + high * stride + column);
      const float4 x = *to_low, y = *to_high;
      const float4 sum{x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
      const float4 difference{x.x - y.x, x.y - y.y, x.z - y.z, x.w - y.w};
      *to_low = is_a ? sum : difference;
      *to_high = is_a ? difference : sum;
    }
  }
  __syncthreads();
}

TCUR_DEVICE void add_product(float4& sum, float factor, const float4& x) {
  sum.x += factor * x.x;
  sum.y += factor * x.y;
  sum.z += factor * x.z;
  sum.w += factor * x.w;
}

// E and O of one block of lines, for the quad at `column`: x_l = E - O, x_{n3-l} = E + O, or Re =
// E, Im = -O of the forward transform.
template <bool INVERSE>
TCUR_DEVICE void dft_lines(
    const float* rows,
    int n3,
    int stride,
    int column,
    const LineBlock& block,
    const float* table,
    float4 (&even)[kLines],
    float4 (&odd)[kLines]) {
  const int half = static_cast<int>(block.level.half), size = static_cast<int>(block.level.size);
  const bool is_even = block.level.is_even();
  const auto quad = [&](int row) {
    return *reinterpret_cast<const float4*>(rows + row * stride + column);
  };
  const float4 start = quad(row_a<INVERSE>(n3, is_even ? half : 0));
  // sin(2πkl/length) at k = half/2: 1 and -1 in turn for the odd l.
  float4 turned{0.0f, 0.0f, 0.0f, 0.0f};
  if (is_even && half % 2 == 0) {
    turned = quad(row_b<INVERSE>(n3, half / 2));
  }
#pragma unroll
  for (int i = 0; i < kLines; ++i) {  // kLines is even: the sign follows i
    const float sign = i % 2 == 0 ? 1.0f : -1.0f;
    even[i] = start;
    odd[i] = {sign * turned.x, sign * turned.y, sign * turned.z, sign * turned.w};
  }
  const float4* coefficients = reinterpret_cast<const float4*>(table + block.offset);
#pragma unroll 2
  for (int k = 1; k <= size; ++k) {
    const float4 cos = coefficients[2 * k - 2], sin = coefficients[2 * k - 1];
    const int at = is_even ? half - k : k;
    const float4 a = quad(row_a<INVERSE>(n3, at)), b = quad(row_b<INVERSE>(n3, at));
    add_product(even[0], cos.x, a);
    add_product(odd[0], sin.x, b);
    add_product(even[1], cos.y, a);
    add_product(odd[1], sin.y, b);
    add_product(even[2], cos.z, a);
    add_product(odd[2], sin.z, b);
    add_product(even[3], cos.w, a);
    add_product(odd[3], sin.w, b);
  }
}

}  // namespace tcur
