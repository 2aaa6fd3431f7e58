"""Times every kernel of an operator's call, and reads hardware counters of some kernels.

``python -m benchmarks.gpu_kernels`` is the program that ``ncu`` profiles.
"""

from __future__ import annotations

import csv
import itertools
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import tcur_kernels as tcur

from .gpu_bench import Bench
from .gpu_build import logged
from .gpu_clock import Contender, Run
from .gpu_gradients import operator
from .gpu_operators import FP32, SHAPES, TINY, VIT_B, Data, Shape, backends, text, why_absent
from .gpu_rows import Row

CALLS = 10
OPERATORS = (
    "materialize",
    "core_grad_dense",
    "core_grad_tokens",
    "core_grad_tokens packed",
    "core_of_packed",
    "cur_linear",
    "cur_linear bf16",
)
TOKENS = 2048
#: Counters by the names of rows.
METRICS = {
    "us": "gpu__time_duration.sum",
    "dram %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram read MB": "dram__bytes_read.sum",
    "dram write MB": "dram__bytes_write.sum",
    "L2 %": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "L1 %": "l1tex__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "instructions": "sm__inst_executed.sum",
    "tensor %": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "warps %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "shared bytes": "launch__shared_mem_per_block",
    "waves": "launch__waves_per_multiprocessor",
    "bank conflicts": "l1tex__data_bank_conflicts_pipe_lsu.sum",
}
STALLS = ("long_scoreboard", "short_scoreboard", "barrier", "mio_throttle", "lg_throttle")
STALLS += ("math_pipe_throttle", "wait", "not_selected", "membar", "drain")
BRIEF = [*METRICS.values()]  # used if ncu does not know one of the names below
METRICS |= {
    f"stall {name}": f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio"
    for name in STALLS
}
MARK = "spin_kernel"  # the kernel of torch.cuda._sleep, which separates the calls for ncu
#: Shapes that are also timed with some of the work left out.
VARIED = ("vit_b_attention", "vit_b_mlp_up")
#: What ncu profiles: operator, backend, shape.
READINGS = [
    ("materialize", "cuda", "vit_b_attention"),
    ("materialize", "cuda", "vit_b_mlp_up"),
    ("core_grad_dense", "cuda", "vit_b_attention"),
    ("materialize", "triton", "vit_b_attention"),
]


def calls(shape: Shape, device: torch.device, tokens: int) -> dict[str, Callable[[str], object]]:
    """Operators by name, each a function of the backend; all in fp32, some also in bf16."""
    n3, n1, n2, _ = shape
    data = Data.make(shape, device)
    factors, at = data.factors, n3 // 2
    layers = [weight.clone() for weight in data.weight.unbind()]
    out = torch.empty_like(data.weight)
    x, grad_y = torch.randn(tokens, n2, device=device), torch.randn(tokens, n1, device=device)
    bias = torch.randn(n1, device=device)
    weight, packed = layers[at], factors.packed()
    parts = torch.randn(n3, *data.core.shape, device=device)  # of a layer for each slice

    def linear(backend: str, dtype: torch.dtype = torch.float32) -> object:
        precision = "bf16" if dtype == torch.bfloat16 else "ieee"
        tensors = (x.to(dtype), weight.to(dtype), bias.to(dtype), factors, data.core, at)
        return tcur.cur_linear(*tensors, backend=backend, precision=precision)

    return {
        "materialize": lambda backend: tcur.materialize(
            layers, factors, data.core, out=out, backend=backend
        ),
        "core_grad_dense": lambda backend: operator("core_grad_dense", backend)(
            data.weight, *packed
        ),
        "core_grad_tokens": lambda backend: operator("core_grad_tokens", backend)(
            x, grad_y, *packed, n3, at, 1
        ),
        "core_grad_tokens packed": lambda backend: operator("core_grad_tokens", backend)(
            x, grad_y, *packed, n3, at, 1, None, 1, True
        ),
        "core_of_packed": lambda backend: operator("core_of_packed", backend)(parts, 1.0),
        "cur_linear": linear,
        "cur_linear bf16": partial(linear, dtype=torch.bfloat16),
    }


def short(name: str) -> str:
    """A kernel's name without namespaces, argument types and most template arguments."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    head, bracket, rest = name.partition("<")
    own = head.partition("(")[0].split("::")[-1]
    inner = re.sub(r"\((\w+)\)", "", rest.rpartition(">")[0]) if bracket else ""
    if "::" in inner or len(inner) > 24:
        inner = inner.split("::")[-1][:24]
    return f"{own}<{inner}>" if inner else own


def measured(run: Callable[[], object], count: int = CALLS) -> dict[str, tuple[float, float]]:
    """The kernels of a call, each with mean microseconds per launch and launches per call."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            run()
        torch.cuda.synchronize()
    found: defaultdict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[short(event.name)].append(event.time_range.elapsed_us())
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return {name: (sum(us) / len(us), len(us) / count) for name, us in found.items()}


def _kernels(bench: Bench, row: Row, shape: Shape, op: str) -> None:
    call = calls(shape, bench.device, 30 if bench.tiny else TOKENS)[op]
    if not bench.clock.on_gpu:
        call(row.backend)
        bench.rows.add(replace(row, note="absent: no CUDA"))
        return
    found = measured(partial(call, row.backend))
    total = sum(us * count for us, count in found.values())
    note = f"{sum(count for _, count in found.values()):g} launches"
    bench.rows.add(replace(row, contender="all", ms=total / 1e3, note=note))
    for name, (us, count) in sorted(found.items(), key=lambda item: -item[1][0] * item[1][1]):
        note = f"{count:g} a call, {100 * us * count / total:.0f} %"
        bench.rows.add(replace(row, contender=name, ms=us / 1e3, note=note))


def variants(bench: Bench, section: str, case: str, shape: Shape, backend: str) -> None:
    """Finds the bottleneck: leaves some of the work out, fp32 to fp32, and compares with a copy.

    "no base" only writes. "fewer planes" has half the rank, so half the multiplications that form
    the planes. "no transform" has the same numbers in a single slice, so tubes have length one.
    """
    n3, n1, n2, rank = shape
    forms = {
        "whole": shape,
        "no base": shape,
        "fewer planes": (n3, n1, n2, max(1, rank // 2)),
        "no transform": (1, n3 * n1, n2, rank),
    }
    count = bench.clock.sets(2 * FP32.itemsize * n3 * n1 * n2)
    stacks = [torch.randn(n3, n1, n2, device=bench.device) for _ in range(count)]
    outs = [torch.empty_like(stack) for stack in stacks]

    def runs(name: str) -> list[Run]:
        data = Data.make(forms[name], bench.device)
        factors, core = data.factors, data.core
        if name == "no base":
            op = operator("materialize_out", backend)
            spectra = factors.packed()
            return [partial(op, [], *spectra, core, 1.0, out=out) for out in outs]
        sizes = forms[name][:3]
        return [
            partial(
                tcur.materialize, w.view(sizes), factors, core, out=o.view(sizes), backend=backend
            )
            for w, o in zip(stacks, outs, strict=True)
        ]

    def copies() -> list[Run]:
        return [partial(o.copy_, w) for w, o in zip(stacks, outs, strict=True)]

    contenders = [Contender("copy", "torch", copies)]
    for name in forms:
        share = 0.5 if name == "no base" else 1.0
        absent = why_absent(backend, bench.device)
        contenders.append(Contender(name, backend, partial(runs, name), share=share, absent=absent))
    bench.race(section, case, contenders, ratios=("whole",))


def run(bench: Bench, out: Path) -> None:
    """Times the kernels of every operator at the shapes of a ViT-B, the variants, the counters."""
    shapes = {name: SHAPES[name] for name in VIT_B} if not bench.tiny else {"tiny": TINY}
    here = [b for b in backends(bench.device) if why_absent(b, bench.device) is None]
    for (name, shape), op, backend in itertools.product(shapes.items(), OPERATORS, here):
        case = f"{op} {name} {text(shape)} {backend}"
        row = Row("kernels", case, "", backend)
        bench.piece("kernels", case, partial(_kernels, bench, row, shape, op))
    for name, backend in itertools.product(VARIED if not bench.tiny else shapes, here):
        case = f"{name} {text(shapes[name])} {backend}"
        work = partial(variants, bench, "variants", case, shapes[name], backend)
        bench.piece("variants", case, work)
    bench.piece("ncu", "counters", partial(_counters, bench, out))


def _counters(bench: Bench, out: Path) -> None:
    tool = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if tool is None or not bench.clock.on_gpu:
        bench.rows.add(Row("ncu", "counters", "", note="absent"))
        return
    command = [tool, "--clock-control", "none", "--profile-from-start", "off", "--csv"]
    command += ["--target-processes", "application-only"]
    ours = [sys.executable, "-m", "benchmarks.gpu_kernels"]
    for chosen in (list(METRICS.values()), BRIEF):
        with tempfile.TemporaryDirectory() as folder:
            log, program = Path(folder, "log"), Path(folder, "program")
            asked = ["--metrics", ",".join(chosen), "--log-file", str(log)]
            ended = logged([*command, *asked, *ours], program, min(75.0, bench.clock.left))
            found, said = (
                file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
                for file in (log, program)
            )
        with open(out / "ncu.txt", "a", encoding="utf-8") as file:
            file.write(f"{said}\n{found}\n")
        if _read(bench, found) or ended.startswith("FAILED: not done"):
            break
    if ended != "passed":
        bench.rows.add(Row("ncu", "counters", "", note=ended))


def _read(bench: Bench, text: str) -> bool:
    """Adds a row for each kernel in ncu's table; returns whether there was any."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, dict[str, str]] = {}
    names: dict[str, str] = {}
    for line in csv.DictReader(lines[start:]):
        names[line["ID"]] = line["Kernel Name"]
        value = f"{line['Metric Value']} {line['Metric Unit']}".strip()
        kernels.setdefault(line["ID"], {})[line["Metric Name"]] = value
    reading = -1
    for key, values in kernels.items():
        if MARK in names[key]:
            reading += 1
            continue
        op, backend, shape = READINGS[reading] if 0 <= reading < len(READINGS) else ("?", "", "")
        told = {label: values[m] for label, m in METRICS.items() if m in values} or values
        note = ", ".join(f"{label} {value}" for label, value in told.items())
        ms = _milliseconds(values.get(METRICS["us"], ""))
        bench.rows.add(Row("ncu", f"{op} {shape}", short(names[key]), backend, ms, note=note))
    return bool(kernels)


def _milliseconds(value: str) -> float | None:
    number, _, unit = value.replace(",", "").partition(" ")
    scale = {"ns": 1e-6, "nsecond": 1e-6, "us": 1e-3, "usecond": 1e-3, "ms": 1, "msecond": 1}
    return float(number) * scale[unit] if unit in scale else None


def main() -> None:
    """Runs every reading once, after a mark; a reading that cannot run leaves only its mark."""
    device = torch.device("cuda")
    for op, backend, shape in READINGS:
        call = None
        try:
            call = calls(SHAPES[shape], device, 16)[op]
            call(backend)
        except Exception as error:
            print(f"{op} {backend} {shape}: {error}")
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1000)
        if call is not None:
            try:
                call(backend)
            except Exception as error:
                print(f"{op} {backend} {shape}: {error}")
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        print(f"{op} {backend} {shape}: done")


if __name__ == "__main__":
    main()
