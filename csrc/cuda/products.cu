// Σ_t p[t, block]ᵀ z[t, block] for every bin and slice, over a chunk of tokens per block:
//     X = Σ p_re z_re - p_im z_im    Y = -Σ (p_re z_im + p_im z_re)    ∂Û_k += e^{-2πikl/n3} (X +
//     iY)
// A thread sums 2 x 2 numbers of X and Y for some of the tokens of the chunk, by fp32
// multiplications: rank/2 operations per byte of p and z, below what a multiprocessor has to spare
// up to a rank of 32. Chunks have a fixed length, and partial sums are added in order.
//
// Planned: 256 threads, up to 64 registers, 4 blocks per multiprocessor, 16 KiB of shared memory
// each at a rank of 32.
#include "products.h"

namespace tcur {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 256;  // tokens per block: fp32 sums keep their digits
constexpr int kStep = 16;    // tokens in shared memory at a time

struct ProductArgs {
  TokenRows p, z;
  float* parts;  // [rows, chunks, slices, n3, rank, rank]
  int n3, rank;
  int64_t slice_index, slices, chunks, row_length;
  Tables tables;
};

// Tokens of one step: [kStep, re and im, width], zeros where there is nothing.
TCUR_DEVICE void load_step(
    const TokenRows& rows,
    int64_t begin,
    int64_t end,
    int64_t column,
    int rank,
    bool is_pair,
    int width,
    float* to) {
  for (int i = threadIdx.x; i < kStep * 2 * width; i += kThreads) {
    const int a = i % width, part = i / width % 2;
    const int64_t token = begin + i / (2 * width);
    const bool is_there = token < end && a < rank && (part == 0 || is_pair);
    const int64_t at = token % rows.rows * rows.stride + column + part * rank + a;
    to[i] = is_there ? load_number(rows.data, at, rows.element) : 0.0f;
  }
}

TCUR_KERNEL(kThreads, 4) products_kernel(const TCUR_PARAMETER ProductArgs args) {
  const int rank = args.rank, n3 = args.n3, bins = n3 / 2 + 1;
  const int side = (rank + 1) / 2, width = 2 * side, blocks = side * side;
  float* p = shared_memory<float>();
  float* z = p + kStep * 2 * width;
  float* sums = z + kStep * 2 * width;  // [kThreads, 8]
  const int bin = blockIdx.x % bins;
  const int64_t part = blockIdx.x / bins, slice = part % args.slices;
  const int64_t chunk = part / args.slices % args.chunks, row = part / args.slices / args.chunks;
  const bool is_pair = bin > 0 && bin <= pairs(n3);
  const int plane = bin == 0 ? 0 : 2 * bin - 1;
  const int64_t begin = row * args.row_length + chunk * kChunk, last = (row + 1) * args.row_length;
  const int64_t end = begin + kChunk < last ? begin + kChunk : last;
  const float2 root = args.tables.root(static_cast<int>(bin * (args.slice_index + slice) % n3));
  const int64_t square = static_cast<int64_t>(rank) * rank;
  float* out = args.parts + (part * n3 + plane) * square;

  for (int first = 0; first < blocks; first += kThreads) {
    const int count = blocks - first < kThreads ? blocks - first : kThreads;
    const int groups = kThreads / count, group = threadIdx.x / count;
    const int block = first + threadIdx.x % count, a = block / side * 2, b = block % side * 2;
    float x[2][2] = {}, y[2][2] = {};
    for (int64_t token = begin; token < end; token += kStep) {
      __syncthreads();
      load_step(args.p, token, end, slice * n3 * rank + plane * rank, rank, is_pair, width, p);
      load_step(args.z, token, end, plane * rank, rank, is_pair, width, z);
      __syncthreads();
      for (int t = group; t < kStep && group < groups; t += groups) {
        const float2 p_re = *reinterpret_cast<const float2*>(p + 2 * t * width + a);
        const float2 p_im = *reinterpret_cast<const float2*>(p + (2 * t + 1) * width + a);
        const float2 z_re = *reinterpret_cast<const float2*>(z + 2 * t * width + b);
        const float2 z_im = *reinterpret_cast<const float2*>(z + (2 * t + 1) * width + b);
        x[0][0] += p_re.x * z_re.x - p_im.x * z_im.x;
        x[0][1] += p_re.x * z_re.y - p_im.x * z_im.y;
        x[1][0] += p_re.y * z_re.x - p_im.y * z_im.x;
        x[1][1] += p_re.y * z_re.y - p_im.y * z_im.y;
        y[0][0] -= p_re.x * z_im.x + p_im.x * z_re.x;
        y[0][1] -= p_re.x * z_im.y + p_im.x * z_re.y;
        y[1][0] -= p_re.y * z_im.x + p_im.y * z_re.x;
        y[1][1] -= p_re.y * z_im.y + p_im.y * z_re.y;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[threadIdx.x * 8 + i] = x[i / 2][i % 2];
      sums[threadIdx.x * 8 + 4 + i] = y[i / 2][i % 2];
    }
    __syncthreads();
    // One thread per number: the groups' sums in order, and the phase. The next turn writes `sums`
    // behind the barriers of its first step.
    for (int i = threadIdx.x; i < 4 * count; i += kThreads) {
      const int which = i / 4, corner = i % 4;
      const int row = (first + which) / side * 2 + corner / 2;
      const int column = (first + which) % side * 2 + corner % 2;
      float re = 0.0f, im = 0.0f;
      for (int other = 0; other < groups; ++other) {
        re += sums[(other * count + which) * 8 + corner];
        im += sums[(other * count + which) * 8 + 4 + corner];
      }
      if (row < rank && column < rank) {
        out[row * rank + column] = root.x * re + root.y * im;
        if (is_pair) {
          out[square + row * rank + column] = root.x * im - root.y * re;
        }
      }
    }
  }
}

}  // namespace

void core_from_products(
    const Call& call,
    const TokenRows& p,
    const TokenRows& z,
    int n3,
    int rank,
    int64_t slice_index,
    int64_t slices,
    const TokenCores& cores,
    const Tables& tables,
    const Tensor& out) {
  const int64_t chunks = tiles_of(cores.row_length, kChunk), count = cores.rows * chunks * slices;
  const Tensor parts = call.floats({count, n3, rank, rank});
  const ProductArgs args{
      p,
      z,
      parts.mutable_data_ptr<float>(),
      n3,
      rank,
      slice_index,
      slices,
      chunks,
      cores.row_length,
      tables};
  const int64_t width = (rank + 1) / 2 * 2, floats = 2 * kStep * 2 * width + kThreads * 8;
  if (count > 0) {
    launch(
        products_kernel,
        (n3 / 2 + 1) * count,
        kThreads,
        floats * static_cast<int64_t>(sizeof(float)),
        call.stream(),
        args);
  }
  const CoreArgs last{
      parts.const_data_ptr<float>(),
      cores.rows,
      chunks * slices,
      cores.ids(),
      n3,
      rank,
      out.mutable_data_ptr<float>()};
  make_core(last, call.stream());
}

}  // namespace tcur
