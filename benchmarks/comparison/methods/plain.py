"""What is trained without an adapter: everything, or the head alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from ..tasks.base import Task
from .base import Prepared, is_head


def full(model: nn.Module, task: Task, seed: int) -> Prepared:
    """Trains all parameters; tied weights are one parameter, and are saved once."""
    trained = [p for name, p in model.named_parameters() if not is_head(task, name)]
    return Prepared(trained, saver(model, trained))


def head(model: nn.Module, task: Task, seed: int) -> Prepared:
    """Trains nothing beside the head; what it saves is empty."""
    return Prepared([], saver(model, []))


def saver(model: nn.Module, trained: Sequence[nn.Parameter]) -> Callable[[Path], None]:
    """What saves the present values of trained parameters under their names in the model."""
    wanted = {id(parameter) for parameter in trained}
    named = {name: p for name, p in model.named_parameters() if id(p) in wanted}
    return partial(_save, named)


def _save(named: dict[str, nn.Parameter], path: Path) -> None:
    save_file({name: p.detach().contiguous() for name, p in named.items()}, path)
