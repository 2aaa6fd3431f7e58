"""An adapter from a file, on the base it was made for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .adapt import build_stack, install
from .adapter import Adapter
from .file import Contents, StoredStack, read_contents
from .fingerprint import digest, frozen_digest, persistent_buffers
from .install import is_adapted
from .linear_maps import find_weights
from .train_also import matches_any, trained_names


def load_adapter(model: nn.Module, path: str | Path, strict: bool = True) -> Adapter:
    """Adapts ``model``, the base the adapter was made for, in place and loads the adapter.

    Args:
        model: a base model that is not adapted.
        path: file written by `Adapter.save`.
        strict: True refuses a model that differs anywhere in its frozen parameters. False compares
            the stacks' weights only, which C and R are made of (not even those if the file holds
            C and R itself), and loads those trained parameters and buffers that the model has;
            `Adapter.skipped` names what is in the file alone, `Adapter.missing` what the model
            alone has of the parts that are trained.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is torn, foreign, of another format version, or made for another
            base; or a model that is adapted already. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if is_adapted(model):
        raise ValueError("model: expected a base model, got one that is adapted already")
    contents = read_contents(Path(path))
    own_base = [_check_stack(model, stored, strict) for stored in contents.stacks]
    state = {**dict(model.named_parameters()), **dict(persistent_buffers(model))}
    learned, skipped = _learned(contents, state, strict)
    train_also = tuple(p for p in contents.train_also if strict or matches_any(model, p))
    trained = trained_names(model, train_also)
    missing = tuple(name for name in trained if ("trained", name) not in learned)
    if strict:
        if missing:
            raise ValueError(
                f"path: expected values of all that {', '.join(train_also)} names in the model, "
                f"got none of {', '.join(missing)} (strict=False loads all the same)"
            )
        if frozen_digest(model, contents.plan, trained) != contents.frozen_sha256:
            raise ValueError(
                "model: expected the base that the adapter was made for, got one whose frozen "
                "parameters outside of the stacks differ (strict=False loads all the same)"
            )

    stacks = {}
    for stored, is_own in zip(contents.stacks, own_base, strict=True):
        settings = (stored.rank, stored.alpha, stored.indices, stored.mode, stored.precision)
        factors = None if is_own else stored.factors
        stack = build_stack(model, stored.plan, *settings, factors)
        with torch.no_grad():
            stack.core.copy_(stored.core)
        stacks[stored.plan.name] = stack
    adapter = install(model, contents.plan, stacks, train_also)
    adapter.skipped, adapter.missing = skipped, missing
    with torch.no_grad():
        for (_, name), tensor in learned.items():
            state[name].copy_(tensor)
    return adapter


def _check_stack(model: nn.Module, stored: StoredStack, strict: bool) -> bool:
    """Refuses a model without the layers of a stack; whether it has the base that C and R are of.

    Another base will do where the file has C and R itself, and nobody insists.
    """
    modules, weights = dict(model.named_modules()), find_weights(model)
    slices: list[Tensor] = []
    for member in stored.plan.members:
        if member.module not in weights:
            module = modules.get(member.module)
            kind = "no such module" if module is None else type(module).__name__
            raise ValueError(
                f"model: expected a linear layer {member.module} as in the adapter, got {kind}"
            )
        weight = weights[member.module].tensor
        expected = (member.slices * stored.plan.n1, stored.plan.n2)
        if weight.shape != expected:
            raise ValueError(
                f"model: expected {member.module} of shape {list(expected)} (out, in), got "
                f"{list(weight.shape)}"
            )
        slices += weight.detach().split(stored.plan.n1)
    if digest(slices) == stored.base_sha256:
        return True
    if strict or stored.factors is None:
        hint = "" if stored.factors is None else "; strict=False loads it with the C and R it holds"
        raise ValueError(
            f"model: expected the base that the adapter was made for, got other weights in "
            f"stack {stored.plan.name} ({slices[0].dtype}; the fingerprint covers the dtype too"
            f"{hint})"
        )
    return False


def _learned(
    contents: Contents, state: dict[str, Tensor], strict: bool
) -> tuple[dict[tuple[str, str], Tensor], tuple[str, ...]]:
    """What the file has learned and the model can take; and the names of what it cannot."""
    learned, skipped = {}, []
    for (kind, name), tensor in contents.learned.items():
        fits = name in state and state[name].shape == tensor.shape
        if fits:
            learned[(kind, name)] = tensor
        elif strict:
            got = list(state[name].shape) if name in state else "none"
            raise ValueError(f"model: expected {name} of shape {list(tensor.shape)}, got {got}")
        else:
            skipped.append(name)
    return learned, tuple(sorted(skipped))
