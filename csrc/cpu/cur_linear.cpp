// tcur::cur_linear, CPU: one or more consecutive slices of W + scale * C*U*R as a linear map.
//
// forward    y = x Wᵀ + b + ((x R̂ᵀ) M_lᵀ) Ĉᵀ        x: [..., n2], y: [..., slices*n1]
// transposed y = x W + Σ_l ((x_l Ĉ) M_l) R̂          x: [..., slices*n1], y: [..., n2]
//
// M_l is the core at slice l in the packed basis; tokens_kernel.h says what it does to a token. The
// base product is the same call that nn.Linear makes, so with a core of zeros the output is bit for
// bit that of nn.Linear. With adapter_ids, every row of tokens uses the M_l of its own core.
#include "../common/token_products.h"
#include "host.h"
#include "token_cores.h"

namespace tcur {
namespace {

template <class T>
Tensor update(
    const CurLinearArguments& a,
    const LinearSizes& sizes,
    const Tensor& in,  // [tokens, q] or transposed [tokens*slices, q], contiguous
    const TokensByCore& cores) {
  const bool transposed = a.transposed;
  const int64_t tokens = sizes.tokens, n3 = sizes.n3, rank = sizes.rank, q = sizes.q();
  const Kernels<T>& k = kernels<T>();
  const std::shared_ptr<const TubeDft<T>> dft = tube_dft<T>(n3);
  // The products of a forward map come out conjugate and turn after that.
  const std::vector<T> turns =
      slice_turns<T>(n3, a.slice_index, a.slices, !transposed, [&](int64_t plane) {
        return a.scale * inverse_weight(plane, n3);
      });
  const TokenBasis<T> basis{n3, rank, a.slices, k.lanes, turns.data(), dft.get()};
  const T* core_values = a.core.const_data_ptr<T>();  // [..., n3, rank, rank]
  const TokenRows rows = token_rows(in, 0, transposed ? a.slices * q : q);
  const int64_t out_rows = transposed ? tokens : tokens * a.slices;
  const Tensor out_tensor = torch::stable::new_empty(in, {out_rows, q}, scalar_type<T>);
  T* out = out_tensor.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, tokens, 64, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(basis.scratch()), tubes(basis.planes()), planes(basis.planes());
    int64_t ready = -1;
    cores.visit(begin, end, [&](int64_t index, int64_t first, int64_t last) {
      if (index != ready) {
        const T* core = core_values + index * q * rank;
        k.transform_core(basis, core, transposed, tubes.data(), planes.data());
        ready = index;
      }
      k.apply_core(basis, planes.data(), transposed, rows, out, first, last, scratch.data());
    });
  });
  const Tensor mixed = operand(a, out_tensor);
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
