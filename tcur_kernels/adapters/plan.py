"""Plans which layers of a model are adapted, in which stacks and order, and which are not."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor, nn

from ..decompose.slices import check_rank
from ..layers.convolution import described, kind_of, kinds_in_short
from ..layers.quantised import Form, Numbers
from .folding import layers_in_short
from .holding import is_reserved
from .linear_maps import Weight, find_weights, is_fused, reasons_to_leave_out
from .targets import Targets as Targets
from .targets import choose

#: How layers are grouped into stacks, unless the targets name the stacks.
StacksBy = Literal["shape", "layer"]
STACKS_BY: tuple[StacksBy, ...] = get_args(StacksBy)

#: If no more modules than these are left out, a printed plan names each. Of more it counts those
#: of the most frequent reasons, up to this many reasons.
_LISTED, _REASONS = 3, 4

_ALL_ZERO = "all weights of its stack are zero: C and R would be, and the core could never learn"

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Member:
    """A layer in a stack: the dotted name of its module and how many slices it takes.

    ``matrix`` says what its matrix is if it is not the weight of a linear layer.
    """

    module: str
    slices: int
    matrix: str = field(default="", compare=False)


@dataclass(frozen=True)
class StackPlan:
    """One stack: its name, the size of its slices, its layers in the order of these, its rank.

    ``note`` tells the reader of the plan how its layers run, and why. If that ``is_special``, not
    just a matter of the number of tokens, the printed plan has the note, too. If a `Budget` gave
    the rank, ``caught`` is the part of the gradient's energy that this rank catches.
    """

    name: str
    n1: int
    n2: int
    members: tuple[Member, ...]
    rank: int
    note: str = ""
    is_special: bool = False
    caught: float | None = None

    @property
    def n3(self) -> int:
        """The number of slices."""
        return sum(member.slices for member in self.members)


@dataclass(frozen=True)
class LeftOut:
    """A module that holds matrices and is not adapted.

    For a bare parameter of the model itself, ``module`` is the name of the parameter.
    """

    module: str
    reason: str


@dataclass(frozen=True, repr=False)
class Plan:
    """The ordered stacks, and what was left out.

    ``print(plan)`` shows both in few lines: names that differ in numbers alone are folded, as in
    ``blocks.0-11.mlp``. `describe` names every layer.
    """

    stacks: tuple[StackPlan, ...]
    left_out: tuple[LeftOut, ...] = ()

    def describe(self) -> str:
        """Every layer with its slices, in their order, and every module left out with the reason.

        Each stack has its rank and how its layers run, and why.
        """
        lines = []
        for stack in self.stacks:
            head = f"stack {stack.name}: {stack.n3} slices of {stack.n1} x {stack.n2}"
            rank = f"rank {stack.rank}{_caught(stack)}"
            lines.append(", ".join([head, rank, *([stack.note] * bool(stack.note))]))
            index = 0
            for member in stack.members:
                last = index + member.slices - 1
                where = f"{index}" if member.slices == 1 else f"{index}-{last}"
                what = f" ({member.matrix})" if member.matrix else ""
                lines.append(f"  {where:>7}  {member.module}{what}")
                index += member.slices
        return "\n".join([*lines, *self._each_left_out()])

    def __repr__(self) -> str:
        layers = sum(len(stack.members) for stack in self.stacks)
        return (
            f"Plan({len(self.stacks)} stacks of {layers} layers, {len(self.left_out)} modules left "
            "out; print it for the names)"
        )

    def __str__(self) -> str:
        lines = [_in_one_line(stack) for stack in self.stacks]
        if len(self.left_out) <= _LISTED:
            return "\n".join([*lines, *self._each_left_out()])
        counts = Counter(item.reason for item in self.left_out).most_common()
        counted = [f"{count} x {reason}" for reason, count in counts[:_REASONS]]
        others = sum(count for _, count in counts[_REASONS:])
        if others:
            counted.append(f"{others} for other reasons")
        lines.append(
            f"left out: {len(self.left_out)} modules, which plan.describe() names: "
            f"{'; '.join(counted)}"
        )
        return "\n".join(lines)

    def _each_left_out(self) -> list[str]:
        each = [f"  {item.module}: {item.reason}" for item in self.left_out]
        return ["left out:", *each] if each else []


def _caught(stack: StackPlan) -> str:
    """What the rank catches, if a budget gave it."""
    return "" if stack.caught is None else f", which catches {stack.caught:.2%} of the gradient"


def _in_one_line(stack: StackPlan) -> str:
    """A stack with the names of its layers folded, in the order of their first slices."""
    n3, rank = stack.n3, stack.rank
    kinds = kinds_in_short([member.matrix for member in stack.members])
    size = f"{stack.n1} x {stack.n2}{f' ({kinds})' if kinds else ''}"
    what = f"{n3} matrices of {size} share one core"
    if n3 == 1:
        what = f"1 matrix of {size} has a core"
    listed = ", ".join(layers_in_short({m.module: m.slices for m in stack.members}))
    line = f"stack {stack.name}: {what} of {n3} x {rank} x {rank} numbers{_caught(stack)}: {listed}"
    return f"{line}; {stack.note}" if stack.is_special else line


def make_plan(
    model: nn.Module,
    targets: Targets,
    rank: int | Mapping[str, int],
    trained: Iterable[str] = (),
    stacks: StacksBy = "shape",
    loaded: bool = True,
) -> Plan:
    """Groups the linear layers of ``model``, and the convolutions that targets name, into stacks.

    Linear layers are plain ``nn.Linear``, GPT-2's ``Conv1D`` (recognised by its type), and the
    projections of ``nn.MultiheadAttention``. A projection is named ``q_proj``, ``k_proj``,
    ``v_proj`` or ``out_proj`` after the name of its attention. Without ``targets`` all linear
    layers are taken, and fused q, k, v projections are cut into three slices. Layers with the same
    slice shape, dtype and device form a stack, in the order in which the model registers them.

    Torch's convolutions are taken only where ``targets`` names them. Their weights are matrices
    ``[out, in / groups * kernel]``, those of transposed ones ``[in, out / groups * kernel]``. They
    form stacks with others of the same kernel shape. With a kernel of one point they are linear
    layers.

    ``targets`` restricts the layers by name. It can also name parameters ``[experts, n1, n2]`` of
    other modules; such a parameter takes a slice for each expert. If it is a mapping, it also says
    which layers share a stack, and in which order.

    Args:
        model: any module.
        targets: see above. A name matches a module by its whole dotted name, by the part of it
            after some dot (``"attn.qkv"``), or as a pattern for either (``"vit.*.mlp.linear?"``). A
            function is called with the name and the module of each linear layer and convolution,
            and with the name of each parameter of experts and the module that holds it. It returns
            whether to adapt it, or the name of the stack to put it in. Its choice of a convolution
            counts only if it answers differently for other modules of that name, a linear layer or
            an empty one.
        rank: one rank, checked for every stack; or ``{stack name or pattern: rank}``.
        trained: names of parameters that are trained directly; their layers are left out.
        stacks: "shape", or "layer", which makes each layer a stack of its own, uncut (matrix CUR);
            a parameter of experts keeps a slice for each expert.
        loaded: False if the weights are not loaded yet (on the meta device).

    Raises:
        TypeError: a target matches no linear layer.
        ValueError: a target matches nothing, or no layer that can be adapted (the message gives the
            reasons); or no layer is left to adapt.
    """
    if stacks not in STACKS_BY:
        raise ValueError(f"stacks: expected one of {', '.join(STACKS_BY)}, got {stacks!r}")
    weights = find_weights(model)
    reasons = reasons_to_leave_out(model, weights, set(trained), loaded)
    chosen, considered = choose(model, weights, reasons, targets)
    if isinstance(chosen, dict):
        if stacks == "layer":
            raise ValueError("stacks: expected 'shape' where targets name the stacks, got 'layer'")
        groups = _named_groups(chosen, weights, reasons)
    else:
        taken = {name: weights[name].form for name in chosen if name not in reasons}
        kinds = {name: kind_of(weights[name].module) for name in taken}
        groups = groups_of(taken, stacks, kinds, experts_of(weights))
    planned, left_out = plan_groups(
        groups,
        Numbers({name: weight.place for name, weight in weights.items()}),
        lambda stack: setting("rank", rank, stack),
        argument="targets",
        stacks=stacks,
        insists=targets is not None,
        is_loaded=loaded,
    )
    left_out += [LeftOut(n, reason) for n, reason in reasons.items() if n in considered]
    if not planned:
        why = "; ".join(f"{item.module}: {item.reason}" for item in left_out[:5])
        raise ValueError(
            "targets: expected at least one nn.Linear that can be adapted, got none"
            + (f" ({why})" if why else "")
        )
    check_setting("rank", rank, planned)
    modules = {name: weight.module for name, weight in weights.items()}
    planned = [with_matrices(stack, modules) for stack in planned]
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}

    def registered(item: LeftOut) -> int:
        weight = weights.get(item.module)
        # A name that is not a module is a parameter of the model itself, which comes first.
        return order.get(item.module if weight is None else weight.owner, -1)

    return Plan(tuple(planned), tuple(sorted(left_out, key=registered)))


def plan_groups(
    groups: Iterable[_Group],
    weights: Mapping[str, Tensor],
    rank_of: Callable[[str], int],
    *,
    argument: str,
    stacks: StacksBy,
    insists: bool,
    is_loaded: bool,
) -> tuple[list[StackPlan], list[LeftOut]]:
    """The groups that can be stacks; and the layers of the other groups, with the reason.

    Args:
        groups: from `groups_of`, or named by the caller.
        weights: name of a layer -> its weight ``[out, in]``.
        rank_of: stack name -> its rank.
        argument: the name of the argument that chose the layers, for errors.
        stacks: how the groups were made. If "shape", a group of a single slice is left out.
        insists: the caller asked for these layers, so raise an error instead of leaving them out.
        is_loaded: whether the weights are loaded.

    Raises:
        ValueError: the caller insists, and the rank is too large for a stack or all its weights
            are zero.
    """
    planned: list[StackPlan] = []
    left_out: list[LeftOut] = []
    for name, (n1, n2), members in groups:
        rank, why = rank_of(name), None
        stack = StackPlan(name, n1, n2, tuple(members), rank)
        if stacks == "shape" and stack.n3 == 1:
            why = "the only slice of its shape"
        elif not 1 <= rank <= min(n1, n2):
            why = f"rank {rank} exceeds min({n1}, {n2})"
        if why is None or insists:
            check_rank(f"stack {name}: rank", rank, n1, n2)
            why = None
            if is_loaded and not any(bool(weights[m.module].detach().any()) for m in members):
                why = _ALL_ZERO
                if insists:
                    raise ValueError(
                        f"{argument}: expected weights that are not all zero in stack {name}, got "
                        f"zeros in {', '.join(member.module for member in members[:5])}: {why}"
                    )
        if why is None:
            planned.append(stack)
        else:
            left_out += [LeftOut(member.module, why) for member in members]
    return planned, left_out


def setting(argument: str, value: _Value | Mapping[str, _Value], stack: str) -> _Value:
    """The value for one stack of an argument that may be ``{stack name or pattern: value}``.

    Raises:
        ValueError: the mapping has no value for that stack.
    """
    if not isinstance(value, Mapping):
        return value
    if stack in value:
        return value[stack]
    for pattern, own in value.items():
        if fnmatchcase(stack, pattern):
            return own
    raise ValueError(f"{argument}: expected a value for stack {stack!r}, got {list(value)}")


def check_setting(argument: str, value: Any, stacks: Iterable[StackPlan]) -> None:
    """Refuses a mapping with a name or pattern that matches no stack."""
    if not isinstance(value, Mapping):
        return
    names = [stack.name for stack in stacks]
    for pattern in value:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{argument}: expected names or patterns of stacks ({', '.join(names)}), got "
                f"{pattern!r}"
            )


_Group = tuple[str, tuple[int, int], list[Member]]


def with_matrices(stack: StackPlan, modules: Mapping[str, nn.Module]) -> StackPlan:
    """The entry of a stack in which each layer says what its matrix is, if it is a convolution."""
    members = [replace(m, matrix=described(modules[m.module])) for m in stack.members]
    return replace(stack, members=tuple(members))


def experts_of(weights: Mapping[str, Weight]) -> dict[str, int]:
    """Name of a parameter with a matrix for each expert -> how many experts it has."""
    return {n: w.place.stored.shape[0] for n, w in weights.items() if w.is_of_experts}


def groups_of(
    weights: Mapping[str, Tensor | Form],
    stacks: StacksBy,
    kinds: Mapping[str, str] | None = None,
    experts: Mapping[str, int] | None = None,
) -> list[_Group]:
    """Groups weights [out, in] by one of `STACKS_BY`; returns names, slice sizes and members.

    Args:
        kinds: weights of different kinds do not share a stack; by default there is one kind. Those
            that are quantised, or quantised in another way, are of another kind in any case.
        experts: see `experts_of`.
    """
    if stacks == "shape":
        return _groups_by_shape(weights, kinds or {}, experts or {})
    return _groups_by_layer(weights, experts or {})


def _groups_by_shape(
    weights: Mapping[str, Tensor | Form], kinds: Mapping[str, str], experts: Mapping[str, int]
) -> list[_Group]:
    """Groups weights [out, in] of one slice shape, kind, dtype and device, in their order."""
    groups: dict[tuple[Any, ...], list[Member]] = defaultdict(list)
    for name, weight in weights.items():
        slices = experts.get(name) or _slices_of(name, weight)
        n1, n2 = weight.shape[0] // slices, weight.shape[1]
        kind = (kinds.get(name, ""), weight.kind if isinstance(weight, Form) else "")
        groups[n1, n2, kind, weight.dtype, weight.device].append(Member(name, slices))
    named: list[_Group] = []
    for (n1, n2, *_), members in groups.items():
        name = f"{n1}x{n2}"
        same = sum(other == name or other.startswith(f"{name}_") for other, _, _ in named)
        named.append((f"{name}_{same + 1}" if same else name, (n1, n2), members))
    return named


def _groups_by_layer(
    weights: Mapping[str, Tensor | Form], experts: Mapping[str, int]
) -> list[_Group]:
    """Makes every weight [out, in] a stack of one slice, or one for each expert; named after it."""
    named: list[_Group] = []
    taken: set[str] = set()
    for name, weight in weights.items():
        # Two underscores separate the name of a stack from that of a core, so allow only one here.
        own = key = re.sub(r"[._]+", "_", name)
        number = 1
        while key in taken or is_reserved(key):
            number += 1
            key = f"{own}_{number}"
        taken.add(key)
        slices = experts.get(name, 1)
        n1, n2 = weight.shape[0] // slices, weight.shape[1]
        named.append((key, (n1, n2), [Member(name, slices)]))
    return named


def _slices_of(name: str, weight: Tensor | Form) -> int:
    return 3 if is_fused(name) and weight.shape[0] == 3 * weight.shape[1] else 1


def _named_groups(
    chosen: Mapping[str, list[str]], weights: Mapping[str, Weight], reasons: Mapping[str, str]
) -> list[_Group]:
    groups: list[_Group] = []
    taken: dict[str, str] = {}
    experts = experts_of(weights)
    for stack, names in chosen.items():
        for name in names:
            if name in taken:
                raise ValueError(
                    f"targets: expected each module in one stack, got {name} in "
                    f"{taken[name]!r} and {stack!r}"
                )
            taken[name] = stack
        own = {n: weights[n].form for n in names if n not in reasons}
        if not own:
            why = "; ".join(f"{n}: {reasons[n]}" for n in names)
            raise ValueError(
                f"targets[{stack!r}]: expected a layer that can be adapted, got none ({why})"
            )
        groups.append(_one_group(stack, own, experts))
    return groups


def _one_group(
    stack: str, weights: Mapping[str, Tensor | Form], experts: Mapping[str, int]
) -> _Group:
    """One stack of layers that the targets put together, cut into slices of the smallest size."""
    slices = {name: experts.get(name) or _slices_of(name, w) for name, w in weights.items()}
    n1 = min(weight.shape[0] // slices[name] for name, weight in weights.items())
    n2 = next(iter(weights.values())).shape[1]
    first, like = next(iter(weights.items()))
    for name, weight in weights.items():
        if (weight.dtype, weight.device) != (like.dtype, like.device):
            raise ValueError(
                f"targets[{stack!r}]: expected one dtype and device, got {like.dtype} on "
                f"{like.device} in {first}, {weight.dtype} on {weight.device} in {name}"
            )
        rows = weight.shape[0] // experts.get(name, 1)  # no slice has rows of two experts
        if weight.shape[1] != n2 or rows % n1:
            raise ValueError(
                f"targets[{stack!r}]: expected layers made of {n1} x {n2} slices, got {name} "
                f"of {rows} x {weight.shape[1]}"
            )
    members = [Member(name, weight.shape[0] // n1) for name, weight in weights.items()]
    return stack, (n1, n2), members
