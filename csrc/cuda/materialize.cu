// tcur::materialize, CUDA: W_eff [n3, n1, n2] = W + scale * C*U*R.
//
// A block computes one tile of all slices. First its warps compute the packed planes S_k = P_k R̂_k
// on tensor cores, bin by bin, and write them to shared memory. A pair of planes is one real
// product [P_re, -P_im; P_im, P_re] [R_re; R_im]: of the 16 rows of a fragment, 8 are real parts
// and 8 are imaginary parts. Meanwhile the base of the tile is prefetched into the second-level
// cache. Then the block does the inverse DFT along the tubes. Codelets do it in registers, where
// they also add the base (dft.h). Other lengths use a product with the DFT matrix on tensor cores
// (dft_matrix.h). The base is read once, and W_eff is written once.
//
// Each element of W_eff takes 8 bytes of device memory (6 for bf16), 4*rank/rows + 4*rank/columns
// bytes of R̂ and P from the second-level cache, and 16*rank operations of tensor cores. The
// transform takes 4 to 23 fp32 operations with codelets, or about 4*n3 operations of tensor cores.
// docs/performance.md compares what is counted with what a multiprocessor can do.
// Planned: 256 threads, up to 128 registers, 2 blocks per multiprocessor, each with as much shared
// memory as its tile needs: 96 KiB for 48 slices of 16 x 32.
#include "../common/slice_places.h"
#include "dft.h"
#include "dft_matrix.h"
#include "materialize.h"
#include "operators.h"
#include "prepare.h"

namespace tcur {
namespace {

struct MixArgs {
  const float* lateral_hat;  // [n1, n3*rank]
  const float* core_hat;     // [n3, rank, rank], weighted
  float* mixed;              // [n1, n3*rank]: P_k = Ĉ_k Û_k
  int64_t n1;
  int n3, rank;
};

constexpr int kThreads = 256;

// Each thread computes one number of P.
TCUR_KERNEL(kThreads, 4) mix_kernel(const TCUR_PARAMETER MixArgs args) {
  const int rank = args.rank, n3 = args.n3, q = n3 * rank;
  const int64_t square = static_cast<int64_t>(rank) * rank;
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= args.n1 * q) {
    return;
  }
  const int64_t row = index / q;
  const int column = static_cast<int>(index - row * q), plane = column / rank;
  const int b = column - plane * rank;
  const bool is_pair = !is_real_plane(plane, n3), is_imaginary = plane % 2 == 0;
  const float* left = args.lateral_hat + row * q + plane * rank;
  const float* core = args.core_hat + plane * square + b;
  float sum = 0.0f;
  if (!is_pair) {
    for (int a = 0; a < rank; ++a) {
      sum += left[a] * core[a * rank];
    }
  } else {
    // Re P = C_re U_re - C_im U_im, Im P = C_im U_re + C_re U_im. The imaginary plane follows the
    // real one, so an imaginary number finds its real plane just before.
    const float* re = left - (is_imaginary ? rank : 0);
    const float* core_re = core - (is_imaginary ? square : 0);
    for (int a = 0; a < rank; ++a) {
      const float c_re = re[a], c_im = re[rank + a];
      const float u_re = core_re[a * rank], u_im = core_re[square + a * rank];
      sum += is_imaginary ? c_im * u_re + c_re * u_im : c_re * u_re - c_im * u_im;
    }
  }
  args.mixed[index] = sum;
}

TCUR_DEVICE void prefetch_base(const MaterializeArgs& args, const Corner& corner) {
  constexpr int kLine = 128;  // bytes
  const Tile& tile = args.tile;
  const int bytes = bytes_of(args.base_element);
  const int in_row = ceil_div(tile.columns() * bytes, kLine), in_base = tile.rows * in_row;
  for (int i = threadIdx.x; i < args.bases * in_base; i += kThreads) {
    const int which = i / in_base, row = (i - which * in_base) / in_row, line = i % in_row;
    const int64_t column = corner.column + line * (kLine / bytes);
    const char* base = static_cast<const char*>(args.base[which]);
    if (base != nullptr && corner.row + row < args.n1 && column < args.n2) {
      prefetch(base + args.within(which, (corner.row + row) * args.n2, column) * bytes);
    }
  }
}

// Computes the planes of the tile for `count` bins from planes.first on, zeros beyond n3/2. A
// fragment gives 8 rows of the tile, so a tile of up to 8 * HALVES rows takes HALVES fragments.
template <int HALVES>
TCUR_DEVICE void form_planes(
    const MaterializeArgs& args,
    Precision precision,
    const Corner& corner,
    const Planes& planes,
    int count) {
  const int rank = args.rank, q = args.n3 * rank;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Tile& tile = args.tile;
  constexpr int kGroup = 2 * HALVES;  // fragments of 8 columns that a warp works on together
  const int fragments = tile.columns() / 8, groups = ceil_div(fragments, kGroup);
  for (int item = warp; item < count * groups; item += kThreads / 32) {
    const int index = item / groups, first = (item - index * groups) * kGroup;
    const int bin = planes.first + index, plane = plane_of(bin);
    const bool is_pair = tcur::is_pair(bin, args.n3);
    const int depth = is_pair ? 2 * rank : bin <= args.n3 / 2 ? rank : 0;
    float sums[HALVES][kGroup][4] = {};
    for (int k0 = 0; k0 < depth; k0 += 8) {
      FragmentA left[HALVES];
#pragma unroll
      for (int m = 0; m < HALVES; ++m) {
        const int64_t row = corner.row + 8 * m + g;
        const float* p = args.mixed + row * q + plane * rank;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int k = k0 + t + 4 * (i / 2);
          const bool is_lower = i % 2 == 1;  // rows 8 … 15 are the imaginary plane
          float value = 0.0f;
          if (8 * m < tile.rows && row < args.n1 && k < depth && (is_pair || !is_lower)) {
            value = p[!is_lower ? k : k < rank ? k + rank : k - rank];
            value = !is_lower && k >= rank ? -value : value;
          }
          left[m].set(i, value, precision);
        }
      }
#pragma unroll
      for (int n = 0; n < kGroup; ++n) {
        if (first + n >= fragments) {
          break;
        }
        const int64_t column = corner.column + 8 * (first + n) + g;
        FragmentB right;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int k = k0 + t + 4 * i;
          float value = 0.0f;
          if (k < depth && column < args.n2) {
            value =
                args.horizontal_hat[(static_cast<int64_t>(plane) * rank + k) * args.n2 + column];
          }
          right.set(i, value, precision);
        }
        multiply(sums[0][n], left[0], right, precision);
        if (HALVES > 1 && tile.rows > 8) {
          multiply(sums[HALVES - 1][n], left[HALVES - 1], right, precision);
        }
      }
    }
    float* re = planes.real_row(bin);
    float* im = re + planes.stride;
#pragma unroll
    for (int m = 0; m < HALVES; ++m) {
#pragma unroll
      for (int n = 0; n < kGroup; ++n) {
        if (8 * m < tile.rows && first + n < fragments) {
          const int at = tile.position(8 * m + g, 8 * (first + n) + 2 * t);
          const float* sum = sums[m][n];
          store_lanes<2>(re + at, {sum[0], sum[1]});
          if (is_pair || !planes.is_packed) {
            store_lanes<2>(im + at, {sum[2], sum[3]});
          }
        }
      }
    }
  }
}

// The indices first, first + step, …
struct Steps {
  int first, step;

  TCUR_DEVICE int operator[](int i) const {
    return first + i * step;
  }
};

// Offset of a place within the slice of a slot. The place itself assumes that the slice has a
// matrix of its own.
TCUR_DEVICE int64_t within(const MaterializeArgs& args, int slot, const Place& place) {
  return args.within(slot, place.row_start, place.at - place.row_start);
}

template <int BYTES, int N>
TCUR_DEVICE void add_base(
    const MaterializeArgs& args, const Steps& slots, const Place& place, Quad (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int slot = slots[i];
    const auto raw =
        load_four<BYTES>(args.base[slot], within(args, slot, place), place.count, args.vector);
    x[i] = x[i] + Four<BYTES>::widened(raw, args.base_element);
  }
}

template <int BYTES, int N>
TCUR_DEVICE void store_slices(
    const MaterializeArgs& args,
    const Steps& slots,
    const Steps& slices,
    const Place& place,
    const Quad (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int slot = slots[i];
    const int64_t at = args.first(slot, slices[i]) + within(args, slot, place);
    const auto raw = Four<BYTES>::narrowed(x[i], args.out_element);
    store_four<BYTES>(args.out, at, place.count, args.vector, raw);
  }
}

// Writes some slices of W_eff at four positions. x is the update, to which the base is added; the
// arguments of the slices are in `slots`.
template <int N>
TCUR_DEVICE void write_slices(
    const MaterializeArgs& args,
    const Steps& slots,
    const Steps& slices,
    const Place& place,
    Quad (&x)[N]) {
  if (args.base_element != Element::none) {
    with_bytes(args.base_element, [&](auto bytes) __attribute__((always_inline)) {
      add_base<bytes>(args, slots, place, x);
    });
  }
  with_bytes(args.out_element, [&](auto bytes) __attribute__((always_inline)) {
    store_slices<bytes>(args, slots, slices, place, x);
  });
}

template <int OUTER>
TCUR_KERNEL(kThreads, 2)
materialize_kernel(const TCUR_PARAMETER MaterializeArgs args) {
  float* rows = shared_memory<float>();
  const int positions = args.tile.positions(), quads = positions / 4, inner = args.n3 / OUTER;
  const Corner corner = corner_of(args.tile, blockIdx.x, args.tiles_in_row.value);
  prefetch_base(args, corner);
  with_precision(args.precision, [&](Precision precision) __attribute__((always_inline)) {
    form_planes<2>(args, precision, corner, {rows, positions, 0, true}, args.n3 / 2 + 1);
  });
  __syncthreads();
  if (inner > 1) {
    inner_steps<true, OUTER>(rows, positions, args.tables);
    __syncthreads();
  }
  for (int i = threadIdx.x; i < inner * quads; i += kThreads) {
    const int l0 = i / quads, position = 4 * (i - l0 * quads);
    Quad x[OUTER];
    for_middle_rows<OUTER>(args.n3, l0, [&](int j, int row) __attribute__((always_inline)) {
      x[j] = load_lanes<4>(rows + row * positions + position);
    });
    real_inverse<OUTER, float>(x);
    const Steps slices{l0, inner};
    write_slices(args, slices, slices, place_of(args.tile, corner, args.n1, args.n2, position), x);
  }
}

TCUR_KERNEL(kThreads, 2)
materialize_matrix_kernel(const TCUR_PARAMETER MaterializeArgs args) {
  float* rows = shared_memory<float>();
  const Tile& tile = args.tile;
  const Lines& lines = args.lines;
  const int stride = matrix_stride(tile), quads = tile.positions() / 4;
  const Corner corner = corner_of(tile, blockIdx.x, args.tiles_in_row.value);
  prefetch_base(args, corner);
  LineSums sums(lines);
  for (int bin = 0; bin <= args.n3 / 2; bin += lines.count) {
    const int bins = chunk_bins(args.n3, lines, bin);
    // Not `with_precision`: on sm_90 the copies of it would spill a register.
    form_planes<1>(args, args.precision, corner, {rows, stride, bin, false}, bins);
    __syncthreads();
    sums.add(rows, stride, bin, bins, lines, args.tables);
    __syncthreads();
  }
  sums.store(rows, stride, 1.0f);
  __syncthreads();
  for (int i = threadIdx.x; i < (lines.end(args.n3) - lines.first) * quads; i += kThreads) {
    const int j = i / quads, position = 4 * (i - j * quads), l = lines.first + j;
    float* even = rows + 2 * j * stride + position;
    const Quad e = load_lanes<4>(even);
    const Place place = place_of(args.tile, corner, args.n1, args.n2, position);
    if (l == 0 || 2 * l == args.n3) {
      Quad x[1] = {e};
      write_slices(args, {j, 0}, {l, 0}, place, x);
    } else {
      const Quad o = load_lanes<4>(even + stride);
      Quad x[2] = {e - o, e + o};
      write_slices(args, {j, lines.count}, {l, args.n3 - 2 * l}, place, x);
    }
  }
}

// Chooses the widest tile of 16 rows and at least 32 columns of which two fit on a multiprocessor.
// The tile is narrower if it would otherwise leave too few tiles for all multiprocessors, and
// smaller if there are many slices. Each row of tiles reads R̂ again, so large ranks keep 16 rows.
Tile choose_tile(const Sizes& sizes, const SharedLimits& limits) {
  constexpr int64_t reserved = 1024, few = 512;
  const auto fits = [&](const Tile& tile, int64_t budget) {
    return sizes.n3 * tile.positions() * static_cast<int64_t>(sizeof(float)) <= budget;
  };
  const int64_t half = std::min(limits.block, limits.multiprocessor / 2 - reserved);
  for (int log_columns = 7; log_columns >= 5; --log_columns) {
    const Tile tile{16, log_columns};
    const int64_t tiles = ceil_div(sizes.n1, tile.rows) * ceil_div(sizes.n2, tile.columns());
    if (fits(tile, half) && (tiles >= few || log_columns == 5)) {
      return tile;
    }
  }
  const bool is_wide = sizes.rank > 8;
  const Tile smaller[] = {{is_wide ? 16 : 8, is_wide ? 4 : 5}, {is_wide ? 16 : 8, is_wide ? 3 : 4}};
  for (const Tile& tile : smaller) {
    if (fits(tile, half)) {
      return tile;
    }
  }
  return {8, 3};
}

// Puts slice l into a slot of the arguments.
void put_slice(const SlicePlaces& slices, int64_t l, MaterializeArgs& args, int slot) {
  const SlicePlace& place = slices.all[l];
  args.base[slot] = place.base;
  args.beside[slot] = {
      static_cast<unsigned short>(place.count), static_cast<unsigned short>(place.index)};
}

// Whether every slice of the base starts at a multiple of `numbers` numbers.
bool are_aligned_for(int64_t numbers, const SlicePlaces& slices) {
  return slices.element == Element::none ||
         std::all_of(slices.all.begin(), slices.all.end(), [&](const SlicePlace& place) {
           return is_aligned(place.base, numbers * bytes_of(slices.element));
         });
}

// The largest number of slices that lie side by side in one matrix.
int64_t most_beside(const SlicePlaces& slices) {
  const auto fewer = [](const SlicePlace& a, const SlicePlace& b) { return a.count < b.count; };
  return std::max_element(slices.all.begin(), slices.all.end(), fewer)->count;
}

template <int... I>
auto kernel_for(int64_t outer, std::integer_sequence<int, I...>) {
  static constexpr void (*all[])(MaterializeArgs) = {&materialize_kernel<I + 1>...};
  return all[outer - 1];
}

TubesKernel tubes_kernel_for(int64_t n3) {
  static constexpr TubesKernel (*parts[kTubesParts])(int64_t) = {
      &materialize_tubes<0>, &materialize_tubes<1>, &materialize_tubes<2>, &materialize_tubes<3>};
  return parts[tubes_part(n3)](n3);
}

// Whether the kernels for tubes can take this call. On some devices their tiles do not fit into
// shared memory.
bool takes_tubes(
    const Call& call, const Sizes& sizes, const SlicePlaces& slices, const MaterializeArgs& args) {
  return fits_tubes(sizes.n1, sizes.n2, sizes.n3, sizes.rank, args.vector) &&
         sizes.n1 * sizes.n2 * most_beside(slices) <= UINT32_MAX &&
         tubes_kernel_for(sizes.n3).shared_bytes <= call.limits().block;
}

void launch_tubes(
    const Call& call,
    const Sizes& sizes,
    const float* lateral_hat,
    const float* core,
    double scale,
    const SlicePlaces& slices,
    MaterializeArgs args) {
  const TubesKernel tubes = tubes_kernel_for(sizes.n3);
  const int64_t in_column = ceil_div(sizes.n1, tubes.rows), rows = in_column * tubes.rows;
  const int64_t in_row = ceil_div(sizes.n2, tubes.columns);
  args.tiles_in_row = divisor_of_blocks(in_row);
  args.quads = static_cast<int>(ceil_div(args.rank, 4));
  const int64_t numbers = 4 * args.quads * sizes.n3;
  const Tensor mixed = call.floats({rows, numbers});
  const Tensor tiles = call.floats({in_row * tubes.columns, numbers});
  PrepareArgs arguments = laying_out(args.horizontal_hat, tiles, sizes, tubes.columns, args.quads);
  arguments.mixed = mixed.mutable_data_ptr<float>();
  arguments.lateral_hat = lateral_hat;
  arguments.lateral_vector = args.rank % 4 == 0 && is_aligned(lateral_hat, 16);
  arguments.core = core;
  arguments.n1 = sizes.n1;
  arguments.rows = rows;
  arguments.log_rows = log2_of(tubes.rows);
  arguments.weight = scale / args.n3;
  arguments.tables = args.tables;
  prepare(arguments, call.stream());
  args.mixed = mixed.const_data_ptr<float>();
  args.horizontal_hat = tiles.const_data_ptr<float>();
  for (int l = 0; l < args.n3; ++l) {
    put_slice(slices, l, args, l);
  }
  // Prefetching helps as long as everything that the blocks prefetch stays in the second-level
  // cache. On an H100, which has 50 MB of it, prefetching gained 6 % on stacks of 113 MB and lost
  // 7 to 15 % on stacks of 1 GB and more.
  constexpr int64_t most = 512LL * 1024 * 1024;
  args.prefetches = args.base_element != Element::none &&
                    sizes.n1 * sizes.n2 * sizes.n3 * bytes_of(args.base_element) <= most;
  launch_early(
      call.device(),
      tubes.kernel,
      in_column * in_row,
      tubes.threads,
      tubes.shared_bytes,
      call.stream(),
      args);
}

void launch_by_codelets(
    const Call& call, const Sizes& sizes, const SlicePlaces& slices, MaterializeArgs args) {
  args.tile = choose_tile(sizes, call.limits());
  const int64_t in_row = ceil_div(sizes.n2, args.tile.columns());
  args.tiles_in_row = divisor_of_blocks(in_row);
  args.bases = args.base_element == Element::none ? 0 : args.n3;
  for (int l = 0; l < args.n3; ++l) {
    put_slice(slices, l, args, l);
  }
  launch(
      kernel_for(dft_factors(sizes.n3).outer, std::make_integer_sequence<int, kLongestOuter>{}),
      ceil_div(sizes.n1, args.tile.rows) * in_row,
      kThreads,
      sizes.n3 * args.tile.positions() * static_cast<int64_t>(sizeof(float)),
      call.stream(),
      args);
}

void launch_by_matrix(
    const Call& call, const Sizes& sizes, const SlicePlaces& slices, MaterializeArgs args) {
  args.lines = first_lines(args.n3);
  args.tile = matrix_tile(args.lines);
  const int64_t in_row = ceil_div(sizes.n2, args.tile.columns());
  args.tiles_in_row = divisor_of_blocks(in_row);
  args.bases = args.base_element == Element::none ? 0 : 2 * args.lines.count;
  for (; args.lines.first <= args.n3 / 2; args.lines.first += args.lines.count) {
    std::fill_n(args.base, 2 * args.lines.count, nullptr);
    for (int l = args.lines.first; l < args.lines.end(args.n3); ++l) {
      const int slot = l - args.lines.first;
      put_slice(slices, l, args, slot);
      if (l > 0 && 2 * l != args.n3) {
        put_slice(slices, args.n3 - l, args, args.lines.count + slot);
      }
    }
    launch(
        materialize_matrix_kernel,
        ceil_div(sizes.n1, args.tile.rows) * in_row,
        kThreads,
        matrix_bytes(args.lines, args.tile),
        call.stream(),
        args);
  }
}

template <bool TF32>
void materialize(const MaterializeArguments& a) {
  const Sizes sizes = check_materialize(a);
  const Call call(a.lateral_hat);
  const Precision precision = call.precision(a.lateral_hat, a.horizontal_hat, TF32);
  call.check("core", a.core, ScalarType::Float);
  call.check("out", a.out);
  check_slices(sizes.n3);
  std::vector<Tensor> weights;
  for (const Tensor& weight : a.weights) {
    call.check("weights", weight);
    weights.push_back(torch::stable::contiguous(weight));
  }
  const SlicePlaces slices = place_slices(weights, sizes, a.out);
  if (a.out.numel() == 0) {
    return;
  }
  const Tensor l = torch::stable::contiguous(cast(a.lateral_hat, ScalarType::Float));
  const Tensor h = torch::stable::contiguous(cast(a.horizontal_hat, ScalarType::Float));
  const Tensor c = torch::stable::contiguous(a.core);
  const int n3 = static_cast<int>(sizes.n3), rank = static_cast<int>(sizes.rank);
  const int64_t q = sizes.q();
  MaterializeArgs args{};
  args.horizontal_hat = h.const_data_ptr<float>();
  args.out = a.out.mutable_data_ptr();
  args.n1 = sizes.n1;
  args.n2 = sizes.n2;
  args.n3 = n3;
  args.rank = rank;
  args.precision = precision;
  args.base_element = slices.element;
  args.out_element = element_of(a.out);
  args.vector = sizes.n2 % 4 == 0 && are_aligned_for(4, slices) &&
                is_aligned(args.out, 4 * bytes_of(args.out_element));
  args.side_by_side = most_beside(slices) > 1;
  if (takes_tubes(call, sizes, slices, args)) {
    const Spectrum tables(call, sizes.n3);
    args.tables = tables.tables();
    launch_tubes(
        call, sizes, l.const_data_ptr<float>(), c.const_data_ptr<float>(), a.scale, slices, args);
    return;
  }
  const Spectrum spectrum(call, c, a.scale, {nullptr, 1}, 1);
  const Tensor mixed = call.floats({sizes.n1, q});
  const MixArgs mix{
      l.const_data_ptr<float>(),
      spectrum.core_hat(),
      mixed.mutable_data_ptr<float>(),
      sizes.n1,
      n3,
      rank};
  launch(mix_kernel, ceil_div(sizes.n1 * q, kThreads), kThreads, 0, call.stream(), mix);
  args.mixed = mixed.const_data_ptr<float>();
  args.tables = spectrum.tables();
  if (dft_factors(sizes.n3).outer > 0) {
    launch_by_codelets(call, sizes, slices, args);
  } else {
    launch_by_matrix(call, sizes, slices, args);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, TCUR_DISPATCH_KEY, m) {
  m.impl("materialize" TCUR_LANGUAGE, TORCH_BOX(&positional::materialize<&materialize<false>>));
  m.impl(
      "materialize_out" TCUR_LANGUAGE,
      TORCH_BOX(&positional::materialize_out<&materialize<false>>));
  m.impl("materialize" TCUR_LANGUAGE_TF32, TORCH_BOX(&positional::materialize<&materialize<true>>));
  m.impl(
      "materialize_out" TCUR_LANGUAGE_TF32,
      TORCH_BOX(&positional::materialize_out<&materialize<true>>));
}

}  // namespace tcur
