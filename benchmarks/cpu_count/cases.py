"""What is counted: tasks of ``materialize``, fp32 to fp32 into a kept buffer."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

import tcur_kernels as tcur
from tcur_kernels.operators import native

from . import listing
from .stepping import Caches, Library, Steps

KIB = 1024


@dataclass(frozen=True)
class Machine:
    """A processor: its caches, and what a core does in a cycle at most.

    Arithmetic, reads and writes are instructions on whole vectors, whatever their width is there:
    512 bits on Zen 5, 256 on Zen 2. ``moved`` is bytes between the two levels of caches.
    """

    caches: Caches
    arithmetic: int
    loads: int
    stores: int
    instructions: int
    moved: int


MACHINES = {
    "Zen 5": Machine(Caches((48 * KIB, 12), (1024 * KIB, 16)), 2, 2, 1, 8, 64),
    "Zen 2": Machine(Caches((32 * KIB, 8), (512 * KIB, 8)), 2, 2, 1, 6, 32),
}
#: (n3, n1, n2, rank). Half the columns of the long ones: their R̂ is larger than a cache even so.
SHAPES = [
    (48, 768, 768, 8),
    (12, 3072, 768, 8),
    (12, 768, 3072, 8),
    (96, 768, 384, 8),
    (127, 768, 384, 8),
    (12, 3072, 768, 32),
]
#: Instruction set, processor, and the second-level cache that tiles are sized for.
SETTINGS = [
    ("avx512", "Zen 5", 1024 * KIB),
    ("avx2", "Zen 2", 512 * KIB),
]
#: What a row has of each weight.
COLUMNS = (
    "instructions", *listing.KINDS, "loads", "stores", "loaded_bytes", "stored_bytes", "stack",
    "bytes_l1", "bytes_l1_back", "bytes_l2", "bytes_l2_back", "outside",
)  # fmt: skip


@functools.cache
def library() -> Library:
    """The package's own library."""
    return Library(native.cpu_library())


def count(shape: tuple[int, int, int, int], isa: str, machine: str, cache: int) -> dict[str, float]:
    """`COLUMNS`, each per weight, of one task.

    A task before it has filled the caches. W has no more rows than give each task all of its
    columns, as it is with all rows.
    """
    n3, n1, n2, rank = shape
    n1 = min(n1, 256)
    caches = MACHINES[machine].caches
    core = torch.randn(n3, rank, rank)
    factors = tcur.CURFactors(torch.randn(n3, n1, rank), torch.randn(n3, rank, n2))
    weight, out = torch.zeros(n3, n1, n2), torch.zeros(n3, n1, n2)
    before = native.chosen_isa(), native.second_level_cache(), torch.get_num_threads()
    native.force(isa, cache)
    torch.set_num_threads(1)

    def call() -> object:
        return tcur.materialize(weight, factors, core, out=out)

    try:
        call()  # keeps what belongs to the factors
        entry = library().entry(f"void tcur::{isa}::materialize<float>(")
        return per_weight(library().count(call, entry, caches))
    finally:
        native.force(before[0], before[1])
        torch.set_num_threads(before[2])


def per_weight(steps: Steps) -> dict[str, float]:
    """`COLUMNS` of what was executed. All of W_eff is written past the caches, and nothing else."""
    weights = steps.total(lambda one: _stored(one) if "movnt" in one.name else 0) // 4
    numbers = {"instructions": steps.total(lambda one: 1)}
    for kind in listing.KINDS:
        numbers[kind] = steps.total(lambda one, kind=kind: one.kind == kind)
    numbers |= {
        "loads": steps.total(lambda one: _loaded(one) > 0),
        "stores": steps.total(lambda one: _stored(one) > 0),
        "loaded_bytes": steps.total(_loaded),
        "stored_bytes": steps.total(_stored),
        "stack": steps.on_stack,
        "bytes_l1": 64 * steps.to_first,
        "bytes_l1_back": 64 * steps.from_first,
        "bytes_l2": 64 * steps.to_second,
        "bytes_l2_back": 64 * steps.from_second,
        "outside": steps.outside,
    }
    return {"weights": weights} | {name: number / weights for name, number in numbers.items()}


def _loaded(one: listing.Instruction) -> int:
    return one.memory.bytes if one.memory and one.memory.is_loaded else 0


def _stored(one: listing.Instruction) -> int:
    return one.memory.bytes if one.memory and one.memory.is_stored else 0


def cycles(machine: Machine, row: dict[str, float]) -> dict[str, float]:
    """The least cycles per weight that each part of a core needs; the most of them binds."""
    return {
        "arithmetic": (row["fmas"] + row["vector"]) / machine.arithmetic,
        "loads": row["loads"] / machine.loads,
        "stores": row["stores"] / machine.stores,
        "instructions": row["instructions"] / machine.instructions,
        "L2": (row["bytes_l1"] + row["bytes_l1_back"]) / machine.moved,
    }
