"""The smallest task of benchmarks.comparison: it fits numbers with three layers and a head."""

import torch
from torch import nn

from benchmarks.comparison.tasks.base import Task


class Small(Task):
    """The score falls with the loss."""

    sizes, searched, search = (20, 40), 40, (100,)
    measure, kept_measure, own = "score", "score without the head", ("texts",)
    details_measured = ("error",)
    head, head_rate, layers, steps = ("head",), 1e-2, ["body.*"], 3

    def __init__(self, sources, size, seed):
        torch.manual_seed(0)
        body, self.known = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), torch.randn(10, 8)
        torch.manual_seed(seed)
        self.base = nn.ModuleDict({"body": body, "head": nn.Linear(8, 2)})
        self.inputs, self.targets = torch.randn(size, 8), torch.randn(size, 2)

    def loss(self, model, generator):
        rows = torch.randint(len(self.inputs), (8,), generator=generator)
        y = model["head"](model["body"](self.inputs[rows]))
        return (y - self.targets[rows]).square().mean()

    def score(self, model, part):
        return 1 / (1 + self._error(model))

    def tested(self, model):
        return self.score(model, "test"), {"error": self._error(model)}

    @torch.no_grad()
    def kept(self, model):
        return float(model["body"](self.known).square().mean())

    @torch.no_grad()
    def _error(self, model):
        y = model["head"](model["body"](self.inputs))
        return float((y - self.targets).square().mean())
