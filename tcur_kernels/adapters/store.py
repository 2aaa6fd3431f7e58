"""Thousands of adapters of one model, of which a few are on the device at a time."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..layers.rows import Per, Repeat
from ..layers.stack import TProductStack
from ..operators import streams
from ..processes import tell_of_forks
from .batch import StackedCores, check_finite, checked_core
from .ids import Names, distinct, ids_of
from .waiting import InFile, InMemory, Waiting


class AdapterStore:
    """Serves many adapters of one model by their names; made by `Adapter.store`.

    The cores of all adapters wait in the memory of the host, or in a file. Those that a batch names
    come into slots on the device of the model. The slots are the memory of one stacked tensor for
    each stack, so a graph that was compiled for it stays valid. If all slots are taken, the adapter
    that was used least recently leaves. One that a batch uses stays until the batch ends.

    All methods may be called from several threads. A forked process may go on with the store as it
    was, but add nothing to one that waits in a file. A store is for serving: a graph that awaits
    its backward is refused by torch if other cores were loaded since.

    Attributes:
        slots: how many adapters can be on the device at the same time.
    """

    def __init__(
        self,
        stacks: Mapping[str, TProductStack],
        read: Callable[[str | Path | Mapping[str, Tensor]], Mapping[str, Tensor]],
        batch: Callable[..., AbstractContextManager[None]],
        slots: int | None,
        max_bytes: int | None,
        directory: str | Path | None,
    ) -> None:
        one = {
            name: stack.core.new_empty(stack.core.shape, dtype=stack.factors.dtype, device="meta")
            for name, stack in stacks.items()
        }
        self.slots = _slots(slots, max_bytes, sum(core.nbytes for core in one.values()))
        self._stacks, self._read, self._batch = stacks, read, batch
        self._cores = StackedCores.zeros(stacks, self.slots)
        self._waiting: Waiting = InMemory() if directory is None else InFile(directory, one)
        self._lock = threading.RLock()
        self._numbers: dict[str, int] = {}
        #: Adapter -> its slot; the one used least recently comes first.
        self._slot_of: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(self.slots))[::-1]
        #: Adapter -> how many batches use it now.
        self._users: Counter[str] = Counter()
        #: For each stream, the end of the latest batch on it; and the latest load.
        self._ends: dict[int, streams.Mark] = {}
        self._loaded: streams.Mark | None = None
        tell_of_forks(self)

    def was_forked(self, is_child: bool) -> None:
        """Another thread of the parent may have held the lock; none of it is in the child."""
        if is_child:
            self._lock = threading.RLock()

    def __reduce__(self) -> Any:
        raise TypeError(
            "AdapterStore: expected to stay in the process that made it, got a copy or a pickle of "
            "it; copy or send the adapted model, and make a store there"
        )

    # -- which adapters there are

    def add(self, name: str, adapter: str | Path | Mapping[str, Tensor]) -> None:
        """Adds an adapter, also while others are served. It is read and checked here, once.

        Args:
            name: to call it by in `batch`.
            adapter: as for `Adapter.stack_cores`: a file (as ``Path``), ``{stack name: core}``, or
                the name of an adapter of the model, whose present values are copied.

        Raises:
            FileNotFoundError, TypeError, ValueError: the name is taken or no string, or the adapter
                does not fit this model; the store is as before.
        """
        if not isinstance(name, str):
            raise TypeError(f"name: expected a str, got {type(name).__name__}")
        self._check_free(name)
        given = self._read(adapter)
        cores = {}
        for stack_name, stack in self._stacks.items():
            core = checked_core(given, stack_name, stack, "adapter")
            cores[stack_name] = core.to(stack.factors.dtype)
        check_finite("adapter", cores)
        number = self._waiting.put(cores)
        with self._lock:
            try:
                self._check_free(name)  # another thread may have taken it
            except ValueError:
                self._waiting.drop(number)
                raise
            self._numbers[name] = number

    def remove(self, name: str) -> None:
        """Removes an adapter.

        Raises:
            ValueError: there is none of that name, or a batch uses it.
        """
        with self._lock:
            self._check_known([name])
            if self._users[name]:
                raise ValueError(
                    f"name: expected an adapter that no batch uses, got {name!r}, which "
                    f"{self._users[name]} use"
                )
            self._waiting.drop(self._numbers.pop(name))
            if name in self._slot_of:
                self._free.append(self._slot_of.pop(name))

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._numbers))

    @property
    def loaded(self) -> tuple[str, ...]:
        """The adapters on the device; the one that was used least recently comes first."""
        with self._lock:
            return tuple(self._slot_of)

    @property
    def nbytes(self) -> int:
        """Bytes on the device: of all slots, and of a core of zeros for rows without an adapter."""
        return self._cores.nbytes // self.slots * (self.slots + 1)

    @property
    def nbytes_waiting(self) -> int:
        """Bytes of the adapters that wait: in the memory of the host, or in the file."""
        with self._lock:
            return self._waiting.nbytes

    # -- serving

    @contextmanager
    def batch(
        self,
        names: Names,
        repeat: Repeat | None = None,
        per: Per = "row",
        cu_seqlens: Tensor | None = None,
    ) -> Iterator[None]:
        """Context in which each row of a batch uses the adapter that is named for it.

        Args:
            names: for each row the name of an adapter, or None for none. With ``cu_seqlens`` for
                each sequence; with per="token" for each token, or for those of each row.
            repeat, per, cu_seqlens: as for `Adapter.batch`.

        Raises:
            TypeError, ValueError: a name is unknown; the batch names more adapters than there are
                slots; or as for `Adapter.batch`.
            RuntimeError: other batches use so many slots that there are too few for this one; or a
                CUDA graph is being captured, which would read slots when other adapters are there.
        """
        device = self._device
        if streams.capture_of(device):
            raise RuntimeError(
                "batch: expected no capture of a CUDA graph, got one, whose replays would not know "
                "which adapters are in the slots; capture with stack_cores and Adapter.batch"
            )
        used = distinct(names)
        slot_of = self._take(used)
        try:
            ids = ids_of(names, slot_of, device)
            with self._batch(self._cores, ids, repeat, per, cu_seqlens):
                yield
        finally:
            self._give_back(used)

    def load(self, names: Sequence[str]) -> None:
        """Loads adapters before they are used, as `batch` would.

        Raises:
            TypeError, ValueError, RuntimeError: as for `batch`.
        """
        self._give_back(list(self._take(list(dict.fromkeys(names)))))

    def _take(self, names: Sequence[str]) -> dict[str, int]:
        """Brings adapters into slots, keeps them there, and returns the slots."""
        with self._lock:
            self._check_known(names)
            if len(names) > self.slots:
                raise ValueError(
                    f"names: expected at most {self.slots} adapters in a batch, as many as there "
                    f"are slots, got {len(names)}"
                )
            missing = [name for name in names if name not in self._slot_of]
            leaving = self._leaving(len(missing) - len(self._free), set(names))
            read = {name: self._waiting.get(self._numbers[name]) for name in missing}
            for name in leaving:
                self._free.append(self._slot_of.pop(name))
            if missing:
                self._write(read)
            elif self._loaded is not None:
                streams.wait_for(self._loaded, self._any)
            for name in names:
                self._slot_of.move_to_end(name)
                self._users[name] += 1
            return {name: self._slot_of[name] for name in names}

    def _leaving(self, count: int, staying: set[str]) -> list[str]:
        """The ``count`` adapters to leave: those used least recently that no batch uses."""
        idle = [name for name in self._slot_of if not self._users[name] and name not in staying]
        if count > len(idle):
            busy = sum(1 for name in self._slot_of if self._users[name] and name not in staying)
            raise RuntimeError(
                f"names: expected slots for {count + len(self._free)} more adapters, got "
                f"{len(idle) + len(self._free)}: other batches use {busy} of {self.slots}; end "
                "them first, or make a store with more slots"
            )
        return idle[: max(0, count)]

    @torch.no_grad()
    def _write(self, read: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Writes cores into free slots, when no earlier batch reads them any more."""
        before = [*self._ends.values(), *([] if self._loaded is None else [self._loaded])]
        for mark in before:
            streams.wait_for(mark, self._any)
        try:
            for name, cores in read.items():
                slot = self._free[-1]
                for stack, core in cores.items():
                    self._cores[stack][slot].copy_(core)
                self._slot_of[name] = self._free.pop()
        finally:
            if streams.are_used(self._device):
                self._loaded = streams.mark(self._device)

    def _give_back(self, names: Sequence[str]) -> None:
        device = self._device
        with self._lock:
            if streams.are_used(device):
                self._ends[streams.current(device)] = streams.mark(device)
            for name in names:
                self._users[name] -= 1
                if not self._users[name]:
                    del self._users[name]

    @property
    def _any(self) -> Tensor:
        """The cores of one of the stacks; those of all others are used together with them."""
        return next(iter(self._cores.values()))

    @property
    def _device(self) -> torch.device:
        return self._any.device

    def _check_free(self, name: str) -> None:
        if name in self._numbers:
            raise ValueError(f"name: expected a name that is free, got {name!r}")

    def _check_known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._numbers:
                raise ValueError(
                    f"names: expected adapters of this store, got {name!r}, which is not one of "
                    f"its {len(self._numbers)}"
                )

    def __repr__(self) -> str:
        there = len(self._slot_of)
        return f"AdapterStore({len(self)} adapters, {there} of them in {self.slots} slots)"


def _slots(slots: Any, max_bytes: Any, one: int) -> int:
    """The number of slots, from itself or from the bytes that they and a core of zeros may take."""
    if (slots is None) == (max_bytes is None):
        raise ValueError(
            "slots: expected either slots or max_bytes, got "
            + ("neither" if slots is None else "both")
        )
    for name, value in (("slots", slots), ("max_bytes", max_bytes)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if slots is not None:
        if slots < 1:
            raise ValueError(f"slots: expected at least 1, got {slots}")
        return int(slots)
    if max_bytes < 2 * one:
        raise ValueError(
            f"max_bytes: expected at least {2 * one}, for one adapter and a core of zeros, got "
            f"{max_bytes}"
        )
    return int(max_bytes) // one - 1
