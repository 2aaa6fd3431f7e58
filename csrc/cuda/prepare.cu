// R̂ in tiles, and P_k = Ĉ_k Û_k in theirs.
//
// The first blocks make P: each that of one bin for some rows. The core's spectrum, in fp64 so that
// what is left is one rounding, is made anew by every block, which takes less time than a launch of
// its own: a thread sums some of the slices of one number. The other blocks lay out R̂, a quad of
// numbers for each thread; with rank/n1 of the bytes that the kernel after it moves, that is done
// anew at every call too.
// Planned: 256 threads, up to 64 registers, 4 blocks per multiprocessor.
#include "prepare.h"

#include "elements.h"
#include "roots.h"

namespace tcur {
namespace {

constexpr int kThreads = 256, kRows = 64;

struct Blocks {
  int bins;
  int64_t of_p;  // for each bin
};

TCUR_DEVICE void lay_out_horizontal(const PrepareArgs& args, int64_t index) {
  const int quads_in_tile = args.columns / 4, ranks = 4 * args.quads;
  const int at = static_cast<int>(index % quads_in_tile);
  index /= quads_in_tile;
  const int i = static_cast<int>(index % 4);
  index /= 4;
  const int plane = static_cast<int>(index % args.n3);
  index /= args.n3;
  const int quad = static_cast<int>(index % args.quads);
  const int64_t tile = index / args.quads, column = tile * args.columns + 4 * at;
  if (tile * args.columns >= args.n2) {
    return;
  }
  const int c = 4 * quad + i;
  const float* row = args.horizontal_hat + (static_cast<int64_t>(plane) * args.rank + c) * args.n2;
  Quad values{};
  if (c < args.rank) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      values.v[j] = column + j < args.n2 ? row[column + j] : 0.0f;
    }
  }
  float* to = args.tiles + tile * args.columns * ranks * args.n3;
  store_lanes(
      to + ((static_cast<int64_t>(quad) * args.n3 + plane) * 4 + i) * args.columns + 4 * at, values);
}

// Û of one bin, weighted, from the core: u [2, rank, rank] in shared memory. `parts` is as much again
// as the block has threads, twice.
TCUR_DEVICE void transform_core(
    const PrepareArgs& args, int bin, const double2* roots, double* parts, float* u) {
  const int n3 = args.n3, square = args.rank * args.rank;
  const double weight = args.scale * inverse_weight(bin == 0 ? 0 : 2 * bin - 1, n3);
  // Threads side by side take numbers side by side; what is left of them shares the slices.
  const int numbers = square < kThreads ? square : kThreads, shares = kThreads / numbers;
  const int share = static_cast<int>(threadIdx.x) / numbers;
  for (int first = 0; first < square; first += numbers) {
    const int entry = first + static_cast<int>(threadIdx.x) % numbers;
    double re = 0.0, im = 0.0;
    if (share < shares && entry < square) {
#pragma unroll 8
      for (int l = share; l < n3; l += shares) {
        const double x = args.core[static_cast<int64_t>(l) * square + entry];
        re += x * roots[l].x;
        im -= x * roots[l].y;
      }
    }
    parts[threadIdx.x] = re;
    parts[kThreads + threadIdx.x] = im;
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * numbers; i += kThreads) {
      const int which = i / numbers, number = i - which * numbers;
      double sum = 0.0;
      for (int s = 0; s < shares; ++s) {
        sum += parts[which * kThreads + s * numbers + number];
      }
      if (first + number < square) {
        u[which * square + first + number] = static_cast<float>(weight * sum);
      }
    }
    __syncthreads();
  }
}

TCUR_KERNEL(kThreads, 4) prepare_kernel(const TCUR_PARAMETER PrepareArgs args, Blocks blocks) {
  let_next_launch_begin();
  const int n3 = args.n3, rank = args.rank, square = rank * rank, ranks = 4 * args.quads;
  const int64_t block = static_cast<int64_t>(blockIdx.x) - blocks.bins * blocks.of_p;
  if (block >= 0) {
    lay_out_horizontal(args, block * kThreads + threadIdx.x);
    return;
  }
  const int bin = static_cast<int>(blockIdx.x % blocks.bins);
  const int64_t first = blockIdx.x / blocks.bins * static_cast<int64_t>(kRows);
  const bool is_pair = bin > 0 && bin <= pairs(n3);
  const int plane = bin == 0 ? 0 : 2 * bin - 1;
  double2* roots = shared_memory<double2>();  // e^{2πikl/n3} for l = 0 … n3-1
  double* parts = reinterpret_cast<double*>(roots + n3);
  float* u_re = reinterpret_cast<float*>(parts + 2 * kThreads);
  float* u_im = u_re + square;
  for (int l = threadIdx.x; l < n3; l += kThreads) {
    roots[l] = unit_root(bin * l % n3, n3);
  }
  __syncthreads();
  transform_core(args, bin, roots, parts, u_re);
  for (int i = threadIdx.x; i < kRows * ranks; i += kThreads) {
    const int64_t row = first + i / ranks;
    const int b = i % ranks;
    if (row >= args.rows) {
      break;
    }
    float re = 0.0f, im = 0.0f;
    if (b < rank && row < args.n1) {
      const float* c_re = args.lateral_hat + row * n3 * rank + plane * rank;
#pragma unroll 4
      for (int a = 0; a < rank; ++a) {
        const float c = c_re[a], d = is_pair ? c_re[rank + a] : 0.0f;
        re += c * u_re[a * rank + b] - d * u_im[a * rank + b];
        im += d * u_re[a * rank + b] + c * u_im[a * rank + b];
      }
    }
    const int64_t tile = row / args.tile_rows, at = row - tile * args.tile_rows;
    float* to = args.mixed + tile * args.tile_rows * ranks * n3 +
                ((static_cast<int64_t>(b / 4) * n3 + plane) * args.tile_rows + at) * 4 + b % 4;
    to[0] = re;
    if (is_pair) {
      to[4 * args.tile_rows] = im;
    }
  }
}

}  // namespace

void prepare(const PrepareArgs& args, Stream stream) {
  const int64_t tiles = (args.n2 + args.columns - 1) / args.columns;
  const int64_t quads = tiles * args.columns * args.quads * args.n3;
  const Blocks blocks{
      args.n3 / 2 + 1, args.mixed == nullptr ? 0 : (args.rows + kRows - 1) / kRows};
  const int64_t square = static_cast<int64_t>(args.rank) * args.rank;
  const int64_t shared = static_cast<int64_t>(args.n3 + kThreads) * sizeof(double2) + 2 * square * 4;
  launch(
      prepare_kernel,
      blocks.bins * blocks.of_p + (quads + kThreads - 1) / kThreads,
      kThreads,
      shared,
      stream,
      args,
      blocks);
}

}  // namespace tcur
