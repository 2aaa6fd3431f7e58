"""Times ids of tokens and packed sequences beside ids of rows, forward, through all layers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

import tcur_kernels as tcur
from tcur_kernels.adapters.install import stacks_of

from .served import check, layers, random_cores, without_gradients
from .timing import Timing, interleave

#: name -> (width, blocks, sequences, tokens of a sequence)
CASES = {
    "vit_b_8x64": (768, 12, 8, 64),
    "minilm_8x64": (384, 6, 8, 64),
    "minilm_64x8": (384, 6, 64, 8),
}
YARDSTICK = "rows"
RANK = 8


def measure(case: str, rounds: int) -> dict[str, Timing]:
    """Compares some sequences with their adapter alone in float64, then times the ways.

    Every sequence has an adapter of its own. "rows": an id for each row. "tokens": an id for each
    token of the same rows. "packed": the sequences one after another in one row, with
    ``cu_seqlens``. "shuffled": the tokens in no order, with an id for each. "one_by_one": a call
    for each sequence. "frozen": no adapter.

    Raises:
        RuntimeError: a sequence is wrong.
    """
    width, blocks, sequences, length = CASES[case]
    base = layers(width, blocks)
    adapter = tcur.adapt(copy.deepcopy(base), rank=RANK)
    generator = torch.Generator().manual_seed(1)
    cores = adapter.stack_cores([random_cores(adapter, generator) for _ in range(sequences)])
    x = torch.randn(sequences, length, width, generator=generator)
    ids = torch.arange(sequences)
    tokens = ids[:, None].expand(sequences, length).contiguous()
    bounds = torch.arange(0, sequences * length + 1, length, dtype=torch.int32)
    row = x.view(1, -1, width)
    order = torch.randperm(sequences * length, generator=generator)
    mixed, mixed_ids = row[:, order], tokens.flatten()[order]

    def batch(x: Tensor, ids: Tensor, **how: object) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with adapter.batch(cores, ids, **how):  # type: ignore[arg-type]
                y: Tensor = adapter.model(x)
                return y

        return without_gradients(run)

    def one_by_one() -> Tensor:
        return torch.cat([batch(x[i : i + 1], ids[i : i + 1])() for i in range(sequences)])

    contenders = {
        "rows": batch(x, ids),
        "tokens": batch(x, tokens, per="token"),
        "packed": batch(row, ids, cu_seqlens=bounds),
        "shuffled": batch(mixed, mixed_ids, per="token"),
        "one_by_one": one_by_one,
        "frozen": without_gradients(lambda: base(x)),
    }
    chosen = [0, sequences - 1]
    wanted = [_exact(adapter, cores, i, x[i]) for i in chosen]
    back = order.argsort()
    for name, run in contenders.items():
        if name != "frozen":
            y = run()
            y = y[:, back] if name == "shuffled" else y
            check(name, y.view_as(x)[chosen], wanted)
    return interleave(dict(contenders), YARDSTICK, rounds)


@torch.no_grad()
def _exact(adapter: tcur.Adapter, cores: tcur.StackedCores, index: int, x: Tensor) -> Tensor:
    exact = copy.deepcopy(adapter.model).double()
    for name, stack in stacks_of(exact).items():
        stack.core.copy_(cores[name][index])
    y: Tensor = exact(x.double())
    return y
