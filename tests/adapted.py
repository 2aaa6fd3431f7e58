"""Small adapted models whose cores are not zero, and a check that holds for all of them."""

import torch
from torch import nn
from torch.nn import functional as F

import tcur_kernels as tcur
from plain import Plain
from tolerance import assert_composition_close

WIDTH = 12


def layers(count=4, seed=0, bias=True):
    torch.manual_seed(seed)
    return [nn.Linear(WIDTH, WIDTH, bias) for _ in range(count)]


def randomise(adapter, std=0.5):
    with torch.no_grad():
        for stack in adapter.stacks.values():
            stack.core.normal_(std=std)


def adapted(model=None, **kwargs):
    model = nn.Sequential(*layers()) if model is None else model
    adapter = tcur.adapt(model, rank=3, **kwargs)
    randomise(adapter)
    return model, adapter


def assert_is_the_merged_model(model, adapter, *args):
    """Asserts that the adapted and the merged model agree, up to one rounding."""
    plain, exact = Plain(adapter, torch.float32), Plain(adapter, torch.float64)
    wide = [each.double() if each.is_floating_point() else each for each in args]
    assert_composition_close(model(*args), lambda: plain(*args), exact(*wide))
    merged = adapter.merge(inplace=False)
    assert_composition_close(merged(*args), lambda: plain(*args), exact(*wide))


class Reads(nn.Module):
    """Multiplies by the weights of half of its layers itself, and calls the other layers."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(layers())

    def forward(self, x):
        for index, part in enumerate(self.parts):
            x = part(x) if index % 2 else F.linear(x, part.weight, part.bias)
        return x


class ReadsAll(Reads):
    """Calls none of its layers."""

    def forward(self, x):
        for part in self.parts:
            x = F.linear(x, part.weight, part.bias)
        return x
