// Division of the numbers of threads and blocks by what a launch fixes.
#pragma once

#include "launch.h"

namespace tcur {

// Division by a value that a launch fixes. A multiplication and a shift replace some thirty
// instructions, for which every thread of a short kernel would wait. The factor is 2^(31+s)/value,
// rounded up. With value <= 2^s, n * factor is too large by less than 2^(31+s)/value for
// 0 <= n < 2^31, which is too little to reach the next quotient. With 2^(s-1) < value, the factor
// has 32 bits.
struct Divisor {
  int value = 1, shift = 31;
  unsigned factor = 1U << 31;

  Divisor() = default;
  explicit Divisor(int value_) : value(value_) {
    while (1LL << (shift - 31) < value) {
      ++shift;
    }
    factor = static_cast<unsigned>(((1ULL << shift) + value - 1) / value);
  }
  TCUR_DEVICE int quotient(int n) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<unsigned>(n)) * factor >> shift);
  }
};

// Of a number of blocks in a grid. A grid with more than fit is refused when it is launched.
inline Divisor divisor_of_blocks(int64_t blocks) {
  return Divisor(static_cast<int>(blocks < INT32_MAX ? blocks : INT32_MAX));
}

}  // namespace tcur
