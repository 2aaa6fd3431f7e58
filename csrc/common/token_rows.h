// Tokens in the form in which kernels read them.
#pragma once

#include "elements.h"

#include <cstdint>

namespace tcur {

// Rows of numbers of some element type, `stride` numbers apart.
struct TokenRows {
  const void* data;
  Element element;
  int64_t stride, rows;
};

}  // namespace tcur
