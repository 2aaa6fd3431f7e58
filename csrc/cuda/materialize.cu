// tcur::materialize, CUDA: W_eff [n3, n1, n2] = W + scale * C*U*R.
//
// A block makes one tile of all slices: 16 or 8 rows, 8 to 128 columns. Its warps form the packed
// planes S_k = P_k R̂_k on tensor cores, bin by bin, into shared memory: a pair of planes is one
// real product [P_re, -P_im; P_im, P_re] [R_re; R_im], with 8 rows of each kind in the 16 of a
// fragment. Then the inverse DFT along the tubes (dft.h), whose outputs meet the base in registers:
// it is read while the sums are formed, and W_eff is written once.
//
// Per element of W_eff: 8 bytes of device memory (6 for bf16), 4*rank/rows + 4*rank/columns bytes
// of R̂ and P from the second-level cache, 16*rank operations of tensor cores, and about
// n3/6 … n3/2 fp32 multiplications. docs/design.md compares them with what a multiprocessor can do.
// Planned: 256 threads, up to 128 registers, 2 blocks per multiprocessor, each with as much shared
// memory as its tile needs: 96 KiB for 48 slices of 16 x 32.
#include "fragments.h"
#include "operators.h"

namespace tcur {
namespace {

struct MixArgs {
  const float* lateral_hat;  // [n1, n3*rank]
  const float* core_hat;     // [n3, rank, rank], weighted
  float* mixed;              // [n1, n3*rank]: P_k = Ĉ_k Û_k
  int64_t n1;
  int n3, rank;
};

struct MaterializeArgs {
  const float* mixed;           // [n1, n3*rank]
  const float* horizontal_hat;  // [n3*rank, n2]
  const float* dft;             // coefficients of dft.h
  void* out;                    // [n3, n1, n2]
  int64_t n1, n2, tiles_in_row;
  int n3, rank;
  Precision precision;
  Tile tile;
  Element base_element, out_element;  // base_element none: no base
  bool vector;                        // rows start at multiples of four elements
  const void* base[kMaxSlices];       // each [n1, n2]
};

constexpr int kThreads = 256;
constexpr int kGroup = 4;  // fragments of 8 columns that a warp works on together

// One thread per number of P.
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
  const bool is_pair = plane > 0 && plane <= 2 * pairs(n3), is_imaginary = plane % 2 == 0;
  const float* left = args.lateral_hat + row * q + plane * rank;
  const float* core = args.core_hat + plane * square + b;
  float sum = 0.0f;
  if (!is_pair) {
    for (int a = 0; a < rank; ++a) {
      sum += left[a] * core[a * rank];
    }
  } else {
    // Re P = C_re U_re - C_im U_im, Im P = C_im U_re + C_re U_im; the other plane of the pair lies
    // after the real one and before the imaginary one.
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

// The packed planes of the tile.
TCUR_DEVICE void form_planes(const MaterializeArgs& args, const Corner& corner, float* planes) {
  const int rank = args.rank, q = args.n3 * rank;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Tile& tile = args.tile;
  const int bins = args.n3 / 2 + 1, fragments = tile.columns() / 8;
  const int groups = (fragments + kGroup - 1) / kGroup;
  for (int item = warp; item < bins * groups; item += kThreads / 32) {
    const int bin = item / groups, first = (item - bin * groups) * kGroup;
    const bool is_pair = bin > 0 && bin <= pairs(args.n3);
    const int plane = bin == 0 ? 0 : 2 * bin - 1, depth = is_pair ? 2 * rank : rank;
    float sums[2][kGroup][4] = {};
    for (int k0 = 0; k0 < depth; k0 += 8) {
      FragmentA left[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int64_t row = corner.row + 8 * m + g;
        const float* p = args.mixed + row * q + plane * rank;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int k = k0 + t + 4 * (i / 2);
          const bool is_lower = i % 2 == 1;  // rows 8 … 15: the imaginary plane
          float value = 0.0f;
          if (8 * m < tile.rows && row < args.n1 && k < depth && (is_pair || !is_lower)) {
            value = p[!is_lower ? k : k < rank ? k + rank : k - rank];
            value = !is_lower && k >= rank ? -value : value;
          }
          left[m].set(i, value, args.precision);
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
          right.set(i, value, args.precision);
        }
        multiply(sums[0][n], left[0], right, args.precision);
        if (tile.rows > 8) {
          multiply(sums[1][n], left[1], right, args.precision);
        }
      }
    }
    float* to = planes + plane * tile.positions();
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kGroup; ++n) {
        if (8 * m < tile.rows && first + n < fragments) {
          const int at = tile.position(8 * m + g, 8 * (first + n) + 2 * t);
          const float* sum = sums[m][n];
          *reinterpret_cast<float2*>(to + at) = {sum[0], sum[1]};
          if (is_pair) {
            *reinterpret_cast<float2*>(to + tile.positions() + at) = {sum[2], sum[3]};
          }
        }
      }
    }
  }
}

// One output of the transform and what it is added to.
template <int IN, int OUT>
TCUR_DEVICE void write_sum(
    const MaterializeArgs& args,
    int slice,
    int64_t at,
    int64_t count,
    const typename Four<IN>::Raw& raw,
    const float4& update) {
  float4 sum = update;
  if (args.base_element != Element::none) {
    const float4 base = Four<IN>::widened(raw, args.base_element);
    sum = {base.x + update.x, base.y + update.y, base.z + update.z, base.w + update.w};
  }
  store_four<OUT>(
      args.out,
      slice * args.n1 * args.n2 + at,
      count,
      args.vector,
      Four<OUT>::narrowed(sum, args.out_element));
}

template <int IN, int OUT>
TCUR_KERNEL(kThreads, 2)
materialize_kernel(const TCUR_PARAMETER MaterializeArgs args) {
  float* planes = shared_memory<float>();
  const Tile& tile = args.tile;
  const int n3 = args.n3, quads = tile.positions() / 4;
  const Corner corner = corner_of(tile, blockIdx.x, args.tiles_in_row);
  form_planes(args, corner, planes);
  fold_tile<true>(planes, n3, quads);
  const int work = line_blocks(n3) * quads;
  for (int i = threadIdx.x; i < work; i += kThreads) {
    const int index = i / quads, position = 4 * (i - index * quads);
    const int tile_row = position >> tile.log_columns;
    const int64_t row = corner.row + tile_row;
    const int64_t column = corner.column + tile.swizzled(tile_row, position & (tile.columns() - 1));
    const int64_t count = row < args.n1 ? args.n2 - column : 0, at = row * args.n2 + column;
    const LineBlock block = line_block(n3, index);
    typename Four<IN>::Raw low[kLines] = {}, high[kLines] = {};
    if (args.base_element != Element::none) {
#pragma unroll
      for (int j = 0; j < kLines; ++j) {
        if (j < block.lines) {
          const int l = block.output(j);
          low[j] = load_four<IN>(args.base[l], at, count, args.vector);
          if (block.is_pair(j)) {
            high[j] = load_four<IN>(args.base[n3 - l], at, count, args.vector);
          }
        }
      }
    }
    float4 even[kLines], odd[kLines];
    dft_lines<true>(planes, n3, 4 * quads, position, block, args.dft, even, odd);
#pragma unroll
    for (int j = 0; j < kLines; ++j) {
      if (j < block.lines) {
        const int l = block.output(j);
        const float4 e = even[j];
        const float4 o = block.is_pair(j) ? odd[j] : float4{0.0f, 0.0f, 0.0f, 0.0f};
        const float4 minus{e.x - o.x, e.y - o.y, e.z - o.z, e.w - o.w};
        write_sum<IN, OUT>(args, l, at, count, low[j], minus);
        if (block.is_pair(j)) {
          const float4 plus{e.x + o.x, e.y + o.y, e.z + o.z, e.w + o.w};
          write_sum<IN, OUT>(args, n3 - l, at, count, high[j], plus);
        }
      }
    }
  }
}

// The widest tile of 16 rows of which two fit a multiprocessor, at least 32 columns, but not so
// wide that few are left for the multiprocessors; for many slices a smaller one. R̂ is read again
// for every `rows` rows, so that large ranks keep 16 of them.
Tile choose_tile(const Sizes& sizes, const SharedLimits& limits) {
  constexpr int64_t reserved = 1024, few = 512;
  const auto fits = [&](const Tile& tile, int64_t budget) {
    return sizes.n3 * tile.positions() * static_cast<int64_t>(sizeof(float)) <= budget;
  };
  const int64_t half = std::min(limits.block, limits.multiprocessor / 2 - reserved);
  for (int log_columns = 7; log_columns >= 5; --log_columns) {
    const Tile tile{16, log_columns};
    const int64_t tiles = tiles_of(sizes.n1, tile.rows) * tiles_of(sizes.n2, tile.columns());
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

// The base as n3 tensors [n1, n2], whether it comes as one tensor, as layers, or not at all.
void set_base(MaterializeArgs& args, const std::vector<Tensor>& weights, const Sizes& s) {
  args.base_element = Element::none;
  if (weights.empty()) {
    return;
  }
  args.base_element = element_of(weights[0].scalar_type());
  const bool is_stack = weights.size() == 1 && weights[0].dim() == 3;
  if (is_stack) {
    check_shape("weights", weights[0], {s.n3, s.n1, s.n2});
  } else {
    STD_TORCH_CHECK(
        static_cast<int64_t>(weights.size()) == s.n3, "tcur: weights must be n3 tensors [n1, n2]");
  }
  for (int64_t l = 0; l < s.n3; ++l) {
    if (is_stack) {
      const char* data = static_cast<const char*>(weights[0].const_data_ptr());
      args.base[l] = data + l * s.n1 * s.n2 * bytes_of(args.base_element);
    } else {
      check_shape("weights", weights[l], {s.n1, s.n2});
      check_dtype("weights", weights[l], weights[0].scalar_type());
      args.base[l] = weights[l].const_data_ptr();
    }
    args.vector = args.vector && is_aligned(args.base[l], 4 * bytes_of(args.base_element));
  }
}

void write_materialized(
    std::vector<Tensor> weights,
    const Tensor& lateral_hat,
    const Tensor& horizontal_hat,
    const Tensor& core,
    double scale,
    const Tensor& out,
    bool tf32) {
  STD_TORCH_CHECK(core.dim() == 3, "tcur: core must be [n3, rank, rank]");
  const Sizes sizes = check_packed(lateral_hat, horizontal_hat, core.size(0));
  check_shape("core", core, {sizes.n3, sizes.rank, sizes.rank});
  check_shape("out", out, {sizes.n3, sizes.n1, sizes.n2});
  STD_TORCH_CHECK(out.is_contiguous(), "tcur: out must be contiguous");
  const Call call(lateral_hat);
  const Precision precision = call.precision(lateral_hat, horizontal_hat, tf32);
  call.check("core", core, ScalarType::Float);
  call.check("out", out);
  check_slices(sizes.n3);
  for (Tensor& weight : weights) {
    call.check("weights", weight);
    weight = torch::stable::contiguous(weight);
  }
  if (out.numel() == 0) {
    return;
  }
  const Tensor l = torch::stable::contiguous(cast(lateral_hat, ScalarType::Float));
  const Tensor h = torch::stable::contiguous(cast(horizontal_hat, ScalarType::Float));
  const Tensor c = torch::stable::contiguous(core);
  const int n3 = static_cast<int>(sizes.n3), rank = static_cast<int>(sizes.rank);
  const int64_t q = sizes.n3 * sizes.rank;
  const Spectrum spectrum(call, c, scale, {nullptr, 1}, 1);
  const Tensor mixed = call.floats({sizes.n1, q});
  const MixArgs mix{
      l.const_data_ptr<float>(),
      spectrum.core_hat(),
      mixed.mutable_data_ptr<float>(),
      sizes.n1,
      n3,
      rank};
  launch(mix_kernel, tiles_of(sizes.n1 * q, kThreads), kThreads, 0, call.stream(), mix);

  const Tile tile = choose_tile(sizes, call.limits());
  const int64_t in_row = tiles_of(sizes.n2, tile.columns());
  const Element element = element_of(out.scalar_type());
  MaterializeArgs args{
      mixed.const_data_ptr<float>(),
      h.const_data_ptr<float>(),
      spectrum.tables().dft(),
      out.mutable_data_ptr(),
      sizes.n1,
      sizes.n2,
      in_row,
      n3,
      rank,
      precision,
      tile,
      Element::none,
      element,
      sizes.n2 % 4 == 0 && is_aligned(out.const_data_ptr(), 4 * bytes_of(element)),
      {}};
  set_base(args, weights, sizes);
  const bool is_half_in = args.base_element == Element::bf16 || args.base_element == Element::f16;
  const auto kernel =
      is_half_in ? (element == Element::f32 ? materialize_kernel<2, 4> : materialize_kernel<2, 2>)
                 : (element == Element::f32 ? materialize_kernel<4, 4> : materialize_kernel<4, 2>);
  launch(
      kernel,
      tiles_of(sizes.n1, tile.rows) * in_row,
      kThreads,
      sizes.n3 * tile.positions() * static_cast<int64_t>(sizeof(float)),
      call.stream(),
      args);
}

template <bool TF32>
void materialize_out(
    std::vector<Tensor> weights,
    Tensor lateral_hat,
    Tensor horizontal_hat,
    Tensor core,
    double scale,
    Tensor out) {
  write_materialized(std::move(weights), lateral_hat, horizontal_hat, core, scale, out, TF32);
}

template <bool TF32>
Tensor materialize(
    std::vector<Tensor> weights,
    Tensor lateral_hat,
    Tensor horizontal_hat,
    Tensor core,
    double scale,
    ScalarType out_dtype) {
  Tensor out = empty_w_eff(lateral_hat, horizontal_hat, core, out_dtype);
  write_materialized(std::move(weights), lateral_hat, horizontal_hat, core, scale, out, TF32);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, TCUR_DISPATCH_KEY, m) {
  m.impl("materialize" TCUR_LANGUAGE, TORCH_BOX(&materialize<false>));
  m.impl("materialize_out" TCUR_LANGUAGE, TORCH_BOX(&materialize_out<false>));
  m.impl("materialize" TCUR_LANGUAGE_TF32, TORCH_BOX(&materialize<true>));
  m.impl("materialize_out" TCUR_LANGUAGE_TF32, TORCH_BOX(&materialize_out<true>));
}

}  // namespace tcur
