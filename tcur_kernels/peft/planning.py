"""From the targeted layers to stacks, afresh or as a saved adapter recorded them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.utils import parametrize

from ..adapters.fingerprint import digest
from ..adapters.linear_maps import Weight, reasons_to_leave_out, why_computed
from ..adapters.plan import LeftOut, Member, Plan, StackPlan, groups_by_layer, groups_by_shape
from ..decompose import Selection, check_rank
from ..layers.weights import Place, is_attention
from ..operators.functional import slice_update
from .config import Recorded, TCURConfig
from .hosted import AdapterStack, has_other_forward, is_supported, place_of

#: Name in the model -> base layer.
Layers = Mapping[str, nn.Module]

_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def plan_and_build(
    model: nn.Module, layers: Layers, config: TCURConfig, strict: bool
) -> tuple[Plan, dict[str, AdapterStack]]:
    """Plan and stacks of an adapter; what the config has to hold of them is in its ``plan`` then.

    Args:
        strict: refuse a layer that cannot be adapted rather than leave it out.

    Raises:
        TypeError, ValueError: naming the layer, or what does not fit a saved adapter.
    """
    if config.plan is not None and getattr(config.plan, "made_by", None) is None:
        plan = read_plan(model, layers, config)
        return plan, build_stacks(plan, layers, config, config.plan)
    made_by = (config.rank, config.selection)
    plan = make_plan(model, layers, config, strict)
    if config.plan is not None and config.plan.made_by == made_by:  # type: ignore[attr-defined]
        try:
            if read_plan(model, layers, config).stacks == plan.stacks:
                return plan, build_stacks(plan, layers, config, config.plan)
        except ValueError:
            pass  # made for another model
    stacks = build_stacks(plan, layers, config, None)
    config.plan = Recorded(record(plan, stacks), made_by)
    return plan, stacks


def make_plan(model: nn.Module, layers: Layers, config: TCURConfig, strict: bool) -> Plan:
    """Stacks of the targeted layers.

    Args:
        strict: refuse a layer that cannot be adapted rather than leave it out.

    Raises:
        TypeError, ValueError: naming the layer.
    """
    reasons, others = _reasons_to_leave_out(model, layers)
    if strict:
        for name, reason in reasons.items():
            error = ValueError if is_supported(layers[name]) else TypeError
            raise error(
                f"target_modules: expected layers that can be adapted, got {name}: {reason}. "
                f"Target module {layers[name]} is not supported."
            )
    else:
        reasons |= others
    left_out = [LeftOut(name, reason) for name, reason in reasons.items()]
    weights = {n: place_of(layer).weight for n, layer in layers.items() if n not in reasons}
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


def read_plan(model: nn.Module, layers: Layers, config: TCURConfig) -> Plan:
    """The plan that a config holds, refused unless the targeted layers fit it.

    Where the modules have got other names, as from one version of transformers to the next, those
    of the same shapes in the same order stand for them, if their weights are to be checked against
    the fingerprints: these tell whether it was right.

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
    if config.check_base and not any(m.module in layers for s in stacks for m in s.members):
        stacks = _renamed(model, layers, config, stacks)
    for stack in stacks:
        for member in stack.members:
            expected = [member.slices * stack.n1, stack.n2]
            layer = layers.get(member.module)
            if layer is None or not is_supported(layer):
                kind = "no such target" if layer is None else type(layer).__name__
                raise ValueError(
                    f"model: expected a linear layer {member.module} as in the adapter, got {kind}"
                )
            if list(place_of(layer).weight.shape) != expected:
                raise ValueError(
                    f"model: expected {member.module} of shape {expected} as in the adapter, got "
                    f"{list(place_of(layer).weight.shape)}"
                )
    return Plan(stacks)


def _renamed(
    model: nn.Module, layers: Layers, config: TCURConfig, stacks: tuple[StackPlan, ...]
) -> tuple[StackPlan, ...]:
    """The same stacks with the names that their layers have in this model, if it has the like."""
    here = make_plan(model, layers, config, strict=False).stacks
    sizes = [[(s.n1, s.n2, [m.slices for m in s.members]) for s in plan] for plan in (here, stacks)]
    if sizes[0] != sizes[1]:
        return stacks
    return tuple(
        StackPlan(old.name, old.n1, old.n2, new.members)
        for old, new in zip(stacks, here, strict=True)
    )


def build_stacks(
    plan: Plan, layers: Layers, config: TCURConfig, recorded: list[dict[str, Any]] | None
) -> dict[str, AdapterStack]:
    """The stacks of a plan; no layer is changed.

    Args:
        recorded: what was recorded of these stacks, None for new ones.

    Raises:
        ValueError: base weights that are not finite, or not those of the saved adapter.
    """
    stacks = {}
    for index, entry in enumerate(plan.stacks):
        saved = None if recorded is None else recorded[index]
        rule: Selection = config.selection
        if saved is not None:
            rule = (saved["rows"], saved["columns"])
        places = _places_of(entry, layers)
        try:
            stack = AdapterStack(
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
        if not config.init_weights:
            _draw(stack)
        stacks[entry.name] = stack
    return stacks


@torch.no_grad()
def _draw(stack: AdapterStack) -> None:
    """Draws a core by which the update of the first slice has half the norm of its weight."""
    stack.core.normal_()
    update = slice_update(stack.factors, stack.core, 0, scale=stack.alpha)
    norms = stack.places[0].weight[: stack.n1].to(update.dtype).norm(), update.norm()
    if norms[1] > 0:  # alpha, or the weights, may be 0
        stack.core.mul_(0.5 * norms[0] / norms[1])


def record(plan: Plan, stacks: Mapping[str, AdapterStack]) -> list[dict[str, Any]]:
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


def _places_of(entry: StackPlan, layers: Layers) -> list[Place]:
    """The weights of a stack, in the order of their slices."""
    places: list[Place] = []
    first = 0
    for member in entry.members:
        places.append(place_of(layers[member.module], first, member.slices))
        places[-1].name = member.module
        first += member.slices
    return places


def _reasons_to_leave_out(
    model: nn.Module, layers: Layers
) -> tuple[dict[str, str], dict[str, str]]:
    """Why layers cannot be adapted, by their names: targeted ones, and all other modules."""
    names = {id(module): name for name, module in model.named_modules()}
    targets = {names[id(layer)]: target for target, layer in layers.items()}
    weights, reasons = {}, {}
    for name, module in model.named_modules():
        if is_attention(module):
            reasons[name] = "its projections are no layers that are called, as peft's have to be"
        if not is_supported(module):
            continue
        why = why_computed(module)
        if why is None:
            weights[name] = Weight(name, name, module, place_of(module))
            if has_other_forward(module):
                why = "its forward was replaced, so that it could not be adapted"
        if why is not None:
            reasons[name] = why
    known = reasons_to_leave_out(model, weights, set())
    for name, target in targets.items():
        if name not in weights and name not in reasons:
            kind = type(layers[target]).__name__
            reasons[name] = f"{kind} is neither nn.Linear nor Conv1D"
            if parametrize.is_parametrized(layers[target]):
                reasons[name] = known.get(name, reasons[name])
    reasons = known | reasons
    inside = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, _WRAPPERS))
    return (
        {targets[name]: why for name, why in reasons.items() if name in targets},
        {
            name: why
            for name, why in reasons.items()
            if name not in weights
            and name not in targets
            and not (inside and name.startswith(inside))
        },
    )


class Record:
    """What was recorded of stacks, kept true: C and R follow the base, which may be loaded anew."""

    def __init__(self, plan: list[dict[str, Any]] | None, stacks: Sequence[AdapterStack]) -> None:
        self._plan, self._stacks = plan, stacks
        self._factors = [stack.factors for stack in stacks]

    @property
    def plan(self) -> list[dict[str, Any]] | None:
        """As `record` gives it."""
        if self._plan is None or torch.compiler.is_compiling():
            return self._plan
        now = [stack.factors for stack in self._stacks]
        if any(a is not b for a, b in zip(now, self._factors, strict=True)):
            self._factors = now
            entries = [
                {**entry, "sha256": _fingerprint(stack)}
                for entry, stack in zip(self._plan, self._stacks, strict=True)
            ]
            made_by = getattr(self._plan, "made_by", None)
            self._plan = entries if made_by is None else Recorded(entries, made_by)
        return self._plan


def _fingerprint(stack: AdapterStack) -> str:
    """SHA-256 of C and R in fp32: the same for a half-precision base and its fp32 copy."""
    return digest(factor.float() for factor in (stack.lateral, stack.horizontal))
