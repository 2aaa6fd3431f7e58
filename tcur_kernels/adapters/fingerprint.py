"""Fingerprints of base weights: which base an adapter was made for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .plan import Plan

#: Name under which a model holds its stacks: cores are ``tcur.<stack>.core`` in its state_dict.
STACKS = "tcur"


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of dtypes, shapes and bits of the tensors, in order."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(f"{tensor.dtype} {list(tensor.shape)};".encode())
        data = tensor.detach().cpu().contiguous().flatten()
        state.update(data.view(torch.uint8).numpy().data)
    return state.hexdigest()


def frozen_digest(model: nn.Module, plan: Plan, trained: Iterable[str]) -> str:
    """Fingerprint of every parameter that is neither trained nor in a stack, by name."""
    apart = set(trained)
    apart |= {f"{m.module}.weight" for stack in plan.stacks for m in stack.members}
    state = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        if name not in apart and not name.startswith(f"{STACKS}."):
            state.update(f"{name} {digest([parameter])};".encode())
    return state.hexdigest()


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that the model's state_dict holds, those of the stacks aside."""
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved and not name.startswith(f"{STACKS}."):
            yield name, buffer
