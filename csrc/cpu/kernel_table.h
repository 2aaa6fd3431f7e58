// The table of the kernels of one instruction set. The library chooses one of these tables.
#pragma once

#include "compiled_kernels.h"
#include "simd.h"

namespace tcur::TCUR_ISA {

#define TCUR_QUOTED(name) #name
#define TCUR_NAME_OF(name) TCUR_QUOTED(name)

template <class T>
constexpr Kernels<T> table = {
    TCUR_NAME_OF(TCUR_ISA),
    Simd<T>::lanes,
    kStrip<T>,
    kRowBlock,
    kFetchesBase,
    &inverse_dft<T>,
    &forward_dft<T>,
    &materialize_scratch<T>,
    &materialize<T>,
    &core_grad_dense_scratch<T>,
    &core_grad_dense<T>,
    &transform_core<T>,
    &apply_core<T>,
    &core_products<T>,
    &add_update<T>};

inline bool runs_here() {
  return TCUR_RUNS_HERE;
}

static const bool is_registered = register_variant(
    {TCUR_NAME_OF(TCUR_ISA), TCUR_VECTOR_BYTES, &runs_here, &table<float>, &table<double>});

}  // namespace tcur::TCUR_ISA
