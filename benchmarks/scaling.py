"""Times ``materialize`` over n3 at a fixed number of weights, over the rank, and over threads."""

from __future__ import annotations

from collections.abc import Callable

import torch

import tcur_kernels as tcur

from .timing import Timing, interleave

WEIGHTS, COLUMNS = 48 * 768 * 768, 768
LENGTHS = (1, 2, 4, 8, 12, 16, 24, 32, 47, 48, 64, 96, 97, 127, 128)
RANKS = (1, 2, 4, 8, 16, 32)
#: name -> (n3, n1, n2, rank)
CASES = {
    **{f"n3_{n3}": (n3, WEIGHTS // COLUMNS // n3, COLUMNS, 8) for n3 in LENGTHS},
    **{f"rank_{r}": (12, WEIGHTS // COLUMNS // 12, COLUMNS, r) for r in RANKS},
}
YARDSTICK = "stream"


def measure(case: str, rounds: int) -> dict[str, Timing]:
    """Times it with the given threads and with one (``_1``), each beside a copy of its bytes."""
    n3, n1, n2, rank = CASES[case]
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n3, n1, n2, generator=generator)
    factors = tcur.CURFactors(weight[:, :, :rank].contiguous(), weight[:, :rank].contiguous())
    core = 1e-2 * torch.randn(n3, rank, rank, generator=generator)
    out = torch.empty_like(weight)

    def with_threads(count: int, run: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            torch.set_num_threads(count)
            run()

        return call

    def stream() -> torch.Tensor:
        return torch.add(weight, weight, out=out)

    def materialize() -> torch.Tensor:
        return tcur.materialize(weight, factors, core, out=out)

    contenders = {
        YARDSTICK: with_threads(threads, stream),
        "materialize": with_threads(threads, materialize),
        "stream_1": with_threads(1, stream),
        "materialize_1": with_threads(1, materialize),
    }
    try:
        return interleave(contenders, YARDSTICK, rounds)
    finally:
        torch.set_num_threads(threads)
