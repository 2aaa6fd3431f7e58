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

// Room for W_eff [n3, n1, n2], where materialize is not given any.
inline Tensor empty_w_eff(
    const Tensor& lateral_hat,
    const Tensor& horizontal_hat,
    const Tensor& core,
    ScalarType out_dtype) {
  STD_TORCH_CHECK(
      core.dim() == 3 && lateral_hat.dim() == 2 && horizontal_hat.dim() == 2,
      "tcur: materialize takes packed factors [n1, q], [q, n2] and a core [n3, rank, rank]");
  return torch::stable::new_empty(
      core, {core.size(0), lateral_hat.size(0), horizontal_hat.size(1)}, out_dtype);
}

// Where a slice lies: `index`-th of `count` slices side by side in a matrix [n1, count*n2]. The
// matrices of W_eff are those of the base, one after the other.
struct SlicePlace {
  const void* base;  // first number of its weight; null without a base
  int64_t count, index;
};

// The n3 slices of the base: one tensor [n3, n1, n2]; or layers [n1, count*n2], contiguous; or
// none. W_eff must have room for them, [n3, n1, n2], or flat where any lie side by side.
inline std::vector<SlicePlace> place_slices(
    const std::vector<Tensor>& weights, const Sizes& s, const Tensor& out) {
  std::vector<SlicePlace> places;
  bool is_flat = false;
  if (weights.empty()) {
    places.assign(s.n3, {nullptr, 1, 0});
  } else if (weights.size() == 1 && weights[0].dim() == 3) {
    check_shape("weights", weights[0], {s.n3, s.n1, s.n2});
    const char* data = static_cast<const char*>(weights[0].const_data_ptr());
    for (int64_t l = 0; l < s.n3; ++l) {
      places.push_back({data + l * s.n1 * s.n2 * weights[0].element_size(), 1, 0});
    }
  } else {
    for (const Tensor& weight : weights) {
      STD_TORCH_CHECK(weight.dim() == 2, "tcur: weights must be [n1, n2], or [n1, slices*n2]");
      const int64_t count = s.n2 == 0 ? 1 : weight.size(1) / s.n2;
      check_shape("weights", weight, {s.n1, count * s.n2});
      check_dtype("weights", weight, weights[0].scalar_type());
      const char* data = static_cast<const char*>(weight.const_data_ptr());
      for (int64_t index = 0; index < count; ++index) {
        places.push_back({data + index * s.n2 * weight.element_size(), count, index});
      }
      is_flat = is_flat || count > 1;
    }
    STD_TORCH_CHECK(
        static_cast<int64_t>(places.size()) == s.n3, "tcur: weights must have n3 slices together");
  }
  if (is_flat) {
    check_shape("out", out, {s.n3 * s.n1 * s.n2});
  } else {
    check_shape("out", out, {s.n3, s.n1, s.n2});
  }
  STD_TORCH_CHECK(out.is_contiguous(), "tcur: out must be contiguous");
  return places;
}

// Tokens of one row, of which adapter_ids, int64 [rows], has one entry each.
inline int64_t check_adapter_ids(const Tensor& adapter_ids, int64_t tokens) {
  STD_TORCH_CHECK(
      adapter_ids.dim() == 1 && adapter_ids.scalar_type() == ScalarType::Long,
      "tcur: adapter_ids must be int64 [rows]");
  const int64_t rows = adapter_ids.numel();
  STD_TORCH_CHECK(
      rows == 0 ? tokens == 0 : tokens % rows == 0,
      "tcur: adapter_ids must have one entry for each of the rows that the tokens divide into");
  return rows == 0 ? 0 : tokens / rows;
}

struct TokenSizes : Sizes {
  int64_t tokens;
};

// Arguments of core_grad_tokens.
inline TokenSizes check_gradient_tokens(
    const Tensor& x,
    const std::optional<Tensor>& grad_y,
    const Tensor& lateral_hat,
    const std::optional<Tensor>& horizontal_hat,
    int64_t n3,
    int64_t slice_index,
    int64_t slices,
    const std::optional<Tensor>& adapter_ids,
    int64_t adapters,
    bool packed) {
  const Sizes sizes = check_token_factors(lateral_hat, horizontal_hat, n3);
  STD_TORCH_CHECK(
      slice_index >= 0 && slices >= 1 && slice_index + slices <= n3,
      "tcur: slice_index out of range");
  STD_TORCH_CHECK(
      x.dim() >= 1 && x.size(x.dim() - 1) == sizes.n2, "tcur: x must be [..., n2], or [..., q]");
  const int64_t tokens = sizes.n2 == 0 ? 0 : x.numel() / sizes.n2;
  if (grad_y.has_value()) {
    STD_TORCH_CHECK(
        grad_y->dim() >= 1 && grad_y->size(grad_y->dim() - 1) == slices * sizes.n1,
        "tcur: grad_y must be [..., slices*n1]");
    STD_TORCH_CHECK(
        grad_y->numel() == tokens * slices * sizes.n1,
        "tcur: x and grad_y must have the same tokens");
  } else {
    STD_TORCH_CHECK(
        slices == 1 && tokens == sizes.n1, "tcur: without grad_y, x must be one slice of G");
    STD_TORCH_CHECK(!adapter_ids.has_value(), "tcur: adapter_ids goes without a dense gradient");
  }
  STD_TORCH_CHECK(adapters >= 0, "tcur: adapters must not be negative");
  STD_TORCH_CHECK(
      !packed || !adapter_ids.has_value(), "tcur: adapter_ids goes without packed gradients");
  return {sizes, tokens};
}

struct PackedSizes {
  int64_t count, n3, rank;
};

// Arguments of core_of_packed.
inline PackedSizes check_packed_gradients(const Tensor& packed) {
  STD_TORCH_CHECK(
      packed.dim() == 4 && packed.size(1) >= 1 && packed.size(2) >= 1 &&
          packed.size(2) == packed.size(3),
      "tcur: packed must be [m, n3, rank, rank]");
  return {packed.size(0), packed.size(1), packed.size(2)};
}

struct LinearSizes : TokenSizes {
  int64_t in_features, out_features;
};

// Arguments of cur_linear.
inline LinearSizes check_linear(
    const Tensor& x,
    const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias,
    const Tensor& lateral_hat,
    const Tensor& horizontal_hat,
    const Tensor& core,
    int64_t slice_index,
    int64_t slices,
    bool transposed,
    const std::optional<Tensor>& z,
    bool dense_grad,
    bool many) {
  STD_TORCH_CHECK(
      core.dim() == (many ? 4 : 3),
      "tcur: core must be [n3, rank, rank], and [adapters, n3, rank, rank] with adapter_ids");
  STD_TORCH_CHECK(
      !many || !dense_grad, "tcur: adapter_ids goes by the factors, without a dense gradient");
  const Sizes sizes = check_token_factors(lateral_hat, horizontal_hat, core.size(core.dim() - 3));
  STD_TORCH_CHECK(
      core.size(core.dim() - 2) == sizes.rank && core.size(core.dim() - 1) == sizes.rank,
      "tcur: core has an unexpected shape");
  check_dtype("core", core, compute_dtype(lateral_hat.scalar_type()));
  STD_TORCH_CHECK(
      slice_index >= 0 && slices >= 1 && slice_index + slices <= sizes.n3,
      "tcur: slice_index out of range");
  const int64_t rows = slices * sizes.n1;
  const int64_t in_features = transposed ? rows : sizes.n2;
  STD_TORCH_CHECK(
      x.dim() >= 1 && x.size(x.dim() - 1) == in_features,
      "tcur: x has an unexpected last dimension");
  STD_TORCH_CHECK(
      !bias.has_value() || (weight.has_value() && !transposed),
      "tcur: bias goes with a weight, forwards");
  if (weight.has_value()) {
    check_shape("weight", *weight, {rows, sizes.n2});
  }
  STD_TORCH_CHECK(!z.has_value() || !transposed, "tcur: z goes with a forward map");
  const int64_t tokens = in_features == 0 ? 0 : x.numel() / in_features;
  return {{sizes, tokens}, in_features, transposed ? sizes.n2 : rows};
}

inline Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(x),
      torch::stable::detail::from(weight),
      torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor cast(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

}  // namespace tcur
