// The variant that every processor of the architecture runs: 16-byte vectors, no target attribute.
#include "isa.h"

#define TCUR_ISA baseline
#define TCUR_TARGET
#define TCUR_VECTOR_BYTES 16
#define TCUR_REGISTERS 16
#include "variant.h"

namespace tcur {
namespace {
const Kernels<float> f32 = baseline::table<float>("baseline");
const Kernels<double> f64 = baseline::table<double>("baseline");
bool runs_here() {
  return true;
}
}  // namespace

const IsaVariant kBaselineVariant{"baseline", &runs_here, &f32, &f64};
}  // namespace tcur
