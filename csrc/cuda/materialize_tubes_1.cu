// Kernels of `materialize` for lengths n3 = 4j + 1 of two short factors (materialize_tubes.h).
//
// Planned: 128 threads, up to 168 registers, 3 blocks per multiprocessor; for tiles up to 56 KiB 128
// registers and 4 blocks.
#include "materialize_tubes.h"

namespace tcur {

template <>
TubesKernel materialize_tubes<1>(int64_t n3) {
  return tubes_kernel_of<1>(n3, std::make_integer_sequence<int, kTubesPerPart>{});
}

}  // namespace tcur
