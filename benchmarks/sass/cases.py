"""The calls of operators that are counted, by name."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .launches import Launch, operator, record

FP32, BF16 = torch.float32, torch.bfloat16
NAMES = {FP32: "fp32", BF16: "bf16"}
Sizes = tuple[int, int, int, int]

#: (n3, n1, n2, rank)
SHAPES: tuple[Sizes, ...] = (
    (48, 768, 768, 8),
    (12, 3072, 768, 8),
    (12, 768, 3072, 8),
    (64, 1024, 4096, 8),
    (128, 4096, 4096, 8),
)
DTYPES = ((FP32, FP32), (FP32, BF16), (BF16, BF16))
TOKENS, ADAPTERS, LAYERS = 2048, 64, 48


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        operator: its name.
        sizes: n3, n1, n2 and rank.
        how: what else tells it from other calls.
        launches: makes the call and says what it launches.
        floor_bytes: what must move for each number of W: a copy's bytes, or those that are read; 0
            where W is not touched.
    """

    operator: str
    sizes: Sizes
    how: str
    launches: Callable[[], list[Launch]]
    floor_bytes: int = 0

    @property
    def name(self) -> str:
        """As it is written in rows."""
        return f"{self.operator} {'x'.join(map(str, self.sizes))} {self.how}"

    @property
    def elements(self) -> int:
        """Numbers of W: n3·n1·n2."""
        n3, n1, n2, _ = self.sizes
        return n3 * n1 * n2


def _factors(sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    n3, n1, n2, rank = sizes
    return torch.empty(n1, n3 * rank), torch.empty(n3 * rank, n2)


def _core(sizes: Sizes) -> torch.Tensor:
    return torch.empty(sizes[0], sizes[3], sizes[3])


def _materialize(sizes: Sizes, base: torch.dtype, out: torch.dtype) -> Case:
    def launches() -> list[Launch]:
        # Memory that is never touched: no page of it is ever there.
        bases, factors, core = [torch.empty(sizes[:3], dtype=base)], _factors(sizes), _core(sizes)
        call = operator("materialize")
        return record(lambda: call(bases, *factors, core, 0.5, out))

    moved = base.itemsize + out.itemsize
    return Case("materialize", sizes, f"{NAMES[base]}->{NAMES[out]}", launches, moved)


def _core_grad_dense(sizes: Sizes, dtype: torch.dtype) -> Case:
    def launches() -> list[Launch]:
        gradient, factors = torch.empty(sizes[:3], dtype=dtype), _factors(sizes)
        return record(lambda: operator("core_grad_dense")(gradient, *factors))

    return Case("core_grad_dense", sizes, NAMES[dtype], launches, dtype.itemsize)


def _core_grad_tokens(sizes: Sizes, is_packed: bool) -> Case:
    def launches() -> list[Launch]:
        n3, n1, n2, _ = sizes
        x, grad_y = torch.zeros(TOKENS, n2), torch.zeros(TOKENS, n1)
        how = (n3, 0, 1, None, 1, is_packed)
        call = operator("core_grad_tokens")
        return record(lambda: call(x, grad_y, *_factors(sizes), *how))

    how = f"{TOKENS} tokens{', packed' if is_packed else ''}"
    return Case("core_grad_tokens", sizes, how, launches)


def core_grad_ids(sizes: Sizes, tokens: int = TOKENS, adapters: int = ADAPTERS) -> Case:
    """A gradient from tokens of which each has one of the adapters, at most 256 of them."""

    def launches() -> list[Launch]:
        n3, n1, n2, _ = sizes
        x, grad_y = torch.zeros(tokens, n2), torch.zeros(tokens, n1)
        ids = torch.randint(0, adapters, (tokens,), generator=torch.Generator().manual_seed(0))
        call, how = operator("core_grad_tokens"), (n3, 0, 1, ids, adapters)
        found = record(lambda: call(x, grad_y, *_factors(sizes), *how), [ids])
        known = (*found[0].known, *_sorted_rows(found[0], ids, adapters))
        return [replace(launch, known=known) for launch in found]

    return Case("core_grad_tokens", sizes, f"{tokens} tokens, {adapters} adapters", launches)


def _sorted_rows(order: Launch, ids: torch.Tensor, adapters: int) -> list[tuple[int, bytes]]:
    """What `order_kernel` leaves: rows sorted by core, and where those of a core begin and end.

    It sorts by four bits of the ids at a time. Up to 256 cores take two turns, each with memory of
    its own. The arguments end with where the rows are after both turns and after the first, with
    the beginnings and with the ends.
    """
    twice, once, begin, end = struct.unpack("<4Q", order.arguments[-32:])
    counts = torch.bincount(ids, minlength=adapters)
    ends = counts.cumsum(0)
    contents = {
        once: (ids % 16).argsort(stable=True),
        twice: ids.argsort(stable=True),
        begin: ends - counts,
        end: ends,
    }
    return [(at, rows.to(torch.int32).numpy().tobytes()) for at, rows in contents.items()]


def _cur_linear(sizes: Sizes, is_transposed: bool) -> Case:
    def launches() -> list[Launch]:
        _, n1, n2, _ = sizes
        x = torch.zeros(TOKENS, n1 if is_transposed else n2)
        how = (_core(sizes), 0, 1, 0.5, is_transposed)
        return record(lambda: operator("cur_linear")(x, None, None, *_factors(sizes), *how))

    how = f"{TOKENS} tokens{', transposed' if is_transposed else ''}"
    return Case("cur_linear", sizes, how, launches)


def _core_of_packed(sizes: Sizes) -> Case:
    def launches() -> list[Launch]:
        parts = torch.empty(LAYERS, *_core(sizes).shape)
        return record(lambda: operator("core_of_packed")(parts, 0.5))

    return Case("core_of_packed", sizes, f"{LAYERS} layers", launches)


CASES = (
    *(_materialize(sizes, *dtypes) for sizes in SHAPES for dtypes in DTYPES),
    *(_core_grad_dense(sizes, dtype) for sizes in SHAPES for dtype in (FP32, BF16)),
    *(_core_grad_tokens(SHAPES[0], is_packed) for is_packed in (False, True)),
    core_grad_ids(SHAPES[0]),
    *(_cur_linear(SHAPES[0], is_transposed) for is_transposed in (False, True)),
    _core_of_packed(SHAPES[0]),
)
