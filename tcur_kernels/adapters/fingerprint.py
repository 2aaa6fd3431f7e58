"""Fingerprints of base weights: which base an adapter was made for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..processes import whole
from .holding import PREFIXES
from .linear_maps import find_weights
from .plan import Plan


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of dtypes, shapes and bits of the tensors, in order."""
    state = hashlib.sha256()
    for tensor in tensors:
        update_digest(state, tensor)
    return state.hexdigest()


def update_digest(state: hashlib._Hash, tensor: Tensor) -> None:
    """Adds dtype, shape and bits of one tensor."""
    state.update(f"{tensor.dtype} {list(tensor.shape)};".encode())
    data = whole(tensor.detach()).cpu().contiguous().flatten()
    state.update(data.view(torch.uint8).numpy().data)


def frozen_digest(model: nn.Module, plan: Plan, trained: Iterable[str]) -> str:
    """Fingerprint of every parameter that is neither trained nor in a stack, by name."""
    members = {m.module for stack in plan.stacks for m in stack.members}
    weights = find_weights(model)
    apart = set(trained)
    frozen: dict[str, Tensor] = {}
    for name, weight in weights.items():
        held, _ = weight.parameter_names()
        if name not in members and held not in apart:
            frozen[f"{name}.weight"] = weight.tensor
    # Linear maps one by one: of in_proj_weight some blocks may be in a stack and others not.
    apart |= {weight.parameter_names()[0] for weight in weights.values()}
    for name, parameter in model.named_parameters():
        if name not in apart and not name.startswith(PREFIXES):
            frozen[name] = parameter
    state = hashlib.sha256()
    for name, tensor in sorted(frozen.items()):
        state.update(f"{name} {digest([tensor])};".encode())
    return state.hexdigest()


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that the model's state_dict holds, those of the stacks aside."""
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved and not name.startswith(PREFIXES):
            yield name, buffer
