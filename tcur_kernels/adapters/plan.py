"""Which layers of a model are adapted, in which stacks and order; which are not, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..decompose import check_rank

#: None (all, grouped by shape), names or patterns, or {stack name: names or patterns}.
Targets = None | str | Sequence[str] | Mapping[str, str | Sequence[str]]

#: Last components of the names that projections of q, k and v in one matrix go by. Only a name can
#: tell: a projection to three times the width is no reason to cut it.
_FUSED_QKV = ("qkv", "qkv_proj", "Wqkv", "in_proj", "query_key_value", "c_attn")


@dataclass(frozen=True)
class Member:
    """A layer in a stack: the dotted name of its module and how many slices it takes."""

    module: str
    slices: int


@dataclass(frozen=True)
class StackPlan:
    """One stack: its name, the size of its slices, and its layers in the order of the slices."""

    name: str
    n1: int
    n2: int
    members: tuple[Member, ...]

    @property
    def n3(self) -> int:
        """Number of slices."""
        return sum(member.slices for member in self.members)


@dataclass(frozen=True)
class LeftOut:
    """A module that could have been adapted and is not."""

    module: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Ordered stacks and what was left out; ``print(plan)`` shows both."""

    stacks: tuple[StackPlan, ...]
    left_out: tuple[LeftOut, ...] = ()

    def __str__(self) -> str:
        lines = []
        for stack in self.stacks:
            head = f"stack {stack.name}: {stack.n3} slices of {stack.n1} x {stack.n2}"
            lines.append(head)
            index = 0
            for member in stack.members:
                last = index + member.slices - 1
                where = f"{index}" if member.slices == 1 else f"{index}-{last}"
                lines.append(f"  {where:>7}  {member.module}")
                index += member.slices
        if self.left_out:
            lines.append("left out:")
            lines += [f"  {item.module}: {item.reason}" for item in self.left_out]
        return "\n".join(lines)


def make_plan(model: nn.Module, targets: Targets, rank: int, trained: Iterable[str] = ()) -> Plan:
    """Groups the linear layers of ``model`` into stacks.

    Without ``targets`` every plain ``nn.Linear`` is taken, fused q, k, v projections are cut into
    three slices, and layers of one slice shape, dtype and device form a stack in the order in which
    the model registers them. ``targets`` restricts the layers by name; as a mapping it also says
    which of them share a stack, and in which order.

    Args:
        model: any module.
        targets: see above. A name matches a module by its whole dotted name, by the end of it
            after a dot (``"attn.qkv"``), or as a pattern of either (``"vit.*.mlp.linear?"``).
        rank: checked against every stack.
        trained: names of parameters that are trained directly; their layers are left out.

    Raises:
        TypeError: a target that is no ``nn.Linear``.
        ValueError: a target that matches nothing, or in no stack, or no layer left to adapt.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    reasons = _reasons_to_leave_out(model, modules, set(trained))
    linears = {name: m for name, m in modules.items() if is_plain_linear(m)}
    if isinstance(targets, Mapping):
        groups, considered = _groups_by_mapping(modules, targets, reasons)
    else:
        chosen = list(linears) if targets is None else _match("targets", modules, targets)
        groups = _groups_by_shape({name: linears[name] for name in chosen}, reasons)
        considered = set(reasons) if targets is None else set(chosen)

    stacks, left_out = [], []
    for key, (n1, n2), members in groups:
        alone = sum(member.slices for member in members) == 1
        too_small = not 1 <= rank <= min(n1, n2)
        if targets is None and (alone or too_small):
            reason = (
                "the only slice of its shape" if alone else f"rank {rank} exceeds min({n1}, {n2})"
            )
            left_out += [LeftOut(member.module, reason) for member in members]
            continue
        check_rank("rank", rank, n1, n2)
        stacks.append(StackPlan(key, n1, n2, tuple(members)))
    left_out += [LeftOut(n, reason) for n, reason in reasons.items() if n in considered]
    if not stacks:
        why = "; ".join(f"{item.module}: {item.reason}" for item in left_out[:5])
        raise ValueError(
            "targets: expected at least one nn.Linear that can be adapted, got none"
            + (f" ({why})" if why else "")
        )
    order = {name: index for index, name in enumerate(modules)}
    return Plan(tuple(stacks), tuple(sorted(left_out, key=lambda item: order[item.module])))


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module is an ``nn.Linear`` and no subclass of it."""
    # By exact type: subclasses (the output projection of nn.MultiheadAttention, quantised layers)
    # are often used without their forward.
    return type(module) is nn.Linear


def _reasons_to_leave_out(
    model: nn.Module, modules: dict[str, nn.Module], trained: set[str]
) -> dict[str, str]:
    """Linear layers that no stack can take, with the reason."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    reasons = {}
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight
        if not is_plain_linear(module):
            reasons[name] = f"{type(module).__name__} is not a plain nn.Linear"
        elif len(owners[id(weight)]) > 1:
            reasons[name] = f"its weight is tied: {', '.join(owners[id(weight)])}"
        elif {f"{name}.weight", f"{name}.bias"} & trained:
            reasons[name] = "trained directly (train_also)"
        elif not weight.dtype.is_floating_point:
            reasons[name] = f"its weight is {weight.dtype}"
    return reasons


def _match(argument: str, modules: dict[str, nn.Module], targets: str | Sequence[str]) -> list[str]:
    """Names of the linear layers that the targets match, each target at least one."""
    chosen: dict[str, None] = {}
    for target in [targets] if isinstance(targets, str) else targets:
        if not isinstance(target, str):
            raise TypeError(f"{argument}: expected names or patterns, got {type(target).__name__}")
        found = [n for n in modules if fnmatchcase(n, target) or fnmatchcase(n, f"*.{target}")]
        if not found:
            raise ValueError(f"{argument}: expected a module that matches {target!r}, got none")
        linear = [name for name in found if isinstance(modules[name], nn.Linear)]
        if not linear:
            kinds = ", ".join(sorted({type(modules[name]).__name__ for name in found}))
            raise TypeError(f"{argument}: expected {target!r} to match nn.Linear, got {kinds}")
        unsupported = [name for name in linear if not is_plain_linear(modules[name])]
        if len(unsupported) == len(linear):
            kinds = ", ".join(sorted({type(modules[name]).__name__ for name in unsupported}))
            raise TypeError(
                f"{argument}: expected {target!r} to match a plain nn.Linear, got {kinds}"
            )
        chosen.update(dict.fromkeys(name for name in linear if is_plain_linear(modules[name])))
    return [name for name in modules if name in chosen]


def _slices_of(name: str, linear: nn.Linear) -> int:
    fused = name.rpartition(".")[2] in _FUSED_QKV and linear.out_features == 3 * linear.in_features
    return 3 if fused else 1


_Group = tuple[str, tuple[int, int], list[Member]]


def _groups_by_shape(linears: dict[str, nn.Linear], reasons: dict[str, str]) -> list[_Group]:
    groups: dict[tuple[int, int, torch.dtype, torch.device], list[Member]] = defaultdict(list)
    for name, linear in linears.items():
        if name not in reasons:
            slices = _slices_of(name, linear)
            weight = linear.weight
            n1, n2 = linear.out_features // slices, linear.in_features
            groups[n1, n2, weight.dtype, weight.device].append(Member(name, slices))
    named: list[_Group] = []
    for (n1, n2, _, _), members in groups.items():
        name = f"{n1}x{n2}"
        same = sum(other == name or other.startswith(f"{name}_") for other, _, _ in named)
        named.append((f"{name}_{same + 1}" if same else name, (n1, n2), members))
    return named


def _groups_by_mapping(
    modules: dict[str, nn.Module],
    targets: Mapping[str, str | Sequence[str]],
    reasons: dict[str, str],
) -> tuple[list[_Group], set[str]]:
    """The groups, and the names of all layers that the mapping matches."""
    groups: list[_Group] = []
    taken: dict[str, str] = {}
    for stack, patterns in targets.items():
        if not isinstance(stack, str) or not stack.isidentifier():
            raise ValueError(f"targets: expected identifiers as stack names, got {stack!r}")
        if hasattr(nn.ModuleDict, stack):
            raise ValueError(f"targets: expected a stack name that is free, got {stack!r}")
        names = _match(f"targets[{stack!r}]", modules, patterns)
        for name in names:
            if name in taken:
                raise ValueError(
                    f"targets: expected each module in one stack, got {name} in "
                    f"{taken[name]!r} and {stack!r}"
                )
            taken[name] = stack
        linears = {n: modules[n] for n in names if n not in reasons}
        if not linears:
            raise ValueError(
                f"targets[{stack!r}]: expected a layer that can be adapted, got none ("
                + "; ".join(f"{n}: {reasons[n]}" for n in names)
                + ")"
            )
        groups.append(_one_group(stack, linears))
    return groups, set(taken)


def _one_group(stack: str, linears: dict[str, nn.Module]) -> _Group:
    """One stack of layers named together: cut to the smallest slice among them."""
    layers = {name: module for name, module in linears.items() if isinstance(module, nn.Linear)}
    n1 = min(layer.out_features // _slices_of(name, layer) for name, layer in layers.items())
    n2 = next(iter(layers.values())).in_features
    kinds = {(layer.weight.dtype, layer.weight.device) for layer in layers.values()}
    if len(kinds) > 1:
        raise ValueError(f"targets[{stack!r}]: expected one dtype and device, got {kinds}")
    for name, layer in layers.items():
        if layer.in_features != n2 or layer.out_features % n1:
            raise ValueError(
                f"targets[{stack!r}]: expected layers made of {n1} x {n2} slices, got {name} "
                f"of {layer.out_features} x {layer.in_features}"
            )
    members = [Member(name, layer.out_features // n1) for name, layer in layers.items()]
    return stack, (n1, n2), members
