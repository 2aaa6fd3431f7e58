"""The methods, each a name: what is trained beside the head, and how."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

import tcur_kernels as tcur

from ..comparison import methods as compared
from ..comparison.methods import by_peft
from ..comparison.methods.base import Method, Prepared, layers
from ..comparison.tasks.base import Task
from .by_gradient import rules


def method(name: str) -> Method:
    """The method of a name.

    Names are ``head``, ``full``, ``lora:8``, and ``cores:BASIS:SELECTION:8``, maybe ``:layer``.
    """
    kind, *options = name.split(":")
    if kind in ("head", "full"):
        return compared.method(kind)
    if kind == "lora":
        config = partial(by_peft.lora, rank=int(options[0]))
        return Method(name, "peft", partial(by_peft.prepare, config=config))
    return Method(name, "tcur_kernels", _Cores(*options))


@dataclass(frozen=True)
class _Cores:
    """Cores in a basis, of slices by a rule, with a stack for every shape or every layer."""

    basis: str
    rule: str
    rank: str
    stacks: str = "shape"

    def __call__(self, model: nn.Module, task: Task, seed: int) -> Prepared:
        draws = self.rule in ("uniform", "inverse")  # CURLoRA's rule is meant to be drawn
        targets, rank = [name for name, _ in layers(model, task)], int(self.rank)
        by_gradient = self.rule == "gradient"
        adapter = tcur.adapt(
            model,
            targets=targets,
            rank=rank,
            selection=rules(task, model, targets, rank, seed) if by_gradient else self.rule,
            basis=self.basis,
            stacks=self.stacks,
            generator=torch.Generator().manual_seed(seed) if draws else None,
        )
        return Prepared(list(adapter.parameters()), adapter.save)
