"""Methods of few equations: bottleneck adapters, SSF and LoTR.

Each of them adds a small module to a layer, as its child, and a forward hook that transforms the
output of the layer with it. Layers stay the same objects, and their weights are never written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..tasks.base import Task
from .base import Prepared, RefusedError, layers, norms, size_of
from .plain import saver

#: The name of the added module in its layer.
CHILD = "adaptation"


def adapter(model: nn.Module, task: Task, seed: int, width: int = 32) -> Prepared:
    """A `Bottleneck` after every layer; a fused q, k, v projection gets one for each third."""
    generator = torch.Generator().manual_seed(seed)
    children = []
    for name, layer in layers(model, task):
        parts = 3 if is_fused(name, layer) else 1
        outputs = size_of(layer)[1] // parts
        made = [Bottleneck(outputs, width, layer.weight, generator) for _ in range(parts)]
        children.append(_attach(name, layer, made[0] if parts == 1 else Parts(made)))
    return _prepared(model, children)


def ssf(model: nn.Module, task: Task, seed: int) -> Prepared:
    """A `ScaleAndShift` after every layer, and after every normalisation beside them."""
    children = []
    for name, layer in layers(model, task):
        child = ScaleAndShift((size_of(layer)[1],), layer.weight)
        children.append(_attach(name, layer, child))
    for name, norm in norms(model, task):
        like = next(norm.parameters(), next(model.parameters()))
        children.append(_attach(name, norm, ScaleAndShift(norm.normalized_shape, like)))
    return _prepared(model, children)


def lotr(model: nn.Module, task: Task, seed: int, rank: int = 8) -> Prepared:
    """A `Core` after every layer; layers of one shape share A and B.

    A and B are parameters of the model itself. At first they are normal numbers, and their columns
    have norms of about one.
    """
    generator = torch.Generator().manual_seed(seed)
    stacks = defaultdict(list)
    for name, layer in layers(model, task):
        stacks[size_of(layer)].append((name, layer))
    trained: list[nn.Parameter] = []
    for (inputs, outputs), members in stacks.items():
        like = members[0][1].weight
        a = nn.Parameter(_normal((outputs, rank), outputs, like, generator))
        b = nn.Parameter(_normal((inputs, rank), inputs, like, generator))
        model.register_parameter(f"lotr_{outputs}x{inputs}_a", a)
        model.register_parameter(f"lotr_{outputs}x{inputs}_b", b)
        cores = [_attach(name, layer, Core(a, b)) for name, layer in members]
        trained += [a, b, *(core.core for core in cores)]
    return Prepared(trained, saver(model, trained))


class Bottleneck(nn.Module):
    """The adapter of Houlsby et al., "Parameter-efficient transfer learning for NLP" (2019).

    y + W_up relu(W_down y), here without bias. W_up starts at zero, and W_down with normal numbers.
    """

    def __init__(self, size: int, width: int, like: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Parameter(_normal((width, size), size, like, generator))
        self.up = nn.Parameter(like.new_zeros(size, width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What takes the place of the output y."""
        return y + (y @ self.down.mT).relu() @ self.up.mT


class Parts(nn.Module):
    """Transforms equal parts of an output, each by a module of its own."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What takes the place of the output y."""
        chunks = y.chunk(len(self.parts), dim=-1)
        return torch.cat([p(x, own) for p, own in zip(self.parts, chunks, strict=True)], dim=-1)


class ScaleAndShift(nn.Module):
    """SSF of Lian et al., "Scaling & shifting your features" (2022): gamma * y + beta.

    gamma is 1 at first, and beta is 0.
    """

    def __init__(self, shape: Sequence[int], like: Tensor) -> None:
        super().__init__()
        self.gamma = nn.Parameter(like.new_ones(shape))
        self.beta = nn.Parameter(like.new_zeros(shape))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What takes the place of the output y."""
        return self.gamma * y + self.beta


class Core(nn.Module):
    """LoTR of Bershatsky et al., "LoTR: Low tensor rank weight adaptation" (2024).

    The update of layer l is ΔW_l = A G_l Bᵀ, so its output becomes y + A G_l Bᵀ x. All layers of
    the stack share A and B. The core G_l is a parameter of this module, and is zero at first.
    """

    def __init__(self, a: nn.Parameter, b: nn.Parameter) -> None:
        super().__init__()
        self.core = nn.Parameter(a.new_zeros(a.shape[1], b.shape[1]))
        self._shared = (a, b)  # in a tuple, so that the model alone registers them

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What takes the place of the output y."""
        a, b = self._shared
        return y + x @ b @ self.core.mT @ a.mT


def is_fused(name: str, layer: nn.Module) -> bool:
    """Whether a layer computes q, k and v at once."""
    inputs, outputs = size_of(layer)
    last = name.rpartition(".")[2]
    return outputs == 3 * inputs and ("qkv" in last or last == "c_attn")


def _attach(name: str, layer: nn.Module, child: nn.Module) -> nn.Module:
    """Makes a layer transform its output by a module, which becomes its child."""
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        # the only use of this class; a hook of such a layer would never run
        raise RefusedError(f"{name}: nn.MultiheadAttention takes its weight without calling it")
    layer.add_module(CHILD, child)
    layer.register_forward_hook(_transform)
    return child


def _transform(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The hook; it finds the module by its name, so that a copy of a model uses its own."""
    return layer.get_submodule(CHILD)(inputs[0], output)


def _prepared(model: nn.Module, children: Sequence[nn.Module]) -> Prepared:
    trained = [parameter for child in children for parameter in child.parameters()]
    return Prepared(trained, saver(model, trained))


def _normal(shape: tuple[int, int], terms: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers, of which so many squares add up to about one."""
    return (torch.randn(shape, generator=generator) / sqrt(terms)).to(like)
