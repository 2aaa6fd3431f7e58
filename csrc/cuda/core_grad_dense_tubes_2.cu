// Kernels of `core_grad_dense` for tubes, part 2 of their lengths (core_grad_dense_tubes.h).
//
// Planned by `Tubes`: launch bounds tell the compiler how many threads and blocks there are.
#include "core_grad_dense_tubes.h"

namespace tcur {

template <>
ProjectTubesKernel project_tubes<2>(int64_t n3) {
  return project_tubes_of<2>(n3, std::make_integer_sequence<int, kTubesLengths>{});
}

}  // namespace tcur
