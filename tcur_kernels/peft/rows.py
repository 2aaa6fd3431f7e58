"""A batch whose rows use different adapters; peft calls it a mixed batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..adapters.batch import StackedCores
from ..adapters.ids import NO_ADAPTER
from ..adapters.plan import Plan
from ..layers.exclusion import Gate
from ..layers.rows import rows_of, using_rows
from .hosted import AdapterStack

#: peft's name for rows without an adapter.
BASE = "__base__"


class Owner:
    """Stands for a tuner in its layers, which find the rows of their own model by it.

    Attributes:
        stacks: adapter name -> its stacks.
        gate: closed while a thread changes what all threads share.
    """

    def __init__(self) -> None:
        self.stacks: dict[str, list[AdapterStack]] = {}
        self.gate = Gate()

    def let_changes_end(self) -> None:
        """Waits while another thread changes what all threads share; called by every layer."""
        if not torch.compiler.is_compiling():
            self.gate.let_through()

    def loaded(self, model: nn.Module, incompatible_keys: Any) -> None:
        """After a checkpoint was loaded: takes C and R from the new base.

        This cannot wait, because graphs that were compiled before do not check the base.
        """
        for stacks in self.stacks.values():
            for stack in stacks:
                stack.look()


class NamedRows:
    """Which adapter each row of a batch uses.

    Args:
        names: the adapter names of the rows.
        inside_encoder: the names of the rows inside an encoder. Beam search gives the encoder
            fewer rows than the other layers.
        encoder: ids of the encoder's modules.
        lead: the adapter whose stacks compute all rows, if all adapters share C and R; else None.
        adapters: the adapters of the rows, in the order of their cores.
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
        self.lead, self.adapters = lead, list(adapters)
        self._cores: StackedCores | None = None

    def of(self, module: nn.Module) -> tuple[str, ...]:
        """The adapter names of the rows that a module gets."""
        return self.inside_encoder if id(module) in self.encoder else self.names

    def batch(self, tuner: Tuner) -> AbstractContextManager[None]:
        """Context in which the stacks of the leading adapter use the cores of all adapters."""
        assert self.lead is not None
        named = [entry.name for entry in tuner.plans[self.lead].stacks]
        every: dict[str, nn.ModuleDict] = {name: tuner.stacks_named(name) for name in named}
        stacks: dict[str, AdapterStack] = {
            name: own[self.lead]  # type: ignore[misc]
            for name, own in every.items()
        }
        adapters = [
            {name: own[adapter].core for name, own in every.items()} for adapter in self.adapters
        ]
        self._cores = StackedCores.of(stacks, adapters)  # type: ignore[arg-type]
        if self.encoder:  # not all layers have the same rows, so `cores_of` sets them per layer
            return nullcontext()
        return self._cores.rows(stacks, self._ids(self.names, stacks[named[0]]))

    def cores_of(self, stack: AdapterStack, layer: nn.Module) -> AbstractContextManager[None]:
        """The same context for a call of one layer, if not all layers have the same rows."""
        if not self.encoder:
            return nullcontext()
        assert self._cores is not None
        return self._cores.rows({stack.name: stack}, self._ids(self.of(layer), stack))

    def _ids(self, names: Sequence[str], stack: AdapterStack) -> Tensor:
        """The index of the core for each row; none for a row of the base."""
        each = [NO_ADAPTER if name == BASE else self.adapters.index(name) for name in names]
        return torch.tensor(each, device=stack.core.device)


class Tuner(Protocol):
    """The attributes of the tuner that a batch of many adapters needs; see `model.TCURModel`."""

    peft_config: Any
    model: nn.Module
    training: bool
    owner: Owner
    plans: dict[str, Plan]
    tuner_layer_cls: type[nn.Module]

    def stacks_named(self, name: str) -> nn.ModuleDict:
        """The stacks of that name, by adapter name."""


@contextmanager
def rows_by_adapter(tuner: Tuner, names: Sequence[str], beams: int = 1) -> Iterator[None]:
    """Context in which row b of a batch uses the adapter ``names[b]``.

    If all adapters share C and R, the rows share the products with them, and each row uses its own
    core in between. Otherwise the adapters run one after another, each with its own rows. The
    context does not affect other threads.

    Args:
        beams: how many times each row is repeated, directly after itself. If the model has an
            encoder, the rows are repeated only after it.

    Raises:
        ValueError: an adapter is unknown, or the model is in training mode or merged.
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
        module for module in tuner.model.modules() if isinstance(module, tuner.tuner_layer_cls)
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
    """Ids of the modules in a model's encoder, if it has one that is not the model itself."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    if encoder is None or encoder is model:
        return frozenset()
    return frozenset(map(id, encoder.modules()))


def _name_rows(
    module: AuxiliaryTrainingWrapper, owner: Owner, rows: NamedRows
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    """A hook that tells a module of `modules_to_save` which of its copies each row uses."""
    known = module._get_available_adapters()
    own = [name if name in known else BASE for name in rows.of(module)]

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if rows_of(owner) is not rows:
            return None  # another thread's batch
        return args, {**kwargs, "adapter_names": own}

    return hook


def _share_factors(tuner: Tuner, adapters: Sequence[str]) -> bool:
    """Whether these adapters have the same C and R, with the same scale, in all their stacks."""
    first, *others = (tuner.peft_config[name] for name in adapters)
    plans = [tuner.peft_config.record_of(name) for name in adapters]
    scales = [[stack.scale for stack in tuner.owner.stacks[name]] for name in adapters]
    return (
        all(plan == plans[0] for plan in plans)
        and all(scale == scales[0] for scale in scales)
        and all(
            (other.precision, other.basis) == (first.precision, first.basis) for other in others
        )
    )
