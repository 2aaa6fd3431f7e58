// tcur::cur_linear, CUDA: one or more consecutive slices of W + scale * C*U*R as a linear map.
//
// forward    y = x Wᵀ + b + ((x R̂ᵀ) M_lᵀ) Ĉᵀ        x: [..., n2], y: [..., slices*n1]
// transposed y = x W + Σ_l ((x_l Ĉ) M_l) R̂          x: [..., slices*n1], y: [..., n2]
//
// The products with W, R̂ and Ĉ are ordinary ones of torch (cuBLAS), the last of them adding to y in
// place where the dtypes allow. What is left is the core in between, a complex rank x rank matrix
// per bin: with z_c = z_re + i z_im it is v = e^{2πikl/n3} Û_k z_c, and v_re, -v_im go on. One
// thread per token and (re, im) pair of numbers of v; layers that share x share Û_k z_c. It reads
// and writes each number of the projected tokens once, with rank/2 multiplications per byte.
// Planned: 256 threads, up to 64 registers, 4 blocks per multiprocessor.
#include "operators.h"

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

constexpr int kThreads = 256;

struct ApplyArgs {
  const void* in;  // [tokens, q], or [tokens, slices*q] transposed
  void* out;       // [tokens, slices*q], or [tokens, q] transposed; q = n3*rank
  Element in_element, out_element;
  const float* core_hat;  // [entries, n3, rank, rank], weighted
  CoreIds entries;        // of the rows of tokens
  int64_t tokens, row_length, slice_index, slices;
  int n3, rank;
  Tables tables;
};

template <bool TRANSPOSED>
TCUR_KERNEL(kThreads, 4)
apply_kernel(const TCUR_PARAMETER ApplyArgs args) {
  const int rank = args.rank, n3 = args.n3, columns = (n3 / 2 + 1) * rank;
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t token = index / columns, square = static_cast<int64_t>(rank) * rank;
  if (token >= args.tokens) {
    return;
  }
  const int column = static_cast<int>(index - token * columns);
  const int bin = column / rank, a = column - bin * rank;
  const bool is_pair = bin > 0 && bin <= pairs(n3);
  const int plane = bin == 0 ? 0 : 2 * bin - 1;
  const int64_t q = static_cast<int64_t>(n3) * rank, in_slices = TRANSPOSED ? args.slices : 1;
  const int64_t from = token * in_slices * q + plane * rank;
  const int64_t which = args.entries[token / args.row_length];
  const bool is_valid = args.entries.is_valid(which);
  const float* core = args.core_hat + ((is_valid ? which : 0) * n3 + plane) * square;
  const auto phase = [&](int64_t s) {
    return args.tables.root(static_cast<int>(bin * (args.slice_index + s) % n3));
  };

  float re = is_valid ? 0.0f : NAN, im = re;
  for (int b = 0; b < rank; ++b) {
    float x = 0.0f, y = 0.0f;
    for (int64_t s = 0; s < in_slices; ++s) {
      const int64_t at = from + s * q + b;
      const float in_re = load_number(args.in, at, args.in_element);
      const float in_im = is_pair ? load_number(args.in, at + rank, args.in_element) : 0.0f;
      const float2 root = TRANSPOSED ? phase(s) : float2{1.0f, 0.0f};
      x += root.x * in_re - root.y * in_im;
      y += root.x * in_im + root.y * in_re;
    }
    const int64_t entry = TRANSPOSED ? b * rank + a : a * rank + b;
    const float u_re = core[entry], u_im = is_pair ? core[square + entry] : 0.0f;
    re += u_re * x - u_im * y;
    im += u_re * y + u_im * x;
  }
  const int64_t out_slices = TRANSPOSED ? 1 : args.slices;
  for (int64_t s = 0; s < out_slices; ++s) {
    const float2 root = TRANSPOSED ? float2{1.0f, 0.0f} : phase(s);
    const int64_t at = (token * out_slices + s) * q + plane * rank + a;
    store_number(args.out, at, root.x * re - root.y * im, args.out_element);
    if (is_pair) {
      store_number(args.out, at + rank, -(root.x * im + root.y * re), args.out_element);
    }
  }
}

struct AddArgs {
  void* y;
  const void* delta;
  Element y_element, delta_element;
  int64_t size;
};

// y += delta, in fp32, rounded once.
TCUR_KERNEL(kThreads, 4) add_kernel(const TCUR_PARAMETER AddArgs args) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < args.size;
       i += gridDim.x * static_cast<int64_t>(kThreads)) {
    const float sum =
        load_number(args.y, i, args.y_element) + load_number(args.delta, i, args.delta_element);
    store_number(args.y, i, sum, args.y_element);
  }
}

Tensor matmul_transposed(const Tensor& a, const Tensor& b) {
  return torch::stable::matmul(a, torch::stable::transpose(b, 0, 1));
}

// The projected tokens after the core: [tokens*slices, q], or [tokens, q] transposed.
Tensor apply_core(
    const Call& call,
    const LinearSizes& sizes,
    const Tensor& in,  // [tokens, q], or [tokens*slices, q] transposed, contiguous
    const Tensor& core,
    const std::optional<Tensor>& adapter_ids,
    int64_t slice_index,
    int64_t slices,
    double scale,
    bool transposed,
    ScalarType dtype) {
  const int n3 = static_cast<int>(sizes.n3), rank = static_cast<int>(sizes.rank);
  const bool many = adapter_ids.has_value();
  const TokenCores cores(sizes.tokens, adapter_ids, many ? core.size(0) : 1);
  // Spectra of all cores, or of the cores of the rows, whichever are fewer.
  const bool by_rows = many && cores.rows < cores.cores();
  const CoreIds in_order{nullptr, by_rows ? cores.rows : cores.cores()};
  const Spectrum spectrum(call, core, scale, by_rows ? cores.ids() : in_order, in_order.cores);
  const int64_t q = sizes.n3 * sizes.rank;
  const Tensor out =
      torch::stable::new_empty(in, {transposed ? sizes.tokens : sizes.tokens * slices, q}, dtype);
  const ApplyArgs args{
      in.const_data_ptr(),
      out.mutable_data_ptr(),
      element_of(in.scalar_type()),
      element_of(dtype),
      spectrum.core_hat(),
      by_rows ? in_order : cores.ids(),
      sizes.tokens,
      cores.row_length,
      slice_index,
      slices,
      n3,
      rank,
      spectrum.tables()};
  const int64_t threads = sizes.tokens * (sizes.n3 / 2 + 1) * sizes.rank;
  if (threads > 0) {
    launch(
        transposed ? apply_kernel<true> : apply_kernel<false>,
        tiles_of(threads, kThreads),
        kThreads,
        0,
        call.stream(),
        args);
  }
  return out;
}

// y += mixed factor, in place; y is [..., columns of factor].
void add_product_to(const Call& call, const Tensor& y, const Tensor& mixed, const Tensor& factor) {
  const ScalarType dtype = y.scalar_type();
  if (dtype == mixed.scalar_type()) {
    const Tensor flat = torch::stable::view(y, {mixed.size(0), factor.size(1)});
    TORCH_ERROR_CODE_CHECK(
        TCUR_ADDMM(flat.get(), flat.get(), mixed.get(), factor.get(), 1.0, 1.0));
    return;
  }
  const Tensor delta = torch::stable::contiguous(torch::stable::matmul(mixed, factor));
  const AddArgs args{
      y.mutable_data_ptr(),
      delta.const_data_ptr(),
      element_of(dtype),
      element_of(delta.scalar_type()),
      y.numel()};
  if (args.size > 0) {
    const int64_t blocks = std::min<int64_t>(tiles_of(args.size, kThreads), 4096);
    launch(add_kernel, blocks, kThreads, 0, call.stream(), args);
  }
}

Tensor cur_linear(
    Tensor x,
    std::optional<Tensor> weight,
    std::optional<Tensor> bias,
    Tensor lateral_hat,
    Tensor horizontal_hat,
    Tensor core,
    int64_t slice_index,
    int64_t slices,
    double scale,
    bool materialized,
    bool transposed,
    std::optional<Tensor> z,
    bool dense_grad,  // for the derivative alone
    std::optional<Tensor> adapter_ids) {
  const LinearSizes sizes = check_linear(
      x,
      weight,
      bias,
      lateral_hat,
      horizontal_hat,
      core,
      slice_index,
      slices,
      materialized,
      transposed,
      z,
      dense_grad,
      adapter_ids.has_value());
  const Call call(lateral_hat);
  call.check("x", x);
  call.check("lateral_hat", lateral_hat);
  call.check("horizontal_hat", horizontal_hat);
  call.check("core", core);
  check_slices(sizes.n3);
  if (adapter_ids.has_value()) {
    call.check_device("adapter_ids", *adapter_ids);
  }
  std::optional<Tensor> y;
  if (weight.has_value()) {
    call.check("weight", *weight);
    y = transposed ? torch::stable::matmul(x, *weight) : linear(x, *weight, bias);
    if (materialized) {
      return *y;
    }
    y = torch::stable::contiguous(*y);
  }
  const ScalarType precision = lateral_hat.scalar_type();
  Tensor in = x;
  if (z.has_value()) {
    call.check("z", *z);
    in = torch::stable::reshape(*z, {sizes.tokens, sizes.n3 * sizes.rank});
  } else if (transposed) {
    const Tensor rows = torch::stable::reshape(x, {sizes.tokens * slices, sizes.n1});
    in = torch::stable::matmul(cast(rows, precision), lateral_hat);
  } else {
    const Tensor rows = torch::stable::reshape(x, {sizes.tokens, sizes.n2});
    in = matmul_transposed(cast(rows, precision), horizontal_hat);
  }
  const Tensor mixed = apply_core(
      call,
      sizes,
      torch::stable::contiguous(in),
      torch::stable::contiguous(core),
      adapter_ids,
      slice_index,
      slices,
      scale,
      transposed,
      precision);
  const Tensor factor = transposed ? horizontal_hat : torch::stable::transpose(lateral_hat, 0, 1);
  if (y.has_value()) {
    add_product_to(call, *y, mixed, factor);
    return *y;
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = sizes.out_features;
  const Tensor delta = torch::stable::contiguous(torch::stable::matmul(mixed, factor));
  return torch::stable::reshape(cast(delta, x.scalar_type()), shape);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, TCUR_DISPATCH_KEY, m) {
  m.impl("cur_linear" TCUR_LANGUAGE, TORCH_BOX(&cur_linear));
  // Products of tokens are torch's, and follow its own switch for TF32.
  m.impl("cur_linear" TCUR_LANGUAGE_TF32, TORCH_BOX(&cur_linear));
}

}  // namespace tcur
