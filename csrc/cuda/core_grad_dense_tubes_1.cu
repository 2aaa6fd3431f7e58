// Kernels of `core_grad_dense` for lengths n3 = 4j + 1 of two short factors
// (core_grad_dense_tubes.h).
//
// Planned: 128 threads, up to 168 registers, 3 blocks per multiprocessor; for tiles up to 56 KiB 128
// registers and 4 blocks.
#include "core_grad_dense_tubes.h"

namespace tcur {

template <>
ProjectTubesKernel project_tubes<1>(int64_t n3) {
  return project_tubes_of<1>(n3, std::make_integer_sequence<int, kTubesPerPart>{});
}

}  // namespace tcur
