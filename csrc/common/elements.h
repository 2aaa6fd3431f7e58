// Element types of tensors in memory, for kernels, which include no headers of torch but those of
// its number types.
#pragma once

#include "host_device.h"

#include <cstdint>

namespace tcur {

enum class Element { none, f32, f64, bf16, f16 };

// An element type as a type, known at compile time.
template <Element E>
struct ElementConstant {
  static constexpr Element value = E;
};

// Turns an element type of run time into one of compile time; nothing else does. Calls f with the
// constant of the element if it is in the list, and otherwise with the last constant of the list.
template <Element FIRST, Element... OTHERS, class F>
constexpr auto with_element(Element element, F&& f) {
  if constexpr (sizeof...(OTHERS) == 0) {
    return f(ElementConstant<FIRST>{});
  } else {
    return element == FIRST ? f(ElementConstant<FIRST>{}) : with_element<OTHERS...>(element, f);
  }
}

}  // namespace tcur
