"""How a layer runs: the one place that decides between W_eff and the factors.

With q = n3 * rank, a token costs 2 q (n1 + n2) operations more through the factors than through
W_eff, and W_eff costs a pass over n1 * n2 numbers once per core version. Both meet at

    tokens = BALANCE * n1 * n2 / (q * (n1 + n2))

where BALANCE is half of (seconds of `materialize` per weight element) x (operations per second of a
matrix product): the balance of the machine.

The gradient of the core takes z = x R̂ᵀ and p = dy Ĉ, 2 q (n1 + n2) operations per token, or the
dense G = dyᵀx, 2 n1 n2 per token, and then 2 q n1 n2 once. Below rho = n1 n2 / (q (n1 + n2)) = 1
the dense way is the cheaper one for many tokens. By tokens, z can be formed in the forward pass: it
is the same work, and what is kept for the backward pass is then q numbers per token, not n2.
"""

from __future__ import annotations

import torch

MODES = ("auto", "materialized", "factored")

#: Measured on a two-core AVX-512 machine: 0.4 ns per element, 265 GFLOP/s.
BALANCE = 53.0


def tokens_worth_materializing(n1: int, n2: int, n3: int, rank: int) -> float:
    """Tokens per core version above which building W_eff is the cheaper way."""
    return BALANCE * n1 * n2 / (n3 * rank * (n1 + n2))


def choose_mode(
    mode: str,
    *,
    tokens: int,
    n1: int,
    n2: int,
    n3: int,
    rank: int,
    weight_dtype: torch.dtype,
    is_built: bool,
) -> str:
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


def choose_gradient(tokens: int, n1: int, n2: int, n3: int, rank: int) -> str:
    """How the gradient of the core is formed: "z", "x" or "dense".

    "z": by tokens, z made and kept in the forward pass. "x": by tokens, x kept. "dense": by dyᵀx.
    """
    q = n3 * rank
    if tokens * (q * (n1 + n2) - n1 * n2) > q * n1 * n2:
        return "dense"
    return "z" if q < n2 else "x"
