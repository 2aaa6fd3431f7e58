"""Fingerprints of base weights, which tell for which base an adapter was made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..layers.quantisers import parts_of
from ..operators.factors import CURFactors
from ..processes import whole
from .holding import PREFIXES
from .linear_maps import Weight, find_weights
from .plan import Plan

#: Digests of factors. Factors never change; if the base changes, new ones are made.
_DIGESTS: WeakKeyDictionary[CURFactors, str] = WeakKeyDictionary()


@dataclass(frozen=True)
class Fingerprint:
    """Identifies the base weights that C and R are slices of.

    The update of an adapter depends on the base only through C and R, so only C and R have to
    agree. They are hashed once, as long as the base does not change.

    Attributes:
        dtype: of the base weights, as torch prints it ("torch.bfloat16").
        sha256: of the numbers in C and R, independent of their dtype: a half-precision base and
            its copy in fp32 have the same.
    """

    dtype: str
    sha256: str

    @classmethod
    def of(cls, factors: CURFactors) -> Fingerprint:
        """The fingerprint of the base that these C and R were taken from."""
        if factors not in _DIGESTS:
            _DIGESTS[factors] = _digest_of(factors.slices)
        return cls(str(factors.slices[0].dtype), _DIGESTS[factors])

    @classmethod
    def of_slices(cls, lateral: Tensor, horizontal: Tensor) -> Fingerprint:
        """The same for lateral and horizontal slices that no factors were made of."""
        return cls(str(lateral.dtype), _digest_of((lateral, horizontal)))


def _digest_of(slices: tuple[Tensor, Tensor]) -> str:
    return digest(part.double() for side in slices for part in side)


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of dtypes, shapes and bits of the tensors, in order."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(f"{tensor.dtype} {list(tensor.shape)};".encode())
        for part in parts_of(whole(tensor.detach())):  # a quantised one may have several
            data = part.cpu().contiguous().flatten()
            state.update(data.view(torch.uint8).numpy().data)
    return state.hexdigest()


def frozen_digest(model: nn.Module, plan: Plan, trained: Iterable[str]) -> str:
    """SHA-256 of every parameter that is neither trained nor in a stack, by name."""
    members = {m.module for stack in plan.stacks for m in stack.members}
    found = find_weights(model)
    # Experts that are not adapted are parameters like any other.
    weights = {n: w for n, w in found.items() if not w.is_of_experts or n in members}
    apart = set(trained)
    frozen: dict[str, Tensor | Weight] = {}
    for name, weight in weights.items():
        held, _ = weight.parameter_names()
        if name not in members and held not in apart:
            frozen[f"{name}.weight"] = weight
    # The linear maps were handled one by one above, because some blocks of an in_proj_weight may
    # be in a stack and others not.
    apart |= {weight.parameter_names()[0] for weight in weights.values()}
    for name, parameter in model.named_parameters():
        if name not in apart and not name.startswith(PREFIXES):
            frozen[name] = parameter
    state = hashlib.sha256()
    for name in sorted(frozen):
        tensor = frozen[name]
        if isinstance(tensor, Weight):  # a quantised weight becomes numbers only here
            # The digest has always had the whole kernel of a convolution.
            is_kernel = tensor.place.layout == "convolution"
            tensor = tensor.place.base if is_kernel else tensor.tensor
        state.update(f"{name} {digest([tensor])};".encode())
    return state.hexdigest()


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers in the model's state_dict, except those of the stacks."""
    saved = {
        f"{prefix}.{key}" if prefix else key
        for prefix, module in model.named_modules()
        for key in module._buffers.keys() - module._non_persistent_buffers_set
    }
    for name, buffer in model.named_buffers():
        if name in saved and not name.startswith(PREFIXES):
            yield name, buffer
