"""Pretrains the UNETR of `markers`, and keeps it for the next run.

From the loss of a segmentation alone a transformer learns slowly that a distant marker matters. So
every token of four hidden states also has to tell the side, by linear heads that are dropped
afterwards: first alone, then beside the segmentation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tcur_kernels.files.whole import replacing

from . import markers
from .base import example


@dataclass(frozen=True)
class Course:
    """How long and how fast it is pretrained."""

    volumes: int = 64
    side_steps: int = 250
    side_rate: float = 5e-4
    steps: int = 750
    rate: float = 1e-3
    weight: float = 0.2  # of the loss of the sides, beside the segmentation
    seed: int = 0


def pretrained_on_markers(recipe: Any, course: Course, folder: Path) -> nn.Module:
    """The pretrained network, from ``folder`` if it was kept there."""
    code = b"".join(Path(module).read_bytes() for module in (__file__, markers.__file__))
    facts = f"{course} {recipe} {torch.__version__}".encode()
    name = hashlib.sha256(code + facts).hexdigest()[:16]
    file, model = folder / f"markers-{name}.safetensors", recipe.architecture.build()
    if not file.is_file():
        torch.manual_seed(course.seed)
        model = recipe.architecture.build()
        _pretrain(model, course)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(file) as fresh:
            save_file(model.state_dict(), fresh)
    model.load_state_dict(load_file(file))
    return model.eval()


def _pretrain(model: nn.Module, course: Course) -> None:
    def watch(seeds: Sequence[int]) -> Any:
        return tqdm(seeds, desc="volumes", ncols=100)

    volumes = markers.volumes(markers.OLD, course.volumes, "old training", watch)
    images, labels = (
        torch.stack([volume[key].as_tensor() for volume in volumes]) for key in ("image", "label")
    )
    heads = nn.ModuleList(nn.Linear(model.hidden_size, 1) for _ in range(5))
    _learn_sides(model, heads, images, labels, course)
    _learn_both(model, heads, volumes, course)


def _learn_sides(
    model: nn.Module, heads: nn.ModuleList, images: Tensor, labels: Tensor, course: Course
) -> None:
    """Trains the transformer alone, 16 volumes at a time, mirrored, moved, brighter or darker."""
    optimizer = torch.optim.Adam([*model.vit.parameters(), *heads.parameters()], course.side_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, course.side_rate, total_steps=max(course.side_steps, 20), pct_start=0.1
    )
    generator = torch.Generator().manual_seed(course.seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(16, 1, 1, 1, 1, generator=generator)

    for _ in tqdm(range(course.side_steps), desc="side", ncols=100):
        pick = torch.randint(len(images), (16,), generator=generator)
        both = torch.stack([images[pick], labels[pick]])
        flips = torch.rand(16, generator=generator) < 0.5
        both[:, flips] = both[:, flips].flip(3)
        move = torch.randint(-3, 4, (2,), generator=generator).tolist()
        image, label = torch.roll(both, move, (3, 4))
        image = image * uniform(0.8, 1.2) + uniform(-0.2, 0.2)
        image = image + 0.1 * torch.randn(image.shape, generator=generator)
        optimizer.zero_grad()
        _side_loss(model.vit(image), heads, label).backward()
        optimizer.step()
        schedule.step()


def _learn_both(
    model: nn.Module, heads: nn.ModuleList, volumes: Sequence[dict[str, Any]], course: Course
) -> None:
    """Trains the whole network, one volume at a time; the transformer at a quarter of the rate."""
    segmentation_loss = example("segmentation.training").segmentation_loss()
    augment = markers.augmentation()
    augment.set_random_state(course.seed)
    inner = {id(parameter) for parameter in model.vit.parameters()}
    outer = [parameter for parameter in model.parameters() if id(parameter) not in inner]
    groups = [
        {"params": outer, "lr": course.rate},
        {"params": [*model.vit.parameters(), *heads.parameters()], "lr": course.rate / 4},
    ]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in groups],
        total_steps=max(course.steps, 20),
        pct_start=0.1,
    )
    states: list[Any] = []
    hook = model.vit.register_forward_hook(lambda module, inputs, found: states.append(found))
    generator, order = torch.Generator().manual_seed(course.seed), []
    model.train()
    for _ in tqdm(range(course.steps), desc="pretraining", ncols=100):
        order = order or torch.randperm(len(volumes), generator=generator).tolist()
        volume = volumes[order.pop()]
        batch = augment({key: volume[key].clone() for key in ("image", "label")})
        image, label = (batch[key].as_tensor()[None] for key in ("image", "label"))
        optimizer.zero_grad()
        loss = segmentation_loss(model(image), label)
        (loss + course.weight * _side_loss(states.pop(), heads, label)).backward()
        optimizer.step()
        schedule.step()
    hook.remove()


def _side_loss(found: tuple[Tensor, list[Tensor]], heads: nn.ModuleList, label: Tensor) -> Tensor:
    """How well tokens tell the side, and how much of their own patch is structure."""
    last, hidden = found
    part = F.avg_pool3d(label, 16).flatten(2).transpose(1, 2)  # [n, patches, 1]
    loss = F.binary_cross_entropy_with_logits(heads[-1](last), part)
    side = markers.side_of(label)[:, None]
    for head, state in zip(heads, (hidden[3], hidden[6], hidden[9], last), strict=False):
        told = head(state)[..., 0]
        loss = loss + F.binary_cross_entropy_with_logits(told, side.expand_as(told)) / 4
    return loss
