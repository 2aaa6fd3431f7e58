// All kernels of one instruction set, and the table of their entry points.
// The order matters: each header uses what stands above it.
// clang-format off
#include "simd.h"
#include "convert_kernel.h"
#include "factors_kernel.h"
#include "dft_kernel.h"
#include "tile_kernel.h"
#include "materialize_kernel.h"
#include "core_grad_dense_kernel.h"
#include "core_blocks_kernel.h"
// clang-format on

namespace tcur::TCUR_ISA {

template <class T>
constexpr Kernels<T> table(const char* isa) {
  return {
      isa,
      Simd<T>::lanes,
      &inverse_dft<T>,
      &forward_dft<T>,
      &materialize_scratch<T>,
      &materialize<T>,
      &core_grad_dense_scratch<T>,
      &core_grad_dense<T>,
      &apply_core<T>,
      &core_products<T>,
      &add_update<T>};
}

}  // namespace tcur::TCUR_ISA
