// tcur::core_grad_dense, CUDA: ∂U [n3, rank, rank] = Cᵀ * G * Rᵀ from G [n3, n1, n2].
//
// The adjoint of materialize.cu: a block reads tiles of all slices of G, 8 rows high, one after
// another along its part of the columns. A tile is folded as it is read, transformed along the
// tubes (dft.h) into a second tile of packed planes, and multiplied with R̂ on tensor cores:
//     [z_re; z_im] = [G_re, G_im; -G_im, G_re] [R_reᵀ; R_imᵀ]
// which is the conjugate of Ĝ_k R̂_kᴴ, [n1, n3*rank] in all: rows like those of projected tokens,
// with Ĉ for their p. What is left is the work of products.h. G is read once and never transformed
// as a whole.
//
// Per element of G: 4 (2) bytes of device memory, 4*rank/8 bytes of R̂ from the second-level cache,
// 16*rank operations of tensor cores, and the multiplications of the transform.
// Planned: 256 threads, up to 128 registers, 2 blocks per multiprocessor, each with two tiles in
// shared memory: 96 KiB for 48 slices of 8 x 32.
#include "fragments.h"
#include "operators.h"
#include "products.h"

namespace tcur {
namespace {

constexpr int kThreads = 256, kRows = 8;

struct ProjectArgs {
  const void* grad;             // [n3, n1, n2]
  const float* horizontal_hat;  // [n3*rank, n2]
  const float* dft;             // coefficients of dft.h
  float* z;                     // [splits, n1, n3*rank]
  int64_t n1, n2;
  int n3, rank, splits;
  int64_t tiles_per_split;
  Precision precision;
  Tile tile;
  Element element;
  bool vector;  // rows start at multiples of four elements
};

// Rows of the transform: x_0, x_l + x_{n3-l}, x_l - x_{n3-l}, x_{n3/2}.
template <int BYTES>
TCUR_DEVICE void read_folded(const ProjectArgs& args, const Corner& corner, float* rows) {
  const Tile& tile = args.tile;
  const int n3 = args.n3, quads = tile.positions() / 4, stride = tile.positions();
  const int64_t slice = args.n1 * args.n2;
  for (int i = threadIdx.x; i < (n3 / 2 + 1) * quads; i += kThreads) {
    const int l = i / quads, position = 4 * (i - l * quads);
    const int tile_row = position >> tile.log_columns;
    const int64_t row = corner.row + tile_row;
    const int64_t column = corner.column + tile.swizzled(tile_row, position & (tile.columns() - 1));
    const int64_t count = row < args.n1 ? args.n2 - column : 0, at = row * args.n2 + column;
    const auto read = [&](int which) {
      const auto raw = load_four<BYTES>(args.grad, which * slice + at, count, args.vector);
      return Four<BYTES>::widened(raw, args.element);
    };
    const float4 x = read(l);
    float4* low = reinterpret_cast<float4*>(rows + l * stride + position);
    if (l == 0 || 2 * l == n3) {
      *low = x;
      continue;
    }
    const float4 y = read(n3 - l);
    *low = {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
    *reinterpret_cast<float4*>(rows + (n3 - l) * stride + position) = {
        x.x - y.x, x.y - y.y, x.z - y.z, x.w - y.w};
  }
}

// Folded rows -> packed planes.
TCUR_DEVICE void transform(const ProjectArgs& args, const float* rows, float* planes) {
  const int quads = args.tile.positions() / 4, stride = args.tile.positions();
  for (int i = threadIdx.x; i < line_blocks(args.n3) * quads; i += kThreads) {
    const int index = i / quads, position = 4 * (i - index * quads);
    const LineBlock block = line_block(args.n3, index);
    float4 even[kLines], odd[kLines];
    dft_lines<false>(rows, args.n3, stride, position, block, args.dft, even, odd);
#pragma unroll
    for (int j = 0; j < kLines; ++j) {
      if (j < block.lines) {
        const int k = block.output(j), plane = k == 0 ? 0 : 2 * k - 1;
        float4* re = reinterpret_cast<float4*>(planes + plane * stride + position);
        *re = even[j];
        if (block.is_pair(j)) {
          *reinterpret_cast<float4*>(planes + (plane + 1) * stride + position) = {
              -odd[j].x, -odd[j].y, -odd[j].z, -odd[j].w};
        }
      }
    }
  }
}

// z += planes R̂ᵀ; every number of z has one thread of one block that adds to it.
TCUR_DEVICE void project(
    const ProjectArgs& args, const Corner& corner, const float* planes, float* z, bool is_first) {
  const Tile& tile = args.tile;
  const int rank = args.rank, columns = tile.columns();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int fragments = (rank + 7) / 8;
  for (int item = warp; item < (args.n3 / 2 + 1) * fragments; item += kThreads / 32) {
    const int bin = item / fragments, b0 = (item - bin * fragments) * 8;
    const bool is_pair = bin > 0 && bin <= pairs(args.n3);
    const int plane = bin == 0 ? 0 : 2 * bin - 1, depth = is_pair ? 2 * columns : columns;
    const float* re = planes + plane * tile.positions();
    const float* im = re + tile.positions();
    float sums[4] = {};
    for (int k0 = 0; k0 < depth; k0 += 8) {
      FragmentA left;
      FragmentB right;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = k0 + t + 4 * (i / 2);
        const bool is_lower = i % 2 == 1;  // rows 8 … 15: z_im
        float value = 0.0f;
        if (k < depth && (is_pair || !is_lower)) {
          const int at = tile.position(g, k & (columns - 1));
          const bool is_re = (k < columns) != is_lower;
          value = is_re ? re[at] : k < columns ? -im[at] : im[at];
        }
        left.set(i, value, args.precision);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int k = k0 + t + 4 * i, b = b0 + g;
        const int64_t column = corner.column + (k & (columns - 1));
        const int64_t row = plane * rank + (k < columns ? b : rank + b);
        float value = 0.0f;
        if (k < depth && b < rank && column < args.n2) {
          value = args.horizontal_hat[row * args.n2 + column];
        }
        right.set(i, value, args.precision);
      }
      multiply(sums, left, right, args.precision);
    }
    const int64_t row = corner.row + g;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int b = b0 + 2 * t + i % 2;
      if (row < args.n1 && b < rank && (is_pair || i < 2)) {
        float* to = z + row * args.n3 * rank + plane * rank + (i < 2 ? b : rank + b);
        *to = is_first ? sums[i] : *to + sums[i];
      }
    }
  }
}

template <int BYTES>
TCUR_KERNEL(kThreads, 2)
project_kernel(const TCUR_PARAMETER ProjectArgs args) {
  float* rows = shared_memory<float>();
  float* planes = rows + args.n3 * args.tile.positions();
  const int split = blockIdx.x % args.splits;
  float* z = args.z + split * args.n1 * args.n3 * args.rank;
  Corner corner{blockIdx.x / args.splits * static_cast<int64_t>(kRows), 0};
  for (int64_t i = 0; i < args.tiles_per_split; ++i) {
    corner.column = (split * args.tiles_per_split + i) * args.tile.columns();
    if (corner.column >= args.n2 && i > 0) {
      return;  // all threads together; the first tile is there to clear z
    }
    read_folded<BYTES>(args, corner, rows);
    fold_tile<false>(rows, args.n3, args.tile.positions() / 4);
    transform(args, rows, planes);
    __syncthreads();
    project(args, corner, planes, z, i == 0);
  }
}

// The widest tile of which two fit a multiprocessor, or else one.
Tile choose_tile(int64_t n3, const SharedLimits& limits) {
  constexpr int64_t reserved = 1024;
  const int64_t half = std::min(limits.block, limits.multiprocessor / 2 - reserved);
  for (const int64_t budget : {half, limits.block}) {
    for (int log_columns = 6; log_columns >= 2; --log_columns) {
      if (2 * n3 * (kRows << log_columns) * static_cast<int64_t>(sizeof(float)) <= budget) {
        return {kRows, log_columns};
      }
    }
  }
  return {kRows, 2};
}

template <bool TF32>
Tensor core_grad_dense(Tensor grad, Tensor lateral_hat, Tensor horizontal_hat) {
  STD_TORCH_CHECK(grad.dim() == 3, "tcur: grad must be [n3, n1, n2]");
  const Sizes sizes = check_packed(lateral_hat, horizontal_hat, grad.size(0));
  check_shape("grad", grad, {sizes.n3, sizes.n1, sizes.n2});
  const Call call(lateral_hat);
  const Precision precision = call.precision(lateral_hat, horizontal_hat, TF32);
  call.check("grad", grad);
  check_slices(sizes.n3);
  const Tensor g = torch::stable::contiguous(grad);
  const Tensor l = torch::stable::contiguous(lateral_hat);
  const Tensor h = torch::stable::contiguous(cast(horizontal_hat, ScalarType::Float));
  const int n3 = static_cast<int>(sizes.n3), rank = static_cast<int>(sizes.rank);
  const Spectrum tables(call, n3);

  // Blocks enough for every multiprocessor twice, by the shape alone: the sums are then the same
  // on every device.
  constexpr int64_t wanted = 512;
  const Tile tile = choose_tile(n3, call.limits());
  const int64_t row_tiles = tiles_of(sizes.n1, kRows);
  const int64_t tiles = std::max<int64_t>(1, tiles_of(sizes.n2, tile.columns()));
  const int64_t at_most = std::max<int64_t>(1, tiles_of(wanted, std::max<int64_t>(1, row_tiles)));
  const int64_t per_split = tiles_of(tiles, std::min(tiles, at_most));
  const int splits = static_cast<int>(tiles_of(tiles, per_split));
  const Tensor z = call.floats({splits, sizes.n1, sizes.n3 * sizes.rank});
  const Element element = element_of(grad.scalar_type());
  const ProjectArgs args{
      g.const_data_ptr(),
      h.const_data_ptr<float>(),
      tables.tables().dft(),
      z.mutable_data_ptr<float>(),
      sizes.n1,
      sizes.n2,
      n3,
      rank,
      splits,
      per_split,
      precision,
      tile,
      element,
      sizes.n2 % 4 == 0 && is_aligned(g.const_data_ptr(), 4 * bytes_of(element))};
  if (sizes.n1 > 0) {
    launch(
        element == Element::f32 ? project_kernel<4> : project_kernel<2>,
        row_tiles * splits,
        kThreads,
        2 * n3 * tile.positions() * static_cast<int64_t>(sizeof(float)),
        call.stream(),
        args);
  }
  const Tensor out = call.floats({sizes.n3, sizes.rank, sizes.rank});
  const TokenRows p{
      l.const_data_ptr(), element_of(l.scalar_type()), sizes.n3 * sizes.rank, sizes.n1};
  const TokenRows z_rows{
      z.const_data_ptr(), Element::f32, sizes.n3 * sizes.rank, splits * sizes.n1};
  const TokenCores one(z_rows.rows, std::nullopt, 1);
  core_from_products(call, p, z_rows, n3, rank, 0, 1, one, tables.tables(), out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, TCUR_DISPATCH_KEY, m) {
  m.impl("core_grad_dense" TCUR_LANGUAGE, TORCH_BOX(&core_grad_dense<false>));
  m.impl("core_grad_dense" TCUR_LANGUAGE_TF32, TORCH_BOX(&core_grad_dense<true>));
}

}  // namespace tcur
