// Roots of unity in fp64.
#pragma once

#include "launch.h"

#include <cmath>

namespace tcur {

// cos and sin of 2πm/n3.
TCUR_DEVICE double2 unit_root(int m, int n3) {
  double2 root;
#ifdef __CUDACC__
  sincospi(2.0 * m / n3, &root.y, &root.x);
#else
  const double angle = 2.0 * 3.14159265358979323846 * m / n3;
  root = {std::cos(angle), std::sin(angle)};
#endif
  return root;
}

}  // namespace tcur
