"""How a layer runs: the one place that decides between W_eff and the factors.

With q = n3 * rank, a token costs 2 q (n1 + n2) operations more through the factors than through
W_eff, and W_eff costs a pass over n1 * n2 numbers once per core version. Both meet at

    tokens = BALANCE * n1 * n2 / (q * (n1 + n2))

where BALANCE is half of (seconds of `materialize` per weight element) x (operations per second of a
matrix product): the balance of the machine.
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
