"""Cores of many adapters side by side, so that each row of a batch can use its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..layers.rows import Repeat
from ..layers.stack import TProductStack
from ..operators.checks import check_adapter_ids

#: Types of transformers models that transpose their input: their layers get time as first axis.
_TIME_FIRST = ("xlnet",)


class StackedCores(Mapping[str, Tensor]):
    """Maps stack names to the cores ``[A, n3, r, r]`` of A adapters; see `Adapter.stack_cores`.

    Attributes:
        adapters: A.
        nbytes: bytes of all cores together.
    """

    def __init__(self, cores: Mapping[str, Tensor]) -> None:
        self._cores = dict(cores)

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
        stacked = {}
        for name, stack in stacks.items():
            # Copy one core at a time, so that a thousand adapters are never in memory twice.
            shape, dtype = (len(adapters), *stack.core.shape), stack.factors.dtype
            cores = stack.core.new_empty(shape, dtype=dtype)
            for index, adapter in enumerate(adapters):
                cores[index] = _checked(adapter, name, stack, index)
            stacked[name] = cores.detach()
        return cls(stacked)

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
    ) -> Iterator[None]:
        """Context in which row b of a batch uses core ``adapter_ids[b]`` in each of the stacks.

        Args:
            stacks: the stacks that the cores belong to, by name.
            adapter_ids: int64 ``[B]``, on the device of the cores.
            repeat: see `TProductStack.batch`.
        """
        with ExitStack() as batches:
            for name, stack in stacks.items():
                batches.enter_context(stack.batch(self[name], adapter_ids, repeat))
            yield

    def check(self, stacks: Mapping[str, TProductStack], adapter_ids: Tensor) -> None:
        """Refuses ids that are out of range, and cores of other stacks or on another device."""
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
        check_adapter_ids(adapter_ids, self.adapters, next(iter(self._cores.values())).device)

    def __repr__(self) -> str:
        return f"StackedCores({self.adapters} adapters of stacks {', '.join(self)})"

    def __getitem__(self, name: str) -> Tensor:
        return self._cores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cores)

    def __len__(self) -> int:
        return len(self._cores)


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


def _checked(adapter: Mapping[str, Tensor], name: str, stack: TProductStack, index: int) -> Tensor:
    core = adapter.get(name)
    if not isinstance(core, Tensor):
        kind = "none" if core is None else type(core).__name__
        raise TypeError(f"adapters[{index}]: expected a core for stack {name}, got {kind}")
    if core.shape != stack.core.shape:
        raise ValueError(
            f"adapters[{index}]: expected a core {list(stack.core.shape)} for stack {name}, got "
            f"{list(core.shape)}"
        )
    return core.detach()


def check_finite(index: int, adapter: Mapping[str, Tensor]) -> None:
    """Refuses cores with NaN or infinity, which a caller may have made.

    Raises:
        ValueError: a core is not finite; the message names the adapter and the stack.
    """
    for name, core in adapter.items():
        if isinstance(core, Tensor) and not torch.isfinite(core).all():
            raise ValueError(
                f"adapters[{index}]: expected finite numbers in stack {name}, got others"
            )
