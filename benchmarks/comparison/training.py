"""One training, and what is measured of it."""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .methods.base import Method, Prepared, is_head
from .tasks.base import DivergedError, Task

#: The curve of a training has the mean loss of so many parts of it.
CURVE = 20


@dataclass(frozen=True)
class Trained:
    """A trained model, and what its training took.

    Attributes:
        model: in evaluation mode.
        numbers: that the method trained beside the head.
        curve: the mean loss of consecutive parts of the training, all of about one length.
        file_kb: kilobytes of what a user would keep, without the head.
    """

    model: nn.Module
    numbers: int
    curve: list[float]
    file_kb: float


def train(task: Task, method: Method, rate: float, seed: int) -> Trained:
    """Trains with Adam and a one-cycle schedule; the head has its own learning rate.

    Raises:
        DivergedError: the loss became infinite or NaN.
        RefusedError: the method does not take the model.
    """
    training = _Training(task, method, rate, seed)
    losses = [training.step() for _ in range(task.steps)] if training.groups else []
    prepared = training.prepared
    numbers = sum(parameter.numel() for parameter in prepared.parameters)
    return Trained(training.model.eval(), numbers, _parts(losses), _kilobytes(prepared))


def step_of(task: Task, method: Method, rate: float, seed: int) -> Callable[[], float]:
    """A training step, to time it: any number of them may be done. It returns its loss."""
    training = _Training(task, method, rate, seed)
    return training.step if training.groups else lambda: training.loss().item()


class _Training:
    """A model in training."""

    def __init__(self, task: Task, method: Method, rate: float, seed: int) -> None:
        self.task, self.model = task, task.model()
        self.prepared = method.prepare(self.model, task, seed)
        self.model.requires_grad_(False)
        head = [p for n, p in self.model.named_parameters() if is_head(task, n)]
        for parameter in (*self.prepared.parameters, *head):
            parameter.requires_grad_(True)
        both = ((list(self.prepared.parameters), rate), (head, task.head_rate))
        self.groups = [{"params": own, "lr": top} for own, top in both if own]
        self.generator = torch.Generator().manual_seed(seed)
        self.done = 0
        if self.groups:
            self.optimizer = torch.optim.Adam(self.groups)
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(
                self.optimizer,
                max_lr=[group["lr"] for group in self.groups],
                total_steps=task.steps,
            )

    def loss(self) -> Tensor:
        """The loss of the next batch."""
        return self.task.loss(self.model, self.generator)

    def step(self) -> float:
        """One step; returns its loss."""
        loss = self.loss()
        if not math.isfinite(value := loss.item()):
            raise DivergedError(f"the loss is {value} at step {self.done + 1}")
        penalty, after_step = self.prepared.penalty, self.prepared.after_step
        self.optimizer.zero_grad()
        (loss if penalty is None else loss + penalty()).backward()
        self.optimizer.step()
        if after_step is not None:
            after_step(self.done)
        self.done += 1
        if self.done < self.task.steps:
            self.schedule.step()
        return value


def _parts(losses: list[float]) -> list[float]:
    """The means of consecutive parts."""
    count = min(CURVE, len(losses))
    edges = [len(losses) * i // count for i in range(count + 1)] if count else []
    return [statistics.fmean(losses[a:b]) for a, b in itertools.pairwise(edges)]


def _kilobytes(prepared: Prepared) -> float:
    """The size of what the method saves."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        prepared.save(path)
        files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
        return sum(file.stat().st_size for file in files) / 1024
