"""Which core each row of a batch uses: a property of the call, not of the model.

Threads and tasks may run one model at the same time, and each sees only its own batch. In eager
mode a context variable holds the batch. Compilers cannot trace a context variable, but they can
guard on a thread-local value, so traced code reads that one. It cannot tell the tasks of a thread
apart: if batches of several tasks overlap across an ``await``, traced code refuses to run. Nor does
it know of a batch that a context brought from another thread: outside of a batch of its own thread
it refuses to run while any is open.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..processes import tell_of_forks

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


class _Batch:
    """A batch that was opened.

    Attributes:
        every: its rows, and those of the batches around it.
        before: the batch around it.
        is_closed: whether it has ended, in whatever thread or context.
        token: resets the context that it was opened in, and no copy of that context.
    """

    __slots__ = ("before", "every", "is_closed", "token")

    token: Token[_Batch | None]

    def __init__(self, before: _Batch | None, owner: object, rows: object) -> None:
        self.before = before
        self.every: Every = {**({} if before is None else before.every), id(owner): rows}
        self.is_closed = False


_current: ContextVar[_Batch | None] = ContextVar("tcur_rows", default=None)


class _Batches:
    """The batches of a thread that are open, in the order of opening, and what traced code reads.

    Attributes:
        rows: of the batch that is open in this thread, if any.
        is_tangled: whether the open batches belong to several tasks.
        batches: these.
    """

    def __init__(self) -> None:
        self.batches: list[_Batch] = []
        self.settle()

    def settle(self) -> None:
        """Finds out what the open batches mean for traced code."""
        self.rows: Every | None = self.batches[-1].every if self.batches else None
        # In one task each batch is opened within the one before it, and the first within none.
        within: _Batch | None = None
        self.is_tangled = False
        for batch in self.batches:
            self.is_tangled |= batch.before is not within
            within = batch


class _Thread(threading.local):
    """Every thread has batches of its own."""

    def __init__(self) -> None:
        self.open = _Batches()


class _Everywhere:
    """Whether a batch is open in any thread.

    A context with an open batch may be carried to another thread, as ``asyncio.to_thread`` does.
    Eager code sees that batch there. Traced code cannot know of it, nor that there is none.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._count = 0
        self._lock = threading.Lock()
        self._is_told = False

    def was_forked(self, is_child: bool) -> None:
        """A child has the batches of the thread that forked it, and of no other."""
        if is_child:
            self._lock = threading.Lock()
            self._count = 0
            self.add(len(_thread.open.batches))

    def add(self, number: int) -> None:
        """Counts batches that were opened, or closed if negative."""
        if not self._is_told:
            self._is_told = True
            tell_of_forks(self)
        with self._lock:
            self._count += number
            self.is_open = self._count > 0


_thread = _Thread()
_everywhere = _Everywhere()


def rows_of(owner: object) -> Any:
    """The rows that the current batch sets for an owner, such as a stack; None outside a batch.

    Raises:
        RuntimeError: traced code is in batches of several tasks, which it cannot tell apart, or in
            none while another thread is in one; or the batch has ended, and this thread or task
            got it with a copy of a context.
    """
    if not torch.compiler.is_compiling():
        batch = _current.get()
        if batch is not None and batch.is_closed:
            batch = _left()
        return None if batch is None else batch.every.get(id(owner))
    if _thread.open.is_tangled:
        raise RuntimeError(
            "batch: expected one task with open batches in the thread of a compiled model, got "
            "batches of several; they may not overlap across an await, or need threads of their own"
        )
    every = _thread.open.rows
    if every is None and _everywhere.is_open:
        raise RuntimeError(
            "batch: expected one of this thread, or none in any thread, where a compiled model "
            "runs, got one of another thread, which may be carried here (asyncio.to_thread); open "
            "a batch in this thread, whose ids may be -1, or let the graph break"
        )
    return None if every is None else every.get(id(owner))


def _left() -> _Batch | None:
    """The batch of this context, where one has ended that is still in it.

    If another thread has closed it, the context in which it was opened goes on outside of it. A
    copy of that context does not: whoever has it was to compute in the batch.
    """
    while (batch := _current.get()) is not None and batch.is_closed:
        try:
            _current.reset(batch.token)
        except (ValueError, RuntimeError):
            raise RuntimeError(
                "batch: expected one that is open, got one that ended before a thread or task that "
                "was started in it; wait for these within the batch"
            ) from None
    return batch


@contextmanager
def using_rows(owner: object, rows: object) -> Iterator[None]:
    """Context in which `rows_of` returns ``rows`` for this owner; for a stack they are `Rows`."""
    before = _current.get()
    while before is not None and before.is_closed:
        before = before.before
    batch = _Batch(before, owner, rows)
    batch.token = token = _current.set(batch)
    opened = _thread.open  # an abandoned generator may be closed by another thread
    opened.batches.append(batch)
    opened.settle()
    _everywhere.add(1)
    try:
        yield
    finally:
        batch.is_closed = True
        opened.batches = [each for each in opened.batches if each is not batch]
        opened.settle()
        _everywhere.add(-1)
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
