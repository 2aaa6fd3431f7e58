"""Cores of many adapters side by side, so that each row of a batch can use its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.rows import Per, Repeat
from ..layers.stack import TProductStack
from ..operators.basis import Basis
from .ids import check_ids, without_negatives

#: Types of transformers models that transpose their input: their layers get time as first axis.
_TIME_FIRST = ("xlnet",)


class StackedCores(Mapping[str, Tensor]):
    """Maps stack names to the cores ``[A, n3, r, r]`` of A adapters; see `Adapter.stack_cores`.

    Behind the cores that `Adapter.stack_cores` makes lies one more, of zeros, for rows without an
    adapter. It counts nowhere. Cores that are given to this class are copied in each batch, to make
    room for it.

    Attributes:
        adapters: A.
        nbytes: bytes of all cores together.
    """

    def __init__(self, cores: Mapping[str, Tensor]) -> None:
        self._cores = dict(cores)
        #: The same memory with the core of zeros, ``[A + 1, n3, r, r]``.
        self._rooms: dict[str, Tensor] = {}
        #: The basis that the cores of a stack are written in, where that is known.
        self._bases: dict[str, Basis] = {}

    @classmethod
    def of(
        cls, stacks: Mapping[str, TProductStack], adapters: Sequence[Mapping[str, Tensor]]
    ) -> StackedCores:
        """Puts the cores of adapters side by side, on the device of the stacks' own cores.

        Raises:
            TypeError, ValueError: there are no adapters, a stack is missing, or a core has another
                shape.
        """
        if not adapters:
            raise ValueError("adapters: expected at least one, got none")
        stacked = cls.zeros(stacks, len(adapters))
        # Copy one core at a time, so that a thousand adapters are never in memory twice.
        for name, stack in stacks.items():
            for index, adapter in enumerate(adapters):
                core = checked_core(adapter, name, stack, f"adapters[{index}]")
                stacked._rooms[name][index] = core
        return stacked

    @classmethod
    @torch.inference_mode(False)  # a later training step may use the cores, too
    @torch.no_grad()
    def zeros(cls, stacks: Mapping[str, TProductStack], adapters: int) -> StackedCores:
        """Cores of zeros for so many adapters."""
        rooms = {
            name: stack.core.new_zeros((adapters + 1, *stack.core.shape), dtype=stack.factors.dtype)
            for name, stack in stacks.items()
        }
        stacked = cls({name: room[:adapters] for name, room in rooms.items()})
        stacked._rooms = rooms
        stacked._bases = {name: stack.basis for name, stack in stacks.items()}
        return stacked

    @property
    def adapters(self) -> int:
        """The number of adapters, A."""
        return next(iter(self._cores.values())).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all cores."""
        return sum(cores.nbytes for cores in self._cores.values())

    @contextmanager
    def rows(
        self,
        stacks: Mapping[str, TProductStack],
        adapter_ids: Tensor,
        repeat: Repeat | None = None,
        per: Per = "row",
    ) -> Iterator[None]:
        """Context in which row b of a batch uses core ``adapter_ids[b]`` in each of the stacks.

        Args:
            stacks: the stacks that the cores belong to, by name.
            adapter_ids: int64 ``[B]``, on the device of the cores; -1: no adapter.
            repeat, per: see `TProductStack.batch`.
        """
        ids = without_negatives(adapter_ids, self.adapters)
        are_trained = {name: cores.requires_grad for name, cores in self._cores.items()}
        with ExitStack() as batches:
            for name, stack in stacks.items():
                batches.enter_context(stack.batch(self.with_zeros(name), ids, repeat, per))
            yield
        for name, is_trained in are_trained.items():
            if self._cores[name].requires_grad != is_trained:
                raise ValueError(
                    f"cores: expected requires_grad={is_trained} in stack {name} until the end of "
                    "the batch, as at its beginning, got another value"
                )

    def with_zeros(self, name: str) -> Tensor:
        """The cores of a stack and one of zeros, ``[A + 1, n3, r, r]``; a gradient reaches them."""
        cores, room = self._cores[name], self._rooms.get(name)
        if room is None or room.data_ptr() != cores.data_ptr():
            return torch.cat([cores, cores.new_zeros((1, *cores.shape[1:]))])
        if not cores.requires_grad:
            return room
        beside: Tensor = _Beside.apply(cores, room)
        return beside

    def check(
        self,
        stacks: Mapping[str, TProductStack],
        adapter_ids: Tensor,
        per: Per = "row",
        cu_seqlens: Tensor | None = None,
        repeat: Any = None,
    ) -> tuple[Tensor, Per]:
        """Refuses ids that are out of range, and cores of other stacks or on another device.

        Returns:
            The ids as `rows` takes them, and what each belongs to.
        """
        self.check_stacks(stacks)
        device = next(iter(self._cores.values())).device
        return check_ids(adapter_ids, self.adapters, device, per, cu_seqlens, repeat)

    def check_stacks(self, stacks: Mapping[str, TProductStack]) -> None:
        """Refuses cores of other stacks, on another device or in another basis.

        Raises:
            ValueError: they are; the message names a stack.
        """
        if self._cores.keys() != stacks.keys():
            raise ValueError(
                f"cores: expected those of stacks {', '.join(stacks)}, got {', '.join(self)}"
            )
        for name, stack in stacks.items():
            core, cores = stack.core, self._cores[name]
            if cores.device != core.device or cores.shape[1:] != core.shape:
                raise ValueError(
                    f"cores: expected [A, {', '.join(map(str, core.shape))}] on {core.device} in "
                    f"stack {name}, got {list(cores.shape)} on {cores.device}"
                )
            basis = self._bases.get(name, stack.basis)
            if basis != stack.basis:
                raise ValueError(
                    f"cores: expected them in basis {stack.basis} in stack {name}, got {basis}; "
                    "stack them again after change_basis"
                )

    def __reduce__(self) -> Any:
        # Copies of the cores and of their rooms would be apart in memory.
        return type(self), (self._cores,), {"_bases": self._bases}

    def __repr__(self) -> str:
        return f"StackedCores({self.adapters} adapters of stacks {', '.join(self)})"

    def __getitem__(self, name: str) -> Tensor:
        return self._cores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cores)

    def __len__(self) -> int:
        return len(self._cores)


class _Beside(torch.autograd.Function):
    """The cores with what lies behind them in memory, without a copy; the gradient reaches them."""

    @staticmethod
    def forward(ctx: Any, cores: Tensor, room: Tensor) -> Tensor:
        return room.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[:-1], None


def check_batch_first(model: nn.Module) -> None:
    """Refuses a model in which some module expects the batch as second axis.

    Raises:
        ValueError: there is such a module, which the message names.
    """
    for name, module in model.named_modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if kind in _TIME_FIRST:
            raise ValueError(
                f"model: expected the batch as first axis, got {kind}, whose layers have time first"
            )
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            raise ValueError(
                f"model: expected the batch as first axis, got batch_first=False in {name}"
            )


def checked_core(
    adapter: Mapping[str, Tensor], name: str, stack: TProductStack, argument: str
) -> Tensor:
    """The core that an adapter has for a stack, detached; refuses none, or one of another shape.

    Args:
        argument: what messages call the adapter.

    Raises:
        TypeError, ValueError: there is none, or it has another shape.
    """
    core = adapter.get(name)
    if not isinstance(core, Tensor):
        kind = "none" if core is None else type(core).__name__
        raise TypeError(f"{argument}: expected a core for stack {name}, got {kind}")
    if core.shape != stack.core.shape:
        raise ValueError(
            f"{argument}: expected a core {list(stack.core.shape)} for stack {name}, got "
            f"{list(core.shape)}"
        )
    return core.detach()


def check_finite(argument: str, adapter: Mapping[str, Tensor]) -> None:
    """Refuses cores with NaN or infinity, which a caller may have made.

    Args:
        argument: what messages call the adapter.

    Raises:
        ValueError: a core is not finite; the message names the adapter and the stack.
    """
    for name, core in adapter.items():
        if isinstance(core, Tensor) and not torch.isfinite(core).all():
            raise ValueError(f"{argument}: expected finite numbers in stack {name}, got others")
