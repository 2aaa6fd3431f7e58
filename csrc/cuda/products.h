// The diagonal blocks of pᵀz, turned by the phases of their slices: what the gradient of the core
// is made of, whether from tokens or from a dense G.
#pragma once

#include "../common/token_rows.h"
#include "operators.h"

namespace tcur {

// p: [tokens, slices*q], z: [tokens, q], q = n3*rank. out: [cores, n3, rank, rank], the gradients
// of the cores; packed, with one core alone: ∂Û, not transformed back. Both are fp32 or bf16; z in
// bf16 goes with p in bf16. Where p has fewer rows than z, they are taken again.
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
