// tcur::core_grad_dense, CUDA: ∂U [n3, rank, rank] = Cᵀ * G * Rᵀ from G [n3, n1, n2].
//
// The adjoint of materialize.cu. A block walks along its part of the columns and reads tiles of all
// slices of G, 8 rows high. It transforms each tile along the tubes into packed planes in shared
// memory. Codelets do this while the tile comes from memory (dft.h); other lengths use a product
// with the DFT matrix (dft_matrix.h). Then the block multiplies the planes with R̂ on tensor cores:
//     [z_re; z_im] = [G_re, G_im; -G_im, G_re] [R_reᵀ; R_imᵀ]
// This is the conjugate of Ĝ_k R̂_kᴴ. All of z is [n1, n3*rank]: its rows are like those of
// projected tokens whose p is Ĉ, so products.h does the rest. G is never transformed as a whole. It
// is read once, except for lengths beyond 255 that are not a product of two short factors; those
// read it once for every 128 bins.
//
// Each element of G takes 4 bytes of device memory (2 for bf16 and fp16), 4*rank/8 bytes of R̂ from
// the second-level cache, and 16*rank operations of tensor cores. The transform takes 4 to 23 fp32
// operations with codelets, or about 4*n3 operations of tensor cores.
// Planned: 256 threads, up to 128 registers, 2 blocks per multiprocessor, each with a tile in
// shared memory: 96 KiB for 48 slices of 8 x 64.
#include "core_grad_dense.h"

#include "../common/token_products.h"
#include "dft.h"
#include "operators.h"
#include "prepare.h"
#include "products.h"

namespace tcur {
namespace {

constexpr int kThreads = 256, kRows = 8;

template <int BYTES>
TCUR_DEVICE Quad read_slice(const ProjectArgs& args, int slice, const Place& place) {
  const int64_t at = slice * args.n1 * args.n2 + place.at;
  const auto raw = load_four<BYTES>(args.grad, at, place.count, args.vector);
  return Four<BYTES>::widened(raw, args.element);
}

// Reads the slices of a tile and does the outer step of dft.h on them.
template <int BYTES, int OUTER>
TCUR_DEVICE void read_transformed(const ProjectArgs& args, const Corner& corner, float* rows) {
  const int positions = args.tile.positions(), quads = positions / 4, inner = args.n3 / OUTER;
  for (int i = threadIdx.x; i < inner * quads; i += kThreads) {
    const int l0 = i / quads, position = 4 * (i - l0 * quads);
    const Place place = place_of(args.tile, corner, args.n1, args.n2, position);
    Quad x[OUTER];
#pragma unroll
    for (int j = 0; j < OUTER; ++j) {
      x[j] = read_slice<BYTES>(args, l0 + inner * j, place);
    }
    real_forward<OUTER, float>(x);
    for_middle_rows<OUTER>(args.n3, l0, [&](int j, int row) __attribute__((always_inline)) {
      store_lanes<4>(rows + row * positions + position, x[j]);
    });
  }
}

// Reads slices first … first+count-1 and their mirror images n3-l, and writes A and B of
// dft_matrix.h, zeros beyond n3/2.
template <int BYTES>
TCUR_DEVICE void read_folded(
    const ProjectArgs& args, const Corner& corner, int first, int count, float* rows) {
  const int stride = matrix_stride(args.tile), quads = args.tile.positions() / 4;
  for (int i = threadIdx.x; i < count * quads; i += kThreads) {
    const int j = i / quads, position = 4 * (i - j * quads), l = first + j;
    const Place place = place_of(args.tile, corner, args.n1, args.n2, position);
    Quad a{}, b{};
    if (l <= args.n3 / 2) {
      a = read_slice<BYTES>(args, l, place);
      if (l > 0 && 2 * l < args.n3) {
        const Quad mirrored = read_slice<BYTES>(args, args.n3 - l, place);
        b = a - mirrored;
        a = a + mirrored;
      }
    }
    float* to = rows + 2 * j * stride + position;
    store_lanes<4>(to, a);
    store_lanes<4>(to + stride, b);
  }
}

// z += planes R̂ᵀ for some bins. Only one thread of one block adds to any number of z.
TCUR_DEVICE void project(
    const ProjectArgs& args,
    Precision precision,
    const Corner& corner,
    const Planes& planes,
    int bins,
    float* z,
    bool is_first) {
  const Tile& tile = args.tile;
  const int rank = args.rank, columns = tile.columns();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int fragments = ceil_div(rank, 8);
  for (int item = warp; item < bins * fragments; item += kThreads / 32) {
    const int index = item / fragments, b0 = (item - index * fragments) * 8;
    const int bin = planes.first + index;
    const bool is_pair = tcur::is_pair(bin, args.n3);
    const int plane = plane_of(bin), depth = is_pair ? 2 * columns : columns;
    const float* re = planes.real_row(bin);
    const float* im = re + planes.stride;
    float sums[4] = {};
    for (int k0 = 0; k0 < depth; k0 += 8) {
      FragmentA left;
      FragmentB right;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = k0 + t + 4 * (i / 2);
        const bool is_lower = i % 2 == 1;  // rows 8 … 15 are z_im
        float value = 0.0f;
        if (k < depth && (is_pair || !is_lower)) {
          const int at = tile.position(g, k & (columns - 1));
          const bool is_re = (k < columns) != is_lower;
          value = is_re ? re[at] : k < columns ? -im[at] : im[at];
        }
        left.set(i, value, precision);
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
        right.set(i, value, precision);
      }
      multiply(sums, left, right, precision);
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

// Calls work(corner, z, is_first) for each tile of a block, one after another.
template <class F>
TCUR_DEVICE void for_tiles(const ProjectArgs& args, F&& work) {
  const int row_tile = args.splits.quotient(static_cast<int>(blockIdx.x));
  const int split = static_cast<int>(blockIdx.x) - row_tile * args.splits.value;
  float* z = args.z + split * args.n1 * args.n3 * args.rank;
  const int first = split * args.tiles_per_split;
  for (int tile = first; tile < first + args.tiles_per_split; ++tile) {
    const Corner corner{
        static_cast<int64_t>(row_tile) * kRows,
        static_cast<int64_t>(tile) << args.tile.log_columns};
    if (corner.column >= args.n2 && tile > first) {
      return;  // all threads return together; the first tile always runs, because it clears z
    }
    work(corner, z, tile == first);
  }
}

template <int OUTER>
TCUR_KERNEL(kThreads, 2)
project_kernel(const TCUR_PARAMETER ProjectArgs args) {
  float* rows = shared_memory<float>();
  const int positions = args.tile.positions();
  for_tiles(
      args, [&](const Corner& corner, float* z, bool is_first) __attribute__((always_inline)) {
        with_bytes(args.element, [&](auto bytes) __attribute__((always_inline)) {
          read_transformed<bytes, OUTER>(args, corner, rows);
        });
        __syncthreads();
        if (args.n3 > OUTER) {
          inner_steps<false, OUTER>(rows, positions, args.tables);
          __syncthreads();
        }
        with_precision(args.precision, [&](Precision precision) __attribute__((always_inline)) {
          const Planes planes{rows, positions, 0, true};
          project(args, precision, corner, planes, args.n3 / 2 + 1, z, is_first);
        });
        __syncthreads();
      });
}

TCUR_KERNEL(kThreads, 2)
project_matrix_kernel(const TCUR_PARAMETER ProjectArgs args) {
  float* rows = shared_memory<float>();
  const Lines& lines = args.lines;
  const int stride = matrix_stride(args.tile);
  for_tiles(
      args, [&](const Corner& corner, float* z, bool is_first) __attribute__((always_inline)) {
        LineSums sums(lines);
        for (int l = 0; l <= args.n3 / 2; l += lines.count) {
          const int count = chunk_bins(args.n3, lines, l);
          with_bytes(args.element, [&](auto bytes) __attribute__((always_inline)) {
            read_folded<bytes>(args, corner, l, count, rows);
          });
          __syncthreads();
          sums.add(rows, stride, l, count, lines, args.tables);
          __syncthreads();
        }
        sums.store(rows, stride, -1.0f);
        __syncthreads();
        const int bins = lines.end(args.n3) - lines.first;
        // Not `with_precision`: on sm_100 the copies of it would spill a register.
        const Planes planes{rows, stride, lines.first, false};
        project(args, args.precision, corner, planes, bins, z, is_first);
        __syncthreads();
      });
}

template <int... I>
auto kernel_for(int64_t outer, std::integer_sequence<int, I...>) {
  static constexpr void (*all[])(ProjectArgs) = {&project_kernel<I + 1>...};
  return all[outer - 1];
}

// The widest tile of which two fit on a multiprocessor, or one if no two fit.
Tile choose_tile(int64_t n3, const SharedLimits& limits) {
  constexpr int64_t reserved = 1024;
  const int64_t half = std::min(limits.block, limits.multiprocessor / 2 - reserved);
  for (const int64_t budget : {half, limits.block}) {
    for (int log_columns = 6; log_columns >= 3; --log_columns) {
      if (n3 * (kRows << log_columns) * static_cast<int64_t>(sizeof(float)) <= budget) {
        return {kRows, log_columns};
      }
    }
  }
  return {kRows, 3};
}

// How blocks walk over the tiles: `splits` blocks share each row of tiles, and each walks over
// `per_split` of them. This makes a few blocks for each of 132 multiprocessors. It depends on the
// shape alone, so that the sums are the same on every device.
struct Walk {
  int splits;
  int64_t per_split, row_tiles;

  Walk(const Sizes& sizes, int rows, int columns, int64_t wanted)
      : row_tiles(ceil_div(sizes.n1, rows)) {
    const int64_t tiles = std::max<int64_t>(1, ceil_div(sizes.n2, columns));
    const int64_t at_most = std::max<int64_t>(1, wanted / std::max<int64_t>(1, row_tiles));
    per_split = ceil_div(tiles, std::min(tiles, at_most));
    splits = static_cast<int>(ceil_div(tiles, per_split));
  }
};

ProjectTubesKernel tubes_kernel_for(int64_t n3) {
  static constexpr ProjectTubesKernel (*parts[kTubesParts])(int64_t) = {
      &project_tubes<0>, &project_tubes<1>, &project_tubes<2>, &project_tubes<3>};
  return parts[tubes_part(n3)](n3);
}

// Computes z [splits, n1, n3*rank] with the kernels for tubes.
Tensor project_by_tubes(const Call& call, const Sizes& sizes, const Tensor& h, ProjectArgs args) {
  const ProjectTubesKernel tubes = tubes_kernel_for(sizes.n3);
  const int quads = static_cast<int>(ceil_div(sizes.rank, 4));
  const int64_t width = ceil_div(sizes.n2, tubes.columns) * tubes.columns;
  const Tensor tiles = call.floats({width, quads * 4 * sizes.n3});
  prepare(laying_out(h.const_data_ptr<float>(), tiles, sizes, tubes.columns, quads), call.stream());
  const Walk walk(sizes, tubes.rows, tubes.columns, 792);
  const Tensor z = call.floats({walk.splits, sizes.n1, sizes.q()});
  args.horizontal_hat = tiles.const_data_ptr<float>();
  args.z = z.mutable_data_ptr<float>();
  args.splits = divisor_of_blocks(walk.splits);
  args.tiles_per_split = static_cast<int>(walk.per_split);
  args.quads = quads;
  for (; args.first_quad < quads; args.first_quad += tubes.quads) {
    launch_early(
        call.device(),
        tubes.kernel,
        walk.row_tiles * walk.splits,
        tubes.threads,
        tubes.shared_bytes,
        call.stream(),
        args);
  }
  return z;
}

// Computes z with the kernels for any length, rank and alignment.
Tensor project_by_tiles(const Call& call, const Sizes& sizes, const Tensor& h, ProjectArgs args) {
  const bool has_factors = dft_factors(sizes.n3).outer > 0;
  args.lines = first_lines(args.n3);
  args.tile = has_factors ? choose_tile(sizes.n3, call.limits()) : matrix_tile(args.lines);
  const Walk walk(sizes, kRows, args.tile.columns(), 264);
  const Tensor z = call.floats({walk.splits, sizes.n1, sizes.q()});
  args.horizontal_hat = h.const_data_ptr<float>();
  args.z = z.mutable_data_ptr<float>();
  args.splits = divisor_of_blocks(walk.splits);
  args.tiles_per_split = static_cast<int>(walk.per_split);
  const int64_t blocks = walk.row_tiles * walk.splits;
  if (has_factors) {
    launch(
        kernel_for(dft_factors(sizes.n3).outer, std::make_integer_sequence<int, kLongestOuter>{}),
        blocks,
        kThreads,
        sizes.n3 * args.tile.positions() * static_cast<int64_t>(sizeof(float)),
        call.stream(),
        args);
    return z;
  }
  for (; args.lines.first <= args.n3 / 2; args.lines.first += args.lines.count) {
    launch(
        project_matrix_kernel,
        blocks,
        kThreads,
        matrix_bytes(args.lines, args.tile),
        call.stream(),
        args);
  }
  return z;
}

template <bool TF32>
Tensor core_grad_dense(const CoreGradDenseArguments& a) {
  const Sizes sizes = check_core_grad_dense(a);
  const Call call(a.lateral_hat);
  const Precision precision = call.precision(a.lateral_hat, a.horizontal_hat, TF32);
  call.check("grad", a.grad);
  check_slices(sizes.n3);
  const Tensor g = torch::stable::contiguous(a.grad);
  const Tensor l = torch::stable::contiguous(a.lateral_hat);
  const Tensor h = torch::stable::contiguous(cast(a.horizontal_hat, ScalarType::Float));
  const int n3 = static_cast<int>(sizes.n3), rank = static_cast<int>(sizes.rank);
  const Spectrum tables(call, n3);

  const Element element = element_of(g);
  ProjectArgs args{};
  args.grad = g.const_data_ptr();
  args.tables = tables.tables();
  args.n1 = sizes.n1;
  args.n2 = sizes.n2;
  args.n3 = n3;
  args.rank = rank;
  args.precision = precision;
  args.element = element;
  args.vector = sizes.n2 % 4 == 0 && is_aligned(args.grad, 4 * bytes_of(element));
  const bool is_there = sizes.n1 > 0 && sizes.n2 > 0;
  // On some devices the tiles of some lengths do not fit into shared memory.
  const bool takes_tubes = fits_tubes(sizes.n1, sizes.n2, sizes.n3, rank, args.vector) &&
                           tubes_kernel_for(n3).shared_bytes <= call.limits().block;
  const Tensor z = !is_there     ? call.floats({0, sizes.n1, sizes.q()})
                   : takes_tubes ? project_by_tubes(call, sizes, h, args)
                                 : project_by_tiles(call, sizes, h, args);
  const Tensor out = call.floats({sizes.n3, sizes.rank, sizes.rank});
  const TokenRows p = token_rows(l, 0, sizes.q()), z_rows = token_rows(z, 0, sizes.q());
  const TokenCores one(z_rows.rows, std::nullopt, 1);
  core_from_products(call, p, z_rows, n3, rank, 0, 1, one, tables.tables(), false, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, TCUR_DISPATCH_KEY, m) {
  m.impl(
      "core_grad_dense" TCUR_LANGUAGE,
      TORCH_BOX(&positional::core_grad_dense<&core_grad_dense<false>>));
  m.impl(
      "core_grad_dense" TCUR_LANGUAGE_TF32,
      TORCH_BOX(&positional::core_grad_dense<&core_grad_dense<true>>));
}

}  // namespace tcur
