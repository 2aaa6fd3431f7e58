"""Host time of a layer besides its arithmetic: forward and backward at tiny sizes.

On a GPU the host stays ahead of the device as long as the Python code of a layer takes less time
than its kernels. Here sizes are so small that almost only the host's work remains. The yardstick is
a frozen ``nn.Linear`` of the same size. One call runs 1000 layers, so milliseconds can be read as
microseconds per layer, forward and backward. "kernels" runs only the operators of such layers,
without modules and autograd. That part is not Python, and on a GPU other code does it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tcur_kernels as tcur

from .timing import Timing, interleave

#: name -> (tokens, width, slices, rank)
CASES = {"tiny_16": (8, 16, 4, 2), "tiny_16_40_slices": (8, 16, 40, 2)}
YARDSTICK = "linear"
MODES = ("materialized", "factored")
LAYERS = 1000
LIMIT = 1e-4


def measure(case: str, rounds: int) -> dict[str, Timing]:
    """Compares the gradients of the cores with each other, then times the layers.

    Raises:
        RuntimeError: a gradient is wrong; nothing is timed then.
    """
    tokens, width, slices, rank = CASES[case]
    times = LAYERS // slices
    generator = torch.Generator().manual_seed(0)
    base = nn.Sequential(*(nn.Linear(width, width) for _ in range(slices))).requires_grad_(False)
    x = torch.randn(tokens, width, generator=generator, requires_grad=True)
    value = 1e-2 * torch.randn(slices, rank, rank, generator=generator)
    contenders = {"linear": _step_of(base, x, times)}
    grads = []
    for mode in MODES:
        model = copy.deepcopy(base)
        (stack,) = tcur.adapt(model, rank=rank, mode=mode).stacks.values()
        with torch.no_grad():
            stack.core.copy_(value)
        grads.append(torch.autograd.grad(model(x), stack.core, x)[0])
        contenders[mode] = _step_of(model, x, times)
        contenders[f"{mode}_kernels"] = _kernels_of(stack, x, times)
    error = float((grads[0] - grads[1]).norm() / grads[0].norm())
    print(f"relative difference of the gradients of the core: {error:.1e}")
    if not error < LIMIT:
        raise RuntimeError(f"gradients of the core differ by {error:.2g}")
    timings = interleave(contenders, YARDSTICK, rounds)
    for mode in MODES:
        layer, linear, kernels = (
            timings[name].median_ms for name in (mode, YARDSTICK, f"{mode}_kernels")
        )
        print(
            f"{mode}: a layer takes {layer - linear:.1f} us more than nn.Linear, its kernels alone "
            f"take {kernels:.1f} us"
        )
    return timings


def _step_of(model: nn.Module, x: Tensor, times: int) -> Callable[[], object]:
    def run() -> None:
        for _ in range(times):
            model(x).backward(x)

    return run


def _kernels_of(stack: tcur.TProductStack, x: Tensor, times: int) -> Callable[[], object]:
    """Only the operators of all layers, forward and backward, in inference mode."""
    linear, gradient = torch.ops.tcur.cur_linear.default, torch.ops.tcur.core_grad_tokens.default
    core_of_packed = torch.ops.tcur.core_of_packed.default
    with torch.inference_mode():
        lateral_hat, horizontal_hat = (hat.clone() for hat in stack.factors.packed())
        factors = (lateral_hat, horizontal_hat, stack.core.clone())
        w_eff, grad = stack.effective(x.dtype).clone(), x.clone()
        places = [
            (layer.tcur_place.slice_index, layer.base_weight.clone(), layer.bias.clone())
            for layer in stack.layers
        ]

    def run() -> None:
        with torch.inference_mode():
            for _ in range(times):
                y, packed = grad, []
                for index, weight, bias in places:
                    z = F.linear(y, horizontal_hat)
                    if stack.mode == "materialized":
                        y = F.linear(y, w_eff[index], bias)
                        grad @ w_eff[index]
                    else:
                        how = (*factors, index, 1, 1.0)
                        y = linear(y, weight, bias, *how, False, z)
                        linear(grad, weight, None, *how, True)
                    where = (stack.n3, index, 1, None, 1, True)
                    packed.append(gradient(z, grad, lateral_hat, None, *where))
                core_of_packed(torch.stack(packed), 1.0)

    return run
