"""A batch whose rows go by different adapters: what peft calls a mixed batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..adapters.batch import StackedCores
from ..adapters.plan import Plan
from ..layers.rows import rows_of, using_rows
from .hosted import AdapterStack

#: peft's name for rows without an adapter.
BASE = "__base__"


class Owner:
    """Stands for a tuner with its layers: one has the rows of its own model, not of another.

    Attributes:
        stacks: adapter name -> its stacks.
    """

    def __init__(self) -> None:
        self.stacks: dict[str, list[AdapterStack]] = {}

    def loaded(self, model: nn.Module, incompatible_keys: Any) -> None:
        """A checkpoint was loaded: C and R of the base that is there now.

        At once, for graphs that were compiled before, which do not look at the base.
        """
        for stacks in self.stacks.values():
            for stack in stacks:
                stack.look()


class NamedRows:
    """Which adapter each row of a batch goes by.

    Args:
        names: of the rows.
        inside_encoder: those where there are fewer rows, in the encoder of a search with beams.
        encoder: ids of the layers that are there.
        lead: the adapter whose stacks hold the cores of all rows, where they share C and R.
        adapters: those whose cores these are, in the order of the cores.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        inside_encoder: tuple[str, ...],
        encoder: frozenset[int],
        lead: str | None,
        adapters: Sequence[str],
    ) -> None:
        self.names, self.inside_encoder, self.encoder = names, inside_encoder, encoder
        self.lead, self.adapters = lead, [*adapters, BASE]
        self._cores: StackedCores | None = None

    def of(self, module: nn.Module) -> tuple[str, ...]:
        """The names of the rows that a module meets."""
        return self.inside_encoder if id(module) in self.encoder else self.names

    def batch(self, tuner: Tuner) -> AbstractContextManager[None]:
        """Gives the stacks of the leading adapter the cores of all, and zeros for the base."""
        assert self.lead is not None
        named = [entry.name for entry in tuner.plans[self.lead].stacks]
        every: dict[str, nn.ModuleDict] = {name: tuner.stacks_named(name) for name in named}
        stacks: dict[str, AdapterStack] = {
            name: own[self.lead]  # type: ignore[misc]
            for name, own in every.items()
        }
        adapters = [
            {name: own[adapter].core for name, own in every.items()}
            for adapter in self.adapters[:-1]
        ]
        base = {name: torch.zeros_like(stack.core) for name, stack in stacks.items()}
        self._cores = StackedCores.of(stacks, [*adapters, base])  # type: ignore[list-item]
        if self.encoder:  # rows are not those of all layers: `cores_of` gives each layer its own
            return nullcontext()
        return self._cores.rows(stacks, self._ids(self.names, stacks[named[0]]))

    def cores_of(self, stack: AdapterStack, layer: nn.Module) -> AbstractContextManager[None]:
        """That context for a call of one layer, where its rows are not those of all layers."""
        if not self.encoder:
            return nullcontext()
        assert self._cores is not None
        return self._cores.rows({stack.name: stack}, self._ids(self.of(layer), stack))

    def _ids(self, names: Sequence[str], stack: AdapterStack) -> Tensor:
        """Which of the cores each row goes by."""
        each = [self.adapters.index(name) for name in names]
        return torch.tensor(each, device=stack.core.device)


class Tuner(Protocol):
    """What of peft's tuner a batch of many adapters asks for; see `model.TCURModel`."""

    peft_config: Any
    model: nn.Module
    training: bool
    owner: Owner
    plans: dict[str, Plan]
    tuner_layer_cls: type[nn.Module]

    def stacks_named(self, name: str) -> nn.ModuleDict:
        """Adapter name -> its stack of that name."""


@contextmanager
def rows_by_adapter(tuner: Tuner, names: Sequence[str], beams: int = 1) -> Iterator[None]:
    """Context in which row b of a batch goes by the adapter ``names[b]``.

    Adapters that share C and R go together, each row with its own core between two shared matrix
    products; others one after another, each with its rows. What runs in other threads meanwhile
    is none of this batch.

    Args:
        beams: how often each row stands after another, past the encoder if there is one.

    Raises:
        ValueError: an unknown adapter, a model in training mode, or a merged one.
    """
    adapters = [name for name in dict.fromkeys(names) if name != BASE]
    unknown = sorted({name for name in adapters if name not in tuner.peft_config})
    if unknown:
        known = ", ".join([BASE, *tuner.peft_config])
        raise ValueError(
            f"adapter_names: expected some of {known}. Trying to infer with non-existing "
            f"adapter(s): {', '.join(unknown)}"
        )
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    layers = [
        module for module in tuner.model.modules() if module.__class__ is tuner.tuner_layer_cls
    ]
    if any(layer.merged for layer in layers):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call "
            "`unmerge_adapter` first."
        )
    lead = adapters[0] if adapters and _share_factors(tuner, adapters) else None
    each = tuple(name for name in names for _ in range(beams))
    encoder = _encoder_of(tuner.model) if beams > 1 else frozenset()
    rows = NamedRows(each, tuple(names), encoder, lead, adapters)
    with ExitStack() as context:
        context.enter_context(using_rows(tuner.owner, rows))
        if lead is not None:
            context.enter_context(rows.batch(tuner))
        for module in tuner.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                hook = _name_rows(module, tuner.owner, rows)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                context.callback(handle.remove)
        yield


def _encoder_of(model: Any) -> frozenset[int]:
    """Ids of the modules in the encoder of a model that has one apart from itself."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    if encoder is None or encoder is model:
        return frozenset()
    return frozenset(map(id, encoder.modules()))


def _name_rows(
    module: AuxiliaryTrainingWrapper, owner: Owner, rows: NamedRows
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    """A hook by which a module of `modules_to_save` learns which of its copies a row goes by."""
    known = module._get_available_adapters()
    own = [name if name in known else BASE for name in rows.of(module)]

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if rows_of(owner) is not rows:
            return None  # another thread's batch
        return args, {**kwargs, "adapter_names": own}

    return hook


def _share_factors(tuner: Tuner, adapters: Sequence[str]) -> bool:
    first, *others = (tuner.peft_config[name] for name in adapters)
    plans = [tuner.peft_config.record_of(name) for name in adapters]
    return all(plan == plans[0] for plan in plans) and all(
        (other.rank, other.alpha, other.precision) == (first.rank, first.alpha, first.precision)
        for other in others
    )
