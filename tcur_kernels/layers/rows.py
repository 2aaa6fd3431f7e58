"""Which core each row of a batch goes by: a property of the call, not of the model.

Threads and tasks that run one model at a time see their own batches. A context variable says so in
eager mode. Compilers cannot trace one, but they guard on what a thread holds: traced code asks
that. Tasks of one thread must not run compiled models between the awaits of a batch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

#: How rows of a batch repeat: each of them several times in a row, as beams and windows do; or all
#: of them, one batch after the other, as the halves of a classifier-free guidance do.
Repeat = Literal["each", "all"]


@dataclass(frozen=True)
class Rows:
    """Cores ``[A, n3, r, r]``, and for each row of a batch the index of its own, int64 ``[B]``."""

    cores: Tensor
    adapter_ids: Tensor
    repeat: Repeat | None

    def ids_for(self, x: Tensor) -> Tensor:
        """The ids, one for each of B equal parts of ``x``.

        Raises:
            ValueError: another number of rows, and nobody said how they repeat.
        """
        ids, count = self.adapter_ids, self.adapter_ids.shape[0]
        found = x.shape[0] if x.ndim else 1
        if found == count or count == 1:
            return ids
        if self.repeat is None or count == 0 or found % count:
            hint = "" if self.repeat else "; if rows repeat, say how: repeat='each' or repeat='all'"
            raise ValueError(
                f"x: expected {count} rows, one for each of adapter_ids, as first axis, got "
                f"{list(x.shape)}{hint}"
            )
        return ids if self.repeat == "each" else ids.repeat(found // count)


_current: ContextVar[Mapping[int, Any] | None] = ContextVar("tcur_rows", default=None)
_traced = threading.local()


def rows_of(owner: object) -> Any:
    """What the batch that is going on says of a stack, or of what else has rows; None in none."""
    is_traced = torch.compiler.is_compiling()
    every = getattr(_traced, "rows", None) if is_traced else _current.get()
    return None if every is None else every.get(id(owner))


@contextmanager
def using_rows(owner: object, rows: object) -> Iterator[None]:
    """Context in which `rows_of` an owner are these: for a stack, `Rows`."""
    before = _current.get()
    every = {**(before or {}), id(owner): rows}
    token = _current.set(every)
    traced_before = getattr(_traced, "rows", None)
    _traced.rows = every
    try:
        yield
    finally:
        _current.reset(token)
        _traced.rows = traced_before


def check_repeat(repeat: Any) -> None:
    """Refuses what is no way to repeat rows.

    Raises:
        ValueError: naming it.
    """
    if repeat is not None and repeat not in get_args(Repeat):
        allowed = ", ".join(map(repr, (None, *get_args(Repeat))))
        raise ValueError(f"repeat: expected one of {allowed}, got {repeat!r}")
