"""A training step through all linear layers of a ViT-B: forward, gradients of input and adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import tcur_kernels as tcur

from .baselines import LoRALinear
from .timing import Timing, interleave

#: name -> (tokens, autocast to bf16)
CASES = {
    "vit_b_864_tokens": (864, False),
    "vit_b_216_tokens": (216, False),
    "vit_b_864_tokens_autocast": (864, True),
}
YARDSTICK = "frozen"
WIDTH, BLOCKS, RANK = 768, 12, 8
LIMIT = 5e-2  # tells a wrong gradient; bf16 through 72 layers in a row is off by 1e-2


class Block(nn.Module):
    """The linear layers of a transformer block and nothing else; q, k, v share their input."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, WIDTH] -> the same."""
        x = x + self.out(self.query(x) + self.key(x) + self.value(x))
        return x + self.down(self.up(x))


def build() -> nn.Module:
    """72 frozen linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(BLOCKS))).requires_grad_(False)


def with_lora(model: nn.Module) -> nn.Module:
    """A LoRA of the same rank on every linear layer."""
    for block in model:
        for name, layer in list(block.named_children()):
            setattr(block, name, LoRALinear(layer, RANK))
    return model


def adapted(model: nn.Module, precision: str) -> nn.Module:
    """tCURLoRA on every linear layer: stacks of 48, 12 and 12 slices."""
    adapter = tcur.adapt(model, rank=RANK, precision=precision)
    assert sorted(stack.n3 for stack in adapter.stacks.values()) == [12, 12, 48]
    with torch.no_grad():
        for core in adapter.parameters():
            core.normal_(std=1e-2)
    return model


def step_of(model: nn.Module, tokens: int, autocast: bool) -> Callable[[], object]:
    """Forward and backward; the trained parameters change first, as an optimizer's step does."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    x = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(tokens, WIDTH, generator=generator)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        with torch.no_grad():
            for parameter in trained:
                parameter.mul_(1.0)
                parameter.grad = None
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        y.backward(grad.to(y.dtype))

    return step


def measure(case: str, rounds: int) -> dict[str, Timing]:
    """Checks the gradients of the core against the reference's, then times steps.

    Raises:
        RuntimeError: a gradient is wrong; nothing is timed then.
    """
    tokens, autocast = CASES[case]
    base = build()
    models = {
        "frozen": base,
        "tcur": adapted(copy.deepcopy(base), "ieee"),
        "tcur_bf16": adapted(copy.deepcopy(base), "bf16"),
        "lora": with_lora(copy.deepcopy(base)),
    }
    if autocast:  # tcur follows autocast: the two would be one
        del models["tcur_bf16"]
    steps = {name: step_of(model, tokens, autocast) for name, model in models.items()}
    _check(models, steps, tokens)
    return interleave(steps, YARDSTICK, rounds)


def _check(
    models: dict[str, nn.Module], steps: dict[str, Callable[[], object]], tokens: int
) -> None:
    """Compares the gradients of all cores with those of the same model in float64."""
    exact = adapted(build().double(), "ieee")
    cores = {name: p for name, p in exact.named_parameters() if p.requires_grad}
    for contender in ("tcur", "tcur_bf16"):
        if contender not in models:
            continue
        steps[contender]()
        trained = {n: p for n, p in models[contender].named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, parameter in trained.items():
                cores[name].copy_(parameter)
        step_of(exact, tokens, False)()
        for name, parameter in trained.items():
            wanted, came = cores[name].grad, parameter.grad
            assert wanted is not None
            assert came is not None
            error = float((came - wanted).norm() / wanted.norm())
            print(f"{contender} {name}: relative error of the gradient {error:.1e}")
            if not error < LIMIT:
                raise RuntimeError(f"{contender}: gradient of {name} is off by {error:.2g}")
