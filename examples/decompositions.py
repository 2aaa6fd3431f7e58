"""Tubal CUR, mode-wise CUR and Tucker of the same trained weights, at equal numbers of parameters.

A small vision transformer learns scikit-learn's handwritten digits; they come with scikit-learn, so
nothing is downloaded. Its linear layers of one shape are stacked, and every stack is decomposed.
All decompositions keep the same number of parameters, fewer than the stack has. The table shows
their relative errors.

    python examples/decompositions.py [--steps 400] [--ranks 2 4 8]
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

import tcur_kernels as tcur
from tcur_kernels.adapters.plan import make_plan

WIDTH, DEPTH, HEADS = 48, 6, 4


class Block(nn.Module):
    """Attention and a perceptron, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens to tokens."""
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Reader(nn.Module):
    """A small vision transformer that reads digits of 8 x 8 pixels as 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(16, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[batch, 8, 8]`` to scores of the ten digits."""
        patches = images.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)
        return self.head(self.blocks(self.embed(patches) + self.places).mean(1))


def trained(steps: int) -> tuple[Reader, float]:
    """The trained model, and its accuracy on the fifth of the digits kept for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float() / 16
    labels = torch.from_numpy(digits.target).long()
    torch.manual_seed(0)
    order = torch.randperm(len(images))
    seen, unseen = order[len(order) // 5 :], order[: len(order) // 5]
    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in trange(steps, desc="training", leave=False):
        batch = seen[torch.randint(len(seen), (128,))]
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        right = model(images[unseen]).argmax(1) == labels[unseen]
    return model, float(right.float().mean())


def multilinear_rank(shape: tuple[int, int, int], budget: int) -> tuple[int, int, int]:
    """The largest (n3, c, c) whose core and factors have at most ``budget`` numbers."""
    n3, n1, n2 = shape
    c = 1
    while c < min(n1, n2) and n3 * n3 + (c + 1) * (n1 + n2) + n3 * (c + 1) ** 2 <= budget:
        c += 1
    return n3, c, c


def errors(stack: Tensor, rank: int) -> dict[str, float]:
    """Relative errors of decompositions that keep as many numbers as C, U and R of this rank."""
    import tensorly
    from tensorly.decomposition import tucker

    n3, n1, n2 = stack.shape
    ranks = multilinear_rank((n3, n1, n2), n3 * rank * (n1 + n2 + rank))
    core, factors = tucker(np.asarray(stack), list(ranks))
    rest = stack - torch.from_numpy(tensorly.tucker_to_tensor((core, factors)))
    u, s, v = tcur.t_svd(stack)
    kept = tcur.t_product(u[..., :rank].contiguous(), s[:, :rank, :rank].contiguous())
    best = tcur.t_product(kept, tcur.t_transpose(v[..., :rank].contiguous()))
    return {
        "t-SVD": float((stack - best).norm() / stack.norm()),
        "norm": tcur.tensor_cur(stack, rank, "norm", "projection").relative_error(stack),
        "deim": tcur.tensor_cur(stack, rank, "deim", "projection").relative_error(stack),
        "mode-wise": tcur.modewise_cur(stack, ranks).relative_error(stack),
        "Tucker": float(rest.norm() / stack.norm()),
    }


def main() -> None:
    """Trains, decomposes, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    args = parser.parse_args()
    model, accuracy = trained(args.steps)
    print(f"a transformer that reads {100 * accuracy:.1f} % of unseen digits; relative errors")
    print(f"{'stack':>18}{'rank':>6}{'numbers kept':>14}", end="")
    print("".join(f"{name:>11}" for name in ("t-SVD", "norm", "deim", "mode-wise", "Tucker")))
    for plan in make_plan(model, None, max(args.ranks)).stacks:
        weights = [model.get_parameter(f"{m.module}.weight").detach() for m in plan.members]
        stack = torch.cat([w.reshape(-1, plan.n1, plan.n2) for w in weights]).double()
        for rank in args.ranks:
            share = plan.n3 * rank * (plan.n1 + plan.n2 + rank) / stack.numel()
            name = f"{plan.n3} x {plan.n1} x {plan.n2}"
            print(f"{name:>18}{rank:6}{100 * share:12.1f} %", end="")
            print("".join(f"{error:11.3f}" for error in errors(stack, rank).values()))


if __name__ == "__main__":
    main()
