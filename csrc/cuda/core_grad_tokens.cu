// tcur::core_grad_tokens, CUDA: ∂U [n3, rank, rank] from tokens, no n1 x n2 gradient in between.
//
// z = x R̂ᵀ and p = dy Ĉ are ordinary matrix products of torch (cuBLAS), in fp32 or, for factors in
// bf16, in that precision; only the diagonal blocks of pᵀz are formed (products.h). No R̂: x is z
// already. No dy: the tokens are the rows of G = dyᵀx, and p = Ĉ.
//
// Beside these products: one launch for the blocks, and one that ends their sums and transforms
// them (spectrum.h), with adapter_ids a third one that sorts rows by core (row_order.h). Packed,
// the sums are all that is wanted: core_of_packed.cu transforms those of many layers at once.
#include "../common/token_products.h"
#include "products.h"

namespace tcur {
namespace {

Tensor core_grad_tokens(const CoreGradTokensArguments& a) {
  const TokenSizes sizes = check_core_grad_tokens(a);
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
  // What products.h reads: fp32, or bf16 beside bf16. Every fp16 is an fp32.
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
  // Products of tokens are torch's, and follow its own switch for TF32.
  m.impl(
      "core_grad_tokens" TCUR_LANGUAGE_TF32,
      TORCH_BOX(&positional::core_grad_tokens<&core_grad_tokens>));
}

}  // namespace tcur
