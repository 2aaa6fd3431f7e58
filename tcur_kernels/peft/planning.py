"""From the targeted layers to stacks, afresh or as a saved adapter recorded them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..adapters.fingerprint import digest
from ..adapters.plan import LeftOut, Member, Plan, StackPlan, groups_by_layer, groups_by_shape
from ..adapters.weights import Weight, reasons_to_leave_out
from ..decompose import Selection, check_rank
from ..nn import TProductStack
from ..places import Place, is_conv1d, is_plain_linear
from .config import TCURConfig

#: Name in the model -> base layer.
Layers = Mapping[str, nn.Module]


def make_plan(model: nn.Module, layers: Layers, config: TCURConfig, strict: bool) -> Plan:
    """Stacks of the targeted layers.

    Args:
        strict: refuse a layer that cannot be adapted rather than leave it out.

    Raises:
        TypeError, ValueError: naming the layer.
    """
    reasons = _reasons_to_leave_out(model, layers)
    if strict:
        for name, reason in reasons.items():
            error = ValueError if is_supported(layers[name]) else TypeError
            raise error(
                f"target_modules: expected layers that can be adapted, got {name}: {reason}"
            )
    left_out = [LeftOut(name, reason) for name, reason in reasons.items()]
    weights = {n: Place(layer).weight for n, layer in layers.items() if n not in reasons}
    groups = groups_by_shape(weights) if config.stacks == "shape" else groups_by_layer(weights)
    stacks = []
    for key, (n1, n2), members in groups:
        stack = StackPlan(key, n1, n2, tuple(members))
        why = None
        if stack.n3 == 1 and config.stacks == "shape":
            why = "the only slice of its shape"
        elif config.rank > min(n1, n2):
            why = f"rank {config.rank} exceeds min({n1}, {n2})"
        if why is not None and not strict:
            left_out += [LeftOut(member.module, why) for member in members]
            continue
        check_rank("rank", config.rank, n1, n2)
        stacks.append(stack)
    if not stacks:
        why = "; ".join(f"{item.module}: {item.reason}" for item in left_out[:5])
        raise ValueError(f"target_modules: expected a layer that can be adapted, got none ({why})")
    return Plan(tuple(stacks), tuple(left_out))


def read_plan(layers: Layers, config: TCURConfig) -> Plan:
    """The plan that a saved adapter recorded, refused unless the targeted layers fit it.

    Raises:
        ValueError: a plan that is damaged, or made for another architecture.
    """
    assert config.plan is not None
    try:
        stacks = tuple(
            StackPlan(s["name"], s["n1"], s["n2"], tuple(Member(m, k) for m, k in s["members"]))
            for s in config.plan
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"plan: expected that of a saved adapter, got {error!r}") from error
    for stack in stacks:
        for member in stack.members:
            expected = [member.slices * stack.n1, stack.n2]
            layer = layers.get(member.module)
            if layer is None or not is_supported(layer):
                kind = "no such target" if layer is None else type(layer).__name__
                raise ValueError(
                    f"model: expected a linear layer {member.module} as in the adapter, got {kind}"
                )
            if list(Place(layer).weight.shape) != expected:
                raise ValueError(
                    f"model: expected {member.module} of shape {expected} as in the adapter, got "
                    f"{list(Place(layer).weight.shape)}"
                )
    return Plan(stacks)


def build_stacks(plan: Plan, layers: Layers, config: TCURConfig) -> dict[str, TProductStack]:
    """The stacks of a plan; no layer is changed.

    Raises:
        ValueError: base weights that are not finite, or not those of the saved adapter.
    """
    stacks = {}
    for index, entry in enumerate(plan.stacks):
        saved = None if config.plan is None else config.plan[index]
        rule: Selection = config.selection
        if saved is not None:
            rule = (saved["rows"], saved["columns"])
        places = _places_of(entry, layers)
        try:
            stack = TProductStack(
                places,
                config.rank,
                config.alpha,
                rule,
                config.mode,
                precision=config.precision,
                name=entry.name,
            )
        except ValueError as error:
            raise ValueError(f"stack {entry.name}: {error}") from error
        if saved is not None and config.check_base and _fingerprint(stack) != saved["sha256"]:
            raise ValueError(
                f"model: expected the base that the adapter was made for, got other weights in "
                f"stack {entry.name} ({places[0].weight.dtype}; check_base=False in the config "
                "loads all the same)"
            )
        stacks[entry.name] = stack
    return stacks


def record(plan: Plan, stacks: Mapping[str, TProductStack]) -> list[dict[str, Any]]:
    """What a saved adapter needs to rebuild its stacks, as JSON can hold it."""
    return [
        {
            "name": entry.name,
            "n1": entry.n1,
            "n2": entry.n2,
            "members": [[member.module, member.slices] for member in entry.members],
            "rows": list(stacks[entry.name].rows),
            "columns": list(stacks[entry.name].columns),
            "sha256": _fingerprint(stacks[entry.name]),
        }
        for entry in plan.stacks
    ]


def is_supported(layer: nn.Module) -> bool:
    """Whether a layer of this type can be adapted."""
    return is_plain_linear(layer) or is_conv1d(layer)


def _places_of(entry: StackPlan, layers: Layers) -> list[Place]:
    """The weights of a stack, in the order of their slices."""
    starts = itertools.accumulate((m.slices for m in entry.members), initial=0)
    return [
        Place(layers[member.module], first, member.slices)
        for member, first in zip(entry.members, starts, strict=False)
    ]


def _reasons_to_leave_out(model: nn.Module, layers: Layers) -> dict[str, str]:
    """Why targeted layers cannot be adapted, by their names."""
    names = {id(module): name for name, module in model.named_modules()}
    reasons, weights, targets = {}, {}, {}
    for target, layer in layers.items():
        if is_supported(layer):
            name = names[id(layer)]  # below the adapted layer, if there is one already
            weights[name] = Weight(name, name, layer, Place(layer))
            targets[name] = target
        else:
            reasons[target] = f"{type(layer).__name__} is neither nn.Linear nor Conv1D"
    found = reasons_to_leave_out(model, weights, set())
    return reasons | {targets[name]: why for name, why in found.items() if name in targets}


def _fingerprint(stack: TProductStack) -> str:
    """SHA-256 of C and R in fp32: the same for a half-precision base and its fp32 copy."""
    return digest(factor.float() for factor in (stack.lateral, stack.horizontal))
