// ∂Û_k = Σ_t conj(Σ_s e^{2πi k l_s/n3} p_s[t, block]ᵀ z[t, block]) for every bin k, where s runs
// over slices. With p turned and summed over slices first, this is
//     re ∂Û = Σ p_re z_re - p_im z_im    im ∂Û = -Σ (p_re z_im + p_im z_re)
//
// A thread computes 4 x 4 numbers of both parts for some tokens of a chunk. It reads p and z
// directly from memory; what the threads of a bin share comes from the first-level cache. A thread
// starts its loads together: 16 in bf16, 8 longer ones in fp32. The block adds the sums of its
// threads in order in shared memory, and spectrum.cu adds those of the chunks. How rows are cut
// into chunks depends on the shape alone.
//
// Each pair of numbers of p and z takes 4*rank/2 fp32 multiplications. Up to a rank of 32 this is
// less than a multiprocessor has to spare. For 2048 tokens of 48 slices at rank 8, 224 blocks of 4
// bins and 64 tokens read 3 MB in bf16 and write 32 partial sums, 0.4 MB.
// Planned: 256 threads, up to 128 registers, 2 blocks per multiprocessor, 33 KiB of shared memory
// each.
#include "products.h"

#include "row_order.h"
#include "token_grid.h"

namespace tcur {
namespace {

constexpr int kThreads = kTokenThreads;
constexpr int kStride = kThreads + 1;  // of the sums in shared memory, to avoid bank conflicts
constexpr int kMostPerThread = 32;     // tokens, so few that fp32 sums stay exact enough

struct ProductArgs {
  TokenRows p, z;
  float* parts;  // [rows, chunks, n3, rank, rank]
  TokenGrid grid;
  Tables tables;
  int rank;
  Divisor side;  // quads of a rank
  int slice_index, slices;
};

template <Element P, Element Z, bool VECTOR>
TCUR_KERNEL(kThreads, 2)
products_kernel(const TCUR_PARAMETER ProductArgs args) {
  constexpr int kBatch = P == Element::f32 || Z == Element::f32 || !VECTOR ? 2 : 4;  // tokens
  const TokenGrid& grid = args.grid;
  const int rank = args.rank, side = args.side.value, n3 = args.tables.n3;
  const int per_token = grid.threads_per_token();
  const int group = grid.by_threads_per_token.quotient(threadIdx.x);
  const Share share(grid);
  const Item seat(grid, share, threadIdx.x - group * per_token, n3);
  const int tile_row = args.side.quotient(seat.tile);
  const int a = tile_row * 4, b = (seat.tile - tile_row * side) * 4;
  float re[4][4] = {}, im[4][4] = {};
  if (seat.is_there && group < grid.groups) {
    const int count_a = rank - a < 4 ? rank - a : 4, count_b = rank - b < 4 ? rank - b : 4;
    const int column = seat.plane * rank, q = n3 * rank;
    Turn second_turn(seat.bin, args.slice_index, n3);
    const float2 root = args.tables.root(second_turn.next());
    int64_t token = share.begin + group, p_row = token, p_step = grid.groups;
    if (p_row >= args.p.rows) {
      p_row %= args.p.rows;
    }
    if (p_step >= args.p.rows) {
      p_step %= args.p.rows;
    }
    const auto next_row = [&](int64_t row) __attribute__((always_inline)) {
      return row + p_step >= args.p.rows ? row + p_step - args.p.rows : row + p_step;
    };
    for (; token < share.end; token += kBatch * grid.groups) {
      PackedPair<Z> z_raw[kBatch];
      PackedPair<P> p_raw[kBatch];
      const int64_t first_p_row = p_row;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int64_t t = token + u * grid.groups;
        const bool is_there = t < share.end;
        z_raw[u] = load_pair<Z, VECTOR>(
            args.z.data,
            t * args.z.stride + column + b,
            rank,
            is_there ? count_b : 0,
            seat.is_pair);
        p_raw[u] = load_pair<P, VECTOR>(
            args.p.data,
            p_row * args.p.stride + column + a,
            rank,
            is_there ? count_a : 0,
            seat.is_pair);
        p_row = next_row(p_row);
      }
      p_row = first_p_row;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        Pairs p{};
        p.add_turned(p_raw[u], root);
        Turn turn = second_turn;
        for (int s = 1; s < args.slices; ++s) {
          const int count = token + u * grid.groups < share.end ? count_a : 0;
          const int64_t at = p_row * args.p.stride + s * q + column + a;
          const auto raw = load_pair<P, VECTOR>(args.p.data, at, rank, count, seat.is_pair);
          p.add_turned(raw, args.tables.root(turn.next()));
        }
        p_row = next_row(p_row);
        const Numbers z_re = z_raw[u].re.widened(), z_im = z_raw[u].im.widened();
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const float p_re = p.re.v[i / 4], p_im = p.im.v[i / 4];
          re[i / 4][i % 4] += p_re * z_re.v[i % 4];
          re[i / 4][i % 4] -= p_im * z_im.v[i % 4];
          im[i / 4][i % 4] -= p_re * z_im.v[i % 4];
          im[i / 4][i % 4] -= p_im * z_re.v[i % 4];
        }
      }
    }
  }
  float* sums = shared_memory<float>();  // [re and im, 16, kStride]
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    sums[i * kStride + threadIdx.x] = re[i / 4][i % 4];
    sums[(16 + i) * kStride + threadIdx.x] = im[i / 4][i % 4];
  }
  __syncthreads();
  // Each thread adds the sums of the groups for one number, in order.
  const int square = rank * rank;
  float* out =
      args.parts + (share.row * grid.chunks + share.chunk) * static_cast<int64_t>(n3) * square;
  for (int i = threadIdx.x; i < per_token * 16; i += kThreads) {
    const int item = i / 16, corner = i % 16;
    const Item of(grid, share, item, n3);
    const int tile_row = args.side.quotient(of.tile);
    const int row = tile_row * 4 + corner / 4;
    const int column = (of.tile - tile_row * side) * 4 + corner % 4;
    if (!of.is_there || row >= rank || column >= rank) {
      continue;
    }
    float sum_re = 0.0f, sum_im = 0.0f;
    for (int other = 0; other < grid.groups; ++other) {
      sum_re += sums[corner * kStride + other * per_token + item];
      sum_im += sums[(16 + corner) * kStride + other * per_token + item];
    }
    float* to = out + static_cast<int64_t>(of.plane) * square + row * rank + column;
    to[0] = sum_re;
    if (of.is_pair) {
      to[square] = sum_im;
    }
  }
}

using Kernel = void (*)(ProductArgs);

template <bool VECTOR>
Kernel kernel_for(Element p, Element z) {
  if (p == Element::f32) {
    return &products_kernel<Element::f32, Element::f32, VECTOR>;
  }
  return with_element<Element::bf16, Element::f32>(z, [](auto element) -> Kernel {
    return &products_kernel<Element::bf16, decltype(element)::value, VECTOR>;
  });
}

bool starts_at_vectors(const TokenRows& rows) {
  return rows.stride % 4 == 0 && is_aligned(rows.data, 4 * bytes_of(rows.element));
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
    bool packed,
    const Tensor& out) {
  STD_TORCH_CHECK(
      p.element == Element::bf16 || (p.element == Element::f32 && z.element == Element::f32),
      "tcur: tokens must be fp32, or those of dy bf16");
  constexpr int64_t wanted = 264;  // blocks, two for each of 132 multiprocessors
  const int side = ceil_div(rank, 4);
  TokenGrid grid = token_grid(n3, rank, side * side, kThreads, cores);
  const int64_t per_block = ceil_div(
      cores.rows() * cores.row_length() * grid.bin_blocks * grid.tile_blocks, wanted * grid.groups);
  cut_rows(grid, std::clamp<int64_t>(per_block, 4, kMostPerThread));
  const SortedRows sorted(call, cores);
  const Tensor parts = call.floats({cores.rows(), grid.chunks, n3, rank, rank});
  const ProductArgs args{
      p,
      z,
      parts.mutable_data_ptr<float>(),
      grid,
      tables,
      rank,
      Divisor(side),
      static_cast<int>(slice_index),
      static_cast<int>(slices)};
  const bool vector = rank % 4 == 0 && starts_at_vectors(p) && starts_at_vectors(z);
  if (grid.blocks() > 0) {
    launch(
        vector ? kernel_for<true>(p.element, z.element) : kernel_for<false>(p.element, z.element),
        grid.blocks(),
        kThreads,
        32 * kStride * static_cast<int64_t>(sizeof(float)),
        call.stream(),
        args);
  }
  if (packed) {
    const PackedArgs last{
        parts.const_data_ptr<float>(), grid.chunks, out.numel(), out.mutable_data_ptr<float>()};
    sum_packed(last, call.stream());
    return;
  }
  const CoreArgs last{
      parts.const_data_ptr<float>(),
      cores.rows(),
      grid.chunks,
      sorted.order(),
      cores.cores(),
      rank,
      out.mutable_data_ptr<float>(),
      1.0,
      tables};
  make_core(last, call.stream());
}

}  // namespace tcur
