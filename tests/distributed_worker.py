"""Run by torchrun on two processes: each named way of training, against one process.

In float64, as it is not about roundings; in mixed precision against plain torch.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

import tcur_kernels as tcur
from models import Block, Checkpointed, Tiny
from plain import Plain
from tcur_kernels.processes import whole
from tolerance import FLOAT64, assert_composition_close, relative_error
from torchrun import leave


def adapted(mode="auto", norms=True, dtype=torch.float64):
    torch.manual_seed(0)
    model = Tiny().eval().to(dtype)
    if not norms:
        for block in model.blocks:
            block.norm = nn.Identity()
    adapter = tcur.adapt(model, rank=2, mode=mode, train_also="head")
    with torch.no_grad():
        for stack in adapter.stacks.values():
            stack.core.normal_(std=0.3)
    return model, adapter


def steps(model, adapter, x, count=2):
    """Gradients and parameters after each of some optimizer steps, whole."""
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    record = []
    for _ in range(count):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        for name, parameter in adapter.named_parameters():
            record.append((f"grad of {name}", whole(parameter.grad).clone()))
        optimizer.step()
        for name, parameter in adapter.named_parameters():
            record.append((name, whole(parameter.detach()).clone()))
    return record


def compare(record, wanted, what):
    for (name, actual), (_, expected) in zip(record, wanted, strict=True):
        assert actual.dtype == expected.dtype == torch.float64, name
        error = relative_error(actual, expected)
        assert error <= FLOAT64, f"{what}: {name} is off by {error:.2g}"


def ddp(rank, x, wanted, mode):
    model, adapter = adapted(mode)
    compare(steps(DistributedDataParallel(model), adapter, x[rank::2]), wanted, f"ddp {mode}")


def ddp_checkpointed(rank, x, wanted):
    model, adapter = adapted()
    parallel = DistributedDataParallel(Checkpointed(model, use_reentrant=False))
    compare(steps(parallel, adapter, x[rank::2]), wanted, "ddp, checkpoints")
    model, adapter = adapted()
    x = x.clone().requires_grad_()  # reentrant checkpoints want an input that asks for gradients
    parallel = DistributedDataParallel(Checkpointed(model, use_reentrant=True), static_graph=True)
    compare(steps(parallel, adapter, x[rank::2]), wanted, "ddp, reentrant, static graph")
    model, adapter = adapted()
    parallel = DistributedDataParallel(Checkpointed(model, use_reentrant=True))
    with torch.no_grad():
        parallel(x[rank::2])
    with pytest.raises(RuntimeError, match="pass use_reentrant=False"):
        steps(parallel, adapter, x[rank::2])


def ddp_accumulated(rank, x, wanted):
    """Two halves without synchronisation and then with."""
    model, adapter = adapted()
    parallel = DistributedDataParallel(model)
    own = x[rank::2]
    with parallel.no_sync():
        (parallel(own[:2]).square().mean() / 2).backward()
    (parallel(own[2:]).square().mean() / 2).backward()
    record = [(f"grad of {n}", p.grad) for n, p in adapter.named_parameters()]
    compare(record, wanted[: len(record)], "ddp, accumulated")


def fsdp(rank, x, wanted, path):
    model, adapter = adapted()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    compare(steps(model, adapter, x[rank::2]), wanted, "fsdp2")
    adapter.save(path)
    dist.barrier()
    torch.manual_seed(0)
    alone = Tiny().eval().double()
    tcur.load_adapter(alone, path)
    compare([("output", alone(x))], [("output", model(x))], "saved by rank 0")
    for call, message in (
        (adapter.merge, "merge: expected whole weights, got sharded or offloaded"),
        (
            lambda: tcur.TProductStack([model.blocks[0].mlp[0]], 2),
            "linears: expected whole weights",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def fsdp1(rank, x, wanted, use_orig_params, mode):
    """The older way, which flattens parameters and sets plain tensors in their place."""
    model, adapter = adapted(mode)
    names = [name for name, _ in adapter.named_parameters() if not name.startswith("head")]
    with torch.no_grad():
        y = model(x[rank::2])
    # Flat parameters must be frozen or trained as a whole: the root's are the cores alone then.
    apart = () if use_orig_params else (model.embed, model.head)
    sharded = FullyShardedDataParallel(
        model,
        auto_wrap_policy=lambda module, recurse, **_: recurse or isinstance(module, Block),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
        ignored_states=[p for module in apart for p in module.parameters()],
    )
    compare([("output", sharded(x[rank::2]))], [("output", y)], f"fsdp1 {use_orig_params} {mode}")
    compare([("output", sharded(x[rank::2]))], [("output", y)], f"fsdp1 {use_orig_params} {mode}")
    sharded(x[rank::2]).square().mean().backward()
    with FullyShardedDataParallel.summon_full_params(sharded, with_grads=use_orig_params):
        if use_orig_params:
            grads = {
                n.replace("_fsdp_wrapped_module.", ""): p.grad
                for n, p in sharded.named_parameters()
            }
            record = [(f"grad of {name}", grads[name]) for name in names]
            compare(record, wanted[: len(record)], f"fsdp1 {mode}")


def fsdp_forced(rank, x):
    model, _ = adapted("materialized")
    for block in model.blocks:
        fully_shard(block)
    with pytest.raises(
        ValueError, match="where weights are sharded or offloaded, got 'materialized'"
    ):
        model(x)


def fsdp_mixed(rank, x):
    """Parameters cast to bf16 for the computation, the core among them."""
    # Without norms: torch's batch norm fails where its weights are cast and its statistics are not.
    (model, adapter), x = adapted(norms=False, dtype=torch.float32), x.float()
    plain, exact = (Plain(adapter, dtype) for dtype in (torch.bfloat16, torch.float64))
    starts = [parameter.detach().clone() for parameter in adapter.parameters()]

    def step(plain):
        grads = plain.with_gradients(lambda y: y.square().mean(), x.to(plain.dtype))[1:]
        wide = torch.promote_types(plain.dtype, torch.float32)
        parameters = [start.to(wide, copy=True) for start in starts]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.to(wide)
        torch.optim.Adam(parameters, lr=1e-2).step()
        return [tensor.to(plain.dtype) for tensor in (*grads, *parameters)]

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    actual = [tensor for _, tensor in steps(model, adapter, x[rank::2], 1)]
    assert all(tensor.dtype == torch.float32 for tensor in actual)
    assert_composition_close(actual, lambda: step(plain), step(exact))


class Convolutions(nn.Module):
    """Two blocks whose convolutions share stacks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(
            *[
                nn.Sequential(nn.Conv1d(6, 8, 3), nn.Tanh(), nn.ConvTranspose1d(8, 6, 3))
                for _ in range(2)
            ]
        )

    def forward(self, x):
        return self.blocks(x)


def convolutions(rank, x, sharding):
    """Each layer reads W_eff within its forward, while its weight is whole."""
    torch.manual_seed(0)
    model = Convolutions().double()
    adapter = tcur.adapt(model, "*", rank=2)
    with torch.no_grad():
        for stack in adapter.stacks.values():
            stack.core.normal_(std=0.3)
    alone = copy.deepcopy(model)
    alone(x.mT).square().mean().backward()
    wanted = [("output", alone(x[rank::2].mT))]
    wanted += [(f"grad of {n}", p.grad) for n, p in alone.named_parameters() if "tcur" in n]
    if sharding == "fsdp2":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        called = model
    elif sharding == "fsdp1":
        called = FullyShardedDataParallel(
            model,
            auto_wrap_policy=lambda module, recurse, **_: recurse or module in [*model.blocks],
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
    else:
        called = DistributedDataParallel(model)
    with torch.no_grad():
        compare([("output", called(x[rank::2].mT))], wanted[:1], f"convolutions, {sharding}")
    y = called(x[rank::2].mT)
    y.square().mean().backward()
    record = [("output", y)]
    if sharding == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(called, with_grads=True):
            record += [("grad", p.grad) for n, p in called.named_parameters() if "tcur" in n]
    else:
        record += [(n, whole(p.grad)) for n, p in model.named_parameters() if "tcur" in n]
    compare(record, wanted, f"convolutions, {sharding}")


def main():
    path = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    x = torch.randn(8, 7, 6, dtype=torch.float64)
    wanted = steps(*adapted(), x)
    for mode in ("auto", "materialized"):
        ddp(rank, x, wanted, mode)
    ddp_checkpointed(rank, x, wanted)
    ddp_accumulated(rank, x, wanted)
    fsdp(rank, x, copy.deepcopy(wanted), path / "adapter")
    for use_orig_params in (True, False):
        for mode in ("auto", "factored"):
            fsdp1(rank, x, wanted, use_orig_params, mode)
    fsdp_forced(rank, x)
    fsdp_mixed(rank, x)
    for sharding in ("ddp", "fsdp1", "fsdp2"):
        convolutions(rank, x, sharding)
    if rank == 0:
        print("all ways agree")
    leave()


if __name__ == "__main__":
    main()
