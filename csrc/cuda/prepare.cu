// Lays out R̂ in tiles, and computes P_k = Ĉ_k Û_k in tiles.
//
// The first blocks compute P, each for one bin and some rows. Every such block computes the
// spectrum of the core for its bin again, because that takes less time than a separate launch. A
// thread sums some of the slices of one number, in fp64, and the result is rounded once. The other
// blocks lay out R̂, sixteen numbers for each thread. They do so again at every call, because that
// moves only rank/n1 of the bytes that the next kernel moves.
// Planned: 256 threads, up to 64 registers, 4 blocks per multiprocessor.
#include "prepare.h"

#include "lanes.h"

namespace tcur {
namespace {

constexpr int kThreads = 256, kRows = 128;

struct Blocks {
  int of_p;        // blocks that compute P
  unsigned items;  // groups of four columns of R̂, in all quads of the rank and all planes
  Divisor by_bins, by_planes, by_quads, by_rank;
};

// The four rows of a quad of the rank, at four columns.
TCUR_DEVICE void lay_out_horizontal(const PrepareArgs& args, const Blocks& blocks, unsigned index) {
  if (index >= blocks.items) {
    return;
  }
  const int in_tile = index & ((1U << args.log_columns) / 4 - 1);
  const int rest = static_cast<int>(index >> (args.log_columns - 2));
  const int block = blocks.by_planes.quotient(rest), plane = rest - block * args.n3;
  const int tile = blocks.by_quads.quotient(block), quad = block - tile * args.quads;
  const unsigned column = (static_cast<unsigned>(tile) << args.log_columns) + 4 * in_tile;
  const auto n2 = static_cast<unsigned>(args.n2);
  const unsigned first = plane * args.rank + 4 * quad;
  const float* from = args.horizontal_hat + static_cast<int64_t>(first) * n2 + column;
  Quad values[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (4 * quad + i < args.rank) {
      if (args.vector) {
        values[i] = column < n2 ? load_constant(from) : values[i];
      } else {
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
          values[i].v[j] = column + j < n2 ? from[j] : 0.0f;
        }
      }
    }
    from += n2;
  }
  float* to = args.tiles + (static_cast<int64_t>(rest) << (args.log_columns + 2)) + 4 * in_tile;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    store_lanes(to + (i << args.log_columns), values[i]);
  }
}

// Shared memory of a block that computes P. Zeros make whole quads of the ranks.
struct PrepareMemory {
  double* parts;  // [2, kThreads]
  float* u;       // [2, ranks, ranks]
  float* slice;   // rows of Ĉ_k [kRows, stride]: [2, ranks]
  int ranks, stride;

  // Behind each row is one quad more, so that the rows of neighbours do not share banks.
  TCUR_HOST_DEVICE static int64_t bytes(int64_t ranks) {
    return 2 * kThreads * static_cast<int64_t>(sizeof(double)) +
           (2 * ranks * ranks + kRows * (2 * ranks + 4)) * static_cast<int64_t>(sizeof(float));
  }
  TCUR_DEVICE explicit PrepareMemory(int ranks)
      : parts(shared_memory<double>()),
        u(reinterpret_cast<float*>(parts + 2 * kThreads)),
        slice(u + 2 * ranks * ranks),
        ranks(ranks),
        stride(2 * ranks + 4) {
  }
};

// Loads rows of Ĉ_k, four numbers of a plane for each thread.
TCUR_DEVICE void load_lateral(
    const PrepareArgs& args,
    const Blocks& blocks,
    const PrepareMemory& memory,
    int plane,
    int planes,
    int64_t first) {
  const int quads = args.quads, rank = args.rank;
  for (int i = threadIdx.x; i < kRows * planes * quads; i += kThreads) {
    const int line = blocks.by_quads.quotient(i), a = 4 * (i - line * quads);
    const int row = planes == 2 ? line / 2 : line, part = planes == 2 ? line % 2 : 0;
    const int64_t r = first + row < args.n1 ? first + row : args.n1 - 1;
    const float* from = args.lateral_hat + (r * args.n3 + plane + part) * rank + a;
    Quad values{};
    if (args.lateral_vector) {
      values = load_constant(from);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values.v[j] = a + j < rank ? from[j] : 0.0f;
      }
    }
    store_lanes(memory.slice + row * memory.stride + part * memory.ranks + a, values);
  }
}

// Computes Û of one bin, weighted, from the core.
TCUR_DEVICE void transform_core(
    const PrepareArgs& args, const Blocks& blocks, const PrepareMemory& memory, int bin) {
  constexpr int kBatch = 12;  // slices that a thread loads at a time
  const int n3 = args.n3, rank = args.rank, square = rank * rank;
  const double weight = is_pair(bin, n3) ? 2.0 * args.weight : args.weight;
  // Neighbouring threads take neighbouring numbers. If there are more threads than numbers, several
  // threads share the slices of a number.
  const int numbers = square < kThreads ? square : kThreads, shares = kThreads / numbers;
  const int share = static_cast<int>(threadIdx.x) / numbers;
  const int own = static_cast<int>(threadIdx.x) - share * numbers;
  const auto turn_of = [&](int product) __attribute__((always_inline)) {
    return product - blocks.by_planes.quotient(product) * n3;
  };
  const int first_turn = turn_of(bin * share), step = turn_of(bin * shares);
  for (int first = 0; first < square; first += numbers) {
    const int entry = first + own;
    double re = 0.0, im = 0.0;
    if (share < shares && entry < square) {
      int turn = first_turn;
      const float* from = args.core + static_cast<int64_t>(share) * square + entry;
      for (int begin = share; begin < n3; begin += kBatch * shares) {
        float x[kBatch];
        double2 root[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          x[i] = begin + i * shares < n3 ? *from : 0.0f;
          from += shares * square;
          root[i] = args.tables.exact[turn];
          turn = turn + step >= n3 ? turn + step - n3 : turn + step;
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          re += x[i] * root[i].x;
          im -= x[i] * root[i].y;
        }
      }
    }
    memory.parts[threadIdx.x] = re;
    memory.parts[kThreads + threadIdx.x] = im;
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * numbers; i += kThreads) {
      const int which = i >= numbers, number = which ? i - numbers : i;
      double sum = 0.0;
      for (int s = 0; s < shares; ++s) {
        sum += memory.parts[which * kThreads + s * numbers + number];
      }
      if (first + number < square) {
        const int a = blocks.by_rank.quotient(first + number), b = first + number - a * rank;
        memory.u[(which * memory.ranks + a) * memory.ranks + b] = static_cast<float>(weight * sum);
      }
    }
    __syncthreads();
  }
}

// Computes P_k = Ĉ_k Û_k for the rows of the block, four numbers of a row for each thread.
TCUR_DEVICE void multiply_rows(
    const PrepareArgs& args,
    const Blocks& blocks,
    const PrepareMemory& memory,
    int plane,
    bool is_pair,
    int64_t first) {
  const int quads = args.quads, ranks = memory.ranks;
  for (int i = threadIdx.x; i < kRows * quads; i += kThreads) {
    const int at = blocks.by_quads.quotient(i), quad = i - at * quads;
    const int64_t row = first + at;
    if (row >= args.rows) {
      return;
    }
    Quad re{}, im{};
    if (row < args.n1) {
      const float *lateral = memory.slice + at * memory.stride, *u = memory.u + 4 * quad;
      for (int a = 0; a < ranks; a += 4) {
        const Quad c = load_lanes<4>(lateral + a);
        const Quad d = is_pair ? load_lanes<4>(lateral + ranks + a) : Quad{};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Quad u_re = load_lanes<4>(u + (a + j) * ranks);
          const Quad u_im = load_lanes<4>(u + (ranks + a + j) * ranks);
          re = re + c.v[j] * u_re - d.v[j] * u_im;
          im = im + d.v[j] * u_re + c.v[j] * u_im;
        }
      }
    }
    const int64_t tile = row >> args.log_rows, in_tile = row & ((1 << args.log_rows) - 1);
    float* to =
        args.mixed + ((((tile * quads + quad) * args.n3 + plane) << args.log_rows) + in_tile) * 4;
    store_lanes(to, re);
    if (is_pair) {
      store_lanes(to + (4 << args.log_rows), im);
    }
  }
}

TCUR_KERNEL(kThreads, 4) prepare_kernel(const TCUR_PARAMETER PrepareArgs args, Blocks blocks) {
  let_next_launch_begin();
  const int block = static_cast<int>(blockIdx.x);
  if (block >= blocks.of_p) {
    lay_out_horizontal(args, blocks, (block - blocks.of_p) * kThreads + threadIdx.x);
    return;
  }
  const int group = blocks.by_bins.quotient(block), bin = block - group * blocks.by_bins.value;
  const int64_t first = group * static_cast<int64_t>(kRows);
  const bool is_pair = tcur::is_pair(bin, args.n3);
  const int plane = plane_of(bin);
  const PrepareMemory memory(4 * args.quads);
  // Ĉ_k is loaded first, so that it arrives while the core is transformed.
  load_lateral(args, blocks, memory, plane, is_pair ? 2 : 1, first);
  for (int i = threadIdx.x; i < 2 * memory.ranks * memory.ranks; i += kThreads) {
    memory.u[i] = 0.0f;
  }
  transform_core(args, blocks, memory, bin);
  multiply_rows(args, blocks, memory, plane, is_pair, first);
}

}  // namespace

void prepare(const PrepareArgs& args, Stream stream) {
  const int bins = args.n3 / 2 + 1;
  const int64_t columns = ceil_div(args.n2, int64_t{1} << args.log_columns) << args.log_columns;
  const int64_t items = columns / 4 * args.quads * args.n3;
  const int64_t of_p = args.mixed == nullptr ? 0 : bins * ceil_div(args.rows, kRows);
  const Blocks blocks{
      static_cast<int>(of_p),
      static_cast<unsigned>(items),
      Divisor(bins),
      Divisor(args.n3),
      Divisor(args.quads),
      Divisor(args.rank)};
  launch(
      prepare_kernel,
      of_p + ceil_div(items, kThreads),
      kThreads,
      of_p > 0 ? PrepareMemory::bytes(4 * args.quads) : 0,
      stream,
      args,
      blocks);
}

}  // namespace tcur
