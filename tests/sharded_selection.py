"""Run by torchrun: every rule and core on sharded weights, against the same on one process."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import tcur_kernels as tcur
from tcur_kernels import decompose
from tcur_kernels.decompose import Deim, Leverage
from tolerance import assert_equal_in_float64
from torchrun import leave


def whole(n3, n1, n2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(n3, n1, 4, dtype=torch.float64, generator=generator)
    right = torch.randn(n3, 4, n2, dtype=torch.float64, generator=generator)
    noise = 1e-2 * torch.randn(n3, n1, n2, dtype=torch.float64, generator=generator)
    return (tcur.t_product(left, right) + noise).to(dtype)


def same(found, expected):
    """Indices and slices; cores of float64, or what they are in another dtype, rounded once."""
    assert torch.equal(found.rows, expected.rows), (found.rows, expected.rows)
    assert torch.equal(found.columns, expected.columns), (found.columns, expected.columns)
    assert torch.equal(found.lateral, expected.lateral)
    assert torch.equal(found.horizontal, expected.horizontal)
    if expected.core.dtype == torch.float64:
        assert_equal_in_float64(found.core, expected.core)
    else:
        assert torch.equal(found.core, expected.core), (found.core, expected.core)


def rules(mesh):
    """Sharded by slices, rows, columns or not at all; fewer rows than some processes have."""
    chosen = [
        *decompose.RULES,
        Leverage("randomized", power_iterations=1),
        Deim("randomized"),
        lambda stack, rank, generator: ([1, 0], [0, 2]),
    ]
    for shape in ((4, 9, 7), (3, 2, 5), (1, 8, 6)):
        a = whole(*shape)
        for dim in (0, 1, 2):
            placed = distribute_tensor(a, mesh, [Shard(dim)])
            for rule in chosen:
                for core in ("intersection", "projection", "zero"):
                    # Processes must agree, though their own generators differ.
                    torch.manual_seed(dist.get_rank())
                    found = tcur.tensor_cur(placed, 2, rule, core)
                    torch.manual_seed(0)
                    expected = tcur.tensor_cur(a, 2, rule, core)
                    same(found, expected)
                error = found.relative_error(placed)
                assert abs(error - expected.relative_error(a)) < 1e-12
        for rule in ("norm", "norm2", "leverage", "inverse", "uniform"):
            draws = [torch.Generator().manual_seed(s) for s in (dist.get_rank(), 0)]
            found = tcur.tensor_cur(placed, 2, rule, generator=draws[0])
            same(found, tcur.tensor_cur(a, 2, rule, generator=draws[1]))
    for a in (torch.ones(3, 7, 8), torch.zeros(3, 7, 8), whole(4, 9, 8, torch.bfloat16)):
        for dim in (1, 2):
            placed = distribute_tensor(a, mesh, [Shard(dim)])
            for rule in ("norm", "norm2", "leverage", "deim", "inverse"):
                same(tcur.tensor_cur(placed, 3, rule), tcur.tensor_cur(a, 3, rule))


def layers(mesh):
    """Lists of weights as FSDP2 leaves them: a fused one of three slices beside plain ones."""
    a = whole(5, 6, 8)
    fused, plain = a[:3].reshape(18, 8), list(a[3:])
    for dim in (0, 1):
        placed = [distribute_tensor(w, mesh, [Shard(dim)]) for w in (fused, *plain)]
        stack = decompose.ShardedSlices("weights", placed)
        assert (stack.n3, stack.n1, stack.n2) == (5, 6, 8)
        same(tcur.tensor_cur(stack, 3), tcur.tensor_cur(a, 3))
    mixed = [
        distribute_tensor(w, mesh, [p]) for w, p in zip(plain, (Shard(0), Replicate()), strict=True)
    ]
    same(
        tcur.tensor_cur(decompose.ShardedSlices("weights", mixed), 3, "norm2"),
        tcur.tensor_cur(a[3:], 3, "norm2"),
    )


def models(mesh):
    """The parameters that FSDP2 shards."""
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(8, 9) for _ in range(4)))
    expected = tcur.tensor_cur(torch.stack([layer.weight.detach() for layer in plain]), 3)
    fully_shard(plain, mesh=mesh)
    stack = decompose.ShardedSlices("weights", [layer.weight for layer in plain])
    same(tcur.tensor_cur(stack, 3), expected)


def bad_input(mesh):
    """All processes raise, and none waits for the others."""
    a = whole(4, 6, 8)
    a[2, 5, 7] = torch.nan
    for dim in (1, 2):
        placed = distribute_tensor(a, mesh, [Shard(dim)])
        with pytest.raises(ValueError, match="a: expected finite numbers, got NaN or Inf"):
            tcur.tensor_cur(placed, 2)
    other = init_device_mesh("cpu", (1, dist.get_world_size()))
    weights = [
        distribute_tensor(a[0], mesh, [Shard(0)]),
        distribute_tensor(a[1], other, [Replicate(), Shard(0)]),
    ]
    for broken in (weights, [weights[0], a[1]]):
        with pytest.raises(ValueError, match="weights: expected DTensors on one device mesh"):
            decompose.ShardedSlices("weights", broken)
    hybrid = distribute_tensor(whole(4, 6, 8), other, [Replicate(), Shard(1)])
    same(tcur.tensor_cur(hybrid, 2), tcur.tensor_cur(whole(4, 6, 8), 2))


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (rules, layers, models, bad_input):
        part(mesh)
    print(f"process {dist.get_rank()} of {dist.get_world_size()}: done", file=sys.stderr)
    leave()


main()
