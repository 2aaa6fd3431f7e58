"""The methods, each a name: what is trained beside the head, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

import tcur_kernels as tcur

from .by_gradient import rules
from .tasks import Task


@dataclass(frozen=True)
class Method:
    """A method: ``head``, ``full``, ``lora:8``, or ``cores:BASIS:SELECTION:8``, maybe ``:layer``.

    Attributes:
        name: as above.
        prepare: makes a model adaptable; returns the parameters that are trained beside the head.
    """

    name: str
    prepare: Callable[[nn.Module, Task, int], list[nn.Parameter]]


def method(name: str) -> Method:
    """The method of a name."""
    kind, *options = name.split(":")
    if kind == "head":
        return Method(name, lambda model, task, seed: [])
    if kind == "full":
        return Method(name, _full)
    if kind == "lora":
        return Method(name, lambda model, task, seed: _lora(model, task, int(options[0])))
    return Method(name, lambda model, task, seed: _cores(model, task, seed, *options))


def _full(model: nn.Module, task: Task, seed: int) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if not is_head(task, name)]


def _lora(model: nn.Module, task: Task, rank: int) -> list[nn.Parameter]:
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, _ in _layers(model, task)]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=8, target_modules=names), model)
    return [parameter for name, parameter in model.named_parameters() if ".lora_" in name]


def _cores(
    model: nn.Module, task: Task, seed: int, basis: str, rule: str, rank: str, stacks: str = "shape"
) -> list[nn.Parameter]:
    draws = rule in ("uniform", "inverse")  # CURLoRA's rule is meant to be drawn
    targets = [name for name, _ in _layers(model, task)]
    adapter = tcur.adapt(
        model,
        targets=targets,
        rank=int(rank),
        selection=rules(task, model, targets, int(rank), seed) if rule == "gradient" else rule,
        basis=basis,
        stacks=stacks,
        generator=torch.Generator().manual_seed(seed) if draws else None,
    )
    return list(adapter.parameters())


def _layers(model: nn.Module, task: Task) -> Iterator[tuple[str, nn.Module]]:
    """The layers that methods adapt."""
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        is_target = task.layers is None or any(fnmatchcase(name, p) for p in task.layers)
        if is_linear and is_target and not is_head(task, name):
            yield name, module


def is_head(task: Task, name: str) -> bool:
    """Whether a module or parameter is part of the head."""
    return any(name == head or name.startswith(f"{head}.") for head in task.head)


def train(task: Task, name: str, rate: float, seed: int) -> tuple[nn.Module, int]:
    """Trains with Adam and a one-cycle schedule; returns the model and what it trained."""
    model = task.model()
    model.requires_grad_(False)
    trained = method(name).prepare(model, task, seed)
    head = [p for n, p in model.named_parameters() if is_head(task, n)]
    for parameter in (*trained, *head):
        parameter.requires_grad_(True)
    groups = [(own, top) for own, top in ((trained, rate), (head, task.head_rate)) if own]
    if groups:
        optimizer = torch.optim.Adam([{"params": own} for own, _ in groups])
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=[top for _, top in groups], total_steps=task.steps
        )
        generator = torch.Generator().manual_seed(seed)
        for _ in range(task.steps):
            loss: Tensor = task.loss(model, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval(), sum(parameter.numel() for parameter in trained)
