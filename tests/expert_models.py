"""A small module with experts that multiplies by them in many ways, and its exact results."""

import torch
from torch import nn
from torch.nn import functional as F

import tcur_kernels as tcur
from adapted import randomise
from plain import Plain

EXPERTS, IN, OUT = 4, 8, 12
TARGETS = ["experts.rows", "experts.columns"]


ONE = {
    "linear": lambda m, x, e: F.linear(x, m.rows[e]),
    "linear, bias": lambda m, x, e: F.linear(x, m.rows[e], m.bias),
    "times its transpose": lambda m, x, e: x @ m.rows[e].T,
    "times": lambda m, x, e: x @ m.columns[e],
    "linear, transposed": lambda m, x, e: F.linear(x, m.columns[e].permute(1, 0)),
    "a part of it": lambda m, x, e: F.linear(x, m.rows[e, :]),
}


def sorted_by_expert(ids):
    order = ids.argsort(stable=True)
    return order, ids.bincount(minlength=EXPERTS).cumsum(0).int()


def grouped(m, x, ids):
    order, ends = sorted_by_expert(ids)
    return F.grouped_mm(x[order].to(m.rows.dtype), m.rows.transpose(-2, -1), offs=ends)[
        order.argsort()
    ]


def grouped_columns(m, x, ids):
    order, ends = sorted_by_expert(ids)
    return torch._grouped_mm(x[order], m.columns, ends)[order.argsort()]


ALL = {
    "grouped": grouped,
    "grouped, columns": grouped_columns,
    "picked": lambda m, x, ids: torch.bmm(m.rows[ids], x[..., None])[..., 0],
    "picked, columns": lambda m, x, ids: (x[:, None] @ m.columns[ids])[:, 0],
    "picked from the end": lambda m, x, ids: torch.bmm(x[:, None], m.columns[ids - EXPERTS])[:, 0],
    "as many for each": lambda m, x, ids: torch.bmm(x.view(EXPERTS, -1, IN), m.columns).flatten(
        0, 1
    ),
    "transposed, and again": lambda m, x, ids: (
        m.rows.mT.mT @ x.view(EXPERTS, -1, IN).permute(0, 2, 1)
    ).mT.flatten(0, 1),
    "all of them": lambda m, x, ids: torch.einsum("ti,eoi->eto", x, m.rows)[
        ids, torch.arange(len(ids))
    ],
}


class Experts(nn.Module):
    """Each token goes to one expert."""

    def __init__(self, way="linear"):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(EXPERTS, OUT, IN) / IN**0.5)
        self.columns = nn.Parameter(torch.randn(EXPERTS, IN, OUT) / IN**0.5)
        self.bias = nn.Parameter(torch.randn(OUT))
        self.way = way

    def forward(self, x, ids):
        if self.way in ALL:
            return ALL[self.way](self, x, ids)
        y = x.new_zeros(len(x), OUT)
        for e in ids.unique():
            tokens = (ids == e).nonzero()[:, 0]
            y = y.index_copy(0, tokens, ONE[self.way](self, x[tokens], e).to(y.dtype))
        return y


class Model(nn.Module):
    def __init__(self, way="linear"):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(IN, IN)
        self.experts = Experts(way)

    def forward(self, x, ids):
        return self.experts(self.first(x), ids)


IDS = torch.tensor([3, 0, 0, 3, 2, 0, 2, 3])  # nothing for expert 1
EACH = torch.arange(EXPERTS).repeat_interleave(2)


def tokens(way="linear"):
    torch.manual_seed(1)
    evenly = way in ("as many for each", "transposed, and again")
    return torch.randn(len(IDS), IN), EACH if evenly else IDS


def adapted(way="linear", targets=TARGETS, **settings):
    model = Model(way)
    adapter = tcur.adapt(model, targets, **{"rank": 3, **settings})
    randomise(adapter, 0.1)
    return model, adapter


def with_gradients(model, adapter, x, ids):
    """The output, and the gradients of x and of the cores."""
    x = x.detach().clone().requires_grad_()
    y = model(x, ids)
    y.square().sum().backward()
    return (y, x.grad, *(stack.core.grad for stack in adapter.stacks.values()))


def exactly(adapter, x, ids, way, dtype=torch.float64):
    """The same in plain torch. It has no grouped product in float64."""
    plain = Plain(adapter, dtype)
    if dtype == torch.float64 and way.startswith("grouped"):
        plain._model.experts.way = "linear" if way == "grouped" else "times"

    def compute():
        wide = x.to(dtype, copy=True).requires_grad_()
        y = plain(wide, ids)
        unused = {"allow_unused": True, "materialize_grads": True}
        return (y, *torch.autograd.grad(y.square().sum(), [wide, *plain.trained], **unused))

    return compute
