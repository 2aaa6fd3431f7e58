"""Training steps, a captured step, and many adapters in one batch, on a device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

import tcur_kernels as tcur

from . import methods
from .gpu_clock import Bench, Row, captured
from .gpu_operators import Data

#: name -> tokens of a batch: UNETR at 96^3 with four volumes; ViT-B with 64 images.
BATCHES = {"unetr": 4 * 216, "vit_b": 64 * 197}


#: Ways to train, beside those of `methods`.
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    **{name: methods.METHODS[name] for name in ("frozen", "full", "tcur", "tcur_bf16")},
    "lora_8": lambda model: methods.lora(model, 8),
    "lora_32": lambda model: methods.lora(model, 32),
}


def training(bench: Bench) -> None:
    """A step through the linear layers of the encoder: time and peak memory."""
    with mock.patch.object(methods, "WIDTH", 16 if bench.tiny else methods.WIDTH):
        base = methods.build().to(bench.device)
        for name, tokens in {"tiny": 20}.items() if bench.tiny else BATCHES.items():
            for autocast in (False, True):
                case = f"{name} {tokens} tokens {'bf16 autocast' if autocast else 'fp32'}"
                for contender, way in WAYS.items():
                    run = methods.step_of(way(copy.deepcopy(base)), tokens, autocast)
                    bench.measure("step", case, contender, run, graph=False)
                    del run
                    if bench.device.type == "cuda":
                        torch.cuda.empty_cache()


def capture(bench: Bench) -> None:
    """A whole step as one CUDA graph, and whether its gradients are those of the eager step."""
    case = "vit_b 864 tokens fp32"
    if bench.device.type != "cuda":
        bench.rows.add(Row("cuda_graph", case, "tcur", note="absent: no CUDA"))
        return
    model = methods.tcur_ieee(methods.build().to(bench.device))
    run = methods.step_of(model, 864, False)
    run()
    cores = [p for p in model.parameters() if p.requires_grad]
    expected = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in cores]
    replay = captured(run)
    if replay is None:
        bench.rows.add(Row("cuda_graph", case, "tcur", note="FAILED: cannot be captured"))
        return
    replay()
    torch.cuda.synchronize()
    error = max(
        float((p.grad - e).norm() / e.norm()) if p.grad is not None else float("inf")
        for p, e in zip(cores, expected, strict=True)
    )
    if not error < 1e-5:
        bench.rows.add(Row("cuda_graph", case, "tcur", note=f"WRONG: error {error:.2g}"))
        return
    bench.measure("cuda_graph", case, "tcur, replayed", replay, graph=False)
    bench.measure("cuda_graph", case, "tcur, launched", run, graph=False)


def serving(bench: Bench) -> None:
    """One call with a core per row of the batch against a loop over the adapters."""
    shape, rows = ((6, 20, 24, 2), 8) if bench.tiny else ((48, 768, 768, 8), 4096)
    n3, _, n2, rank = shape
    data = Data.make(shape, bench.device)
    factors = tcur.CURFactors(data.lateral, data.horizontal)
    weight = data.weight[1]
    x = torch.randn(rows, 1, n2, device=bench.device)
    for adapters in (1, 4, 8) if bench.tiny else (1, 64, 4096):
        cores = torch.randn(adapters, n3, rank, rank, device=bench.device) / rank
        ids = torch.arange(rows, device=bench.device) % adapters

        def together(cores: Tensor = cores, ids: Tensor = ids) -> Tensor:
            return tcur.cur_linear(x, weight, None, factors, cores, 1, adapter_ids=ids)

        def loop(cores: Tensor = cores, adapters: int = adapters) -> Tensor:
            y = torch.empty(rows, 1, weight.shape[0], device=bench.device)
            for adapter in range(adapters):
                own = slice(adapter, rows, adapters)
                y[own] = tcur.cur_linear(x[own], weight, None, factors, cores[adapter], 1)
            return y

        case = f"{'x'.join(map(str, shape))}, {rows} rows, {adapters} adapters"
        error = float((together() - loop()).norm() / loop().norm())
        if not error < 1e-5:
            bench.rows.add(Row("serving", case, "together", note=f"WRONG: error {error:.2g}"))
            continue
        bench.measure("serving", case, "together", together)
        bench.measure("serving", case, "loop", loop, graph=False)
