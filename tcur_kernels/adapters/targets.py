"""Finds the layers that the ``targets`` of a user choose, by name, pattern, function or stack."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..layers.weights import PROJECTIONS
from .holding import is_reserved
from .linear_maps import Weight

#: None (all, grouped by shape), names or patterns, {stack name: names or patterns}, or a function
#: of a name and a module that returns whether to adapt it, or the name of its stack.
Targets = (
    None
    | str
    | Sequence[str]
    | Mapping[str, str | Sequence[str]]
    | Callable[[str, nn.Module], bool | str | None]
)

_Chosen = list[str] | dict[str, list[str]]

#: Characters that match others.
_WILD = set("*?[")


def choose(
    model: nn.Module, weights: Mapping[str, Weight], reasons: dict[str, str], targets: Targets
) -> tuple[_Chosen, set[str]]:
    """Names of the layers that the targets choose, in the model's order; or such names by stack.

    Also returns the names of layers that the targets match but that cannot be adapted. What is
    adapted only where targets name it, and is not named, is added to ``reasons``.
    """
    if targets is None:
        for name, weight in weights.items():
            if weight.is_only_named:
                reasons.setdefault(name, _not_named(weight))
        maps = [name for name, weight in weights.items() if not weight.is_of_experts]
        return maps, reasons.keys() - (weights.keys() - maps)
    if isinstance(targets, Mapping):
        for stack in targets:
            _check_stack_name(stack)
        by_stack, considered = {}, set()
        for stack, patterns in targets.items():
            argument = f"targets[{stack!r}]"
            by_stack[stack], met = _match(argument, model, weights, reasons, patterns)
            considered |= met
        return by_stack, considered
    if callable(targets):
        return _called(targets, model, weights, reasons)
    return _match("targets", model, weights, reasons, targets)


def _not_named(weight: Weight) -> str:
    kind = type(weight.module).__name__
    return f"{kind} is not a linear layer (targets may name it)"


def _check_stack_name(stack: Any) -> None:
    if not isinstance(stack, str) or not stack.isidentifier():
        raise ValueError(f"targets: expected identifiers as stack names, got {stack!r}")
    if is_reserved(stack):
        raise ValueError(f"targets: expected a stack name that is free, got {stack!r}")


def _match(
    argument: str,
    model: nn.Module,
    weights: Mapping[str, Weight],
    reasons: Mapping[str, str],
    targets: str | Sequence[str],
) -> tuple[list[str], set[str]]:
    """Names of the linear layers that the targets match; see `choose`.

    Raises:
        TypeError, ValueError: a target matches no layer that can be adapted; the message says why.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    names: dict[str, str] = {name: name for name in (*modules, *weights, *reasons)}
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention) and name in reasons:
            # An attention that is left out has no entries for its projections, but the user may
            # still name them.
            names |= {f"{name}.{part}": name for part in (*PROJECTIONS, "out_proj")}
    chosen: set[str] = set()
    considered: set[str] = set()
    if not isinstance(targets, Iterable):
        raise TypeError(f"{argument}: expected names or patterns, got {type(targets).__name__}")
    for target in [targets] if isinstance(targets, str) else targets:
        if not isinstance(target, str):
            raise TypeError(f"{argument}: expected names or patterns, got {type(target).__name__}")
        found = {own for name, own in names.items() if _matches(name, target)}
        if _WILD & set(target.rpartition(".")[2]):  # a parameter is meant only by its own name
            found -= {name for name, weight in weights.items() if weight.is_of_experts}
        if not found:
            _refuse_parameter(argument, model, target)
            raise ValueError(f"{argument}: expected a module that matches {target!r}, got none")
        # The name of an attention stands for all its projections.
        linear = [
            n
            for n, weight in weights.items()
            if n in found or (weight.owner in found and not weight.is_of_experts)
        ]
        met = [name for name in reasons if name in found or name in linear]
        why = "; ".join(f"{name}: {reasons[name]}" for name in met[:5])
        if not linear:
            parts = [model.get_submodule(n) for n in names if n in found and n in modules]
            kinds = sorted({type(part).__name__ for part in parts} or {"a parameter"})
            several = any(isinstance(part, nn.Linear) for part in parts)
            expected = "a plain nn.Linear" if several else "nn.Linear"
            raise TypeError(
                f"{argument}: expected {target!r} to match {expected}, got {', '.join(kinds)}"
                + (f" ({why})" if why else "")
            )
        if set(linear) <= set(met):
            raise ValueError(
                f"{argument}: expected {target!r} to match a layer that can be adapted, got none "
                f"({why})"
            )
        chosen |= set(linear)
        considered |= set(met)
    return [name for name in weights if name in chosen], considered


def _refuse_parameter(argument: str, model: nn.Module, target: str) -> None:
    """Refuses a target that names no module, but a parameter without a matrix for each expert."""
    for name, parameter in model.named_parameters():
        if _matches(name, target):
            raise TypeError(
                f"{argument}: expected {target!r} to match a linear layer or a parameter [experts, "
                f"n1, n2], got {name} {list(parameter.shape)}"
            )


def _matches(name: str, target: str) -> bool:
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")


def _called(
    function: Callable[[str, nn.Module], bool | str | None],
    model: nn.Module,
    weights: Mapping[str, Weight],
    reasons: dict[str, str],
) -> tuple[_Chosen, set[str]]:
    """What a function chose: names, or names by stack; see `choose`.

    The function is also asked about subclasses of ``nn.Linear`` that cannot be adapted. If it
    chooses one, the plan says why it is left out. So it does for a convolution or a parameter of
    experts that the function does not mean, see `_meant`. Of parameters with three axes it is asked
    about those that hold several matrices.
    """
    asked = {
        name: weight.module
        for name, weight in weights.items()
        if not weight.is_of_experts or min(weight.place.stored.shape) > 1
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | _ConvNd) and name in reasons:
            asked[name] = module
    chosen: list[str] = []
    not_meant: set[str] = set()
    by_stack: dict[str, list[str]] = defaultdict(list)
    for name, module in asked.items():
        others = _others(name, module, weights.get(name))
        answer, why = _meant(function, name, module, others) if others else (None, None)
        if why is not None:
            reasons.setdefault(name, f"{type(module).__name__} is not a linear layer ({why})")
            not_meant.add(name)
            continue
        if not others:
            answer = function(name, module)
        if isinstance(answer, str):
            _check_stack_name(answer)
            by_stack[answer].append(name)
        elif answer is True:
            chosen.append(name)
        elif answer is not None and answer is not False:
            raise TypeError(
                f"targets: expected the function to return a bool, a stack name or None, got "
                f"{type(answer).__name__} for {name}"
            )
    if by_stack and chosen:
        raise ValueError(
            f"targets: expected the function to name a stack for all layers or for none, got none "
            f"for {chosen[0]}"
        )
    named = {name for names in by_stack.values() for name in names}
    return dict(by_stack) or chosen, (named | set(chosen) | not_meant) & set(reasons)


def _others(name: str, module: nn.Module, weight: Weight | None) -> list[tuple[str, nn.Module]]:
    """What a function is asked about beside a convolution or a parameter of experts; see `_meant`.

    For a convolution these are modules of the same name. For a parameter it is an empty module in
    place of its own, and another parameter of its own.
    """
    if isinstance(module, _ConvNd):
        return [(name, nn.Linear(1, 1, device="meta")), (name, nn.Module())]
    if weight is not None and weight.is_of_experts:
        return [(name, nn.Module()), (f"{weight.owner}.weight", module)]
    return []


def _meant(
    function: Callable[[str, nn.Module], Any],
    name: str,
    module: nn.Module,
    others: list[tuple[str, nn.Module]],
) -> tuple[Any, str | None]:
    """What a function says of something that is no linear layer; and why that does not count.

    Functions from before anything else could be adapted choose by a name within which it happens to
    be, or look at attributes of a linear layer. So a choice counts if the function says something
    else of one of the others.
    """
    try:
        answer = function(name, module)
    except AttributeError as error:
        return None, f"targets failed on it, which says that it is not meant: {error}"
    if answer is not True and not isinstance(answer, str):
        return answer, None
    try:
        if any(function(*other) != answer for other in others):
            return answer, None
    except Exception:  # it looked for something that these do not have
        return answer, None
    return answer, "targets chose it by its name alone; check its type, too, to adapt it"
