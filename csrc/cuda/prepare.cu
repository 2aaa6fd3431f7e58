// Lays out R̂ in tiles, and computes P_k = Ĉ_k Û_k in tiles.
//
// The first blocks compute P, each for one bin and some rows. Every such block computes the
// spectrum of the core for its bin again, because that takes less time than a separate launch. A
// thread sums some of the slices of one number, in fp64, and the result is rounded once. The other
// blocks lay out R̂, four numbers for each thread. They do so again at every call, because that
// moves only rank/n1 of the bytes that the next kernel moves.
// Planned: 256 threads, up to 64 registers, 4 blocks per multiprocessor.
#include "prepare.h"

#include "lanes.h"

namespace tcur {
namespace {

constexpr int kThreads = 256, kRows = 64;

struct Blocks {
  int bins;
  int64_t of_p;  // for each bin
};

TCUR_DEVICE void lay_out_horizontal(const PrepareArgs& args, unsigned index) {
  const unsigned quads_in_tile = args.columns / 4, n3 = args.n3, quads = args.quads;
  const unsigned rest = index / quads_in_tile, at = index - rest * quads_in_tile;
  const unsigned i = rest % 4, block = rest / 4 / n3, plane = rest / 4 - block * n3;
  const unsigned tile = block / quads, quad = block - tile * quads, c = 4 * quad + i;
  const int64_t column = static_cast<int64_t>(tile) * args.columns + 4 * at;
  if (static_cast<int64_t>(tile) * args.columns >= args.n2) {
    return;
  }
  const int64_t row = static_cast<int64_t>(plane) * args.rank + c;
  const float* from = args.horizontal_hat + row * args.n2 + column;
  Quad values{};
  if (c < static_cast<unsigned>(args.rank)) {
    if (args.vector) {
      values = column < args.n2 ? load_constant(from) : values;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values.v[j] = column + j < args.n2 ? from[j] : 0.0f;
      }
    }
  }
  store_lanes(args.tiles + 4 * static_cast<int64_t>(index), values);
}

// Computes Û of one bin, weighted, from the core: u [2, rank, rank]. Both u and `parts` are in
// shared memory; `parts` has two numbers for each thread of the block.
TCUR_DEVICE void transform_core(const PrepareArgs& args, int bin, double* parts, float* u) {
  constexpr int kBatch = 12;  // slices that a thread loads at a time
  const int n3 = args.n3, square = args.rank * args.rank;
  const double weight = args.scale * inverse_weight(plane_of(bin), n3);
  // Neighbouring threads take neighbouring numbers. If there are more threads than numbers, several
  // threads share the slices of a number.
  const int numbers = square < kThreads ? square : kThreads, shares = kThreads / numbers;
  const int share = static_cast<int>(threadIdx.x) / numbers;
  for (int first = 0; first < square; first += numbers) {
    const int entry = first + static_cast<int>(threadIdx.x) % numbers;
    double re = 0.0, im = 0.0;
    if (share < shares && entry < square) {
      for (int begin = share; begin < n3; begin += kBatch * shares) {
        float x[kBatch];
        double2 root[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int l = begin + i * shares, at = l < n3 ? l : begin;
          x[i] = l < n3 ? args.core[static_cast<int64_t>(at) * square + entry] : 0.0f;
          root[i] = args.tables.exact[bin * at % n3];
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          re += x[i] * root[i].x;
          im -= x[i] * root[i].y;
        }
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

// Shared memory of a block that computes P.
struct PrepareMemory {
  double* parts;     // [2, kThreads]
  float *u, *slice;  // [2, rank, rank]; rows of Ĉ_k [kRows, 2, rank]

  TCUR_HOST_DEVICE static int64_t bytes(int64_t rank) {
    return 2 * kThreads * static_cast<int64_t>(sizeof(double)) +
           2 * rank * (rank + kRows) * static_cast<int64_t>(sizeof(float));
  }
};

TCUR_KERNEL(kThreads, 4) prepare_kernel(const TCUR_PARAMETER PrepareArgs args, Blocks blocks) {
  let_next_launch_begin();
  const int n3 = args.n3, rank = args.rank, square = rank * rank, ranks = 4 * args.quads;
  const int64_t block = static_cast<int64_t>(blockIdx.x) - blocks.bins * blocks.of_p;
  if (block >= 0) {
    lay_out_horizontal(args, static_cast<unsigned>(block) * kThreads + threadIdx.x);
    return;
  }
  const int bin = static_cast<int>(blockIdx.x % blocks.bins);
  const int64_t first = blockIdx.x / blocks.bins * static_cast<int64_t>(kRows);
  const bool is_pair = tcur::is_pair(bin, n3);
  const int plane = plane_of(bin), width = is_pair ? 2 * rank : rank;
  PrepareMemory memory{shared_memory<double>()};
  memory.u = reinterpret_cast<float*>(memory.parts + 2 * kThreads);
  memory.slice = memory.u + 2 * square;
  // Ĉ_k is loaded first, so that it arrives while the core is transformed.
  for (int i = threadIdx.x; i < kRows * width; i += kThreads) {
    const int row = i / width, a = i - row * width;
    const int64_t r = first + row < args.n1 ? first + row : args.n1 - 1;
    memory.slice[row * 2 * rank + a] = args.lateral_hat[(r * n3 + plane) * rank + a];
  }
  transform_core(args, bin, memory.parts, memory.u);
  const float *u_re = memory.u, *u_im = u_re + square;
  for (int i = threadIdx.x; i < kRows * ranks; i += kThreads) {
    const int64_t row = first + i / ranks;
    const int b = i % ranks;
    if (row >= args.rows) {
      break;
    }
    float re = 0.0f, im = 0.0f;
    if (b < rank && row < args.n1) {
      const float* c_re = memory.slice + i / ranks * 2 * rank;
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
  const int64_t tiles = ceil_div(args.n2, args.columns);
  const int64_t quads = tiles * args.columns * args.quads * args.n3;
  const Blocks blocks{args.n3 / 2 + 1, args.mixed == nullptr ? 0 : ceil_div(args.rows, kRows)};
  launch(
      prepare_kernel,
      blocks.bins * blocks.of_p + ceil_div(quads, kThreads),
      kThreads,
      PrepareMemory::bytes(args.rank),
      stream,
      args,
      blocks);
}

}  // namespace tcur
