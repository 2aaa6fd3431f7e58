"""How a layer runs: the one place that decides between W_eff and the factors.

With q = n3 * rank, a token costs 2 q (n1 + n2) operations more through the factors than through
W_eff, and W_eff costs a pass over n1 * n2 numbers once per core version. Both meet at

    tokens = BALANCE * n1 * n2 / (q * (n1 + n2))

where BALANCE is half of (seconds of `materialize` per weight element) x (operations per second of a
matrix product), the balance of the machine: 37 on two AVX-512 cores (0.28 ns, 265 GFLOP/s). A
training step meets W_eff twice and forms z and p for the gradient anyway, and inference meets it
again and again; measured on forward and backward (docs/performance.md), W_eff pays from less than
half of that on.

The gradient of the core takes z = x R̂ᵀ and p = dy Ĉ, 2 q (n1 + n2) operations per token, or the
dense G = dyᵀx, 2 n1 n2 per token, and then 2 q n1 n2 once. Below rho = n1 n2 / (q (n1 + n2)) = 1
the dense way is the cheaper one for many tokens. By tokens, z can be formed in the forward pass: it
is the same work, and what is kept for the backward pass is then q numbers per token, not n2.

On a GPU there may be two backends. The CUDA kernels transform tubes of two short factors by a few
fp32 operations in registers; measured on an H100 they are 2 to 4 times as fast as the Triton
kernels, which multiply by the matrix of the transform. For other lengths both multiply by the
matrix, and `materialize` in Triton took 0.83 and 0.97 of the time (47 and 127 slices). Operators on
tokens have no transform; the CUDA ones took less time in every row (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

import torch

Mode = Literal["auto", "materialized", "factored"]
MODES: tuple[Mode, ...] = get_args(Mode)

#: Measured on a two-core AVX-512 machine, forward and backward.
BALANCE = 15.0

#: Slices that the CUDA kernels take, csrc/cuda/tile.h.
CUDA_SLICES = 2048

#: Factors of a tube's length for which there are codelets, csrc/common/tubes.h.
LONGEST_OUTER, LONGEST_INNER = 16, 9


def check_mode(mode: str) -> Mode:
    """The mode, if it is one.

    Raises:
        ValueError: it is none.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


def tokens_worth_materializing(n1: int, n2: int, n3: int, rank: int) -> float:
    """Tokens per core version above which building W_eff is the cheaper way."""
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
    """ "materialized" or "factored" for one call of one layer.

    Args:
        mode: what the user asked for, one of `MODES`.
        tokens: rows of x in this call.
        n1, n2, n3, rank: sizes of the stack.
        weight_dtype: dtype of the base weights. A 16-bit base swallows small updates when W_eff is
            rounded back to it (at a relative size of 1e-4 about 6 % survive), so "auto" never
            materialises it.
        is_built: whether W_eff for the current core exists already; it is free then.
    """
    if mode != "auto":
        return mode
    if weight_dtype in (torch.bfloat16, torch.float16):
        return "factored"
    if is_built or tokens >= tokens_worth_materializing(n1, n2, n3, rank):
        return "materialized"
    return "factored"


def choose_gradient(
    tokens: int, n1: int, n2: int, n3: int, rank: int
) -> Literal["z", "x", "dense"]:
    """How the gradient of the core is formed: "z", "x" or "dense".

    "z": by tokens, z made and kept in the forward pass. "x": by tokens, x kept. "dense": by dyᵀx.
    """
    q = n3 * rank
    if tokens * (q * (n1 + n2) - n1 * n2) > q * n1 * n2:
        return "dense"
    return "z" if q < n2 else "x"


def has_codelets(n3: int) -> bool:
    """Whether n3 is a product of two factors for which csrc/common/codelets.h makes transforms."""
    inners = range(1, LONGEST_INNER + 1)
    return any(n3 % inner == 0 and n3 // inner <= LONGEST_OUTER for inner in inners)


def has_tubes(n3: int) -> bool:
    """Whether the CUDA kernels have one for this length alone, csrc/cuda/tubes_in_registers.h."""
    return has_codelets(n3) and (n3 <= LONGEST_OUTER or n3 % 4 == 0)


def cuda_takes(n3: int, dtype: torch.dtype) -> bool:
    """Whether the CUDA kernels can work on factors of this dtype and number of slices."""
    return dtype == torch.float32 and n3 <= CUDA_SLICES


def choose_gpu_backend(
    name: str, *, n3: int, dtype: torch.dtype, available: Collection[str]
) -> Literal["cuda", "triton", "reference"]:
    """ "cuda", "triton" or "reference" for an operator on a GPU.

    Args:
        name: the operator; those on tokens have no transform of tubes.
        n3: slices.
        dtype: of the factors.
        available: those of "cuda" and "triton" that are here.
    """
    if "cuda" in available and cuda_takes(n3, dtype):
        by_matrix = name == "materialize" and not has_codelets(n3)
        if not by_matrix or "triton" not in available:
            return "cuda"
    if "triton" in available and dtype == torch.float32:
        return "triton"
    return "reference"
