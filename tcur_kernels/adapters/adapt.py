"""One line to adapt a model, and the adapter that comes of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from math import ceil
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import cost
from ..decompose import Selection
from ..nn import TProductStack
from .checkpoint import write_adapter_file
from .fingerprint import STACKS, digest, frozen_digest, persistent_buffers
from .install import put_in_place, take_out
from .plan import Plan, StackPlan, Targets, check_setting, make_plan, setting
from .weights import find_weights, stand_in


class Stacks(nn.ModuleDict):
    """The stacks of a model, as a child of it; what makes their cores parameters of the model.

    As a module it is the identity: an ``nn.Sequential`` that is adapted runs through all its
    children, this one too.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``input``, as it came."""
        return input


class Adapter:
    """The handle of an adapted model; made by `adapt` and `load_adapter`.

    Attributes:
        model: the adapted model, trained and called as before.
        plan: ordered stacks, slices, shapes, and what was left out and why.
        stacks: stack name -> `TProductStack`; ``stacks[name].core`` is the trained core.
        train_also: patterns of what is trained beside the cores.
        skipped: what `load_adapter` with strict=False found in the file and not in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        stacks: Mapping[str, TProductStack],
        train_also: tuple[str, ...],
        buffer_digests: Mapping[str, str],
    ) -> None:
        self.model = model
        self.plan = plan
        self.stacks = dict(stacks)
        self.train_also = train_also
        self.skipped: tuple[str, ...] = ()
        self._buffer_digests = dict(buffer_digests)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name in the model and parameter, for everything the adapter trains: cores first."""
        for name, stack in self.stacks.items():
            yield f"{STACKS}.{name}.core", stack.core
        parameters = dict(self.model.named_parameters())
        for name in trained_names(self.model, self.train_also):
            yield name, parameters[name]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything the adapter trains: the cores, then what ``train_also`` names."""
        for _, parameter in self.named_parameters():
            yield parameter

    def count_parameters(self) -> int:
        """Number of trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save(self, path: str | Path) -> None:
        """Writes cores, indices, plan, trained parameters and the base's fingerprint to ``path``.

        safetensors; atomic: a save that fails leaves the file that was there as it was.
        """
        trained = trained_names(self.model, self.train_also)
        parameters = dict(self.model.named_parameters())
        tensors: dict[str, Tensor] = {f"trained.{name}": parameters[name] for name in trained}
        # Statistics that training moved (of batch norms, say) belong to what was learned.
        for name, buffer in persistent_buffers(self.model):
            if digest([buffer]) != self._buffer_digests[name]:
                tensors[f"buffer.{name}"] = buffer
        entries = []
        for plan in self.plan.stacks:
            stack = self.stacks[plan.name]
            tensors[f"core.{plan.name}"] = stack.core
            tensors[f"rows.{plan.name}"] = torch.tensor(stack.rows)
            tensors[f"columns.{plan.name}"] = torch.tensor(stack.columns)
            entries.append(
                {
                    "name": plan.name,
                    "n1": plan.n1,
                    "n2": plan.n2,
                    "rank": stack.rank,
                    "alpha": stack.alpha,
                    "mode": stack.mode,
                    "precision": stack.precision,
                    "members": [[member.module, member.slices] for member in plan.members],
                    "base_sha256": digest(stack.base_slices()),
                }
            )
        header = {
            "stacks": entries,
            "train_also": list(self.train_also),
            "frozen_sha256": frozen_digest(self.model, self.plan, trained),
        }
        write_adapter_file(Path(path), header, tensors)

    @property
    def is_merged(self) -> bool:
        """Whether the base weights hold W_eff now."""
        return any(stack.is_merged for stack in self.stacks.values())

    def merge(self, inplace: bool = True) -> nn.Module:
        """Folds the update into the weights, one rounding; `unmerge` takes it back bit for bit.

        Args:
            inplace: True writes into the model's own weights and keeps a copy of the base. False
                returns a merged copy that needs this package no more: its layers are plain
                ``nn.Linear`` again, and this model stays as it is.

        Raises:
            ValueError: the model is merged already.
        """
        if self.is_merged:
            raise ValueError("merge: expected an unmerged adapter, got one that is merged already")
        if inplace:
            for stack in self.stacks.values():
                stack.merge()
            return self.model
        merged = copy.deepcopy(self.model)
        for twin in merged.get_submodule(STACKS).children():
            assert isinstance(twin, TProductStack)
            twin.merge()
        delattr(merged, STACKS)
        take_out(merged)
        return merged

    def unmerge(self) -> None:
        """Restores the base weights bit for bit.

        Raises:
            ValueError: the model is not merged.
        """
        if not self.is_merged:
            raise ValueError("unmerge: expected a merged adapter, got one that is not merged")
        for stack in self.stacks.values():
            stack.unmerge()

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Context in which the model computes with its base weights (trained parts stay trained).

        Raises:
            ValueError: the model is merged; its weights are not the base's.
        """
        if self.is_merged:
            raise ValueError("disable: expected an unmerged adapter, got one that is merged")
        before = {name: stack.enabled for name, stack in self.stacks.items()}
        for stack in self.stacks.values():
            stack.enabled = False
        try:
            yield
        finally:
            for name, stack in self.stacks.items():
                stack.enabled = before[name]

    def __repr__(self) -> str:
        return f"Adapter({self.count_parameters():,} parameters)\n{self.plan}"


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
) -> Adapter:
    """Adapts ``model`` in place by tCURLoRA: only cores, and what ``train_also`` names, train.

    Linear layers of one shape form a stack; C and R are slices of the stacked base weights, and the
    core of each stack starts at zero, so the model computes exactly what it did (an adapted
    ``nn.MultiheadAttention`` groups its products in another way: up to rounding). The base weights
    are never written. The cores are parameters of the model (``model.parameters()`` has them, under
    ``tcur.<stack>.core``); everything else is frozen.

    Args:
        model: any module that holds ``nn.Linear``, GPT-2's ``Conv1D`` or ``nn.MultiheadAttention``.
        targets: None, all of them by shape; names or patterns of layers; a function of name and
            module; or ``{stack name: [names or patterns]}``. See `adapters.plan.make_plan`.
        rank: tubal rank r of C, U and R. Like ``alpha`` and ``selection`` one for all stacks, or
            ``{stack name or pattern: value}``.
        alpha: scale of the update.
        selection: rule for the slices, see `tensor_cur`.
        mode: "auto", "materialized" (W_eff once per step) or "factored" (through the factors).
        train_also: names or patterns of parameters or modules to train beside the cores, matched
            against whole names: ``"out"`` is the module called ``out`` and no other.
        precision: of the products of tokens with the factors, "ieee" or "bf16" (operands rounded:
            faster, at an error of the gradient of about 4e-3); see `TProductStack`.
        stacks: "shape", or "layer": every layer is a stack by itself. The t-product of one slice is
            the matrix product, so ``stacks="layer", selection="inverse"`` is CURLoRA.

    Returns:
        The `Adapter`: plan, parameters, save, merge, unmerge, disable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. The model is
            then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if hasattr(model, STACKS):
        raise ValueError("model: expected a base model, got one that is adapted already")
    ranks = list(rank.values()) if isinstance(rank, Mapping) else [rank]
    if not isinstance(mode, str) or not all(type(one) is int for one in ranks):
        raise TypeError(f"rank, mode: expected an int and a str, got {rank!r} and {mode!r}")
    patterns = (train_also,) if isinstance(train_also, str) else tuple(train_also)
    trained = trained_names(model, patterns)
    plan = make_plan(model, targets, rank, trained, stacks)
    for argument, value in (("alpha", alpha), ("selection", selection)):
        check_setting(argument, value, plan.stacks)
    built = {}
    for stack in plan.stacks:
        rule: Selection = setting("selection", selection, stack.name)  # type: ignore[assignment]
        built[stack.name] = build_stack(
            model,
            stack,
            setting("rank", rank, stack.name),
            setting("alpha", alpha, stack.name),
            rule,
            mode,
            precision,
        )
    return install(model, plan, built, patterns)


def build_stack(
    model: nn.Module,
    plan: StackPlan,
    rank: int,
    alpha: float,
    selection: Selection,
    mode: str,
    precision: str,
) -> TProductStack:
    """The stack of one plan entry; the model is not changed."""
    weights = find_weights(model)
    linears = [stand_in(weights[member.module]) for member in plan.members]
    try:
        return TProductStack(linears, rank, alpha, selection, mode, n1=plan.n1, precision=precision)
    except ValueError as error:
        raise ValueError(f"stack {plan.name}: {error}") from error


def install(
    model: nn.Module, plan: Plan, stacks: Mapping[str, TProductStack], train_also: tuple[str, ...]
) -> Adapter:
    """Freezes the base and puts the layers of the stacks in the place of the linear ones."""
    trained = set(trained_names(model, train_also))
    buffers = {name: digest([buffer]) for name, buffer in persistent_buffers(model)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    put_in_place(model, plan, stacks)
    model.add_module(STACKS, Stacks(stacks))
    noted = [replace(stack, note=_note(stacks[stack.name])) for stack in plan.stacks]
    return Adapter(model, replace(plan, stacks=tuple(noted)), stacks, train_also, buffers)


def _note(stack: TProductStack) -> str:
    """How the layers of a stack run, and why, for the plan."""
    n1, n2, n3, rank = stack.n1, stack.n2, stack.n3, stack.rank
    head = f"rank {rank}"
    if stack.mode != "auto":
        return f"{head}, {stack.mode} as asked for"
    dtype = stack.layers[0].weight.dtype
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


def trained_names(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Parameters that ``train_also`` names, in the model's order; each pattern matches some."""
    names = [n for n, _ in model.named_parameters() if not n.startswith(f"{STACKS}.")]
    chosen: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"train_also: expected names, got {type(pattern).__name__}")
        found = {name for name in names if _matches_whole(name, pattern)}
        if not found:
            raise ValueError(f"train_also: expected parameters that match {pattern!r}, got none")
        chosen |= found
    return [name for name in names if name in chosen]


def _matches_whole(parameter: str, pattern: str) -> bool:
    """Whether the pattern is the name of the parameter or of a module that holds it."""
    parts = parameter.split(".")
    return any(fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))
