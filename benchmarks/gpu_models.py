"""Times training steps through an encoder's linear layers, and many adapters in one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tcur_kernels as tcur

from . import methods
from .gpu_bench import Bench
from .gpu_clock import Contender, Run, captured
from .gpu_kernels import measured
from .gpu_operators import TINY, Data, Shape, text
from .gpu_rows import Row

TOKENS = 4 * 512
#: Ways to train. Under autocast the projections of "tcur" are in bf16 already.
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "frozen": methods.METHODS["frozen"],
    "lora_8": lambda model: methods.lora(model, 8),
    "lora_32": lambda model: methods.lora(model, 32),
    "tcur": methods.tcur_ieee,
    "tcur_bf16": methods.tcur_bf16,
    "full": methods.METHODS["full"],
}
RATIOS = ("frozen", "lora_8")


def training(bench: Bench) -> None:
    """Times a step by wall clock, by its kernels, and as a CUDA graph; measures peak memory."""
    with mock.patch.object(methods, "WIDTH", 16 if bench.tiny else methods.WIDTH):
        for autocast in (True, False):
            tokens = 20 if bench.tiny else TOKENS
            case = f"encoder {tokens} tokens {'bf16 autocast' if autocast else 'fp32'}"
            bench.piece("step", case, partial(_steps, bench, case, tokens, autocast))


def _steps(bench: Bench, case: str, tokens: int, autocast: bool) -> None:
    base = methods.build().to(bench.device)
    methods.step_of(base, tokens, autocast)()  # allocate library workspaces before measuring
    launched: dict[str, Run] = {}

    def make(name: str) -> list[Run]:
        launched[name] = methods.step_of(WAYS[name](copy.deepcopy(base)), tokens, autocast)
        return [launched[name]]

    def make_graph(name: str) -> list[Run]:
        # Use a separate model, because another step must not replace tensors that a graph writes.
        return [methods.step_of(WAYS[name](copy.deepcopy(base)), tokens, autocast)]

    names = [name for name in WAYS if not (autocast and name == "tcur_bf16")]
    contenders = [Contender(name, "wall", partial(make, name), "wall") for name in names]
    if bench.clock.on_gpu:
        contenders += [Contender(name, "graph", partial(make_graph, name)) for name in names]
    bench.race("step", case, contenders, ratios=RATIOS)
    if not bench.clock.on_gpu:
        return
    for name in launched:
        row = Row("step", case, name, "kernels")
        bench.guarded(row, partial(kernels, bench, row, launched[name]))
    bench.guarded(Row("step", case, "tcur", "replay"), partial(_replayed, base, tokens, autocast))


def kernels(bench: Bench, row: Row, step: Run) -> None:
    """Adds a row with the time of a step's kernels alone, and the longest of them."""
    if bench.clock.left > 0:
        found = measured(step, 2)
        ms = sum(us * count for us, count in found.values()) / 1e3
        most = sorted(found.items(), key=lambda item: -item[1][0] * item[1][1])[:4]
        parts = ", ".join(f"{kernel} {us * n / 1e3:.2g} ms" for kernel, (us, n) in most)
        launches = sum(count for _, count in found.values())
        note = f"{launches:.0f} launches: {parts}"
        bench.rows.add(replace(row, ms=ms, note=note))


def _replayed(base: nn.Module, tokens: int, autocast: bool) -> None:
    """Checks that a captured step gives the same gradients as the eager one."""
    model = methods.tcur_ieee(copy.deepcopy(base))
    run = methods.step_of(model, tokens, autocast)
    run()
    cores = [p for p in model.parameters() if p.requires_grad]
    expected = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in cores]
    captured(run)()
    torch.cuda.synchronize()
    for core, wanted in zip(cores, expected, strict=True):
        came = torch.zeros_like(core) if core.grad is None else core.grad
        error = float((came - wanted).norm() / wanted.norm())
        if not error < (5e-2 if autocast else 1e-5):
            raise ArithmeticError(f"gradient of a replayed step: relative error {error:.2g}")


def serving(bench: Bench) -> None:
    """Times batches with a core per row, for several numbers of adapters, and once a loop."""
    shape, rows, counts = (TINY, 8, (1, 4, 8)) if bench.tiny else (
        (48, 768, 768, 8), 4096, (1, 64, 4096)
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        case = f"{text(shape)} {rows} rows {str(dtype)[6:]}"
        bench.piece("serving", case, partial(_serve, bench, case, shape, rows, counts, dtype))


def _serve(
    bench: Bench,
    case: str,
    shape: Shape,
    rows: int,
    counts: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    n3, n1, n2, rank = shape
    data = Data.make(shape, bench.device)
    factors, weight = data.factors, data.weight[1].to(dtype)
    x = torch.randn(rows, 1, n2, device=bench.device).to(dtype)
    precision = "bf16" if dtype == torch.bfloat16 else "ieee"
    limit = 1e-5 if dtype == torch.float32 else 2e-2

    def batch(adapters: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(bench.device).manual_seed(adapters)
        cores = torch.randn(adapters, n3, rank, rank, generator=generator, device=bench.device)
        return cores / rank, torch.arange(rows, device=bench.device) % adapters

    def together(adapters: int) -> list[Run]:
        cores, ids = batch(adapters)
        how = {"adapter_ids": ids, "precision": precision}
        return [partial(tcur.cur_linear, x, weight, None, factors, cores, 1, **how)]

    def looped(cores: Tensor, adapters: int) -> Tensor:
        y = torch.empty(rows, 1, n1, device=bench.device, dtype=dtype)
        for adapter in range(adapters):
            own = slice(adapter, rows, adapters)
            y[own] = tcur.cur_linear(
                x[own], weight, None, factors, cores[adapter], 1, precision=precision
            )
        return y

    def loop(adapters: int) -> list[Run]:
        return [partial(looped, batch(adapters)[0], adapters)]

    def check(adapters: int) -> str | None:
        cores, ids = batch(adapters)
        y = together(adapters)[0]()
        sample = torch.arange(0, rows, max(1, rows // 16), device=bench.device)
        worst = 0.0
        for row in sample.tolist():
            alone = tcur.cur_linear(
                x[row].float(), weight.float(), None, factors, cores[ids[row]], 1
            )
            worst = max(worst, float((y[row].float() - alone).norm() / alone.norm()))  # type: ignore[index]
        return None if worst < limit else f"relative error {worst:.2g}"

    first, middle = f"{counts[0]} adapter", counts[1]
    contenders = [Contender("linear", "", lambda: [partial(F.linear, x, weight)])]
    contenders += [
        Contender(
            first if count == 1 else f"{count} adapters",
            "",
            partial(together, count),
            check=partial(check, count),
        )
        for count in counts
    ]
    contenders.append(Contender(f"loop of {middle}", "", partial(loop, middle), "launched"))
    bench.race("serving", case, contenders, ratios=(first,))
