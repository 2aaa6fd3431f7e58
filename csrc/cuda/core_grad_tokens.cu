// tcur::core_grad_tokens, CUDA: ∂U [n3, rank, rank] from tokens, no n1 x n2 gradient in between.
//
// z = x R̂ᵀ and p = dy Ĉ are ordinary matrix products of torch (cuBLAS), in fp32 or, for factors in
// bf16, in that precision; only the diagonal blocks of pᵀz are formed (products.h). No R̂: x is z
// already. No dy: the tokens are the rows of G = dyᵀx, and p = Ĉ.
//
// Beside these products: one launch for the blocks, and one that ends their sums and transforms
// them (spectrum.h), with adapter_ids a third one that sorts rows by core (row_order.h). Packed,
// the sums are all that is wanted: core_of_packed.cu transforms those of many layers at once.
#include "products.h"

namespace tcur {
namespace {

Tensor core_grad_tokens(
    Tensor x,
    std::optional<Tensor> grad_y,
    Tensor lateral_hat,
    std::optional<Tensor> horizontal_hat,
    int64_t n3,
    int64_t slice_index,
    int64_t slices,
    std::optional<Tensor> adapter_ids,
    int64_t adapters,
    bool packed) {
  const TokenSizes sizes = check_gradient_tokens(
      x,
      grad_y,
      lateral_hat,
      horizontal_hat,
      n3,
      slice_index,
      slices,
      adapter_ids,
      adapters,
      packed);
  const Call call(lateral_hat);
  call.check("x", x);
  call.check("lateral_hat", lateral_hat);
  check_slices(n3);
  const ScalarType precision = lateral_hat.scalar_type();
  Tensor z = torch::stable::reshape(x, {sizes.tokens, sizes.n2});
  if (horizontal_hat.has_value()) {
    call.check("horizontal_hat", *horizontal_hat);
    z = torch::stable::matmul(cast(z, precision), torch::stable::transpose(*horizontal_hat, 0, 1));
  }
  // What products.h reads: fp32, or bf16 beside bf16. Every fp16 is an fp32.
  if (z.scalar_type() != precision) {
    z = cast(z, ScalarType::Float);
  }
  z = torch::stable::contiguous(z);
  Tensor p = torch::stable::contiguous(lateral_hat);
  if (grad_y.has_value()) {
    call.check("grad_y", *grad_y);
    const Tensor rows = torch::stable::reshape(*grad_y, {sizes.tokens * slices, sizes.n1});
    p = torch::stable::contiguous(torch::stable::matmul(cast(rows, precision), lateral_hat));
  }
  const int64_t q = sizes.n3 * sizes.rank;
  if (adapter_ids.has_value()) {
    call.check_device("adapter_ids", *adapter_ids);
  }
  const TokenCores cores(sizes.tokens, adapter_ids, adapter_ids.has_value() ? adapters : 1);
  std::vector<int64_t> shape{n3, sizes.rank, sizes.rank};
  if (adapter_ids.has_value()) {
    shape.insert(shape.begin(), adapters);
  }
  const Tensor out = torch::stable::new_empty(lateral_hat, shape, ScalarType::Float);
  const Spectrum tables(call, n3);
  core_from_products(
      call,
      {p.const_data_ptr(), element_of(p.scalar_type()), slices * q, sizes.tokens},
      {z.const_data_ptr(), element_of(z.scalar_type()), q, sizes.tokens},
      static_cast<int>(n3),
      static_cast<int>(sizes.rank),
      slice_index,
      slices,
      cores,
      tables.tables(),
      packed,
      out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, TCUR_DISPATCH_KEY, m) {
  m.impl("core_grad_tokens" TCUR_LANGUAGE, TORCH_BOX(&core_grad_tokens));
  // Products of tokens are torch's, and follow its own switch for TF32.
  m.impl("core_grad_tokens" TCUR_LANGUAGE_TF32, TORCH_BOX(&core_grad_tokens));
}

}  // namespace tcur
