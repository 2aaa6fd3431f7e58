"""Times the first token of an adapter that waits in a store, beside one that is loaded."""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import tcur_kernels as tcur

from .served import check, layers, random_cores, without_gradients
from .timing import Timing, interleave

#: name -> (adapters, slots, width, blocks, tokens of the prompt)
CASES = {
    "vit_b_10000": (10_000, 64, 768, 12, 17),
    "minilm_10000": (10_000, 64, 384, 6, 17),
}
YARDSTICK = "warm"
RANK = 8


def measure(case: str, rounds: int) -> dict[str, Timing]:
    """Compares loaded adapters with the same ones stacked, then times a prompt of one row.

    "warm": the adapter is in a slot. "cold": it waits in memory, and in each round it is another
    one. "cold_in_file": it waits in the file of the store. "own_file": without a store, its own
    file is read and checked. "frozen": no adapter.

    Raises:
        RuntimeError: a row of a store is not that of its adapter.
    """
    count, slots, width, blocks, tokens = CASES[case]
    base = layers(width, blocks)
    adapter = tcur.adapt(copy.deepcopy(base), rank=RANK)
    x = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as directory:
        in_memory, in_file = adapter.store(slots=slots), adapter.store(slots, directory=directory)
        for store in (in_memory, in_file):
            fill(store, adapter, count)
        warm = adapter.store(slots=1)
        fill(warm, adapter, 1)
        path = Path(directory, "own")
        adapter.save(path)

        def served(store: tcur.AdapterStore, names: Iterator[str]) -> Callable[[], Tensor]:
            def run() -> Tensor:
                with store.batch([next(names)]):
                    y: Tensor = adapter.model(x)
                    return y

            return without_gradients(run)

        def own_file() -> Tensor:
            with adapter.batch(adapter.stack_cores([path]), torch.zeros(1, dtype=torch.int64)):
                y: Tensor = adapter.model(x)
                return y

        for store in (in_memory, in_file):
            _check(store, adapter, x, [str(count // 2), str(count - 1)])
        contenders = {
            "warm": served(warm, itertools.repeat("0")),
            "cold": served(in_memory, map(str, itertools.cycle(range(count)))),
            "cold_in_file": served(in_file, map(str, itertools.cycle(range(count)))),
            "own_file": without_gradients(own_file),
            "frozen": without_gradients(lambda: base(x)),
        }
        return interleave(dict(contenders), YARDSTICK, rounds)


def fill(store: tcur.AdapterStore, adapter: tcur.Adapter, count: int) -> None:
    """Adds adapters with random cores, named by their numbers; the same at every call."""
    for index in range(count):
        store.add(str(index), _cores(adapter, index))


def _cores(adapter: tcur.Adapter, index: int) -> dict[str, Tensor]:
    return random_cores(adapter, torch.Generator().manual_seed(index))


@torch.no_grad()
def _check(store: tcur.AdapterStore, adapter: tcur.Adapter, x: Tensor, names: list[str]) -> None:
    """Compares what a store serves with the same cores, stacked, in float64."""
    for name in names:
        with store.batch([name]):
            y = adapter.model(x)
        exact = tcur.adapt(copy.deepcopy(adapter.merge(inplace=False)), rank=RANK)
        for stack, core in _cores(adapter, int(name)).items():
            exact.stacks[stack].core.copy_(core)
        check(f"adapter {name}", y, [copy.deepcopy(exact.model).double()(x.double())[0]])
