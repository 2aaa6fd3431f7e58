"""Decides how a layer runs: through W_eff or through the factors, and on which backend.

A layer can multiply its tokens by W_eff, or by the base weight and the factors. With q = n3 * rank,
the factors take 2 q (n1 + n2) operations more for each token. W_eff takes one pass over its n1 * n2
numbers for each version of the core. The two ways cost the same at

    tokens = BALANCE * n1 * n2 / (q * (n1 + n2))

tokens for each version of the core. For one product, BALANCE is half of (seconds of `materialize`
per weight element) x (operations per second of a matrix product). That is a property of the
machine: 37 on two AVX-512 cores (0.28 ns, 265 GFLOP/s). In practice W_eff pays earlier. A training
step multiplies by it twice, forward and backward, and forms z and p for the gradient in any case.
Inference multiplies by it again and again. Measured over forward and backward
(docs/performance.md), W_eff pays from less than half of that balance on.

The gradient of the core can be formed in two ways. By tokens it takes z = x R̂ᵀ and p = dy Ĉ, which
are 2 q (n1 + n2) operations for each token. By tokens, the forward pass can already form z. The
work is the same, and the backward pass then needs q numbers for each token instead of n2.

The dense way takes G = dyᵀx, 2 n1 n2 operations for each token, and then the core's gradient of G.
So if rho = n1 n2 / (q (n1 + n2)) is below 1, it is cheaper for many tokens. Where W_eff is built, G
of all layers goes to one buffer, and `core_grad_dense` reads it once, which takes as long as
AT_ONCE (rank + 4) operations of a product for each number of G. AT_ONCE is a property of machine
and kernel: 4 to 12 on one AVX-512 core, over six sizes and ranks 4 to 32, in the middle 7 (0.4 to
1.1 ns at rank 8, beside products at 105 to 112 GFLOP/s). Where W_eff is not
built, each layer projects its G and drops it, 2 q operations for each number: a buffer of the size
of all weights would be the largest tensor of such a training.

A GPU may have two backends. If n3 has two short factors, the CUDA kernels transform a tube by a few
fp32 operations in registers, while the Triton kernels multiply by the DFT matrix. Measured on an
H100, the CUDA kernels were then 2 to 4 times as fast. For other lengths both multiply by the
matrix, and `materialize` in Triton took 0.83 and 0.97 of the time of CUDA (47 and 127 slices).
Operators on tokens transform no tubes. There the CUDA kernels took less time in every row of
docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

import torch

Mode = Literal["auto", "materialized", "factored"]
MODES: tuple[Mode, ...] = get_args(Mode)

#: The balance of `tokens_worth_materializing`, measured over forward and backward on a machine with
#: two AVX-512 cores.
BALANCE = 15.0

#: The operations of a product that take as long as `core_grad_dense` for one number of G, over
#: rank + 4: measured on one AVX-512 core.
AT_ONCE = 8.0

#: The most slices that the CUDA kernels take, csrc/cuda/tile.h.
CUDA_SLICES = 2048

#: The largest factors of n3 for which there are codelets, csrc/common/tubes.h.
LONGEST_OUTER, LONGEST_INNER = 16, 9


def check_mode(mode: str) -> Mode:
    """Returns the mode if it is one of `MODES`.

    Raises:
        ValueError: it is not.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


def tokens_worth_materializing(n1: int, n2: int, n3: int, rank: int) -> float:
    """Returns how many tokens for each version of the core make building W_eff the cheaper way."""
    return BALANCE * n1 * n2 / (n3 * rank * (n1 + n2))


def choose_mode(
    mode: Mode,
    *,
    tokens: int,
    n1: int,
    n2: int,
    n3: int,
    rank: int,
    weight_dtype: torch.dtype,
    is_built: bool,
) -> Literal["materialized", "factored"]:
    """Chooses "materialized" or "factored" for one call of one layer.

    Args:
        mode: what the user asked for, one of `MODES`.
        tokens: rows of x in this call.
        n1, n2, n3, rank: sizes of the stack.
        weight_dtype: dtype of the base weights. W_eff has the same dtype. In 16 bits, rounding
            loses small updates (of updates of relative size 1e-4 about 6 % survive), so "auto"
            never builds W_eff for such a base.
        is_built: whether W_eff for the current core exists already. Using it then costs nothing.
    """
    if mode != "auto":
        return mode
    if weight_dtype in (torch.bfloat16, torch.float16):
        return "factored"
    if is_built or tokens >= tokens_worth_materializing(n1, n2, n3, rank):
        return "materialized"
    return "factored"


def choose_gradient(
    tokens: int, n1: int, n2: int, n3: int, rank: int, *, at_once: bool
) -> Literal["z", "x", "dense"]:
    """Chooses how the gradient of the core is formed: "z", "x" or "dense".

    "z" and "x" go by tokens: the forward pass forms and keeps z, or it keeps x. "dense" goes by
    G = dyᵀx.

    Args:
        at_once: whether G of all layers of the stack can be transformed at once, because W_eff is
            there and the core is a leaf; else G is projected layer by layer.
    """
    q = n3 * rank
    # For few tokens W_eff is there only if another layer has built it. The way must not depend on
    # that: a checkpoint that is computed again must keep the same tensors.
    at_once = at_once and tokens >= tokens_worth_materializing(n1, n2, n3, rank)
    once = AT_ONCE * (rank + 4) if at_once else 2 * q
    if 2 * tokens * (q * (n1 + n2) - n1 * n2) > once * n1 * n2:
        return "dense"
    return "z" if q < n2 else "x"


def has_codelets(n3: int) -> bool:
    """Whether n3 is a product of two factors for which csrc/common/codelets.h has transforms."""
    inners = range(1, LONGEST_INNER + 1)
    return any(n3 % inner == 0 and n3 // inner <= LONGEST_OUTER for inner in inners)


def has_tubes(n3: int) -> bool:
    """Whether this length has CUDA kernels of its own, csrc/cuda/tubes_in_registers.h."""
    return has_codelets(n3) and (n3 <= LONGEST_OUTER or n3 % 4 == 0)


def cuda_takes(n3: int, dtype: torch.dtype) -> bool:
    """Whether the CUDA kernels can work on factors of this dtype and number of slices."""
    return dtype == torch.float32 and n3 <= CUDA_SLICES


def choose_gpu_backend(
    name: str, *, n3: int, dtype: torch.dtype, available: Collection[str]
) -> Literal["cuda", "triton", "reference"]:
    """Chooses "cuda", "triton" or "reference" for an operator on a GPU.

    Args:
        name: the operator. Operators on tokens transform no tubes.
        n3: number of slices.
        dtype: dtype of the factors.
        available: which of "cuda" and "triton" exist here.
    """
    if "cuda" in available and cuda_takes(n3, dtype):
        by_matrix = name == "materialize" and not has_codelets(n3)
        if not by_matrix or "triton" not in available:
            return "cuda"
    if "triton" in available and dtype == torch.float32:
        return "triton"
    return "reference"
