"""One line to adapt a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer

from ..decompose import Selection
from ..decompose.slices import MAX_WORKSPACE
from ..layers.stack import TProductStack
from ..operators import cost
from .adapter import Adapter
from .build import build_stack, errors_named
from .fingerprint import persistent_buffers
from .holding import PREFIXES
from .install import is_adapted, put_in_place
from .linear_maps import find_places
from .plan import Plan, Targets, check_setting, make_plan, setting
from .streaming import BaseFiles, on_meta
from .train_also import trained_names


def adapt(
    model: nn.Module,
    targets: Targets = None,
    rank: int | Mapping[str, int] = 8,
    alpha: float | Mapping[str, float] = 1.0,
    selection: Selection | Mapping[str, Selection] = "norm",
    mode: str = "auto",
    train_also: str | Sequence[str] = (),
    precision: str = "ieee",
    stacks: str = "shape",
    generator: torch.Generator | None = None,
    weights: str | Path | None = None,
    max_workspace: int = MAX_WORKSPACE,
    progress: bool = False,
) -> Adapter:
    """Adapts ``model`` in place by tCURLoRA: only cores, and what ``train_also`` names, train.

    Linear layers of one shape form a stack; C and R are slices of the stacked base weights, and the
    core of each stack starts at zero, so the model computes exactly what it did. The
    base weights are never written. Modules stay the objects that they were; ``layer.weight`` reads
    as W_eff, ``layer.base_weight`` is the base. The cores are parameters of the model, under
    ``tcur.<stack>`` (``tcur_<stack>`` in a container); everything else is frozen.

    Args:
        model: any module that holds ``nn.Linear``, GPT-2's ``Conv1D`` or ``nn.MultiheadAttention``.
        targets: None, all of them by shape; names or patterns of layers; a function of name and
            module; or ``{stack name: [names or patterns]}``. See `adapters.plan.make_plan`.
        rank: tubal rank r of C, U and R. Like ``alpha`` and ``selection`` one for all stacks, or
            ``{stack name or pattern: value}``.
        alpha: scale of the update.
        selection: rule for the slices, by name, a callable, or indices; see `tensor_cur`.
        mode: "auto", "materialized" (W_eff once per step) or "factored" (through the factors).
        train_also: names or patterns of parameters or modules to train beside the cores, matched
            against whole names: ``"out"`` is the module called ``out`` and no other.
        precision: of the products of tokens with the factors, "ieee" or "bf16" (operands rounded:
            faster, at an error of the gradient of about 4e-3); see `TProductStack`.
        stacks: "shape", or "layer": every layer is a stack by itself. The t-product of one slice is
            the matrix product, so ``stacks="layer", selection="inverse"`` is CURLoRA.
        generator: slices are drawn with it, see `tensor_cur`.
        weights: for a model on the meta device: the safetensors file, or the directory of them,
            that holds its weights. They are read block by block to choose slices, C and R, and are
            not loaded: that is up to the caller, before the model runs.
        max_workspace: bytes used at most while slices of one stack are chosen.
        progress: shows a bar for every pass over the weights.

    Returns:
        The `Adapter`: plan, parameters, save, merge, unmerge, disable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. The model is
            then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if is_adapted(model):
        raise ValueError("model: expected a base model, got one that is adapted already")
    ranks = list(rank.values()) if isinstance(rank, Mapping) else [rank]
    if not isinstance(mode, str) or not all(type(one) is int for one in ranks):
        raise TypeError(f"rank, mode: expected an int and a str, got {rank!r} and {mode!r}")
    for name, buffer in model.named_buffers():
        if isinstance(buffer, UninitializedBuffer):
            raise ValueError(
                f"model: expected buffers with values, got {name} that is not initialised yet: run "
                "a batch through the model first"
            )
    patterns = (train_also,) if isinstance(train_also, str) else tuple(train_also)
    trained = trained_names(model, patterns)
    files = None if weights is None else BaseFiles(model, weights, max_workspace, progress)
    if files is not None and on_meta(model) is None:
        raise ValueError("weights: expected a model on the meta device, got one that is loaded")
    plan = make_plan(model, targets, rank, trained, stacks, loaded=files is None)
    for argument, value in (("alpha", alpha), ("selection", selection)):
        check_setting(argument, value, plan.stacks)
    found, built = find_places(model), {}
    for stack in plan.stacks:
        with errors_named(stack):
            source = None if files is None else files.slices_of(stack)
        rule: Selection = setting("selection", selection, stack.name)  # type: ignore[assignment]
        built[stack.name] = build_stack(
            TProductStack,
            stack,
            found,
            rank=setting("rank", rank, stack.name),
            alpha=setting("alpha", alpha, stack.name),
            selection=rule,
            mode=mode,
            precision=precision,
            source=source,
            generator=generator,
            max_workspace=max_workspace,
            progress=progress,
        )
        _check_learns(stack.name, built[stack.name])
    return install(model, plan, built, patterns, files)


def _check_learns(name: str, stack: TProductStack) -> None:
    """Refuses C or R of zeros: the gradient of the core would be zero for good."""
    for what, factor in (("columns C", stack.lateral), ("rows R", stack.horizontal)):
        if not factor.any():
            raise ValueError(
                f"stack {name}: selection: expected {what} with numbers, without which the core "
                "never learns, got zeros"
            )


def install(
    model: nn.Module,
    plan: Plan,
    stacks: Mapping[str, TProductStack],
    train_also: tuple[str, ...],
    files: BaseFiles | None = None,
) -> Adapter:
    """Freezes the base and puts the layers of the stacks in the place of the linear ones."""
    trained = set(trained_names(model, train_also))
    buffers = {
        name: files.read(name) if files and buffer.is_meta else buffer.detach().clone()
        for name, buffer in persistent_buffers(model)
    }
    put_in_place(model, stacks)
    for name, parameter in model.named_parameters():
        if not name.startswith(PREFIXES):
            parameter.requires_grad = name in trained  # the method is not for uninitialised ones
    noted = [replace(stack, note=_note(stacks[stack.name])) for stack in plan.stacks]
    return Adapter(model, replace(plan, stacks=tuple(noted)), stacks, train_also, buffers)


def _note(stack: TProductStack) -> str:
    """How the layers of a stack run, and why, for the plan."""
    n1, n2, n3, rank = stack.n1, stack.n2, stack.n3, stack.rank
    head = f"rank {rank}"
    if stack.mode != "auto":
        return f"{head}, {stack.mode} as asked for"
    dtype = stack.places[0].weight.dtype
    worth = cost.tokens_worth_materializing(n1, n2, n3, rank)
    best = cost.choose_mode(
        "auto",
        tokens=ceil(worth),
        n1=n1,
        n2=n2,
        n3=n3,
        rank=rank,
        weight_dtype=dtype,
        is_built=False,
    )
    if best == "factored":
        why = "W_eff rounded to it would swallow small updates"
        return f"{head}, factored: the base is {dtype}, and {why}"
    return f"{head}, W_eff from {ceil(worth)} tokens per step on, through the factors below"
