"""Selection rules: which lateral and horizontal slices of a stack form C and R.

A rule is a callable ``rule(stack, rank, generator) -> (rows, columns)``. `RULES` names those of
this module. All of them choose one index set for all frequencies, because indices that differ
between frequencies would not give slices of the stack.

Most rules compute a score for every slice. Without a generator they take the r largest scores, and
the first of equal ones. With a generator they draw r slices without replacement, with probabilities
in proportion to the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .singular import Subspaces, leading_subspaces
from .slices import Slices, bin_weights, half_spectrum

#: ``rule(stack, rank, generator) -> (rows, columns)``.
Rule = Callable[
    [Slices, int, "torch.Generator | None"],
    tuple["Sequence[int] | Tensor", "Sequence[int] | Tensor"],
]

#: The name of a rule, a rule, or explicit (rows, columns).
Selection = str | Rule | tuple[Sequence[int] | Tensor, Sequence[int] | Tensor]

_Generator = torch.Generator | None


@dataclass(frozen=True)
class Norm:
    """The rule of tCURLoRA: 2-norms summed over the frequencies; rows within the chosen columns.

    The score of column j is Σ_k w_k ‖Â_k(:, j)‖₂ with w = 1, 2, …, 2, 1. The rows are then chosen
    within these columns, with the scores Σ_k w_k ‖Ĉ_k(i, :)‖₂ (tCURLoRA, arXiv:2501.02227, and its
    released script). This is a heuristic without an error bound. It needs two passes: one for the
    scores, one to read the columns.
    """

    def __call__(
        self, stack: Slices, rank: int, generator: _Generator = None
    ) -> tuple[Tensor, Tensor]:
        """Chooses rows and columns."""
        squares = torch.zeros(stack.bins, stack.n2, dtype=torch.float64, device=stack.device)
        for _, columns, block in stack.blocks("norms"):
            squares[:, columns] += _energy(half_spectrum(block), 1).to(stack.device)
        weights = bin_weights(stack.n3, stack.device)[:, None]
        scores = (weights * stack.sum(squares).sqrt()).sum(0)
        # Rows are scored within the columns, so all processes must have the same columns by now.
        chosen = stack.agree(pick(scores, rank, generator))
        lateral_hat = half_spectrum(stack.columns(chosen))
        row_scores = (weights * _energy(lateral_hat, 2).sqrt()).sum(0)
        return pick(row_scores, rank, generator), chosen


@dataclass(frozen=True)
class Norm2:
    """Squared norms of the slices; rows and columns are chosen independently.

    The scores are ‖A(:, j, :)‖² for columns and ‖A(i, :, :)‖² for rows. By Parseval,
    n3 ‖A(:, j, :)‖² = Σ_k w_k ‖Â_k(:, j)‖², so no transform is needed. With a generator, these are
    the probabilities of Frieze, Kannan & Vempala (J. ACM 51, 2004) and Drineas, Kannan & Mahoney
    (SIAM J. Comput. 36, 2006), for every frequency at once. Their additive bounds on the expected
    error are for draws *with* replacement. Needs one pass.
    """

    def __call__(
        self, stack: Slices, rank: int, generator: _Generator = None
    ) -> tuple[Tensor, Tensor]:
        """Chooses rows and columns."""
        row_scores, column_scores = squared_norms(stack)
        columns = pick(column_scores, rank, generator)
        return pick(row_scores, rank, generator), columns


@dataclass(frozen=True)
class _OfSubspaces:
    """A rule that uses the leading singular vectors of every frequency.

    Args:
        method: "auto", "exact" or "randomized"; see `singular.leading_subspaces`.
        oversample, power_iterations: of the range finder.
    """

    method: str = "auto"
    oversample: int = 10
    power_iterations: int = 0

    def subspaces(self, stack: Slices, rank: int) -> Subspaces:
        """The leading singular triples of every frequency.

        The exact method needs one pass, or more if the spectra exceed the workspace. The randomized
        method needs 2 + 2 power_iterations passes.
        """
        return leading_subspaces(stack, rank, self.method, self.oversample, self.power_iterations)


@dataclass(frozen=True)
class Leverage(_OfSubspaces):
    """Leverage scores of the leading subspaces, Σ_k w_k ‖V̂_k(j, 1:r)‖² and Σ_k w_k ‖Û_k(i, 1:r)‖².

    See Mahoney & Drineas (PNAS 106, 2009) for matrices and Tarzanagh & Michailidis
    (arXiv:1704.04362) for the t-product. The relative-error guarantees of the latter are for draws
    of more than r slices. The scores of one side sum to Σ_k w_k min(r, rank Â_k), at most n3·r.
    """

    def __call__(
        self, stack: Slices, rank: int, generator: _Generator = None
    ) -> tuple[Tensor, Tensor]:
        """Chooses rows and columns."""
        spaces = self.subspaces(stack, rank)
        weights = bin_weights(stack.n3, stack.device)[:, None]
        columns = pick((weights * _energy(spaces.right, 2)).sum(0), rank, generator)
        return pick((weights * _energy(spaces.left, 2)).sum(0), rank, generator), columns


@dataclass(frozen=True)
class Deim(_OfSubspaces):
    """Q-DEIM with pivots shared by all frequencies: a pivoted t-QR of the leading subspaces.

    At each frequency, X_k = V̂_kᴴ ``[r, n2]`` is orthogonalised column by column, as in the pivoted
    QR of Q-DEIM (Drmač & Gugercin, SIAM J. Sci. Comput. 38, 2016). But all frequencies use the same
    pivot: the column j with the largest min_k ‖X_k(:, j)‖, the smallest residual over the
    frequencies. If that is zero for every column, the pivot is the column with the largest
    Σ_k ‖X_k(:, j)‖². Rows are chosen in the same way with Û_k. (A single QR of all frequencies,
    stacked into K·r rows, would deflate them jointly. Single frequencies could become nearly
    singular, so η would be far larger.)

    Bound (Sorensen & Embree, arXiv:1407.5516, introduction), for the core "projection" and every
    frequency: ‖Â_k − Ĉ_k Û_k R̂_k‖₂ ≤ (η_p + η_q) σ_{r+1}(Â_k) with η_p = ‖V̂_k(J, 1:r)^{-1}‖₂ and
    η_q = ‖Û_k(I, 1:r)^{-1}‖₂. With shared pivots there is no a-priori bound on η: if two
    frequencies live on different columns, r columns cannot serve both. The rule draws nothing.
    """

    def __call__(
        self, stack: Slices, rank: int, generator: _Generator = None
    ) -> tuple[Tensor, Tensor]:
        """Chooses rows and columns."""
        if generator is not None:
            raise ValueError("generator: expected None, selection 'deim' draws nothing")
        spaces = self.subspaces(stack, rank)
        return shared_pivots(spaces.left, rank), shared_pivots(spaces.right, rank)


@dataclass(frozen=True)
class Inverse:
    """CURLoRA's inverted probabilities: prefers slices of *small* norm, for adapters.

    With p_j = ‖A(:, j, :)‖² / ‖A‖², the score is 1 / (p_j + ``smoothing``), and likewise for rows
    (CURLoRA, arXiv:2408.14572; its released code uses 0.001). Unlike there, no slice is drawn
    twice, since that would make C rank-deficient. There is no error bound, because the rule is
    meant for the core "zero". Needs one pass.
    """

    smoothing: float = 1e-3

    def __call__(
        self, stack: Slices, rank: int, generator: _Generator = None
    ) -> tuple[Tensor, Tensor]:
        """Chooses rows and columns."""
        row_squares, column_squares = squared_norms(stack)
        total = column_squares.sum().clamp_min(torch.finfo(torch.float64).tiny)
        columns = pick(1 / (column_squares / total + self.smoothing), rank, generator)
        rows = pick(1 / (row_squares / total + self.smoothing), rank, generator)
        return rows, columns


@dataclass(frozen=True)
class Uniform:
    """Draws slices with equal probability, without replacement.

    This is enough for incoherent tensors (tubal CUR: arXiv:2406.11092). Without a generator it uses
    torch's default generator. Needs no pass.
    """

    def __call__(
        self, stack: Slices, rank: int, generator: _Generator = None
    ) -> tuple[Tensor, Tensor]:
        """Chooses rows and columns."""
        columns = torch.randperm(stack.n2, generator=generator, device="cpu")[:rank]
        return torch.randperm(stack.n1, generator=generator, device="cpu")[:rank], columns


RULES: dict[str, Rule] = {
    "norm": Norm(),
    "norm2": Norm2(),
    "leverage": Leverage(),
    "deim": Deim(),
    "inverse": Inverse(),
    "uniform": Uniform(),
}


def select(
    stack: Slices, rank: int, selection: Selection, generator: _Generator = None
) -> tuple[Tensor, Tensor]:
    """Rows I and columns J, by a rule or as given: int64 ``[r]``, ascending, on the CPU.

    Raises:
        TypeError: indices are not integers.
        ValueError: the rule is unknown; the number of indices is not ``rank``; indices are out of
            range or repeated; a generator is given but nothing is drawn; or the stack is not
            finite.
    """
    if isinstance(selection, str):
        if selection not in RULES:
            raise ValueError(
                f"selection: expected one of {', '.join(RULES)}, a rule or (rows, columns), "
                f"got {selection!r}"
            )
        selection = RULES[selection]
    if callable(selection):
        pair = selection(stack, rank, generator)
    else:
        pair = selection
        if generator is not None:
            raise ValueError("generator: expected None, the indices are given")
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(f"selection: expected a rule or a pair (rows, columns), got {pair!r}")
    rows = _indices("rows", pair[0], rank, stack.n1, "n1")
    columns = _indices("columns", pair[1], rank, stack.n2, "n2")
    return stack.agree(rows), stack.agree(columns)


def squared_norms(stack: Slices) -> tuple[Tensor, Tensor]:
    """‖A(i, :, :)‖² of every row and ‖A(:, j, :)‖² of every column, fp64; one pass."""
    row_squares = torch.zeros(stack.n1, dtype=torch.float64, device=stack.device)
    column_squares = torch.zeros(stack.n2, dtype=torch.float64, device=stack.device)
    for rows, columns, block in stack.blocks("squared norms"):
        squares = block.double().square().sum(0)
        row_squares[rows] += squares.sum(1)
        column_squares[columns] += squares.sum(0)
    return stack.sum(row_squares), stack.sum(column_squares)


def pick(scores: Tensor, rank: int, generator: _Generator) -> Tensor:
    """``rank`` indices by scores: the largest, or drawn in proportion to them."""
    scores = scores.cpu()
    # Sums in another order (blocks, shards, machines) may round scores differently. Treat such
    # scores as equal and take the first, so that all choose the same slices.
    largest = float(scores.max())
    rounded = (scores * (2.0**36 / largest)).round() if largest > 0 else scores
    if generator is None:
        return torch.sort(rounded, descending=True, stable=True).indices[:rank]
    # Slices with score zero come last, in order. They are only taken if nothing else is left.
    candidates = rounded.nonzero()[:, 0]
    drawn = candidates[:0]
    if len(candidates):
        count = min(rank, len(candidates))
        drawn = candidates[torch.multinomial(rounded[candidates], count, generator=generator)]
    rest = (rounded == 0).nonzero()[:, 0]
    return torch.cat([drawn, rest])[:rank]


def shared_pivots(vectors: Tensor, rank: int) -> Tensor:
    """``rank`` pivots, shared by all frequencies, of vectors ``[K, n, r]``; see `Deim`."""
    residual = vectors.mT.clone()  # [K, r, n]
    tiny = torch.finfo(torch.float64).eps ** 2
    free = torch.ones(vectors.shape[1], dtype=torch.bool, device=vectors.device)
    pivots: list[int] = []
    for _ in range(rank):
        squares = _energy(residual, 1)
        # Ignore frequencies whose residual is zero; this happens early if their rank is below r.
        alive = squares[squares.amax(1) > tiny]
        scores = alive.amin(0) if len(alive) else squares.sum(0)
        if not bool((scores[free] > tiny).any()):
            scores = squares.sum(0)
        scores = torch.where(free, scores, -1.0)
        # As in `pick`, rounding must not decide between equal scores.
        pivot = int((scores >= scores.max() - 1e-10).nonzero()[0])
        free[pivot] = False
        pivots.append(pivot)
        direction = residual[:, :, pivot : pivot + 1]
        norms = direction.norm(dim=1, keepdim=True)
        direction = torch.where(norms > tiny**0.5, direction / norms.clamp_min(tiny), 0)
        residual = residual - direction @ (direction.mH @ residual)
    return torch.tensor(pivots, device="cpu")


def _energy(spectrum: Tensor, dim: int) -> Tensor:
    """Squared 2-norms along ``dim``."""
    # On the real view: norms of complex tensors are an order of magnitude slower.
    return torch.view_as_real(spectrum).square().sum(dim).sum(-1)


def _indices(name: str, given: Sequence[int] | Tensor, rank: int, size: int, axis: str) -> Tensor:
    indices = torch.as_tensor(given, device="cpu")
    if indices.dtype.is_floating_point or indices.dtype in (torch.bool, torch.complex64):
        raise TypeError(f"{name}: expected integers, got {indices.dtype}")
    if indices.shape != (rank,):
        raise ValueError(f"{name}: expected {rank} indices (the rank), got {list(indices.shape)}")
    indices = indices.long()
    if indices.min() < 0 or indices.max() >= size:
        raise ValueError(f"{name}: expected 0 to {axis} - 1 = {size - 1}, got {indices.tolist()}")
    if indices.unique().numel() != rank:
        raise ValueError(f"{name}: expected distinct indices, got {indices.tolist()}")
    return indices.sort().values
