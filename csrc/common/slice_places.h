// Where the slices of W_eff and of its base lie.
#pragma once

#include "check.h"

#include <vector>

namespace tcur {

// One slice: the `index`-th of `count` slices side by side in a matrix [n1, count*n2]. W_eff has
// matrices of the same shapes as the base, one after the other.
struct SlicePlace {
  const void* base;  // its first number in the weight; null without a base
  int64_t count, index;
};

// All n3 slices of a call, and the element type of their base, which is none without a base.
struct SlicePlaces {
  Element element = Element::none;
  std::vector<SlicePlace> all;
  bool any_beside = false;  // whether any lie side by side
};

// Finds the slices of the base. weights: one tensor [n3, n1, n2]; or layers [n1, count*n2]; or
// none; all contiguous.
inline SlicePlaces place_base(const std::vector<Tensor>& weights, const Sizes& s) {
  SlicePlaces places;
  if (weights.empty()) {
    places.all.assign(s.n3, {nullptr, 1, 0});
  } else if (weights.size() == 1 && weights[0].dim() == 3) {
    check_shape("weights", weights[0], {s.n3, s.n1, s.n2});
    const char* data = static_cast<const char*>(weights[0].const_data_ptr());
    for (int64_t l = 0; l < s.n3; ++l) {
      places.all.push_back({data + l * s.n1 * s.n2 * weights[0].element_size(), 1, 0});
    }
  } else {
    for (const Tensor& weight : weights) {
      STD_TORCH_CHECK(weight.dim() == 2, "tcur: weights must be [n1, n2], or [n1, slices*n2]");
      const int64_t count = weight.size(1) / s.n2;
      STD_TORCH_CHECK(count >= 1, "tcur: weights must be [n1, n2], or [n1, slices*n2]");
      check_shape("weights", weight, {s.n1, count * s.n2});
      check_dtype("weights", weight, weights[0].scalar_type());
      const char* data = static_cast<const char*>(weight.const_data_ptr());
      for (int64_t index = 0; index < count; ++index) {
        places.all.push_back({data + index * s.n2 * weight.element_size(), count, index});
      }
      places.any_beside = places.any_beside || count > 1;
    }
    STD_TORCH_CHECK(
        static_cast<int64_t>(places.all.size()) == s.n3,
        "tcur: weights must have n3 slices together");
  }
  if (!weights.empty()) {
    places.element = element_of(weights[0]);
  }
  return places;
}

// The same, for operators that write W_eff. It also checks that `out` has room for the slices: it
// must be [n3, n1, n2], or flat if any slices lie side by side.
inline SlicePlaces place_slices(
    const std::vector<Tensor>& weights, const Sizes& s, const Tensor& out) {
  const SlicePlaces places = place_base(weights, s);
  if (places.any_beside) {
    check_shape("out", out, {s.n3 * s.n1 * s.n2});
  } else {
    check_shape("out", out, {s.n3, s.n1, s.n2});
  }
  STD_TORCH_CHECK(out.is_contiguous(), "tcur: out must be contiguous");
  return places;
}

}  // namespace tcur
