// Integer arithmetic for sizes and addresses.
#pragma once

#include "host_device.h"

#include <cstdint>
#include <type_traits>

namespace tcur {

// How many pieces are needed to cover a size, which must not be negative.
template <class Size, class Piece>
TCUR_HOST_DEVICE constexpr std::common_type_t<Size, Piece> ceil_div(Size size, Piece piece) {
  return (size + piece - 1) / piece;
}

template <class Size, class Piece>
TCUR_HOST_DEVICE constexpr std::common_type_t<Size, Piece> round_up(Size size, Piece multiple) {
  return ceil_div(size, multiple) * multiple;
}

// The logarithm of a power of two.
constexpr int log2_of(int64_t power) {
  return power > 1 ? 1 + log2_of(power / 2) : 0;
}

// Whether an address is a multiple of `bytes`.
inline bool is_aligned(const void* data, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace tcur
