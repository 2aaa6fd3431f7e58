"""Loads an adapter from a file, onto the base that it was made for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..layers.stack import TProductStack
from ..layers.weights import Place
from ..operators.factors import CURFactors
from .adapt import install
from .adapter import Adapter
from .build import build_stack, check_layers
from .file import Contents, StoredStack, read_contents
from .fingerprint import Fingerprint, frozen_digest, persistent_buffers
from .install import is_adapted
from .linear_maps import find_places
from .train_also import matches_any, trained_names


def load_adapter(model: nn.Module, path: str | Path, strict: bool = True) -> Adapter:
    """Adapts ``model``, the base that the adapter was made for, in place and loads the adapter.

    Args:
        model: a base model that is not adapted.
        path: file written by `Adapter.save`.
        strict: True refuses a model unless C and R are slices of its weights, in the dtype in which
            the adapter was made, and all frozen parameters outside of the stacks are the same.
            False compares C and R alone; if the file holds C and R itself, not even that. It loads
            the trained parameters and buffers that the model has. `Adapter.skipped` then names
            those that only the file has, and `Adapter.missing` the trained ones that only the
            model has.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or foreign, has another format version, or was made for
            another base; or the model is adapted already. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if is_adapted(model):
        raise ValueError("model: expected a base model, got one that is adapted already")
    contents = read_contents(Path(path))
    modules, places = dict(model.named_modules()), find_places(model)

    def kind_of(name: str) -> str:
        return type(modules[name]).__name__ if name in modules else "no such module"

    for stored in contents.stacks:
        check_layers(stored.plan, places, kind_of)
    stacks = {stored.plan.name: _build(stored, places, strict) for stored in contents.stacks}
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
    adapter = install(model, contents.plan, stacks, train_also)
    adapter.skipped, adapter.missing, adapter.metadata = skipped, missing, contents.metadata
    with torch.no_grad():
        for (_, name), tensor in learned.items():
            state[name].copy_(tensor)
    return adapter


def _build(stored: StoredStack, places: Mapping[str, Place], strict: bool) -> TProductStack:
    """Builds a stack of a file on the weights that C and R are slices of.

    If the file holds C and R itself and ``strict`` is False, other weights are accepted, too.
    """

    def build(factors: CURFactors | None) -> TProductStack:
        return build_stack(
            TProductStack,
            stored.plan,
            places,
            rank=stored.rank,
            alpha=stored.alpha,
            selection=stored.record.selection,
            mode=stored.mode,
            precision=stored.precision,
            basis=stored.basis,
            factors=factors,
        )

    stack = build(None)
    if Fingerprint.of(stack.factors) != stored.record.base:
        if strict or stored.factors is None:
            hint = ""
            if stored.factors is not None:
                hint = "; strict=False loads it with the C and R it holds"
            raise ValueError(
                f"model: expected the base that the adapter was made for, got other weights in "
                f"stack {stored.plan.name} ({Fingerprint.of(stack.factors).dtype}; the fingerprint "
                f"covers the dtype too{hint})"
            )
        stack = build(stored.factors)
    with torch.no_grad():
        stack.core.copy_(stored.core)
    return stack


def _learned(
    contents: Contents, state: dict[str, Tensor], strict: bool
) -> tuple[dict[tuple[str, str], Tensor], tuple[str, ...]]:
    """The learned tensors of the file that fit the model, and the names of the others."""
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
