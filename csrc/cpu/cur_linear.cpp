// tcur::cur_linear, CPU: one or more consecutive slices of W + scale * C*U*R as a linear map.
//
// forward    y = x Wᵀ + b + ((x R̂ᵀ) M_lᵀ) Ĉᵀ        x: [..., n2], y: [..., slices*n1]
// transposed y = x W + Σ_l ((x_l Ĉ) M_l) R̂          x: [..., slices*n1], y: [..., n2]
//
// M_l is the core at slice l in the real packed basis: for a bin pair, with
// A + iB = scale * weight_k * e^{2πikl/n3} Û_k, the block [[A, -B], [-B, -A]]. The base product is
// the same call that nn.Linear makes, so with a core of zeros the output is bit for bit that of
// nn.Linear. With adapter_ids, every row of tokens uses the M_l of its own core.
#include "../common/token_products.h"
#include "host.h"
#include "token_cores.h"

namespace tcur {
namespace {

// Writes the blocks of M_l, transposed for a forward map, as values[in][out], which apply_core
// expects. The numbers that are not written here are padding, and are zero from the start.
template <class T>
void slice_blocks(
    const CoreBlocks& blocks,
    const UnitRoots& roots,
    const std::vector<T>& core_hat,  // [n3, rank, rank], weighted
    int64_t rank,
    int64_t slice,
    bool transposed,
    T* values) {  // [blocks.size]
  const int64_t square = rank * rank;
  for (const CoreBlock& block : blocks.all) {
    const int64_t plane = block.offset / rank;
    const T* re = core_hat.data() + plane * square;
    T* out = values + block.start;
    const auto put = [&](int64_t a, int64_t b, T value) {
      out[transposed ? a * block.stride + b : b * block.stride + a] = value;
    };
    if (block.width == rank) {
      const T sign = plane > 0 && slice % 2 != 0 ? T(-1) : T(1);
      for (int64_t a = 0; a < rank; ++a) {
        for (int64_t b = 0; b < rank; ++b) {
          put(a, b, sign * re[a * rank + b]);
        }
      }
      continue;
    }
    const T* im = re + square;
    const int64_t k = bin_of(plane);
    const T c = static_cast<T>(roots.cos(k * slice)), s = static_cast<T>(roots.sin(k * slice));
    for (int64_t a = 0; a < rank; ++a) {
      for (int64_t b = 0; b < rank; ++b) {
        const T x = c * re[a * rank + b] - s * im[a * rank + b];
        const T y = c * im[a * rank + b] + s * re[a * rank + b];
        put(a, b, x);
        put(a, rank + b, -y);
        put(rank + a, b, -y);
        put(rank + a, rank + b, -x);
      }
    }
  }
}

template <class T>
Tensor update(
    const CurLinearArguments& a,
    const LinearSizes& sizes,
    const Tensor& in,  // [tokens, q] or transposed [tokens*slices, q], contiguous
    const TokensByCore& cores) {
  const bool transposed = a.transposed;
  const int64_t tokens = sizes.tokens, slices = a.slices, q = sizes.q();
  const int64_t core_size = q * sizes.rank;
  const TubeDft<T> dft(sizes.n3);
  const UnitRoots roots(sizes.n3);
  const T* core_values = a.core.const_data_ptr<T>();  // [..., n3, rank, rank]
  const Kernels<T>& k = kernels<T>();
  const CoreBlocks blocks = core_blocks(sizes.n3, sizes.rank, k.lanes);
  const int64_t out_slices = transposed ? 1 : slices;
  const Tensor out_tensor = torch::stable::new_empty(in, {tokens * out_slices, q}, scalar_type<T>);
  T* out = out_tensor.mutable_data_ptr<T>();
  const int64_t in_stride = transposed ? slices * q : q;
  const int64_t out_stride = out_slices * q;
  torch::stable::parallel_for(0, tokens, 64, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(2 * kTokenGroup * blocks.widest);
    std::vector<T> values(slices * blocks.size, T(0));
    int64_t ready = -1;
    cores.visit(begin, end, [&](int64_t index, int64_t first, int64_t last) {
      if (index != ready) {
        const std::vector<T> core_hat = weighted_core_spectrum(
            dft, core_values + index * core_size, sizes.rank, a.scale, sizes.rank);
        for (int64_t s = 0; s < slices; ++s) {
          T* target = values.data() + s * blocks.size;
          slice_blocks(blocks, roots, core_hat, sizes.rank, a.slice_index + s, transposed, target);
        }
        ready = index;
      }
      for (int64_t s = 0; s < slices; ++s) {
        k.apply_core(
            blocks,
            values.data() + s * blocks.size,
            token_rows(in, transposed ? s * q : 0, in_stride),
            out + (transposed ? 0 : s * q),
            out_stride,
            transposed && s > 0,
            first,
            last,
            scratch.data());
      }
    });
  });
  const Tensor mixed = cast(out_tensor, a.lateral_hat.scalar_type());
  return transposed ? torch::stable::matmul(mixed, a.horizontal_hat)
                    : matmul_transposed(mixed, a.lateral_hat);
}

template <class T>
void add_to(const Tensor& y, const Tensor& delta) {
  const Kernels<T>& k = kernels<T>();
  const Element element = element_of(y);
  const T* values = delta.const_data_ptr<T>();  // in the compute dtype
  void* target = y.mutable_data_ptr();
  torch::stable::parallel_for(0, y.numel(), 32768, [&](int64_t begin, int64_t end) {
    k.add_update(target, element, values, begin, end);
  });
}

Tensor cur_linear(const CurLinearArguments& a) {
  const LinearSizes sizes = check_cur_linear(a);
  check_element("x", a.x);
  std::optional<Tensor> y;
  if (a.weight.has_value()) {
    y = base_product(a);
  }
  CurLinearArguments given = a;
  given.x = torch::stable::contiguous(a.x);
  given.lateral_hat = torch::stable::contiguous(a.lateral_hat);
  given.horizontal_hat = torch::stable::contiguous(a.horizontal_hat);
  given.core = torch::stable::contiguous(a.core);
  const Tensor in = torch::stable::contiguous(project(given, sizes));
  check_element("z", in);
  const TokensByCore cores(TokenCores(sizes.tokens, a.adapter_ids, a.core.size(0)));
  return with_compute_type(a.lateral_hat.scalar_type(), [&](auto number) {
    using T = decltype(number);
    const Tensor delta = update<T>(given, sizes, in, cores);
    if (!y.has_value()) {
      return as_output(a, sizes, delta);
    }
    const Tensor result = torch::stable::contiguous(*y);
    add_to<T>(result, torch::stable::contiguous(cast(delta, scalar_type<T>)));
    return result;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, CPU, m) {
  m.impl("cur_linear", TORCH_BOX(&positional::cur_linear<&cur_linear>));
}

}  // namespace tcur
