"""Federated fine-tuning: two clients share what they learn, and none of their data.

All clients have the same pretrained network. So they have the same C and R, and what a client
learns is in its cores. An update is linear in the core. So the mean of the cores, weighted by the
numbers of samples, gives exactly the mean of the effective weights, which is what federated
averaging wants (McMahan et al. 2017). The means of LoRA's A and of its B do not: the mean of the
products B A is not the product of the means.

The network reads handwritten digits (those of scikit-learn). The clients have mirrored digits: one
of them only digits from 0 to 4, the other one only digits from 5 to 9. Each client is a process of
this machine. After every round they exchange nothing but cores, by ``all_reduce``. They also save
their adapters, and in the end `Adapter.average` makes the same mean of the files.

    python examples/federated.py [--rounds 12] [--output runs/federated]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import tcur_kernels as tcur
from tcur_kernels.files.whole import replacing

CLIENTS = 2
DIGITS = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))

#: Images ``[samples, 64]`` in 0 … 1 and their digits.
Data = tuple[Tensor, Tensor]


def digits() -> tuple[Data, Data]:
    """The images of scikit-learn, for training and for tests."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (x[500:], y[500:]), (x[:500], y[:500])


def mirror(images: Tensor) -> Tensor:
    """The images with left and right exchanged."""
    return images.unflatten(1, (8, 8)).flip(2).flatten(1)


def network() -> nn.Module:
    """A perceptron with six matrices of one shape in the middle."""
    middle = (layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.ReLU()))
    return nn.Sequential(*middle, nn.Linear(64, 10))


def fit(
    model: nn.Module, parameters: Sequence[nn.Parameter], data: Data, rate: float, epochs: int
) -> None:
    """Trains with Adam, in batches of 50."""
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for _ in range(epochs):
        for index in torch.randperm(len(data[0])).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(data[0][index]), data[1][index]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """The fraction of the digits that are read right."""
    return float((model(data[0]).argmax(1) == data[1]).float().mean())


@torch.no_grad()
def average_over_clients(values: Sequence[Tensor], samples: int) -> list[Tensor]:
    """The mean of the values of all clients, weighted by their samples, in fp64."""
    total = torch.tensor(float(samples), dtype=torch.float64)
    dist.all_reduce(total)
    means = [value.double() * (samples / total) for value in values]
    for mean in means:
        dist.all_reduce(mean)
    return means


def client(rank: int, model: nn.Module, data: Data, test: Data, rounds: int, folder: Path) -> None:
    """One client: trains on its own data, and averages its cores with those of the others."""
    torch.manual_seed(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=CLIENTS
    )
    is_own = torch.isin(data[1], torch.tensor(DIGITS[rank]))
    own = data[0][is_own], data[1][is_own]
    samples = len(own[0])
    adapter = tcur.adapt(model, rank=16)
    cores = [stack.core for stack in adapter.stacks.values()]
    layers = [place.module for stack in adapter.stacks.values() for place in stack.places]
    for number in range(1, rounds + 1):
        fit(model, list(adapter.parameters()), own, rate=5e-3, epochs=2)
        alone = accuracy(model, test)
        weights = average_over_clients([layer.weight for layer in layers], samples)
        adapter.metadata = {"samples": samples}
        adapter.save(folder / f"client_{rank}.safetensors")
        means = average_over_clients(cores, samples)
        with torch.no_grad():
            for core, mean in zip(cores, means, strict=True):
                core.copy_(mean)
            pairs = zip(layers, weights, strict=True)
            apart = max(float((a.weight - b).norm() / b.norm()) for a, b in pairs)
        # Every process writes a line of its own, so that the lines of two do not mix.
        told = f"round {number}, client {rank}: {alone:.1%} after its own digits"
        if rank == 0:
            told += f"; {accuracy(model, test):.1%} averaged; W_eff is off its mean by {apart:.0e}"
        print(f"{told}\n", end="", flush=True)
        dist.barrier()
    if rank == 0:
        adapter.save(folder / "federated.safetensors")
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrains, lets the clients learn, and averages their files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("runs/federated"))
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    args.output.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    train, test = digits()
    base = network()
    fit(base, list(base.parameters()), train, rate=3e-3, epochs=20)
    print(f"digits as they are: {accuracy(base, test):.1%}")
    mirrored, test = ((mirror(x), y) for x, y in (train, test))
    print(f"mirrored, before the clients learn: {accuracy(base, test):.1%}")

    with replacing(args.output / "federated.safetensors") as fresh:
        folder = fresh.parent  # for the files of the clients, too
        arguments = (base, mirrored, test, args.rounds, folder)
        torch.multiprocessing.spawn(client, arguments, nprocs=CLIENTS)
        files = {path: tcur.read_metadata(path)["samples"] for path in folder.glob("client_*")}
        tcur.Adapter.average(files, args.output / "averaged.safetensors")

    adapter = tcur.load_adapter(base, args.output / "federated.safetensors")
    adapter.load(args.output / "averaged.safetensors", name="averaged")
    same = all(torch.equal(*stack.every_core()) for stack in adapter.stacks.values())
    print(f"federated adapter: {accuracy(base, test):.1%}, {adapter.count_parameters():,} numbers")
    print(f"Adapter.average of the files of the clients: {'the same' if same else 'other'} cores")


if __name__ == "__main__":
    main()
