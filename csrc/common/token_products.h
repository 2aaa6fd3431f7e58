// The ordinary matrix products that torch computes for operators on tokens, before and after their
// kernels.
#pragma once

#include "check.h"
#include "token_rows.h"

#include <array>

namespace tcur {

// The same call that nn.Linear makes. The stable headers do not wrap it.
inline Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(x),
      torch::stable::detail::from(weight),
      torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor matmul_transposed(const Tensor& a, const Tensor& b) {
  return torch::stable::matmul(a, torch::stable::transpose(b, 0, 1));
}

// The operand of a product with the factors: in their dtype, or with bf16_operands in fp32 after it
// was rounded to bf16. The factors are then numbers of bf16 in fp32 already. A processor without
// units for bf16 multiplies so: torch's products of bf16 matrices are slower there than those in
// fp32.
template <class Arguments>
Tensor operand(const Arguments& a, const Tensor& rows) {
  const Tensor given = a.bf16_operands ? cast(rows, ScalarType::BFloat16) : rows;
  return cast(given, a.lateral_hat.scalar_type());
}

// What the base contributes to the output of cur_linear.
inline Tensor base_product(const CurLinearArguments& a) {
  return a.transposed ? torch::stable::matmul(a.x, *a.weight) : linear(a.x, *a.weight, a.bias);
}

// z = x R̂ᵀ [tokens, n3*rank], or transposed x Ĉ [tokens*slices, n3*rank], in the dtype of the
// factors. If the caller gave z, this returns it in the dtype that it has.
inline Tensor project(const CurLinearArguments& a, const LinearSizes& sizes) {
  if (a.z.has_value()) {
    return torch::stable::reshape(*a.z, {sizes.tokens, sizes.q()});
  }
  if (a.transposed) {
    const Tensor rows = torch::stable::reshape(a.x, {sizes.tokens * a.slices, sizes.n1});
    return torch::stable::matmul(operand(a, rows), a.lateral_hat);
  }
  const Tensor rows = torch::stable::reshape(a.x, {sizes.tokens, sizes.n2});
  return matmul_transposed(operand(a, rows), a.horizontal_hat);
}

// What cur_linear returns without a base: the update, in the dtype and the shape of its x.
inline Tensor as_output(
    const CurLinearArguments& a, const LinearSizes& sizes, const Tensor& update) {
  std::vector<int64_t> shape(a.x.sizes().begin(), a.x.sizes().end());
  shape.back() = sizes.out_features;
  return torch::stable::reshape(cast(update, a.x.scalar_type()), shape);
}

// z = x R̂ᵀ [tokens, n3*rank]; without R̂, x is z already.
inline Tensor project_tokens(const CoreGradTokensArguments& a, const TokenSizes& sizes) {
  const Tensor rows = torch::stable::reshape(a.x, {sizes.tokens, sizes.n2});
  if (!a.horizontal_hat.has_value()) {
    return rows;
  }
  return matmul_transposed(operand(a, rows), *a.horizontal_hat);
}

// p = dy Ĉ [tokens, slices*n3*rank], contiguous. Without dy, the tokens are the rows of one slice
// of G, and p is Ĉ.
inline Tensor project_gradient(const CoreGradTokensArguments& a, const TokenSizes& sizes) {
  if (!a.grad_y.has_value()) {
    return torch::stable::contiguous(a.lateral_hat);
  }
  const Tensor rows = torch::stable::reshape(*a.grad_y, {sizes.tokens * a.slices, sizes.n1});
  return torch::stable::contiguous(torch::stable::matmul(operand(a, rows), a.lateral_hat));
}

// Allocates the gradient of one core [n3, rank, rank], or of the core of each adapter.
inline Tensor empty_gradient(const CoreGradTokensArguments& a, const TokenSizes& sizes) {
  std::vector<int64_t> shape{sizes.n3, sizes.rank, sizes.rank};
  if (a.adapter_ids.has_value()) {
    shape.insert(shape.begin(), a.adapters);
  }
  const ScalarType dtype = compute_dtype(a.lateral_hat.scalar_type());
  return torch::stable::new_empty(a.lateral_hat, shape, dtype);
}

// Views a contiguous tensor as rows of `stride` numbers, starting at `first_column` of each row.
inline TokenRows token_rows(const Tensor& tokens, int64_t first_column, int64_t stride) {
  const char* data = static_cast<const char*>(tokens.const_data_ptr());
  return {
      data + first_column * tokens.element_size(),
      element_of(tokens),
      stride,
      stride == 0 ? 0 : tokens.numel() / stride};
}

}  // namespace tcur
