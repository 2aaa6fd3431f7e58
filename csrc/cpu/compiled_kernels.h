// The functions that are compiled once for every instruction set. The *_kernel.h named above each
// declaration defines and instantiates it, in a translation unit of its own. kernels.h says what
// the functions do.
#pragma once

#include "kernels.h"

namespace tcur::TCUR_ISA {

// transforms_kernel.h
template <class T>
TCUR_TARGET void inverse_dft(
    const TubeDft<T>& dft,
    T* planes,
    int64_t plane_stride,
    T* tubes,
    int64_t tube_stride,
    int64_t width);
template <class T>
TCUR_TARGET void forward_dft(
    const TubeDft<T>& dft,
    T* tubes,
    int64_t tube_stride,
    T* planes,
    int64_t plane_stride,
    int64_t width);

// materialize_kernel.h
template <class T>
TCUR_TARGET int64_t materialize_scratch(const MaterializeArgs<T>& m);
template <class T>
TCUR_TARGET void materialize(const MaterializeArgs<T>& m, int64_t task, T* scratch);

// core_grad_dense_kernel.h
template <class T>
TCUR_TARGET int64_t core_grad_dense_scratch(const CoreGradDenseArgs<T>& m);
template <class T>
TCUR_TARGET void core_grad_dense(
    const CoreGradDenseArgs<T>& m, int64_t task, T* scratch, T* core_hat);

// tokens_kernel.h
template <class T>
TCUR_TARGET void transform_core(
    const TokenBasis<T>& basis, const T* core, bool transposed, T* tubes, T* planes);
template <class T>
TCUR_TARGET void apply_core(
    const TokenBasis<T>& basis,
    const T* planes,
    bool transposed,
    const TokenRows& in,
    T* out,
    int64_t begin,
    int64_t end,
    T* scratch);
template <class T>
TCUR_TARGET void core_products(
    const TokenBasis<T>& basis,
    const TokenRows& p,
    const TokenRows& z,
    int64_t begin,
    int64_t end,
    bool accumulate,
    T* products,
    T* scratch);
template <class T>
TCUR_TARGET void add_update(void* y, Element element, const T* delta, int64_t begin, int64_t end);

}  // namespace tcur::TCUR_ISA
