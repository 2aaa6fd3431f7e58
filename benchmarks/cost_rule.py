"""Checks the rules of `operators.cost`: times a step of one stack in every possible way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn

import tcur_kernels as tcur
from tcur_kernels.operators import cost

from .timing import Timing, interleave

STACKS = {  # slices, n1, n2, rank
    "vit_b_attention_12": (12, 768, 768, 8),
    "vit_b_up": (12, 3072, 768, 8),
    "vit_tiny_attention": (48, 192, 192, 4),
    "small_wide_rank": (12, 192, 192, 16),
}
#: name -> (slices, n1, n2, rank, tokens)
CASES = {
    f"{name}_{tokens}": (*stack, tokens)
    for name, stack in STACKS.items()
    for tokens in (16, 64, 256, 1024)
}
#: Models whose stacks are small; MiniLM's 352 tokens are 16 texts of 22.
SMALL = {
    "minilm_attention": (24, 384, 384),
    "minilm_up": (6, 1536, 384),
    "minilm_down": (6, 384, 1536),
    "unetr_attention": (48, 192, 192),
    "unetr_up": (12, 768, 192),
    "unetr_down": (12, 192, 768),
}
CASES |= {
    f"{name}_r{rank}_{tokens}": (*sizes, rank, tokens)
    for name, sizes in SMALL.items()
    for rank in ((8, 32) if name.startswith("minilm") else (8,))
    for tokens in (64, 128, 352, 512)
}
YARDSTICK = "auto"


def measure(case: str, rounds: int) -> dict[str, Timing]:
    """Times "auto" and all forced ways; a way with a ratio below 1 beats the rule's choice.

    Raises:
        RuntimeError: the ways give different gradients; nothing is timed then.
    """
    count, n1, n2, rank, tokens = CASES[case]
    torch.manual_seed(0)
    linears = [nn.Linear(n2, n1).requires_grad_(False) for _ in range(count)]
    inputs = [torch.randn(tokens, n2, requires_grad=True) for _ in linears]
    grads = [torch.randn(tokens, n1) for _ in linears]

    def way(mode: str, gradient: str | None) -> Callable[[], torch.Tensor]:
        stack = tcur.TProductStack(linears, rank=rank, mode=mode)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            stack.core.copy_(0.1 * torch.randn(count, rank, rank, generator=generator))

        def step() -> torch.Tensor:
            stack.core.grad = None
            with torch.no_grad():
                stack.core.neg_()  # W_eff is stale now; the gradient of one layer stays the same
            with forced(gradient):
                outputs = [layer(x) for layer, x in zip(stack.layers, inputs, strict=True)]
                torch.autograd.backward(outputs, grads)
            assert stack.core.grad is not None
            return stack.core.grad

        return step

    tokens_way = "z" if count * rank < n2 else "x"
    ways = {"auto": way("auto", None)}
    for mode in ("materialized", "factored"):
        for gradient in (tokens_way, "dense"):
            ways[f"{mode}_{gradient}"] = way(mode, gradient)
    exact = ways["auto"]().double()
    for name, run in ways.items():
        error = float((run().double() - exact).norm() / exact.norm())
        if not error < 1e-4:
            raise RuntimeError(f"{name} disagrees with auto: {error:.2g}")
    return interleave(ways, YARDSTICK, rounds)


@contextmanager
def forced(gradient: str | None) -> Iterator[None]:
    """Context that forces one way to the gradient; for None the rule decides."""
    if gradient is None:
        yield
        return
    with mock.patch.object(cost, "choose_gradient", return_value=gradient):
        yield
