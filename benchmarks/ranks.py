"""Times batches of adapters of several ranks: padded, in groups, and of one rank."""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import tcur_kernels as tcur

from .served import check, file_of, layers, without_gradients
from .timing import Timing, interleave

#: name -> (width, blocks, rows, tokens of a row)
CASES = {
    "vit_b_8x64": (768, 12, 8, 64),
    "minilm_8x64": (384, 6, 8, 64),
}
YARDSTICK = "one_rank"
RANK = 8
_Served = tuple[Path, tcur.Adapter]


def measure(case: str, rounds: int) -> dict[str, Timing]:
    """Compares two rows with their adapters alone in float64, then times the batches.

    Every row has an adapter of its own. "one_rank": all of rank 8. "padded": every other one of
    rank 4, with slices that are among those of rank 8. "grouped": every other one of rank 4, with
    other slices. "four_groups": of four choices of slices, and rank 8. "frozen": no adapter.

    Raises:
        RuntimeError: a row is wrong.
    """
    width, blocks, rows, length = CASES[case]
    base = layers(width, blocks)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, length, width, generator=generator)
    adapter = tcur.adapt(copy.deepcopy(base), rank=RANK, selection="norm2")
    numbers = itertools.count()
    contenders: dict[str, Callable[[], Tensor]] = {}
    with tempfile.TemporaryDirectory() as directory:

        def of(count: int, **how: object) -> list[_Served]:
            return [
                file_of(base, Path(directory, str(next(numbers))), generator, **how)
                for _ in range(count)
            ]

        full = of(rows, rank=RANK, selection="norm2")
        small = of(rows // 2, rank=RANK // 2, selection="norm2")
        apart = of(rows // 2, rank=RANK // 2, selection="uniform")
        every = [of(rows // 4, rank=RANK, selection=s) for s in ("uniform", "norm", "leverage")]
        batches = {
            "one_rank": full,
            "padded": _alternating(full, small),
            "grouped": _alternating(full, apart),
            "four_groups": [*full[: rows // 4], *(one for group in every for one in group)],
        }
        for name, entries in batches.items():
            stack = adapter.stack_groups if "group" in name else adapter.stack_cores
            cores = stack([path for path, _ in entries])
            contenders[name] = _batch(adapter, cores, x)
            y, wanted = contenders[name](), [_exact(entries[i][1], x[i]) for i in (1, rows - 1)]
            check(name, y[[1, rows - 1]], wanted)
    contenders["frozen"] = without_gradients(lambda: base(x))
    return interleave(dict(contenders), YARDSTICK, rounds)


def _alternating(first: list[_Served], second: list[_Served]) -> list[_Served]:
    return [one for both in zip(first[: len(second)], second, strict=True) for one in both]


def _batch(
    adapter: tcur.Adapter, cores: tcur.StackedCores | tcur.GroupedCores, x: Tensor
) -> Callable[[], Tensor]:
    ids = torch.arange(len(x))

    def run() -> Tensor:
        with adapter.batch(cores, ids):
            y: Tensor = adapter.model(x)
            return y

    return without_gradients(run)


@torch.no_grad()
def _exact(adapter: tcur.Adapter, x: Tensor) -> Tensor:
    y: Tensor = copy.deepcopy(adapter.model).double()(x.double())
    return y
