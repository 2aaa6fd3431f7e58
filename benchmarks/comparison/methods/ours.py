"""The methods that this package computes: tCURLoRA, and CURLoRA as its case of one slice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tcur_kernels as tcur

from ..tasks.base import Task
from .base import Prepared, RefusedError, layers, size_of
from .small import is_fused


def tcurlora(
    model: nn.Module, task: Task, seed: int, rank: int = 8, basis: str = "orthonormal"
) -> Prepared:
    """A core for all layers of one shape; the slices of largest norm are C and R."""
    return _adapted(model, {n for n, _ in layers(model, task)}, rank=rank, basis=basis)


def curlora(model: nn.Module, task: Task, seed: int, rank: int = 8) -> Prepared:
    """A core for each layer; C and R are drawn by the rule of CURLoRA.

    q, k and v have cores of their own, also where one layer computes all three. Such a layer is
    replaced by `Thirds`.
    """
    names = set()
    for name, layer in list(layers(model, task)):
        if is_fused(name, layer):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Thirds(layer))
            names |= {f"{name}.{part}" for part in ("q", "k", "v")}
        else:
            names.add(name)
    return _adapted(
        model,
        names,
        rank=rank,
        basis="slices",
        selection="inverse",
        stacks="layer",
        generator=torch.Generator().manual_seed(seed),
    )


class Thirds(nn.Module):
    """Computes what a fused projection does, with three linear layers: q, k and v."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        inputs, outputs = size_of(layer)
        rows = layer.weight if isinstance(layer, nn.Linear) else layer.weight.mT
        biases = (None,) * 3 if layer.bias is None else layer.bias.detach().chunk(3)
        weights = rows.detach().contiguous().chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            part = nn.utils.skip_init(nn.Linear, inputs, outputs // 3, bias=False)
            part.weight = nn.Parameter(weight)
            part.bias = None if bias is None else nn.Parameter(bias)
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """The three outputs, one after another."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def _adapted(model: nn.Module, names: set[str], **options: object) -> Prepared:
    """Adapts the layers of these names."""
    try:
        adapter = tcur.adapt(model, targets=lambda name, layer: name in names, **options)
    except ValueError as error:
        raise RefusedError(str(error).splitlines()[0]) from error
    return Prepared(list(adapter.parameters()), adapter.save)
