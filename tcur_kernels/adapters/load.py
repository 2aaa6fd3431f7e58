"""An adapter from a file, on the base it was made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapt import Adapter, build_stack, install, trained_names
from .checkpoint import read_adapter_file
from .fingerprint import STACKS, digest, frozen_digest, persistent_buffers
from .plan import Member, Plan, StackPlan
from .weights import find_weights


def load_adapter(model: nn.Module, path: str | Path, strict: bool = True) -> Adapter:
    """Adapts ``model``, the base the adapter was made for, in place and loads the adapter.

    Args:
        model: a base model that is not adapted.
        path: file written by `Adapter.save`.
        strict: True refuses a model that differs anywhere in its frozen parameters. False compares
            the stacks' weights only, which C and R are made of, and loads those trained parameters
            and buffers that the model has; `Adapter.skipped` names the others.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is torn, foreign, of another format version, or made for another
            base; or a model that is adapted already. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if hasattr(model, STACKS):
        raise ValueError("model: expected a base model, got one that is adapted already")
    header, tensors = read_adapter_file(Path(path))
    plan = Plan(
        tuple(
            StackPlan(s["name"], s["n1"], s["n2"], tuple(Member(m, k) for m, k in s["members"]))
            for s in header["stacks"]
        )
    )
    _check_stacks(model, plan, header)
    state = {**dict(model.named_parameters()), **dict(persistent_buffers(model))}
    learned, skipped = _learned(tensors, state, strict)
    train_also = tuple(header["train_also"])
    if strict:
        trained = [name for kind, name in learned if kind == "trained"]
        if frozen_digest(model, plan, trained) != header["frozen_sha256"]:
            raise ValueError(
                "model: expected the base that the adapter was made for, got one whose frozen "
                "parameters outside of the stacks differ (strict=False loads all the same)"
            )
    else:
        train_also = tuple(p for p in train_also if _matches_any(model, p))

    stacks = {}
    for stack_plan, stored in zip(plan.stacks, header["stacks"], strict=True):
        name = stack_plan.name
        indices = (tensors[f"rows.{name}"], tensors[f"columns.{name}"])
        settings = (stored["rank"], stored["alpha"], indices, stored["mode"], stored["precision"])
        stack = build_stack(model, stack_plan, *settings)
        with torch.no_grad():
            stack.core.copy_(tensors[f"core.{name}"])
        stacks[name] = stack
    adapter = install(model, plan, stacks, train_also)
    adapter.skipped = skipped
    with torch.no_grad():
        for (_, name), tensor in learned.items():
            state[name].copy_(tensor)
    return adapter


def _check_stacks(model: nn.Module, plan: Plan, header: dict[str, Any]) -> None:
    """Refuses a model without the plan's layers, or with other weights in them."""
    modules, weights = dict(model.named_modules()), find_weights(model)
    for stack, stored in zip(plan.stacks, header["stacks"], strict=True):
        slices: list[Tensor] = []
        for member in stack.members:
            if member.module not in weights:
                module = modules.get(member.module)
                kind = "no such module" if module is None else type(module).__name__
                raise ValueError(
                    f"model: expected a linear layer {member.module} as in the adapter, got {kind}"
                )
            weight = weights[member.module].tensor
            expected = (member.slices * stack.n1, stack.n2)
            if weight.shape != expected:
                raise ValueError(
                    f"model: expected {member.module} of shape {list(expected)} (out, in), got "
                    f"{list(weight.shape)}"
                )
            slices += weight.detach().split(stack.n1)
        if digest(slices) != stored["base_sha256"]:
            raise ValueError(
                f"model: expected the base that the adapter was made for, got other weights in "
                f"stack {stack.name} ({slices[0].dtype}; the fingerprint covers the dtype too)"
            )


def _learned(
    tensors: dict[str, Tensor], state: dict[str, Tensor], strict: bool
) -> tuple[dict[tuple[str, str], Tensor], tuple[str, ...]]:
    """What the file has learned and the model can take; and the names of what it cannot."""
    learned, skipped = {}, []
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind not in ("trained", "buffer"):
            continue
        fits = name in state and state[name].shape == tensor.shape
        if fits:
            learned[(kind, name)] = tensor
        elif strict:
            got = list(state[name].shape) if name in state else "none"
            raise ValueError(f"model: expected {name} of shape {list(tensor.shape)}, got {got}")
        else:
            skipped.append(name)
    return learned, tuple(sorted(skipped))


def _matches_any(model: nn.Module, pattern: str) -> bool:
    try:
        return bool(trained_names(model, [pattern]))
    except ValueError:
        return False
