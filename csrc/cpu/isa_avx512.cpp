#include "isa.h"

#if defined(__x86_64__)
#define TCUR_ISA avx512
#define TCUR_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#define TCUR_VECTOR_BYTES 64
#define TCUR_REGISTERS 32
#include "variant.h"

namespace tcur {
namespace {
const Kernels<float> f32 = avx512::table<float>("avx512");
const Kernels<double> f64 = avx512::table<double>("avx512");
bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}
}  // namespace

const IsaVariant kAvx512Variant{"avx512", &runs_here, &f32, &f64};
}  // namespace tcur
#endif
