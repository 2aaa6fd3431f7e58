"""Relative error against rank of a stack, which helps to choose the rank."""

from __future__ import annotations

from collections.abc import Sequence

from .rules import squared_norms
from .singular import leading_subspaces
from .slices import Slices, bin_weights, check_rank
from .tensor import tensor_cur

#: The name of the curve of the best approximation.
BEST = "best"


def error_curve(
    stack: Slices, ranks: Sequence[int], selections: Sequence[str] = ("norm",)
) -> dict[str, list[float]]:
    """‖A − A_r‖ / ‖A‖ for every rank r, for the best tubal approximation and for each rule.

    "best" is the truncated t-SVD (Kilmer & Martin 2011, theorem 4.3), with the error
    sqrt(‖A‖² − Σ_k w_k Σ_{i ≤ r} σ_i(Â_k)² / n3). For stacks as large as those of a ViT-B or
    larger, a range finder computes the singular values, and the curve is that of the approximation
    it finds. The other curves are of `tensor_cur` with the core "projection".

    Args:
        stack: any stack.
        ranks: each 1 to min(n1, n2).
        selections: names of rules.

    Raises:
        TypeError, ValueError: an argument is wrong; or as `tensor_cur`.

    Returns:
        Name -> errors in the order of ``ranks``; "best" first.
    """
    if not isinstance(stack, Slices):
        raise TypeError(f"stack: expected Slices, got {type(stack).__name__}")
    for name, given in (("ranks", ranks), ("selections", selections)):
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise TypeError(f"{name}: expected a list, got {type(given).__name__}")
    if not ranks:
        raise ValueError("ranks: expected at least one, got none")
    for rank in ranks:
        check_rank("ranks", rank, stack.n1, stack.n2)
    total = float(squared_norms(stack)[0].sum())
    squares = leading_subspaces(stack, max(ranks)).values.square()
    kept = (bin_weights(stack.n3, stack.device)[:, None] * squares).sum(0).cumsum(0) / stack.n3
    scale = total or 1.0
    best = [max(0.0, (total - float(kept[rank - 1])) / scale) ** 0.5 for rank in ranks]
    errors = {BEST: best}
    for selection in selections:
        found = (tensor_cur(stack, rank, selection, "projection") for rank in ranks)
        errors[selection] = [d.relative_error(stack) for d in found]
    return errors
