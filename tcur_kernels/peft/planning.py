"""Builds stacks of the targeted layers, from a new plan or from that of a saved adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.utils import parametrize

from ..adapters.build import build_stack, check_layers
from ..adapters.fingerprint import Fingerprint
from ..adapters.linear_maps import (
    TRAINED,
    Weight,
    reasons_to_leave_out,
    why_computed,
    why_unreadable,
)
from ..adapters.plan import LeftOut, Plan, StackPlan, groups_of, plan_groups
from ..adapters.record import StackRecord
from ..files.parsing import Source
from ..layers.quantised import Numbers, form_of
from ..layers.quantisers import quantiser_of, why_packed
from ..layers.weights import is_attention
from ..operators.functional import slice_update
from .config import Recorded, TCURConfig
from .digests import records_in
from .experts import TargetParameter
from .hosted import AdapterStack, has_other_forward, is_supported, place_of
from .patterns import PATTERNS, alpha_of, check_matches, rank_of

#: Name in the model -> base layer, or a parameter of experts.
Layers = Mapping[str, nn.Module | TargetParameter]

_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def plan_and_build(
    model: nn.Module, layers: Layers, config: TCURConfig, strict: bool
) -> tuple[Plan, dict[str, AdapterStack]]:
    """Plans an adapter and builds its stacks; records the plan in ``config.plan``.

    Args:
        strict: whether to refuse a layer that cannot be adapted instead of leaving it out.

    Raises:
        TypeError, ValueError: a layer cannot be adapted, or does not fit a saved adapter; the
            message names it.
    """
    if config.plan is not None and getattr(config.plan, "made_by", None) is None:
        records = read_records(model, layers, config)
        plan = Plan(tuple(record.plan for record in records))
        return plan, build_stacks(plan, layers, config, records)
    check_matches(config, layers)
    patterns = [tuple(getattr(config, name).items()) for name in PATTERNS]
    made_by = (config.rank, config.selection, config.basis, *patterns)
    plan = make_plan(model, layers, config, strict)
    if config.plan is not None and config.plan.made_by == made_by:  # type: ignore[attr-defined]
        try:
            records = read_records(model, layers, config)
            if tuple(record.plan for record in records) == plan.stacks:
                return plan, build_stacks(plan, layers, config, records)
        except ValueError:
            pass  # made for another model
    stacks = build_stacks(plan, layers, config, None)
    config.plan = Recorded(records_of(plan, stacks, config), made_by)
    return plan, stacks


def make_plan(model: nn.Module, layers: Layers, config: TCURConfig, strict: bool) -> Plan:
    """Groups the targeted layers into stacks.

    Args:
        strict: whether to refuse a layer that cannot be adapted instead of leaving it out.

    Raises:
        TypeError, ValueError: a layer cannot be adapted; the message names it.
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
    places = {n: place_of(layer) for n, layer in layers.items() if n not in reasons}
    weights = {name: form_of(place) for name, place in places.items()}
    experts = {n: place.slices for n, place in places.items() if place.layout == "experts"}
    together = {
        member.module
        for _, _, members in groups_of(weights, config.stacks, experts=experts)
        for member in members
        if members[1:]
    }
    stacks: list[StackPlan] = []
    kinds = {name: f"{rank_of(config, name)} {alpha_of(config, name)}" for name in weights}
    for group in groups_of(weights, config.stacks, kinds, experts):
        first = group[2][0].module
        rank = rank_of(config, first)
        planned, others_left = plan_groups(
            [group],
            Numbers(places),
            {group[0]: rank}.__getitem__,
            argument="target_modules",
            # The only layer of a shape is left out, but not one that only a pattern sets apart.
            stacks="layer" if first in together else config.stacks,
            insists=strict,
            is_loaded=not any(weight.is_meta for weight in weights.values()),
        )
        stacks += planned
        left_out += others_left
    if not stacks:
        why = "; ".join(f"{item.module}: {item.reason}" for item in left_out[:5])
        raise ValueError(f"target_modules: expected a layer that can be adapted, got none ({why})")
    return Plan(tuple(stacks), tuple(left_out))


def read_records(model: nn.Module, layers: Layers, config: TCURConfig) -> tuple[StackRecord, ...]:
    """Reads the recorded stacks of a config, and checks that the targeted layers fit them.

    Modules may have new names, for example in a new version of transformers. Then layers of the
    same shapes in the same order take their place. This is done only if ``check_base`` is set,
    because the fingerprints will show whether it was right.

    Raises:
        ValueError: the plan is damaged, or was made for another architecture.
    """
    records = records_in(config.plan, Source("plan", Path(CONFIG_NAME)))
    _check_unchanged(config, records)
    names = [member.module for record in records for member in record.plan.members]
    if config.check_base and not any(name in layers for name in names):
        records = _renamed(model, layers, config, records)
    found = {name: place_of(layer) for name, layer in layers.items() if is_supported(layer)}

    def kind_of(name: str) -> str:
        return type(layers[name]).__name__ if name in layers else "no such target"

    for record in records:
        check_layers(record.plan, found, kind_of)
    return records


def _check_unchanged(config: TCURConfig, records: Sequence[StackRecord]) -> None:
    """Refuses a config without the ranks and alphas that its plan has."""
    for record, entry in zip(records, config.plan or (), strict=True):
        plan = record.plan
        ranks = [config.rank, *config.rank_pattern.values()]
        if plan.rank not in ranks:
            raise ValueError(
                f"rank: expected {plan.rank}, the rank of stack {plan.name} in the plan, got "
                f"{', '.join(map(str, ranks))}"
            )
        alphas = list(config.alpha_pattern.values())
        if "alpha" in entry and entry["alpha"] not in alphas:
            raise ValueError(
                f"alpha_pattern: expected {entry['alpha']}, the alpha of stack {plan.name} in the "
                f"plan, among its values, got {', '.join(map(str, alphas)) or 'none'}"
            )


def _renamed(
    model: nn.Module, layers: Layers, config: TCURConfig, records: tuple[StackRecord, ...]
) -> tuple[StackRecord, ...]:
    """The records with the names of this model's layers, if it has stacks of the same sizes."""
    here = make_plan(model, layers, config, strict=False).stacks
    there = [record.plan for record in records]
    sizes = [[(s.n1, s.n2, [m.slices for m in s.members]) for s in plan] for plan in (here, there)]
    if sizes[0] != sizes[1]:
        return records
    return tuple(
        replace(record, plan=replace(record.plan, members=own.members))
        for record, own in zip(records, here, strict=True)
    )


def build_stacks(
    plan: Plan,
    layers: Layers,
    config: TCURConfig,
    records: Sequence[StackRecord] | None,
) -> dict[str, AdapterStack]:
    """The stacks of a plan; no layer is changed.

    Args:
        records: the records of these stacks; None for new ones.

    Raises:
        ValueError: base weights are not finite, or are not those of the saved adapter.
    """
    found = {name: place_of(layer) for name, layer in layers.items() if is_supported(layer)}
    stacks = {}
    for index, entry in enumerate(plan.stacks):
        record = None if records is None else records[index]
        alpha = alpha_of(config, entry.members[0].module)
        if record is not None:
            assert config.plan is not None
            alpha = config.plan[index].get("alpha", config.alpha)
        stack = build_stack(
            AdapterStack,
            entry,
            found,
            rank=entry.rank,
            alpha=alpha,
            selection=config.selection if record is None else record.selection,
            mode=config.mode,
            precision=config.precision,
            basis=config.basis,
        )
        if record is not None and config.check_base and not _has_base_of(record, stack):
            raise ValueError(
                f"model: expected the base that the adapter was made for, got other weights in "
                f"stack {entry.name} ({stack.places[0].dtype}; check_base=False in the "
                "config loads all the same)"
            )
        if not config.init_weights:
            _draw(stack)
        stacks[entry.name] = stack
    return stacks


def _has_base_of(record: StackRecord, stack: AdapterStack) -> bool:
    """Whether C and R have the recorded numbers; the dtype may differ, since peft casts models."""
    return Fingerprint.of(stack.factors).sha256 == record.base.sha256


@torch.no_grad()
def _draw(stack: AdapterStack) -> None:
    """Draws a core such that the update of the first slice has half the norm of its weight."""
    stack.core.normal_()
    update = slice_update(stack.factors, stack.core, 0, scale=stack.scale)
    norms = stack.places[0].weight[: stack.n1].to(update.dtype).norm(), update.norm()
    if norms[1] > 0:  # alpha, or the weights, may be 0
        stack.core.mul_(0.5 * norms[0] / norms[1])


def records_of(
    plan: Plan, stacks: Mapping[str, AdapterStack], config: TCURConfig
) -> list[dict[str, Any]]:
    """What a saved adapter needs to rebuild its stacks, as values that JSON can hold.

    The rank of a stack is the number of its rows. Its alpha stands there if it is not
    ``config.alpha``. The patterns would not do: a file sorts their keys, so that another one could
    be the first that matches.
    """
    records = []
    for entry in plan.stacks:
        record = StackRecord.of(entry, stacks[entry.name]).as_json()
        alpha = alpha_of(config, entry.members[0].module)
        records.append(record if alpha == config.alpha else {**record, "alpha": alpha})
    return records


def _reasons_to_leave_out(
    model: nn.Module, layers: Layers
) -> tuple[dict[str, str], dict[str, str]]:
    """Reasons why layers cannot be adapted, by name: targeted layers, and all other modules."""
    names = {id(module): name for name, module in model.named_modules()}
    modules = {t: each for t, each in layers.items() if isinstance(each, nn.Module)}
    experts = {t: each for t, each in layers.items() if isinstance(each, TargetParameter)}
    held = {f"{names[id(e.module)]}.{e.key}": target for target, e in experts.items()}
    targets = {names[id(layer)]: target for target, layer in modules.items()}
    weights, reasons = {}, {}
    for name, module in model.named_modules():
        if is_attention(module):
            reasons[name] = "its projections are no layers that are called, as peft's have to be"
        if not is_supported(module):
            continue
        why = why_unreadable(module) if quantiser_of(module) else why_computed(module)
        if why is None:
            weights[name] = Weight(name, name, module, place_of(module))
            if has_other_forward(module):
                why = "its forward was replaced, so that it could not be adapted"
        if why is not None:
            reasons[name] = why
    # Named as trained, parameters of experts are no reason to leave out their module.
    known = reasons_to_leave_out(model, weights, set(held))
    known = {name: why for name, why in known.items() if why != TRAINED}
    of_experts = {
        name: Weight(name, name.rpartition(".")[0], experts[t].module, experts[t].place)
        for name, t in held.items()
    }
    refused = reasons_to_leave_out(model, of_experts, set())
    targets |= {name: target for name, target in held.items() if name in refused}
    reasons |= {name: why for name, why in refused.items() if name in held}
    for name, target in targets.items():
        if name not in weights and name not in reasons and name not in held:
            layer = modules[target]
            reasons[name] = f"{type(layer).__name__} is neither nn.Linear nor Conv1D"
            if parametrize.is_parametrized(layer) or why_packed(layer):
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
    """The records of stacks, kept up to date: loading a new base also changes C and R."""

    def __init__(self, plan: list[dict[str, Any]] | None, stacks: Sequence[AdapterStack]) -> None:
        self._plan, self._stacks = plan, stacks
        self._factors = [stack.factors for stack in stacks]

    @property
    def plan(self) -> list[dict[str, Any]] | None:
        """The plan as `records_of` gives it, with the present fingerprints."""
        if self._plan is None or torch.compiler.is_compiling():
            return self._plan
        now = [stack.factors for stack in self._stacks]
        if any(a is not b for a, b in zip(now, self._factors, strict=True)):
            self._factors = now
            entries = [
                {**entry, "dtype": base.dtype, "sha256": base.sha256}
                for entry, base in zip(self._plan, map(Fingerprint.of, now), strict=True)
            ]
            made_by = getattr(self._plan, "made_by", None)
            self._plan = entries if made_by is None else Recorded(entries, made_by)
        return self._plan
