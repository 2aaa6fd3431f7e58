"""Many adapters of one model that are trained together: one batch, and an optimizer for each."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.rows import Per, Repeat
from ..layers.stack import TProductStack
from ..processes import tell_of_forks
from .batch import StackedCores, check_finite, checked_core
from .ids import Names, distinct, ids_of


class Tenants:
    """Adapters of one model that are trained in common batches; made by `Adapter.tenants`.

    The cores of all tenants lie side by side in one tensor for each stack. What an optimizer gets
    are parameters that are views of it, so a step of any optimizer of torch writes where the next
    batch reads. Each tenant has parameters of its own, and with them a state of its own. A tenant
    without rows in a batch gets no gradient from it: its ``.grad`` stays None, and an optimizer
    passes it by.

    Tenants must not influence one another, so the loss of a batch is a sum over its rows, or over
    the means of the rows of each tenant. A mean over the batch makes a tenant's gradient depend on
    how many rows the others have. Layers that mix rows, such as batch norms in training, do so,
    too.

    Attributes:
        capacity: how many tenants there is room for.
    """

    def __init__(
        self,
        stacks: Mapping[str, TProductStack],
        read: Callable[[str | Path | Mapping[str, Tensor]], Mapping[str, Tensor]],
        batch: Callable[..., AbstractContextManager[None]],
        write: Callable[[Mapping[str, Tensor], str | Path, dict[str, Any]], None],
        capacity: int,
    ) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int):
            raise TypeError(f"capacity: expected an int, got {type(capacity).__name__}")
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1, got {capacity}")
        self.capacity = capacity
        self._stacks, self._read, self._batch, self._write = stacks, read, batch, write
        self._cores = StackedCores.zeros(stacks, capacity)
        self._lock = threading.Lock()
        self._free = list(range(capacity))[::-1]
        self._slot_of: dict[str, int] = {}
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        #: Tenant -> how many open batches have rows of it.
        self._users: Counter[str] = Counter()
        tell_of_forks(self)

    def was_forked(self, is_child: bool) -> None:
        """Another thread of the parent may have held the lock; none of it is in the child."""
        if is_child:
            self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        raise TypeError(
            "Tenants: expected to stay in the process that made them, got a copy or a pickle of "
            "them; save each tenant, or copy the adapted model and let them join there"
        )

    # -- who is there

    @torch.inference_mode(False)
    @torch.no_grad()
    def join(self, name: str, adapter: str | Path | Mapping[str, Tensor] | None = None) -> None:
        """Makes room for a tenant, who starts with cores of zeros, or with those of an adapter.

        Args:
            name: to call the tenant by.
            adapter: as for `Adapter.stack_cores`: a file (as ``Path``), ``{stack name: core}``, or
                the name of an adapter of the model.

        Raises:
            FileNotFoundError, TypeError, ValueError: the name is taken or no string, there is no
                room, or the adapter does not fit this model. Nothing has changed then.
        """
        if not isinstance(name, str):
            raise TypeError(f"name: expected a str, got {type(name).__name__}")
        values: dict[str, Tensor] = {}
        if adapter is not None:
            given = self._read(adapter)
            for stack_name, stack in self._stacks.items():
                values[stack_name] = checked_core(given, stack_name, stack, "adapter")
            check_finite("adapter", values)
        with self._lock:
            if name in self._slot_of:
                raise ValueError(f"name: expected a name that is free, got {name!r}")
            if not self._free:
                raise ValueError(
                    f"name: expected at most {self.capacity} tenants, got {name!r} as one more; "
                    "one has to leave first"
                )
            slot, own = self._free[-1], {}
            for stack_name, cores in self._cores.items():
                core = cores[slot]
                core.copy_(values[stack_name]) if values else core.zero_()
                own[stack_name] = nn.Parameter(core)
            self._slot_of[name], self._parameters[name] = self._free.pop(), own

    def leave(self, name: str) -> None:
        """Frees the room of a tenant. Its parameters keep their values, in memory of their own.

        Raises:
            ValueError: there is no such tenant, or an open batch has rows of it.
        """
        with self._lock:
            self._check_known([name])
            if self._users[name]:
                raise ValueError(
                    f"name: expected a tenant that no open batch has rows of, got {name!r}"
                )
            # An optimizer that still has them must not write where another tenant will be.
            for parameter in self._parameters.pop(name).values():
                parameter.data = parameter.detach().clone()
            self._free.append(self._slot_of.pop(name))

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, name: object) -> bool:
        return name in self._slot_of

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._slot_of))

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The cores of a tenant, one ``[n3, r, r]`` for each stack, for an optimizer of its own.

        Raises:
            ValueError: there is no such tenant.
        """
        return list(self.cores(name).values())

    def cores(self, name: str) -> dict[str, nn.Parameter]:
        """The same, by the names of the stacks.

        Raises:
            ValueError: there is no such tenant.
        """
        with self._lock:
            self._check_known([name])
            return dict(self._parameters[name])

    # -- training

    @contextmanager
    def batch(
        self,
        names: Names,
        repeat: Repeat | None = None,
        per: Per = "row",
        cu_seqlens: Tensor | None = None,
    ) -> Iterator[None]:
        """Context in which each row of a batch goes by the tenant that is named for it.

        The gradients reach the parameters of these tenants; they add to what is there, as always.

        Args:
            names: for each row the name of a tenant, or None for none. With ``cu_seqlens`` for each
                sequence; with per="token" for each token, or for those of each row.
            repeat, per, cu_seqlens: as for `Adapter.batch`.

        Raises:
            TypeError, ValueError: a name is unknown, a parameter is no longer a view of the common
                memory, or as for `Adapter.batch`.
        """
        used = distinct(names)
        with self._lock:
            self._check_known(used)
            slots = {name: self._slot_of[name] for name in used}
            every = [self._parameters[name] for name in used]
            self._check_views(slots)
            self._users.update(used)
        try:
            trained = {
                stack: _Together.apply(cores, tuple(slots.values()), *(own[stack] for own in every))
                for stack, cores in self._rooms().items()
            }
            device = next(iter(self._cores.values())).device
            ids = ids_of(names, slots, device)
            with self._batch(_OfTenants(self._cores, trained), ids, repeat, per, cu_seqlens):
                yield
        finally:
            with self._lock:
                self._users.subtract(used)

    def save(self, name: str, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Writes a tenant as a file of its own, as `Adapter.save` writes an adapter of the model.

        Args:
            name: of the tenant.
            path: the file.
            metadata: what to keep with it; see `Adapter.metadata`.

        Raises:
            TypeError, ValueError: there is no such tenant; or as for `Adapter.save`.
        """
        cores = {stack: core.detach() for stack, core in self.cores(name).items()}
        self._write(cores, path, {} if metadata is None else metadata)

    def _rooms(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {name: self._cores.with_zeros(name) for name in self._cores}

    def _check_known(self, names: list[str]) -> None:
        for name in names:
            if name not in self._slot_of:
                known = ", ".join(self._slot_of) or "none"
                raise ValueError(f"name: expected one of the tenants ({known}), got {name!r}")

    def _check_views(self, slots: Mapping[str, int]) -> None:
        """Refuses parameters that somebody gave other memory, which no batch would read."""
        for name, slot in slots.items():
            for stack, parameter in self._parameters[name].items():
                if parameter.data_ptr() != self._cores[stack][slot].data_ptr():
                    raise ValueError(
                        f"parameters: expected those of {name!r} in the common memory, got other "
                        f"memory in stack {stack}; write values in place, with copy_"
                    )

    def __repr__(self) -> str:
        return f"Tenants({len(self)} of {self.capacity}, of stacks {', '.join(self._stacks)})"


class _OfTenants(StackedCores):
    """Stacked cores whose gradient reaches the parameters of tenants."""

    def __init__(self, cores: StackedCores, trained: Mapping[str, Tensor]) -> None:
        super().__init__(cores)
        self._bases, self._trained = cores._bases, trained

    def with_zeros(self, name: str) -> Tensor:
        """The cores of all tenants, and one of zeros."""
        return self._trained[name]


class _Together(torch.autograd.Function):
    """The memory of all cores, as made of the parameters that are views of it, without a copy."""

    @staticmethod
    def forward(ctx: Any, room: Tensor, slots: tuple[int, ...], *cores: Tensor) -> Tensor:
        ctx.slots = slots
        return room.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        own = grad[list(ctx.slots)]  # a copy: the gradients of tenants that are not here are let go
        return (None, None, *own.unbind())
