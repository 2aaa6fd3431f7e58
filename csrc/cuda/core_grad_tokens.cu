// tcur::core_grad_tokens, CUDA: ∂U [n3, rank, rank] from tokens, without an n1 x n2 gradient.
//
// z = x R̂ᵀ and p = dy Ĉ are ordinary matrix products of torch (cuBLAS), in fp32, or in bf16 if the
// factors are bf16. Of pᵀz, only the diagonal blocks are computed (products.h). Without R̂, x is
// already z. Without dy, the tokens are the rows of G = dyᵀx, and p = Ĉ.
//
// Besides these products there are two launches. One computes the blocks; the other finishes their
// sums and transforms them (spectrum.h). With adapter_ids, a third launch sorts rows by core
// (row_order.h). With `packed`, the result is the sums themselves: core_of_packed.cu transforms
// those of many layers at once.
#include "../common/token_products.h"
#include "products.h"

namespace tcur {
namespace {

Tensor core_grad_tokens(const CoreGradTokensArguments& a) {
  const TokenSizes sizes = check_core_grad_tokens(a);
  check_bf16_in_bf16(a.bf16_operands);
  const Call call(a.lateral_hat);
  call.check("x", a.x);
  call.check("lateral_hat", a.lateral_hat);
  check_slices(a.n3);
  if (a.horizontal_hat.has_value()) {
    call.check("horizontal_hat", *a.horizontal_hat);
  }
  if (a.grad_y.has_value()) {
    call.check("grad_y", *a.grad_y);
  }
  if (a.adapter_ids.has_value()) {
    call.check_device("adapter_ids", *a.adapter_ids);
  }
  Tensor z = project_tokens(a, sizes);
  // products.h reads fp32, or bf16 for both p and z. Every fp16 is also an fp32.
  if (z.scalar_type() != a.lateral_hat.scalar_type()) {
    z = cast(z, ScalarType::Float);
  }
  z = torch::stable::contiguous(z);
  const Tensor p = project_gradient(a, sizes);
  const TokenCores cores(sizes.tokens, a.adapter_ids, a.adapters);
  const Tensor out = empty_gradient(a, sizes);
  const Spectrum tables(call, a.n3);
  core_from_products(
      call,
      token_rows(p, 0, a.slices * sizes.q()),
      token_rows(z, 0, sizes.q()),
      static_cast<int>(a.n3),
      static_cast<int>(sizes.rank),
      a.slice_index,
      a.slices,
      cores,
      tables.tables(),
      a.packed,
      out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, TCUR_DISPATCH_KEY, m) {
  m.impl(
      "core_grad_tokens" TCUR_LANGUAGE,
      TORCH_BOX(&positional::core_grad_tokens<&core_grad_tokens>));
  // torch computes the products of tokens, and follows its own switch for TF32.
  m.impl(
      "core_grad_tokens" TCUR_LANGUAGE_TF32,
      TORCH_BOX(&positional::core_grad_tokens<&core_grad_tokens>));
}

}  // namespace tcur
