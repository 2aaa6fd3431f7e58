// The dtypes of torch that the arithmetic uses, and those that tensors in memory may have.
#pragma once

#include "elements.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <type_traits>

namespace tcur {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Element::f32;
    case ScalarType::Double:
      return Element::f64;
    case ScalarType::BFloat16:
      return Element::bf16;
    case ScalarType::Half:
      return Element::f16;
    default:
      return Element::none;
  }
}
inline Element element_of(const Tensor& tensor) {
  return element_of(tensor.scalar_type());
}

inline bool is_compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double;
}

// The dtype in which products of factors are summed.
inline ScalarType compute_dtype(ScalarType factors) {
  return factors == ScalarType::BFloat16 ? ScalarType::Float : factors;
}

inline Tensor cast(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

}  // namespace tcur
