"""A batch whose rows go by different adapters: what peft calls a mixed batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..nn import TProductStack
from .layer import TCURLinear

if TYPE_CHECKING:
    from .model import TCURModel

#: peft's name for rows without an adapter.
BASE = "__base__"


@contextmanager
def rows_by_adapter(tuner: TCURModel, names: Sequence[str]) -> Iterator[None]:
    """Context in which row b of a batch goes by the adapter ``names[b]``.

    Adapters that share C and R go together, each row with its own core between two shared matrix
    products; others one after another, each with its rows.

    Raises:
        ValueError: an unknown adapter, a model in training mode, or a merged one.
    """
    adapters = [name for name in dict.fromkeys(names) if name != BASE]
    for name in adapters:
        if name not in tuner.peft_config:
            known = ", ".join([BASE, *tuner.peft_config])
            raise ValueError(f"adapter_names: expected some of {known}, got {name!r}")
    if tuner.training:
        raise ValueError("adapter_names: expected a model in evaluation mode, got one in training")
    layers = [module for module in tuner.model.modules() if isinstance(module, TCURLinear)]
    if any(layer.merged for layer in layers):
        raise ValueError("adapter_names: expected an unmerged model, got one that is merged")
    with ExitStack() as context:
        rows: str | tuple[str, ...] = tuple(names)
        if adapters and _share_factors(tuner, adapters):
            rows = adapters[0]
            _enter_stacks(context, tuner, adapters, names)
        for layer in layers:
            layer.tcur_rows = rows
            context.callback(setattr, layer, "tcur_rows", None)
        for module in tuner.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                hook = module.register_forward_pre_hook(_name_rows(module, names), with_kwargs=True)
                context.callback(hook.remove)
        yield


def _name_rows(
    module: AuxiliaryTrainingWrapper, names: Sequence[str]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    """A hook by which a module of `modules_to_save` learns which of its copies a row goes by."""
    known = module._get_available_adapters()
    own = [name if name in known else BASE for name in names]
    return lambda _, args, kwargs: (args, {**kwargs, "adapter_names": own})


def _share_factors(tuner: TCURModel, adapters: Sequence[str]) -> bool:
    first, *others = (tuner.peft_config[name] for name in adapters)
    return all(
        (other.plan, other.rank, other.alpha, other.precision)
        == (first.plan, first.rank, first.alpha, first.precision)
        for other in others
    )


def _enter_stacks(
    context: ExitStack, tuner: TCURModel, adapters: Sequence[str], names: Sequence[str]
) -> None:
    """Gives the stacks of the first adapter the cores of all of them, and zeros for the base."""
    number = {name: index for index, name in enumerate([*adapters, BASE])}
    for entry in tuner.plans[adapters[0]].stacks:
        stacks = tuner.stacks_named(entry.name)
        lead = stacks[adapters[0]]
        assert isinstance(lead, TProductStack)
        cores: list[Tensor] = [stacks[name].get_parameter("core") for name in adapters]
        cores.append(torch.zeros_like(lead.core))
        ids = torch.tensor([number[name] for name in names], device=lead.core.device)
        context.enter_context(lead.batch(torch.stack(cores), ids))
