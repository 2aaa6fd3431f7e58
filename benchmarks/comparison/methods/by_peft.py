"""The methods that the package peft computes, each by its own configuration."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..tasks.base import Task
from .base import Prepared, RefusedError, layers, size_of

if TYPE_CHECKING:
    from peft import AdaLoraConfig, PeftConfig, PeftModel


@dataclass(frozen=True)
class Target:
    """What a configuration is made for.

    Attributes:
        sizes: inputs and outputs of the layers to adapt, by their names.
        seed: of what a method draws.
    """

    sizes: dict[str, tuple[int, int]]
    seed: int

    @property
    def pattern(self) -> str:
        """Matches the whole names; in a list, a name would match the end of another one, too."""
        return "|".join(map(re.escape, self.sizes))


Config = Callable[[Target], "PeftConfig"]


def prepare(model: nn.Module, task: Task, seed: int, config: Config) -> Prepared:
    """Adapts a model with a configuration of peft."""
    return _prepared(_adapted(model, task, seed, config))


def adalora(model: nn.Module, task: Task, seed: int, initial: int = 12, rank: int = 8) -> Prepared:
    """AdaLoRA: the rank falls from ``initial`` to ``rank``, the mean over all layers.

    The first tenth of the training keeps all ranks, and the last three tenths keep those of the
    end. Between them ranks are shared out anew after each twentieth of the training.
    """

    def config(target: Target) -> AdaLoraConfig:
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            target_modules=target.pattern,
            init_r=initial,
            target_r=rank,
            lora_alpha=8,
            total_step=task.steps,
            tinit=task.steps // 10,
            tfinal=task.steps * 3 // 10,
            deltaT=max(1, task.steps // 20),
        )

    adapted = _adapted(model, task, seed, config)
    return _prepared(
        adapted,
        penalty=partial(_far_from_orthogonal, adapted),
        after_step=adapted.base_model.update_and_allocate,
    )


def _far_from_orthogonal(adapted: PeftModel) -> Tensor:
    """What `AdaLoraModel.forward` adds to the loss, for models whose output has a loss."""
    squares = []
    for name, parameter in adapted.named_parameters():
        if ".lora_A." in name:
            squares.append(parameter @ parameter.mT)
        elif ".lora_B." in name:
            squares.append(parameter.mT @ parameter)
    distances = [
        torch.linalg.norm(square - torch.eye(len(square)).to(square)) for square in squares
    ]
    weight = adapted.peft_config["default"].orth_reg_weight
    return weight * torch.stack(distances).mean()


def lora(target: Target, rank: int = 8, start: bool | str = True) -> PeftConfig:
    """LoRA; ``start`` may be ``"pissa_niter_4"``, which is PiSSA."""
    from peft import LoraConfig

    return LoraConfig(target_modules=target.pattern, r=rank, lora_alpha=8, init_lora_weights=start)


def vera(target: Target, rank: int = 64) -> PeftConfig:
    """VeRA, whose shared matrices are drawn."""
    from peft import VeraConfig

    return VeraConfig(target_modules=target.pattern, r=rank, projection_prng_key=target.seed)


def fourierft(target: Target, frequencies: int = 1000) -> PeftConfig:
    """FourierFT with 1000 drawn frequencies for each layer, or all of a layer that has less.

    The coefficients start at zero. peft's default draws them from a normal distribution. Divided by
    the size of a large matrix that is a small update, but to a small matrix it is a large one: for
    64 x 64 its elements would have a standard deviation of 0.8. The model would not start as it was
    pretrained.
    """
    from peft import FourierFTConfig

    numbers = {name: math.prod(size) for name, size in target.sizes.items()}
    return FourierFTConfig(
        target_modules=target.pattern,
        n_frequency=frequencies,
        n_frequency_pattern={name: n for name, n in numbers.items() if n < frequencies},
        scaling=150.0,
        init_weights=True,
        random_loc_seed=target.seed,
    )


def tinylora(target: Target) -> PeftConfig:
    """TinyLoRA with the ranks of peft: 64 numbers for each layer, in singular subspaces of rank 2.

    A vector of these numbers weights drawn matrices.
    """
    from peft import TinyLoraConfig

    return TinyLoraConfig(target_modules=target.pattern, r=2, u=64, projection_seed=target.seed)


def psoft(target: Target, rank: int = 32) -> PeftConfig:
    """PSOFT; the rank is at most the smallest side of a layer."""
    from peft import PsoftConfig

    capped = min(rank, *(min(size) for size in target.sizes.values()))
    return PsoftConfig(target_modules=target.pattern, r=capped, psoft_alpha=capped)


def road(target: Target, group: int = 64) -> PeftConfig:
    """RoAd in groups of 64 outputs, or of the largest divisor of 64 that divides all outputs."""
    from peft import RoadConfig

    divisor = math.gcd(group, *(outputs for _, outputs in target.sizes.values()))
    return RoadConfig(target_modules=target.pattern, variant="road_1", group_size=divisor)


def miss(target: Target, rank: int = 8) -> PeftConfig:
    """MiSS, as it starts in peft: at zero."""
    from peft import MissConfig

    return MissConfig(target_modules=target.pattern, r=rank)


def _adapted(model: nn.Module, task: Task, seed: int, config: Config) -> PeftModel:
    """Adapts a model in place; what peft draws without a seed of its own, it draws with this."""
    from peft import get_peft_model

    target = Target({name: size_of(layer) for name, layer in layers(model, task)}, seed)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # peft finds out itself which layers keep their weight transposed, and says so.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to (True|False) but")
        # peft reads an attribute of transformers' models that has got another name there.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        torch.default_generator.manual_seed(seed)
        try:
            return get_peft_model(model, config(target))
        except (TypeError, ValueError) as error:
            raise RefusedError(str(error).splitlines()[0]) from error


def _prepared(
    adapted: PeftModel,
    penalty: Callable[[], Tensor] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> Prepared:
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    return Prepared(trained, partial(_save, adapted), penalty, after_step)


def _save(adapted: PeftModel, path: Path) -> None:
    # No method adapts embeddings; asked to look for them, peft looks for the model on its hub.
    adapted.save_pretrained(str(path), save_embedding_layers=False)
    (path / "README.md").unlink()  # a form to fill in, larger than some adapters
