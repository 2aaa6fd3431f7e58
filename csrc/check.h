// Shape checks of the operators, and the few ATen calls that the stable ABI does not wrap.
//
// The Python layer has refused bad input by name long before; these checks only make sure that no
// kernel ever reads or writes outside its tensors when an operator is called directly.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <vector>

namespace tcur {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_shape(
    const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (auto it = shape.begin(); same && it != shape.end(); ++it, ++d) {
    same = tensor.size(d) == *it;
  }
  STD_TORCH_CHECK(same, "tcur: ", name, " has an unexpected shape");
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "tcur: ", name, " has an unexpected dtype");
}

inline bool is_compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double;
}

// The dtype that products of factors are summed in.
inline ScalarType compute_dtype(ScalarType factors) {
  return factors == ScalarType::BFloat16 ? ScalarType::Float : factors;
}

// Sizes shared by all operators, read off the packed factors and the number of slices.
struct Sizes {
  int64_t n1, n2, n3, rank;
};

inline Sizes check_packed(
    const Tensor& lateral_hat, const std::optional<Tensor>& horizontal_hat, int64_t n3) {
  STD_TORCH_CHECK(n3 >= 1, "tcur: n3 must be positive");
  STD_TORCH_CHECK(lateral_hat.dim() == 2, "tcur: lateral_hat must be [n1, n3*rank]");
  const int64_t q = lateral_hat.size(1);
  STD_TORCH_CHECK(q > 0 && q % n3 == 0, "tcur: lateral_hat must be [n1, n3*rank]");
  if (!horizontal_hat.has_value()) {
    return {lateral_hat.size(0), q, n3, q / n3};
  }
  STD_TORCH_CHECK(
      horizontal_hat->dim() == 2 && horizontal_hat->size(0) == q,
      "tcur: horizontal_hat must be [n3*rank, n2]");
  check_dtype("horizontal_hat", *horizontal_hat, lateral_hat.scalar_type());
  return {lateral_hat.size(0), horizontal_hat->size(1), n3, q / n3};
}

// lateral_hat: [n1, n3*rank], horizontal_hat: [n3*rank, n2], both fp32 or both fp64.
inline Sizes check_factors(const Tensor& lateral_hat, const Tensor& horizontal_hat, int64_t n3) {
  STD_TORCH_CHECK(
      is_compute_dtype(lateral_hat.scalar_type()), "tcur: lateral_hat must be fp32 or fp64");
  return check_packed(lateral_hat, horizontal_hat, n3);
}

// Operators on tokens take factors in bf16 too, for projections in that precision, and may go
// without R̂ where the tokens are projected already: n2 is then n3*rank.
inline Sizes check_token_factors(
    const Tensor& lateral_hat, const std::optional<Tensor>& horizontal_hat, int64_t n3) {
  STD_TORCH_CHECK(
      is_compute_dtype(compute_dtype(lateral_hat.scalar_type())),
      "tcur: lateral_hat must be fp32, fp64 or bf16");
  return check_packed(lateral_hat, horizontal_hat, n3);
}

inline Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(x),
      torch::stable::detail::from(weight),
      torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor cast(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

}  // namespace tcur
