// The variants' tables; isa_*.cpp define them, isa.cpp chooses among them.
#pragma once

#include "kernels.h"

namespace tcur {

struct IsaVariant {
  const char* name;
  bool (*runs_here)();
  const Kernels<float>* f32;
  const Kernels<double>* f64;
};

#if defined(__x86_64__)
extern const IsaVariant kAvx512Variant;
extern const IsaVariant kAvx2Variant;
#endif
extern const IsaVariant kBaselineVariant;

}  // namespace tcur
