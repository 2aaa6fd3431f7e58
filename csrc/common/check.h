// Checks the arguments of the operators, and reads the sizes from them.
//
// The Python layer has already rejected bad input with an error that names it. The checks here make
// sure that no kernel reads or writes outside its tensors when an operator is called directly. They
// refuse the same as tcur_kernels/operators/definitions/given.py does for the other languages.
#pragma once

#include "arguments.h"

#include <initializer_list>

namespace tcur {

inline bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (auto it = shape.begin(); same && it != shape.end(); ++it, ++d) {
    same = tensor.size(d) == *it;
  }
  return same;
}

inline void check_shape(
    const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(has_shape(tensor, shape), "tcur: ", name, " has an unexpected shape");
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "tcur: ", name, " has an unexpected dtype");
}

// Sizes that all operators share, read from the packed factors and the number of slices.
struct Sizes {
  int64_t n1, n2, n3, rank;

  int64_t q() const {
    return n3 * rank;
  }
};

// Checks packed factors. Operators on tokens may omit R̂ if the tokens are already projected; n2 is
// then n3*rank.
inline Sizes check_packed(
    const Tensor& lateral_hat, const std::optional<Tensor>& horizontal_hat, int64_t n3) {
  STD_TORCH_CHECK(n3 >= 1, "tcur: n3 must be positive");
  STD_TORCH_CHECK(lateral_hat.dim() == 2, "tcur: lateral_hat must be [n1, n3*rank]");
  const int64_t q = lateral_hat.size(1);
  STD_TORCH_CHECK(
      lateral_hat.size(0) > 0 && q > 0 && q % n3 == 0,
      "tcur: lateral_hat must be [n1, n3*rank] with no empty axis");
  if (!horizontal_hat.has_value()) {
    return {lateral_hat.size(0), q, n3, q / n3};
  }
  STD_TORCH_CHECK(
      horizontal_hat->dim() == 2 && horizontal_hat->size(0) == q && horizontal_hat->size(1) > 0,
      "tcur: horizontal_hat must be [n3*rank, n2] with no empty axis");
  check_dtype("horizontal_hat", *horizontal_hat, lateral_hat.scalar_type());
  return {lateral_hat.size(0), horizontal_hat->size(1), n3, q / n3};
}

// Consecutive slices of 0 … n3 - 1. No sum of what is given is formed, because it might overflow.
inline void check_slices_of_layer(int64_t slice_index, int64_t slices, int64_t n3) {
  STD_TORCH_CHECK(
      slices >= 1 && slices <= n3 && slice_index >= 0 && slice_index <= n3 - slices,
      "tcur: slice_index out of range");
}

// Ids of cores, of which there must be some. Whether all ids are in range, only the CPU looks.
inline void check_has_cores(const std::optional<Tensor>& adapter_ids, int64_t cores) {
  STD_TORCH_CHECK(
      !adapter_ids.has_value() || adapter_ids->numel() == 0 || cores > 0,
      "tcur: adapter_ids out of range, because there are no cores");
}

// A tensor whose numbers the arithmetic reads or writes.
inline void check_is_floating(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(
      element_of(tensor) != Element::none, "tcur: ", name, " must be fp32, fp64, bf16 or fp16");
}

// Operators on tokens also take factors in bf16, and then project in that precision. With
// bf16_operands, numbers of bf16 are held in fp32.
inline void check_token_factors(const Tensor& lateral_hat, bool bf16_operands) {
  STD_TORCH_CHECK(
      is_compute_dtype(compute_dtype(lateral_hat.scalar_type())),
      "tcur: lateral_hat must be fp32, fp64 or bf16");
  STD_TORCH_CHECK(
      !bf16_operands || lateral_hat.scalar_type() == ScalarType::Float,
      "tcur: lateral_hat must be fp32 with bf16_operands");
}

inline Sizes check_materialize(const MaterializeArguments& a) {
  STD_TORCH_CHECK(a.core.dim() == 3, "tcur: core must be [n3, rank, rank]");
  const Sizes sizes = check_packed(a.lateral_hat, a.horizontal_hat, a.core.size(0));
  check_shape("core", a.core, {sizes.n3, sizes.rank, sizes.rank});
  return sizes;
}

inline Sizes check_core_grad_dense(const CoreGradDenseArguments& a) {
  STD_TORCH_CHECK(a.grad.dim() == 3, "tcur: grad must be [n3, n1, n2]");
  const Sizes sizes = check_packed(a.lateral_hat, a.horizontal_hat, a.grad.size(0));
  check_shape("grad", a.grad, {sizes.n3, sizes.n1, sizes.n2});
  return sizes;
}

struct TokenSizes : Sizes {
  int64_t tokens;
};

inline TokenSizes check_core_grad_tokens(const CoreGradTokensArguments& a) {
  check_token_factors(a.lateral_hat, a.bf16_operands);
  const Sizes sizes = check_packed(a.lateral_hat, a.horizontal_hat, a.n3);
  check_slices_of_layer(a.slice_index, a.slices, a.n3);
  check_is_floating("x", a.x);
  STD_TORCH_CHECK(
      a.x.dim() >= 1 && a.x.size(a.x.dim() - 1) == sizes.n2,
      "tcur: x must be [..., n2], or [..., q]");
  const int64_t tokens = a.x.numel() / sizes.n2;
  if (a.grad_y.has_value()) {
    check_is_floating("grad_y", *a.grad_y);
    STD_TORCH_CHECK(
        a.grad_y->dim() >= 1 && a.grad_y->size(a.grad_y->dim() - 1) == a.slices * sizes.n1,
        "tcur: grad_y must be [..., slices*n1]");
    STD_TORCH_CHECK(
        a.grad_y->numel() == tokens * a.slices * sizes.n1,
        "tcur: x and grad_y must have the same tokens");
  } else {
    STD_TORCH_CHECK(
        a.slices == 1 && tokens == sizes.n1, "tcur: without grad_y, x must be one slice of G");
    STD_TORCH_CHECK(!a.adapter_ids.has_value(), "tcur: adapter_ids goes without a dense gradient");
  }
  STD_TORCH_CHECK(a.adapters >= 0, "tcur: adapters must not be negative");
  check_has_cores(a.adapter_ids, a.adapters);
  STD_TORCH_CHECK(
      !a.packed || !a.adapter_ids.has_value(), "tcur: adapter_ids goes without packed gradients");
  return {sizes, tokens};
}

struct PackedSizes {
  int64_t count, n3, rank;
};

inline PackedSizes check_core_of_packed(const CoreOfPackedArguments& a) {
  const Tensor& packed = a.packed;
  STD_TORCH_CHECK(
      packed.dim() == 4 && packed.size(1) >= 1 && packed.size(2) >= 1 &&
          packed.size(2) == packed.size(3),
      "tcur: packed must be [m, n3, rank, rank]");
  return {packed.size(0), packed.size(1), packed.size(2)};
}

struct LinearSizes : TokenSizes {
  int64_t in_features, out_features;
};

inline LinearSizes check_cur_linear(const CurLinearArguments& a) {
  const bool many = a.adapter_ids.has_value();
  STD_TORCH_CHECK(
      a.core.dim() == (many ? 4 : 3),
      "tcur: core must be [n3, rank, rank], and [adapters, n3, rank, rank] with adapter_ids");
  STD_TORCH_CHECK(
      !many || !a.dense_grad, "tcur: adapter_ids goes by the factors, without a dense gradient");
  const int64_t n3 = a.core.size(a.core.dim() - 3);
  check_token_factors(a.lateral_hat, a.bf16_operands);
  const Sizes sizes = check_packed(a.lateral_hat, a.horizontal_hat, n3);
  STD_TORCH_CHECK(
      a.core.size(a.core.dim() - 2) == sizes.rank && a.core.size(a.core.dim() - 1) == sizes.rank,
      "tcur: core has an unexpected shape");
  check_dtype("core", a.core, compute_dtype(a.lateral_hat.scalar_type()));
  check_has_cores(a.adapter_ids, a.core.size(0));
  check_slices_of_layer(a.slice_index, a.slices, n3);
  check_is_floating("x", a.x);
  const int64_t rows = a.slices * sizes.n1;
  const int64_t in_features = a.transposed ? rows : sizes.n2;
  STD_TORCH_CHECK(
      a.x.dim() >= 1 && a.x.size(a.x.dim() - 1) == in_features,
      "tcur: x has an unexpected last dimension");
  STD_TORCH_CHECK(
      !a.bias.has_value() || (a.weight.has_value() && !a.transposed),
      "tcur: bias goes with a weight, forwards");
  if (a.weight.has_value()) {
    check_shape("weight", *a.weight, {rows, sizes.n2});
    check_dtype("weight", *a.weight, a.x.scalar_type());
  }
  if (a.bias.has_value()) {  // torch would repeat a shorter one, and promote another dtype
    check_shape("bias", *a.bias, {rows});
    check_dtype("bias", *a.bias, a.x.scalar_type());
  }
  if (a.z.has_value()) {
    STD_TORCH_CHECK(!a.transposed, "tcur: z goes with a forward map");
    check_is_floating("z", *a.z);
    bool has_tokens_of_x = a.z->dim() == a.x.dim() && a.z->size(a.z->dim() - 1) == sizes.q();
    for (int64_t d = 0; has_tokens_of_x && d + 1 < a.x.dim(); ++d) {
      has_tokens_of_x = a.z->size(d) == a.x.size(d);
    }
    STD_TORCH_CHECK(has_tokens_of_x, "tcur: z must be [..., n3*rank] for the tokens of x");
  }
  const int64_t tokens = a.x.numel() / in_features;
  return {{sizes, tokens}, in_features, a.transposed ? sizes.n2 : rows};
}

}  // namespace tcur
