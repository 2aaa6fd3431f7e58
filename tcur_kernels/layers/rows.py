"""Which core each row of a batch uses: a property of the call, not of the model.

Threads and tasks may run one model at the same time, and each sees only its own batch. In eager
mode a context variable holds the batch. Compilers cannot trace a context variable, but they can
guard on a thread-local value, so traced code reads that one. It cannot tell the tasks of a thread
apart: if batches of several tasks overlap across an ``await``, traced code refuses to run.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

#: How the rows of a batch repeat. "each": every row several times in a row, as beams and windows
#: do. "all": the whole batch several times, as the two halves of classifier-free guidance do.
Repeat = Literal["each", "all"]


#: What an id belongs to. "row": a row of the first axis of what the layers get. "token": one of
#: their tokens.
Per = Literal["row", "token"]

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Rows:
    """Cores ``[A, n3, r, r]``, and for each row or token of a batch the index of its core.

    Attributes:
        cores: of all adapters.
        adapter_ids: int64. ``[B]``: of rows, or of the tokens of a packed sequence; ``[B, T]``: of
            tokens.
        repeat: how rows repeat; see `Repeat`.
        per: what an id belongs to.
        number: of this batch; no other has it.
    """

    cores: Tensor
    adapter_ids: Tensor
    repeat: Repeat | None
    per: Per = "row"
    number: int = field(default_factory=_numbers.__next__)

    def ids_for(self, x: Tensor) -> Tensor:
        """The ids ``[rows]`` for ``x``, each id for an equal share of consecutive tokens.

        Raises:
            ValueError: the number of rows differs and is no multiple, or ``repeat`` is not given;
                or ids are for tokens, and the tokens are not arranged as they are.
        """
        if self.per == "token":
            return self._ids_of_tokens(x)
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

    def _ids_of_tokens(self, x: Tensor) -> Tensor:
        ids = self.adapter_ids
        is_packed = ids.ndim == 1 and x.shape[:-1] == (1, *ids.shape)
        if x.shape[:-1] != ids.shape and not is_packed:
            wanted = ", ".join(map(str, ids.shape))
            other = f" or [1, {wanted}, features]" if ids.ndim == 1 else ""
            raise ValueError(
                f"x: expected [{wanted}, features]{other}, an id for each token, got "
                f"{list(x.shape)}; layers that get other tokens than the model does, or in another "
                "arrangement, need an id for each row (per='row')"
            )
        return ids.flatten()


#: The rows of all owners, by the id of the owner.
Every = Mapping[int, Any]

_current: ContextVar[Every | None] = ContextVar("tcur_rows", default=None)


class _Batches:
    """The batches of a thread that are open, in the order of opening, and what traced code reads.

    Attributes:
        rows: of the batch that is open in this thread, if any.
        is_tangled: whether the open batches belong to several tasks.
        batches: for each of them the rows before it, and its own.
    """

    def __init__(self) -> None:
        self.rows: Every | None = None
        self.is_tangled = False
        self.batches: list[tuple[Every | None, Every]] = []

    def settle(self) -> None:
        """Finds out what the open batches mean for traced code."""
        self.rows = self.batches[-1][1] if self.batches else None
        # In one task each batch is opened within the one before it, and the first within none.
        within: Every | None = None
        self.is_tangled = False
        for before, every in self.batches:
            self.is_tangled |= before is not within
            within = every


class _Thread(threading.local):
    """Every thread has batches of its own."""

    def __init__(self) -> None:
        self.open = _Batches()


_thread = _Thread()


def rows_of(owner: object) -> Any:
    """The rows that the current batch sets for an owner, such as a stack; None outside a batch.

    Raises:
        RuntimeError: traced code is in batches of several tasks, which it cannot tell apart.
    """
    if not torch.compiler.is_compiling():
        every = _current.get()
    elif _thread.open.is_tangled:
        raise RuntimeError(
            "batch: expected one task with open batches in the thread of a compiled model, got "
            "batches of several; they may not overlap across an await, or need threads of their own"
        )
    else:
        every = _thread.open.rows
    return None if every is None else every.get(id(owner))


@contextmanager
def using_rows(owner: object, rows: object) -> Iterator[None]:
    """Context in which `rows_of` returns ``rows`` for this owner; for a stack they are `Rows`."""
    before = _current.get()
    every = {**(before or {}), id(owner): rows}
    token = _current.set(every)
    opened = _thread.open  # an abandoned generator may be closed by another thread
    opened.batches.append((before, every))
    opened.settle()
    try:
        yield
    finally:
        opened.batches = [batch for batch in opened.batches if batch[1] is not every]
        opened.settle()
        _current.reset(token)


def check_repeat(repeat: Any) -> None:
    """Checks a value for ``repeat``.

    Raises:
        ValueError: it is not one of the ways to repeat rows.
    """
    if repeat is not None and repeat not in get_args(Repeat):
        allowed = ", ".join(map(repr, (None, *get_args(Repeat))))
        raise ValueError(f"repeat: expected one of {allowed}, got {repeat!r}")


def check_per(per: Any, repeat: Any = None) -> None:
    """Checks a value for ``per``.

    Raises:
        ValueError: it is not one of the things that an id may belong to, or rows are to repeat and
            there are none.
    """
    if per not in get_args(Per):
        raise ValueError(f"per: expected one of {', '.join(map(repr, get_args(Per)))}, got {per!r}")
    if per == "token" and repeat is not None:
        raise ValueError(f"repeat: expected None where ids belong to tokens, got {repeat!r}")
