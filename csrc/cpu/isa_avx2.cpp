#include "isa.h"

#if defined(__x86_64__)
#define TCUR_ISA avx2
#define TCUR_TARGET __attribute__((target("avx2,fma")))
#define TCUR_VECTOR_BYTES 32
#define TCUR_REGISTERS 16
#include "variant.h"

namespace tcur {
namespace {
const Kernels<float> f32 = avx2::table<float>("avx2");
const Kernels<double> f64 = avx2::table<double>("avx2");
bool runs_here() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
}  // namespace

const IsaVariant kAvx2Variant{"avx2", &runs_here, &f32, &f64};
}  // namespace tcur
#endif
