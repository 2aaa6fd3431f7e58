// Kernels of `materialize` for tubes, part 3 of their lengths (materialize_tubes.h).
//
// Planned by `Tubes`: launch bounds tell the compiler how many threads and blocks there are.
#include "materialize_tubes.h"

namespace tcur {

template <>
TubesKernel materialize_tubes<3>(int64_t n3) {
  return tubes_kernel_of<3>(n3, std::make_integer_sequence<int, kTubesLengths>{});
}

}  // namespace tcur
