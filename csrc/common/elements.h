// Element types of tensors in memory, for kernels: no header of torch beyond its number types.
#pragma once

#include "host_device.h"

#include <cstdint>

namespace tcur {

// The low four bits are the bytes of a number, so that kernels need no table of them.
enum class Element { none = 0, f32 = 4, f64 = 8, bf16 = 2, f16 = 16 + 2 };

TCUR_HOST_DEVICE constexpr int bytes_of(Element element) {
  return static_cast<int>(element) & 15;
}

// An element type that is known by its type.
template <Element E>
struct ElementConstant {
  static constexpr Element value = E;
};

// The one place that turns an element type of run time into one of compile time: f of its constant,
// of those that are listed. The last of them stands for all others.
template <Element FIRST, Element... OTHERS, class F>
constexpr auto with_element(Element element, F&& f) {
  if constexpr (sizeof...(OTHERS) == 0) {
    return f(ElementConstant<FIRST>{});
  } else {
    return element == FIRST ? f(ElementConstant<FIRST>{}) : with_element<OTHERS...>(element, f);
  }
}

}  // namespace tcur
