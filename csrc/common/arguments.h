// The arguments of the operators, in the order of the schemas in
// tcur_kernels/operators/contract.py. Each list is written only once.
//
// A backend implements an operator as a function of its struct. torch passes the arguments one by
// one; the function of the same name in `positional` builds the struct from them:
//     m.impl("cur_linear", TORCH_BOX(&positional::cur_linear<&cur_linear>));
#pragma once

#include "dtypes.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <utility>
#include <vector>

namespace tcur {

struct MaterializeArguments {
  std::vector<Tensor> weights;  // see slice_places.h
  Tensor lateral_hat;           // [n1, n3*rank]
  Tensor horizontal_hat;        // [n3*rank, n2]
  Tensor core;                  // [n3, rank, rank]
  double scale;
  Tensor out;                    // see slice_places.h
  std::optional<Tensor> panels;  // R̂ in the layout of the CPU kernels, if the caller keeps it
};

struct CoreGradDenseArguments {
  Tensor grad;            // [n3, n1, n2]
  Tensor lateral_hat;     // [n1, n3*rank]
  Tensor horizontal_hat;  // [n3*rank, n2]
  std::optional<Tensor> panels;
};

struct CoreGradTokensArguments {
  Tensor x;                              // [..., n2], or without R̂ z: [..., n3*rank]
  std::optional<Tensor> grad_y;          // [..., slices*n1]; none: x is one slice of G
  Tensor lateral_hat;                    // [n1, n3*rank]
  std::optional<Tensor> horizontal_hat;  // [n3*rank, n2]
  int64_t n3, slice_index, slices;
  std::optional<Tensor> adapter_ids;  // [rows]
  int64_t adapters;
  bool packed;         // return ∂Û, not transformed back
  bool bf16_operands;  // see token_products.h
};

struct CoreOfPackedArguments {
  Tensor packed;  // [m, n3, rank, rank]
  double scale;
};

struct CurLinearArguments {
  Tensor x;                      // [..., n2]; transposed: [..., slices*n1]
  std::optional<Tensor> weight;  // [slices*n1, n2]
  std::optional<Tensor> bias;    // [slices*n1]
  Tensor lateral_hat;            // [n1, n3*rank]
  Tensor horizontal_hat;         // [n3*rank, n2]
  Tensor core;                   // [n3, rank, rank]; with adapter_ids one for each adapter
  int64_t slice_index, slices;
  double scale;
  bool transposed;
  std::optional<Tensor> z;            // [..., n3*rank]: x R̂ᵀ, if the caller has it
  bool dense_grad;                    // for the derivative alone
  std::optional<Tensor> adapter_ids;  // [rows]
  bool bf16_operands;                 // see token_products.h
};

namespace positional {

template <void (*run)(const MaterializeArguments&)>
void materialize_out(
    std::vector<Tensor> weights,
    Tensor lateral_hat,
    Tensor horizontal_hat,
    Tensor core,
    double scale,
    Tensor out,
    std::optional<Tensor> panels) {
  run({std::move(weights), lateral_hat, horizontal_hat, core, scale, out, panels});
}

// The same, but it allocates W_eff [n3, n1, n2] itself.
template <void (*run)(const MaterializeArguments&)>
Tensor materialize(
    std::vector<Tensor> weights,
    Tensor lateral_hat,
    Tensor horizontal_hat,
    Tensor core,
    double scale,
    ScalarType out_dtype,
    std::optional<Tensor> panels) {
  STD_TORCH_CHECK(
      core.dim() == 3 && lateral_hat.dim() == 2 && horizontal_hat.dim() == 2,
      "tcur: materialize takes packed factors [n1, q], [q, n2] and a core [n3, rank, rank]");
  Tensor out = torch::stable::new_empty(
      core, {core.size(0), lateral_hat.size(0), horizontal_hat.size(1)}, out_dtype);
  run({std::move(weights), lateral_hat, horizontal_hat, core, scale, out, panels});
  return out;
}

template <Tensor (*run)(const CoreGradDenseArguments&)>
Tensor core_grad_dense(
    Tensor grad, Tensor lateral_hat, Tensor horizontal_hat, std::optional<Tensor> panels) {
  return run({grad, lateral_hat, horizontal_hat, panels});
}

template <Tensor (*run)(const CoreGradTokensArguments&)>
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
    bool packed,
    bool bf16_operands) {
  return run(
      {x,
       grad_y,
       lateral_hat,
       horizontal_hat,
       n3,
       slice_index,
       slices,
       adapter_ids,
       adapters,
       packed,
       bf16_operands});
}

template <Tensor (*run)(const CoreOfPackedArguments&)>
Tensor core_of_packed(Tensor packed, double scale) {
  return run({packed, scale});
}

template <Tensor (*run)(const CurLinearArguments&)>
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
    bool transposed,
    std::optional<Tensor> z,
    bool dense_grad,
    std::optional<Tensor> adapter_ids,
    bool bf16_operands) {
  return run(
      {x,
       weight,
       bias,
       lateral_hat,
       horizontal_hat,
       core,
       slice_index,
       slices,
       scale,
       transposed,
       z,
       dense_grad,
       adapter_ids,
       bf16_operands});
}

}  // namespace positional

}  // namespace tcur
