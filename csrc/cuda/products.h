// The diagonal blocks of pᵀz, turned by the phases of their slices. The gradient of the core
// consists of them, whether it comes from tokens or from a dense G.
#pragma once

#include "../common/token_rows.h"
#include "operators.h"

namespace tcur {

// p: [tokens, slices*q], z: [tokens, q], q = n3*rank. out: [cores, n3, rank, rank], the gradients
// of the cores. With `packed`, which needs a single core, out is ∂Û, not transformed back. p and z
// are fp32 or bf16; if z is bf16, so is p. If p has fewer rows than z, its rows repeat.
void core_from_products(
    const Call& call,
    const TokenRows& p,
    const TokenRows& z,
    int n3,
    int rank,
    int64_t slice_index,
    int64_t slices,
    const TokenCores& cores,
    const Tables& tables,
    bool packed,
    const Tensor& out);

}  // namespace tcur
