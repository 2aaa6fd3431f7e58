"""Adapters on quantised bases: C and R of weights in full precision, and merged copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..decompose import Selection, Slices
from ..decompose.tensor import select_slices
from ..layers.quantised import QuantisedPlace, kinds_of
from ..layers.quantised_linear import effective_numbers, plain_linear
from ..layers.quantisers import quantiser_of
from ..layers.stack import TProductStack
from ..layers.weights import Place
from ..operators.basis import Basis
from ..operators.factors import CURFactors
from .build import places_of
from .holding import PREFIXES
from .linear_maps import aliases
from .plan import Plan


def are_quantised(plan: Plan, found: Mapping[str, Place]) -> bool:
    """Whether some stack of a plan has quantised weights."""
    return any(kinds_of(places_of(stack, found)) for stack in plan.stacks)


def factors_of(
    source: Slices,
    rank: int,
    selection: Selection,
    generator: torch.Generator | None,
    basis: Basis,
) -> tuple[tuple[Sequence[int], Sequence[int]], CURFactors]:
    """Chosen rows and columns of a stack that is read from files, and C and R made of them."""
    rows, columns = select_slices(source, rank, selection, generator)
    source.check_finite()
    factors = CURFactors(source.columns(columns), source.rows(rows), basis)
    return (rows.tolist(), columns.tolist()), factors


@torch.no_grad()
def put_plain_layers(model: nn.Module, stack: TProductStack) -> None:
    """Puts plain layers with W_eff in the place of the quantised layers of a stack.

    Weights of the stack that are not quantised get W_eff where they are. Each sum is formed in at
    least fp32 and rounded once.

    Args:
        model: an adapted model that nobody else uses, such as a copy.
        stack: one of its stacks.
    """
    quantised = [place for place in stack.places if isinstance(place, QuantisedPlace)]
    others = [place for place in stack.places if not isinstance(place, QuantisedPlace)]
    # C and R follow a base that is written to, so every W_eff comes before the first write.
    stored = [effective_numbers(place).to(place.dtype) for place in others]
    for each in quantised:
        plain = plain_linear(each, effective_numbers(each), merged_dtype(model, each))
        for name in aliases(model, each.module):
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, plain)
    for place, w_eff in zip(others, stored, strict=True):
        place.stored.copy_(place.in_layout(w_eff))


def merged_dtype(model: nn.Module, place: Place) -> torch.dtype:
    """The dtype of the plain layer that replaces a quantised one.

    It is the dtype that the library gives when it dequantises the weight. bitsandbytes gives fp32
    for every 8-bit weight; there it is the dtype of the layer's bias, or else that of the first
    floating-point parameter of the model.
    """
    if place.kind != "bitsandbytes int8":
        return place.dtype
    bias = place.module._parameters.get("bias")
    if bias is not None:
        return bias.dtype
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not name.startswith(PREFIXES):
            return parameter.dtype
    return place.dtype


def forget_quantiser(model: nn.Module) -> None:
    """Makes transformers save a model as a plain one, if no quantised layer is left in it."""
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None and all(quantiser_of(each) is None for each in model.modules()):
        quantiser.remove_quantization_config(model)


def bias_copies(model: nn.Module) -> dict[int, Any]:
    """What `copy.deepcopy` must be told to copy biases of HQQ, which may have a graph."""
    found: dict[int, Any] = {}
    for module in model.modules():
        bias = module.__dict__.get("bias")
        if isinstance(bias, Tensor) and not bias.is_leaf:
            found[id(bias)] = bias.detach().clone()
    return found
