"""What a method is: it makes a model adaptable, and says what is trained and saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor, nn

from ..tasks.base import Task, is_linear


class RefusedError(Exception):
    """A method does not take a model; the message is that of its library."""


@dataclass(frozen=True)
class Prepared:
    """A model that a method has made adaptable, in place.

    Attributes:
        parameters: what is trained beside the head.
        save: writes the file or folder that a user would keep, without the head.
        penalty: added to the loss.
        after_step: called with the number of the step, 0 for the first, after the optimizer.
    """

    parameters: Sequence[nn.Parameter]
    save: Callable[[Path], None]
    penalty: Callable[[], Tensor] | None = None
    after_step: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        label: its name in tables.
        source: who computes it, or the paper whose equations are computed.
        prepare: makes a model of a task adaptable; gets the seed, too. May raise `RefusedError`.
        rate: the middle of its search for a learning rate, for a large pretrained model.
    """

    label: str
    source: str
    prepare: Callable[[nn.Module, Task, int], Prepared]
    rate: float = 1e-3


def is_head(task: Task, name: str) -> bool:
    """Whether a module or parameter is part of the head."""
    return any(fnmatchcase(name, p) or name.startswith(f"{p}.") for p in task.head)


def layers(model: nn.Module, task: Task) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of the linear layers that methods adapt."""
    for name, module in model.named_modules():
        if is_linear(module) and _matches(task.layers, name) and not is_head(task, name):
            yield name, module


def norms(model: nn.Module, task: Task) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of the normalisations beside these layers."""
    for name, module in model.named_modules():
        wanted = _matches(task.norms, name) and not is_head(task, name)
        if isinstance(module, nn.LayerNorm) and wanted:
            yield name, module


def _matches(patterns: Sequence[str] | None, name: str) -> bool:
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)


def size_of(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; GPT-2's ``Conv1D`` keeps its weight transposed."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, nn.Linear) else (rows, columns)
