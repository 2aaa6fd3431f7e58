// tcur::cur_linear, CUDA: one or more consecutive slices of W + scale * C*U*R as a linear map.
//
// forward    y = x Wᵀ + b + ((x R̂ᵀ) M_lᵀ) Ĉᵀ        x: [..., n2], y: [..., slices*n1]
// transposed y = x W + Σ_l ((x_l Ĉ) M_l) R̂          x: [..., slices*n1], y: [..., n2]
//
// torch (cuBLAS) computes the products with W, R̂ and Ĉ. The last of them adds to y in place if the
// dtypes allow it. The kernels here apply the core in between, a complex rank x rank matrix for
// each bin. With z_c = z_re + i z_im they compute v = e^{2πikl/n3} Û_k z_c, and pass on v_re and
// -v_im. Layers that share x share Û_k z_c.
//
// A block takes some bins of a chunk of tokens. These are 64 numbers of a row or more, so that the
// block reads whole lines of memory. Û of its bins is in shared memory, in the order in which a
// warp reads it. A thread computes four numbers of v for up to four tokens. It loads the next four
// numbers of each token before it multiplies the current ones. Each number of z is read from memory
// once; the rank/4 threads that need it read it from the first-level cache. Each number takes
// 2*rank fp32 multiplications. For 2048 tokens of 48
// slices at rank 8 in bf16: 116 blocks of 7 bins and 72 tokens. Planned: 256 threads, up to 128
// registers, 2 blocks per multiprocessor, up to 64 KiB of shared memory each at large ranks, 3.5
// KiB at a rank of 8.
#include "token_grid.h"

#include "../common/token_products.h"

#include <cmath>

// The one product of torch that the stable headers do not wrap.
#ifdef __CUDACC__
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#define TCUR_ADDMM aoti_torch_cuda_addmm_out
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#define TCUR_ADDMM aoti_torch_cpu_addmm_out
#endif

namespace tcur {
namespace {

constexpr int kThreads = kTokenThreads;
constexpr int kSlab = 32;         // columns of Û in shared memory at a time
constexpr int kMostThreads = 64;  // for one token, so that a slab is at most 64 KiB

// The most tokens that a thread takes.
TCUR_HOST_DEVICE constexpr int tokens_of(Element element, bool transposed, bool vector) {
  return element == Element::f32 || transposed || !vector ? 2 : 4;
}

struct ApplyArgs {
  const void* in;         // [tokens, q], or [tokens, slices*q] transposed
  void* out;              // [tokens, slices*q], or [tokens, q] transposed; q = n3*rank
  const float* core_hat;  // [entries, n3, rank, rank], weighted
  CoreIds entries;        // which entry of core_hat each row of tokens uses
  TokenGrid grid;
  Tables tables;
  int rank, slice_index, slices;
};

// Loads columns first … first+count-1 of Û (or of its transpose) for the bins and rows of this
// block, as [count, re and im, threads of a token, 4]. Numbers beyond the rank are zero, and so are
// all numbers without a core.
template <bool TRANSPOSED>
TCUR_DEVICE void load_slab(
    const ApplyArgs& args,
    const Item& seat,
    int item,
    int group,
    const float* core,
    int first,
    int count,
    float* to) {
  const int rank = args.rank, square = rank * rank, per_token = args.grid.threads_per_token();
  for (int b = group; b < count && group < args.grid.groups; b += args.grid.groups) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      float values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 4 * seat.tile + i, column = first + b;
        const bool is_there = core != nullptr && seat.is_there && row < rank && column < rank &&
                              (part == 0 || seat.is_pair);
        const int entry = TRANSPOSED ? column * rank + row : row * rank + column;
        values[i] = is_there ? core[part * square + entry] : 0.0f;
      }
      *reinterpret_cast<float4*>(to + ((2 * b + part) * per_token + item) * 4) =
          float4{values[0], values[1], values[2], values[3]};
    }
  }
}

template <Element E, bool TRANSPOSED, bool VECTOR>
TCUR_KERNEL(kThreads, 2)
apply_kernel(const TCUR_PARAMETER ApplyArgs args) {
  constexpr int kTokens = tokens_of(E, TRANSPOSED, VECTOR);
  const TokenGrid& grid = args.grid;
  const int rank = args.rank, n3 = args.tables.n3, q = n3 * rank;
  const int in_slices = TRANSPOSED ? args.slices : 1, out_slices = TRANSPOSED ? 1 : args.slices;
  const int per_token = grid.threads_per_token();
  const int group = grid.by_threads_per_token.quotient(threadIdx.x);
  const int item = threadIdx.x - group * per_token;
  const Share share(grid);
  const Item seat(grid, share, item, n3);
  const bool works = seat.is_there && group < grid.groups;
  const int column = seat.plane * rank, a = 4 * seat.tile;
  const int64_t token = share.begin + group, which = args.entries[share.row];
  const bool is_valid = args.entries.is_valid(which);
  const float* core =
      is_valid ? args.core_hat + (which * n3 + seat.plane) * static_cast<int64_t>(rank) * rank
               : nullptr;
  const Turn first_turn(seat.bin, args.slice_index, n3);
  float* slab = shared_memory<float>();

  const auto load =
      [&](int slice, int b, PackedPair<E>(&to)[kTokens]) __attribute__((always_inline)) {
#pragma unroll
        for (int u = 0; u < kTokens; ++u) {
          const int64_t t = token + u * grid.groups;
          const int count = works && t < share.end ? (rank - b < 4 ? rank - b : 4) : 0;
          const int64_t at = (t * in_slices + slice) * q + column + b;
          to[u] = load_pair<E, VECTOR>(args.in, at, rank, count, seat.is_pair);
        }
      };
  Pairs v[kTokens];
#pragma unroll
  for (int i = 0; i < 4 * kTokens; ++i) {
    v[i / 4].re.v[i % 4] = v[i / 4].im.v[i % 4] = is_valid ? 0.0f : NAN;
  }
  PackedPair<E> ahead[kTokens];
  load(0, 0, ahead);
  for (int first = 0; first < rank; first += kSlab) {
    const int columns = rank - first < kSlab ? round_up(rank - first, 4) : kSlab;
    if (first > 0) {
      __syncthreads();
    }
    load_slab<TRANSPOSED>(args, seat, item, group, core, first, columns, slab);
    __syncthreads();
    for (int b = first; b < first + columns && works; b += 4) {
      Pairs x[kTokens] = {};
      Turn turn = first_turn;
      const float2 root = TRANSPOSED ? args.tables.root(turn.next()) : float2{1.0f, 0.0f};
#pragma unroll
      for (int u = 0; u < kTokens; ++u) {
        if (TRANSPOSED) {
          x[u].add_turned(ahead[u], root);
        } else {
          x[u] = {ahead[u].re.widened(), ahead[u].im.widened()};
        }
      }
      for (int s = 1; s < in_slices; ++s) {
        PackedPair<E> raw[kTokens];
        load(s, b, raw);
        const float2 turned = args.tables.root(turn.next());
#pragma unroll
        for (int u = 0; u < kTokens; ++u) {
          x[u].add_turned(raw[u], turned);
        }
      }
      if (b + 4 < rank) {
        load(0, b + 4, ahead);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* from = slab + (2 * (b - first + j) * per_token + item) * 4;
        const Numbers u_re = Packed<Element::f32>{*reinterpret_cast<const float4*>(from)}.widened();
        const Numbers u_im =
            Packed<Element::f32>{*reinterpret_cast<const float4*>(from + per_token * 4)}.widened();
#pragma unroll
        for (int i = 0; i < 4 * kTokens; ++i) {
          Pairs& sum = v[i / 4];
          const float x_re = x[i / 4].re.v[j], x_im = x[i / 4].im.v[j];
          sum.re.v[i % 4] += u_re.v[i % 4] * x_re;
          sum.re.v[i % 4] -= u_im.v[i % 4] * x_im;
          sum.im.v[i % 4] += u_re.v[i % 4] * x_im;
          sum.im.v[i % 4] += u_im.v[i % 4] * x_re;
        }
      }
    }
  }
  Turn turn = first_turn;
  for (int s = 0; s < out_slices && works; ++s) {
    const float2 root = TRANSPOSED ? float2{1.0f, 0.0f} : args.tables.root(turn.next());
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      const int64_t t = token + u * grid.groups;
      const int count = t < share.end ? (rank - a < 4 ? rank - a : 4) : 0;
      const int64_t at = (t * out_slices + s) * q + column + a;
      Pairs turned;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float re = v[u].re.v[i], im = v[u].im.v[i];
        turned.re.v[i] = root.x * re - root.y * im;
        turned.im.v[i] = -(root.x * im + root.y * re);
      }
      store_packed<E, VECTOR>(args.out, at, count, turned.re);
      store_packed<E, VECTOR>(args.out, at + rank, seat.is_pair ? count : 0, turned.im);
    }
  }
}

using ApplyKernel = void (*)(ApplyArgs);

template <bool TRANSPOSED, bool VECTOR>
ApplyKernel kernel_for(Element element) {
  return with_element<Element::f32, Element::bf16>(element, [](auto in) -> ApplyKernel {
    return &apply_kernel<decltype(in)::value, TRANSPOSED, VECTOR>;
  });
}

ApplyKernel kernel_for(Element element, bool transposed, bool vector) {
  if (transposed) {
    return vector ? kernel_for<true, true>(element) : kernel_for<true, false>(element);
  }
  return vector ? kernel_for<false, true>(element) : kernel_for<false, false>(element);
}

struct AddArgs {
  void* y;
  const void* delta;
  int64_t size;
};

// y += delta, computed in fp32 and rounded once. A thread loads two times four numbers of both
// together.
template <Element Y, Element DELTA, bool VECTOR>
TCUR_KERNEL(kThreads, 2)
add_kernel(const TCUR_PARAMETER AddArgs args) {
  const int64_t first = 8 * kThreads * static_cast<int64_t>(blockIdx.x) + 4 * threadIdx.x;
  Packed<Y> y[2];
  Packed<DELTA> delta[2];
  int count[2];
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    const int64_t at = first + 4 * kThreads * u, rest = args.size - at;
    count[u] = rest < 4 ? static_cast<int>(rest) : 4;
    y[u] = load_packed<Y, VECTOR>(args.y, at, count[u]);
    delta[u] = load_packed<DELTA, VECTOR>(args.delta, at, count[u]);
  }
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    Numbers sum = y[u].widened();
    const Numbers other = delta[u].widened();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum.v[i] += other.v[i];
    }
    store_packed<Y, VECTOR>(args.y, first + 4 * kThreads * u, count[u], sum);
  }
}

using AddKernel = void (*)(AddArgs);

// Only for different types: torch adds numbers of the same type.
template <bool VECTOR>
AddKernel add_kernel_for(Element y, Element delta) {
  if (delta == Element::f32) {
    return with_element<Element::bf16, Element::f16>(y, [](auto to) -> AddKernel {
      return &add_kernel<decltype(to)::value, Element::f32, VECTOR>;
    });
  }
  return with_element<Element::f32, Element::f16>(y, [](auto to) -> AddKernel {
    return &add_kernel<decltype(to)::value, Element::bf16, VECTOR>;
  });
}

// Applies the core to the projected tokens. Returns [tokens*slices, q], or [tokens, q] transposed.
Tensor apply_core(
    const Call& call,
    const CurLinearArguments& a,
    const LinearSizes& sizes,
    const Tensor& in) {  // [tokens, q], or [tokens*slices, q] transposed, contiguous; fp32 or bf16
  const int n3 = static_cast<int>(sizes.n3), rank = static_cast<int>(sizes.rank);
  const Tensor core = torch::stable::contiguous(a.core);
  const TokenCores cores(sizes.tokens, a.adapter_ids, core.size(0));
  // Computes the spectra of all cores or of the core of each row, whichever are fewer.
  const bool by_rows = a.adapter_ids.has_value() && cores.rows() < cores.cores();
  const CoreIds in_order{nullptr, by_rows ? cores.rows() : cores.cores()};
  const Spectrum spectrum(
      call, core, a.scale, by_rows ? core_ids(cores) : in_order, in_order.cores);
  const Tensor out = torch::stable::new_empty(
      in, {a.transposed ? sizes.tokens : sizes.tokens * a.slices, sizes.q()}, in.scalar_type());
  const Element element = element_of(in);
  const bool vector = rank % 4 == 0 && is_aligned(in.const_data_ptr(), 4 * bytes_of(element)) &&
                      is_aligned(out.const_data_ptr(), 4 * bytes_of(element));
  constexpr int64_t wanted = 264;  // blocks, two for each of 132 multiprocessors
  TokenGrid grid = token_grid(n3, rank, ceil_div(rank, 4), kMostThreads, cores);
  const int64_t per_thread =
      ceil_div(sizes.tokens * grid.bin_blocks * grid.tile_blocks, wanted * grid.groups);
  cut_rows(grid, std::clamp<int64_t>(per_thread, 1, tokens_of(element, a.transposed, vector)));
  const ApplyArgs args{
      in.const_data_ptr(),
      out.mutable_data_ptr(),
      spectrum.core_hat(),
      by_rows ? in_order : core_ids(cores),
      grid,
      spectrum.tables(),
      rank,
      static_cast<int>(a.slice_index),
      static_cast<int>(a.slices)};
  const int64_t numbers = 8 * std::min(kSlab, round_up(rank, 4)) * grid.threads_per_token();
  if (grid.blocks() > 0) {
    launch(
        kernel_for(element, a.transposed, vector),
        grid.blocks(),
        kThreads,
        numbers * static_cast<int64_t>(sizeof(float)),
        call.stream(),
        args);
  }
  return out;
}

// y += mixed factor, in place; y is [..., columns of factor], mixed and factor are fp32 or bf16.
void add_product_to(const Call& call, const Tensor& y, const Tensor& mixed, const Tensor& factor) {
  const ScalarType dtype = y.scalar_type();
  if (dtype == mixed.scalar_type()) {
    const Tensor flat = torch::stable::view(y, {mixed.size(0), factor.size(1)});
    TORCH_ERROR_CODE_CHECK(TCUR_ADDMM(flat.get(), flat.get(), mixed.get(), factor.get(), 1.0, 1.0));
    return;
  }
  const Tensor delta = torch::stable::contiguous(torch::stable::matmul(mixed, factor));
  const Element to = element_of(dtype), from = element_of(delta);
  const AddArgs args{y.mutable_data_ptr(), delta.const_data_ptr(), y.numel()};
  const bool vector = args.size % 4 == 0 && is_aligned(args.y, 4 * bytes_of(to)) &&
                      is_aligned(args.delta, 4 * bytes_of(from));
  if (args.size > 0) {
    launch(
        vector ? add_kernel_for<true>(to, from) : add_kernel_for<false>(to, from),
        ceil_div(args.size, 8 * kThreads),
        kThreads,
        0,
        call.stream(),
        args);
  }
}

Tensor cur_linear(const CurLinearArguments& a) {
  const LinearSizes sizes = check_cur_linear(a);
  check_bf16_in_bf16(a.bf16_operands);
  const Call call(a.lateral_hat);
  call.check("x", a.x);
  call.check("lateral_hat", a.lateral_hat);
  call.check("horizontal_hat", a.horizontal_hat);
  call.check("core", a.core);
  check_slices(sizes.n3);
  if (a.adapter_ids.has_value()) {
    call.check_device("adapter_ids", *a.adapter_ids);
  }
  if (a.z.has_value()) {
    call.check("z", *a.z);
  }
  std::optional<Tensor> y;
  if (a.weight.has_value()) {
    call.check("weight", *a.weight);
    y = base_product(a);
  }
  const Tensor in = cast(project(a, sizes), a.lateral_hat.scalar_type());
  const Tensor mixed = apply_core(call, a, sizes, torch::stable::contiguous(in));
  const Tensor factor =
      a.transposed ? a.horizontal_hat : torch::stable::transpose(a.lateral_hat, 0, 1);
  if (y.has_value()) {
    y = torch::stable::contiguous(*y);
    add_product_to(call, *y, mixed, factor);
    return *y;
  }
  return as_output(a, sizes, torch::stable::contiguous(torch::stable::matmul(mixed, factor)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, TCUR_DISPATCH_KEY, m) {
  m.impl("cur_linear" TCUR_LANGUAGE, TORCH_BOX(&positional::cur_linear<&cur_linear>));
  // torch computes the products of tokens, and follows its own switch for TF32.
  m.impl("cur_linear" TCUR_LANGUAGE_TF32, TORCH_BOX(&positional::cur_linear<&cur_linear>));
}

}  // namespace tcur
