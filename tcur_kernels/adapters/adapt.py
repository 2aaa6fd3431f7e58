"""`adapt`: adapts a whole model with one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer

from ..decompose import Selection, Slices
from ..decompose.slices import MAX_WORKSPACE
from ..layers.quantised import kinds_of, slices_of_places
from ..layers.stack import TProductStack
from ..operators import cost
from ..operators.basis import DEFAULT_BASIS, Basis, check_basis
from ..operators.factors import Precision
from .adapter import Adapter
from .budget import Budget, within_budget
from .build import build_stack, errors_named, places_of
from .fingerprint import persistent_buffers
from .gradients import Gradients, read_gradients
from .holding import PREFIXES
from .install import is_adapted, put_in_place
from .linear_maps import find_places
from .plan import (
    Plan,
    StackPlan,
    StacksBy,
    Targets,
    check_setting,
    make_plan,
    setting,
    with_matrices,
)
from .quantised import are_quantised, factors_of
from .streaming import BaseFiles, on_meta
from .train_also import trained_names


def adapt(
    model: nn.Module,
    targets: Targets = None,
    rank: int | Mapping[str, int] | Budget = 8,
    alpha: float | Mapping[str, float] = 1.0,
    selection: Selection | Mapping[str, Selection] = "norm",
    mode: cost.Mode = "auto",
    train_also: str | Sequence[str] = (),
    precision: Precision = "ieee",
    stacks: StacksBy = "shape",
    generator: torch.Generator | None = None,
    weights: str | Path | None = None,
    max_workspace: int = MAX_WORKSPACE,
    progress: bool = False,
    basis: Basis = DEFAULT_BASIS,
    gradients: Gradients | None = None,
) -> Adapter:
    """Adapts ``model`` in place by tCURLoRA.

    Only the cores are trained, and what ``train_also`` names; everything else is frozen. Linear
    layers of one shape form a stack, and C and R are slices of the stacked base weights. The core
    of each stack starts at zero, so at first the model computes exactly what it did before. The
    base weights are never written. Modules stay the same objects. ``layer.weight`` gives W_eff, and
    ``layer.base_weight`` the base weight. The cores are parameters of the model named
    ``tcur.<stack>`` (``tcur_<stack>`` in a container).

    Args:
        model: any module that holds ``nn.Linear``, GPT-2's ``Conv1D``, ``nn.MultiheadAttention``,
            quantised linear layers of bitsandbytes, torchao or HQQ, convolutions, or parameters
            ``[experts, n1, n2]``.
        targets: which layers to adapt. None: all linear ones, grouped by shape. Or names or
            patterns of layers, convolutions or parameters of experts; a function of name and
            module; or ``{stack name: [names or patterns]}``. See `adapters.plan.make_plan`.
        rank: tubal rank r of C, U and R. Like ``alpha`` and ``selection``, either one value for all
            stacks or ``{stack name or pattern: value}``. A `Budget` shares out a number of trained
            numbers among the stacks; it needs ``gradients``.
        alpha: scale of the update, on top of that of the basis.
        selection: rule for the slices, by name, a callable, or indices; see `tensor_cur`.
        mode: "materialized" builds W_eff once per step, "factored" computes with the factors, and
            "auto" takes what costs less.
        train_also: names or patterns of parameters or modules to train beside the cores, matched
            against whole names: ``"out"`` is the module called ``out`` and no other.
        precision: of the products of tokens with the factors, "ieee" or "bf16". "bf16" rounds the
            operands; it is faster, with a gradient error of about 4e-3. See `TProductStack`.
        stacks: "shape", or "layer", which makes every layer a stack of its own. The t-product of
            one slice is the matrix product, so ``stacks="layer", selection="inverse"`` is CURLoRA.
        generator: for rules that draw slices at random, see `tensor_cur`.
        weights: for a model on the meta device, the safetensors file or directory with its
            weights. They are read block by block to choose the slices and take C and R. They are
            not loaded into the model; the caller must do that before it runs. For a model with
            quantised layers, its weights in full precision: C and R of these layers are then slices
            of them instead of the dequantised weights, and `Adapter.save` stores C and R. Layers
            that are in memory and not quantised do not use it.
        max_workspace: most bytes to use while the slices of one stack are chosen.
        progress: shows a bar for every pass over the weights.
        basis: "orthonormal": the core is written in isometric factors of the chosen slices, so that
            one learning rate serves all ranks. "slices": C and R are the slices themselves, as
            published; its learning rate falls with the rank. Both span the same updates. See
            `operators.basis`.
        gradients: for a `Budget`: what `collect_gradients` returned, or a safetensors file of it.

    Returns:
        The `Adapter`: plan, parameters, save, merge, unmerge, disable.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says what was expected. The model
            is then unchanged.
    """
    _check_arguments(model, rank, mode, gradients)
    check_basis(basis)
    if not isinstance(train_also, Iterable):
        raise TypeError(f"train_also: expected names, got {type(train_also).__name__}")
    patterns = (train_also,) if isinstance(train_also, str) else tuple(train_also)
    trained = trained_names(model, patterns)
    files = None if weights is None else BaseFiles(model, weights, max_workspace, progress)
    is_loaded = on_meta(model) is None
    planned = 1 if isinstance(rank, Budget) else rank
    plan = make_plan(model, targets, planned, trained, stacks, loaded=files is None or is_loaded)
    for argument, value in (("alpha", alpha), ("selection", selection)):
        check_setting(argument, value, plan.stacks)
    found, built = find_places(model), {}
    if files is not None and is_loaded and not are_quantised(plan, found):
        raise ValueError(
            "weights: expected a model on the meta device, got one that is loaded, with no "
            "quantised layers"
        )

    def source_of(stack: StackPlan) -> Slices | None:
        with errors_named(stack):
            return None if files is None else files.slices_of(stack)

    def slices_of(stack: StackPlan) -> Slices:
        places = places_of(stack, found)
        return source_of(stack) or slices_of_places(
            "model", places, max_workspace, progress, stack.n1
        )

    if isinstance(rank, Budget) and gradients is not None:
        came = read_gradients(gradients)
        plan, selection = within_budget(plan, rank, came, slices_of, selection, generator)
        generator = None  # nothing is left to draw
    for stack in plan.stacks:
        rule: Selection = setting("selection", selection, stack.name)  # type: ignore[assignment]
        source, factors = source_of(stack), None
        if source is not None and kinds_of(places_of(stack, found)):
            # C and R are slices of the given weights, not of the dequantised ones of the layers.
            with errors_named(stack):
                rule, factors = factors_of(source, stack.rank, rule, generator, basis)
            source = None
        built[stack.name] = build_stack(
            TProductStack,
            stack,
            found,
            rank=stack.rank,
            alpha=setting("alpha", alpha, stack.name),
            selection=rule,
            mode=mode,
            precision=precision,
            source=source,
            factors=factors,
            generator=None if factors is not None else generator,
            max_workspace=max_workspace,
            progress=progress,
            basis=basis,
        )
        _check_learns(stack.name, built[stack.name])
    return install(model, plan, built, patterns, files)


def _check_arguments(model: nn.Module, rank: object, mode: object, gradients: object) -> None:
    """Refuses a model that cannot be adapted, and arguments of the wrong type."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if is_adapted(model):
        raise ValueError("model: expected a base model, got one that is adapted already")
    ranks = list(rank.values()) if isinstance(rank, Mapping) else [rank]
    is_shared_out = isinstance(rank, Budget)
    if is_shared_out != (gradients is not None):
        kind = "those of collect_gradients for" if is_shared_out else "None without"
        got = "None" if gradients is None else type(gradients).__name__
        raise ValueError(f"gradients: expected {kind} a rank that is a Budget, got {got}")
    if not isinstance(mode, str) or not (is_shared_out or all(type(one) is int for one in ranks)):
        raise TypeError(f"rank, mode: expected an int and a str, got {rank!r} and {mode!r}")
    for name, buffer in model.named_buffers():
        if isinstance(buffer, UninitializedBuffer):
            raise ValueError(
                f"model: expected buffers with values, got {name} that is not initialised yet: run "
                "a batch through the model first"
            )


def _check_learns(name: str, stack: TProductStack) -> None:
    """Refuses C or R of zeros, with which the gradient of the core would always be zero."""
    for what, factor in zip(("columns C", "rows R"), stack.factors.slices, strict=True):
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
    """Freezes the base and adapts the layers of the stacks in place."""
    trained = set(trained_names(model, train_also))
    buffers = {
        name: files.read(name) if files and buffer.is_meta else buffer.detach().clone()
        for name, buffer in persistent_buffers(model)
    }
    put_in_place(model, stacks)
    for name, parameter in model.named_parameters():
        if not name.startswith(PREFIXES):
            parameter.requires_grad = name in trained  # requires_grad_() refuses uninitialised ones
    noted = tuple(_noted(stack, stacks[stack.name]) for stack in plan.stacks)
    return Adapter(model, replace(plan, stacks=noted), stacks, train_also, buffers)


def _noted(plan: StackPlan, stack: TProductStack) -> StackPlan:
    """The entry of a stack with a note on how its layers run, and why."""
    plan = with_matrices(plan, {place.name: place.module for place in stack.places})
    are_kernels = [place.layout == "convolution" for place in stack.places]
    note, is_special = "", False
    if any(are_kernels):
        note, is_special = _note_of_convolutions(stack)
    if not all(are_kernels):
        others, are_special = _note_of_linear_layers(stack)
        note = f"convolutions: {note}; linear layers: {others}" if note else others
        is_special |= are_special
    return replace(plan, note=note, is_special=is_special)


def _note_of_convolutions(stack: TProductStack) -> tuple[str, bool]:
    """How the convolutions of a stack run, and whether the short form of the plan says so."""
    note = "W_eff, built once for each version of the core"
    if stack.mode != "auto":
        note = f"{stack.mode} as asked for"
    if stack.mode == "factored":
        note = f"{note}: each call forms W_eff of its layer and does not keep it"
    dtype = stack.places[0].weight.dtype
    if dtype.itemsize > 2:
        return note, stack.mode != "auto"
    return f"{note}, rounded to {dtype}, which swallows small updates", True


def _note_of_linear_layers(stack: TProductStack) -> tuple[str, bool]:
    """How the linear layers of a stack run, and whether the short form of the plan says so."""
    n1, n2, n3, rank = stack.n1, stack.n2, stack.n3, stack.rank
    if stack.quantised:
        kinds = " and ".join(stack.quantised)
        whose = "" if stack.base.is_own else "; C and R are those of the given weights"
        note = f"factored: the base is quantised ({kinds}), its product is the library's{whose}"
        return note, True
    if stack.mode != "auto":
        return f"{stack.mode} as asked for", True
    dtype = stack.places[0].dtype
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
        return f"factored: the base is {dtype}, and {why}", True
    return f"W_eff from {ceil(worth)} tokens per step on, through the factors below", False
