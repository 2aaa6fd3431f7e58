"""The linear layers of a ViT-B, and the ways to train them whose steps are timed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import torch
from torch import Tensor, nn

import tcur_kernels as tcur

WIDTH, BLOCKS, RANK = 768, 12, 8


class Block(nn.Module):
    """The linear layers of a transformer block and nothing else; q, k, v share their input."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [tokens, WIDTH] to the same shape."""
        x = x + self.out(self.query(x) + self.key(x) + self.value(x))
        return x + self.down(self.up(x))


class MLP(nn.Module):
    """Only the MLP of such a block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [tokens, WIDTH] to the same shape."""
        return x + self.down(self.up(x))


def build(block: type[nn.Module] = Block) -> nn.Module:
    """Frozen linear layers: 72 for whole blocks, 24 for MLPs; the same weights at every call."""
    torch.manual_seed(0)
    return nn.Sequential(*(block() for _ in range(BLOCKS))).requires_grad_(False)


def _targets(model: nn.Module) -> list[str]:
    return [name for name, _ in next(model.children()).named_children()]


def _tcur(model: nn.Module, precision: str) -> nn.Module:
    adapter = tcur.adapt(model, rank=RANK, precision=precision)
    with torch.no_grad():
        for core in adapter.parameters():
            core.normal_(std=1e-2)
    return model


def tcur_ieee(model: nn.Module) -> nn.Module:
    """tCURLoRA on every linear layer: stacks of 48, 12 and 12 slices, or of 12 and 12."""
    return _tcur(model, "ieee")


def tcur_bf16(model: nn.Module) -> nn.Module:
    """The same, with projections in bf16."""
    return _tcur(model, "bf16")


def lora(model: nn.Module, rank: int = RANK) -> nn.Module:
    """peft's LoRA on every linear layer, by default at the same rank."""
    config = peft.LoraConfig(r=rank, target_modules=_targets(model))
    return peft.inject_adapter_in_model(config, model)


def fourierft(model: nn.Module) -> nn.Module:
    """peft's FourierFT, with its default of 1000 frequencies, on every linear layer."""
    config = peft.FourierFTConfig(n_frequency=1000, target_modules=_targets(model))
    return peft.inject_adapter_in_model(config, model)


def full(model: nn.Module) -> nn.Module:
    """Full fine-tuning: trains every weight and bias."""
    return model.requires_grad_(True)


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "frozen": lambda model: model,
    "tcur": tcur_ieee,
    "tcur_bf16": tcur_bf16,
    "lora": lora,
    "fourierft": fourierft,
    "full": full,
}


def prepared(method: str, base: nn.Module) -> nn.Module:
    """A copy of ``base``, prepared for a method."""
    return METHODS[method](copy.deepcopy(base))


def step_of(model: nn.Module, tokens: int, autocast: bool = False) -> Callable[[], object]:
    """A step: forward, and backward to the input and the trained parameters.

    The step first writes to the trained parameters, as an optimizer does. Anything derived from
    them must therefore be recomputed.
    """
    generator = torch.Generator().manual_seed(1)
    like = next(model.parameters())
    x = torch.randn(tokens, WIDTH, generator=generator).to(like).requires_grad_()
    grad = torch.randn(tokens, WIDTH, generator=generator).to(like.device)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        with torch.no_grad():
            for parameter in trained:
                parameter.mul_(1.0)
                parameter.grad = None
        x.grad = None
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            y = model(x)
        y.backward(grad.to(y.dtype))

    return step
