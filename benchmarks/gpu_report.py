"""Tables and a plot of the newest rows from ``python -m benchmarks.gpu``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import pyplot
from matplotlib.figure import Figure

from . import appending, documents

RESULTS = Path(__file__).parent / "results" / "gpu"
PLAIN = " plain torch"
BASELINES = ("eager", "compile", "S1", "S2")

Row = dict[str, str]
#: (case, contender, backend) -> the newest row.
Found = dict[tuple[str, str, str], Row]


def read() -> list[Row]:
    """All rows of all devices, oldest first."""
    found: list[Row] = []
    for path in sorted(RESULTS.glob("*.csv")):
        found += appending.read(path)
    return sorted(found, key=lambda row: row["time"])


def newest(recorded: Sequence[Row], section: str, device: str) -> Found:
    """The rows of one section on one device that have a time."""
    chosen = [r for r in recorded if (r["section"], r["device"]) == (section, device) and r["ms"]]
    return {(row["case"], row["contender"], row["backend"]): row for row in chosen}


def devices(recorded: Sequence[Row]) -> list[str]:
    """Devices that have rows."""
    return sorted({row["device"] for row in recorded})


def cases(found: Found) -> list[str]:
    """The cases, in the order in which they were measured."""
    return list(dict.fromkeys(case for case, _, _ in found))


def _number(row: Row | None, column: str, form: str = ".4g") -> str:
    return format(float(row[column]), form) if row and row[column] else "–"


def _ratio(top: Row | None, bottom: Row | None) -> str:
    return f"{float(top['ms']) / float(bottom['ms']):.2f}" if top and bottom else "–"


def materialize(recorded: Sequence[Row]) -> str:
    """Table of W_eff: its time, its speed relative to a copy, and ratios of plain torch to it."""
    heads = ["device", "case", "cuda, ms", "% of copy", "layers", "triton", "before"]
    heads += [f"{name} / cuda" for name in BASELINES]
    lines = []
    for device in devices(recorded):
        found = newest(recorded, "materialize", device)
        before = newest(recorded, "materialize before", device)
        for case in cases(found):
            if case.endswith(PLAIN) or (case, "stack", "cuda") not in found:
                continue
            ours = found[case, "stack", "cuda"]
            shares = [
                ours,
                found.get((case, "layers", "cuda")),
                found.get((case, "stack", "triton")),
            ]
            shares.append(before.get((case, "stack", "cuda")))
            plain = [found.get((case + PLAIN, name, "torch")) for name in BASELINES]
            lines.append(
                [device, case, _number(ours, "ms")]
                + [_number(row, "percent_of_copy", ".0f") for row in shares]
                + [_ratio(row, ours) for row in plain]
            )
    return documents.table(heads, lines)


def gradients(recorded: Sequence[Row]) -> str:
    """Table of core gradients: time, and per cent of the floor."""
    heads = ["device", "operator", "case", "cuda, ms", "% of floor", "triton, ms"]
    lines = []
    for device in devices(recorded):
        for section in ("core_grad_dense", "core_grad_tokens"):
            found = newest(recorded, section, device)
            for (case, contender, backend), row in found.items():
                if backend != "cuda":
                    continue
                said = re.search(r"(\d+) % of floor", row["note"])
                # A dense gradient only reads, which is half of a copy.
                share = said[1] if said else _number(row, "percent_of_copy", ".0f")
                triton = found.get((case, contender, "triton"))
                times = [_number(row, "ms"), share, _number(triton, "ms")]
                lines.append([device, section, case, *times])
    return documents.table(heads, lines)


def step(recorded: Sequence[Row]) -> str:
    """Table of training steps, launched and as CUDA graphs, beside the frozen model and LoRA."""
    heads = ["device", "case", "method", "launched, ms", "graph, ms", "graph / frozen"]
    heads += ["graph / lora_8", "launched / lora_8", "peak, MB"]
    lines = []
    for device in devices(recorded):
        found = newest(recorded, "step", device)
        for case, name, backend in found:
            if backend != "wall":
                continue

            def of(name: str, backend: str, case: str = case, found: Found = found) -> Row | None:
                return found.get((case, name, backend))

            ratios = [
                _ratio(of(name, "graph"), of(other, "graph")) for other in ("frozen", "lora_8")
            ]
            ratios.append(_ratio(of(name, "wall"), of("lora_8", "wall")))
            times = [_number(of(name, how), "ms") for how in ("wall", "graph")]
            peak = _number(of(name, "graph"), "peak_mb", ".0f")
            lines.append([device, case, name, *times, *ratios, peak])
    return documents.table(heads, lines)


def serving(recorded: Sequence[Row]) -> str:
    """Table of many adapters in one batch."""
    heads = ["device", "case", "one adapter, ms", "64 / one", "4096 / one", "loop of 64 / one"]
    lines = []
    for device in devices(recorded):
        found = newest(recorded, "serving", device)
        for case in cases(found):
            one = found.get((case, "1 adapter", ""))
            others = ("64 adapters", "4096 adapters", "loop of 64")
            ratios = [_ratio(found.get((case, name, "")), one) for name in others]
            lines.append([device, case, _number(one, "ms"), *ratios])
    return documents.table(heads, lines)


def counters(recorded: Sequence[Row]) -> str:
    """Table of Nsight Compute's counters for the main kernels."""
    names = ("dram %", "L2 %", "issue %", "instructions")
    lines = []
    for device in devices(recorded):
        for (case, kernel, _), row in newest(recorded, "ncu", device).items():
            if kernel.startswith("<"):
                continue
            said = [re.search(rf"{re.escape(name)} ([\d.,]+)", row["note"]) for name in names]
            read_off = [match[1].rstrip(",") if match else "–" for match in said]
            micros = f"{1e3 * float(row['ms']):.1f}"
            lines.append([device, case, f"`{kernel}`", micros, *read_off])
    return documents.table(["device", "case", "kernel", "µs", *names], lines)


#: Name of the marks in the documents -> the table to put between them.
TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "gpu_materialize": materialize,
    "gpu_gradients": gradients,
    "gpu_step": step,
    "gpu_serving": serving,
    "gpu_counters": counters,
}


def draw(recorded: Sequence[Row]) -> dict[str, Figure]:
    """Plots per cent of copy bandwidth over n3, with a line for each rank: file name -> figure."""
    figures = {}
    for device in devices(recorded):
        lines: dict[tuple[str, str], dict[int, float]] = {}
        for (case, form, backend), row in newest(recorded, "sweep", device).items():
            match = re.match(r"(\d+)x(\d+)x\d+x(\d+) ", case)
            if match and form == "stack" and row["percent_of_copy"]:
                where = f"{backend}, {match[2]}², r = {match[3]}", backend
                lines.setdefault(where, {})[int(match[1])] = float(row["percent_of_copy"])
        figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
        for (label, backend), points in sorted(lines.items()):
            ordered = sorted(points.items())
            style = "o-" if backend == "cuda" else "x:"
            axis.plot(*zip(*ordered, strict=True), style, label=label)
        axis.set(xlabel="n3", ylabel="% of copy bandwidth", xscale="log", ylim=(0, 105))
        axis.legend(fontsize="small", ncols=2)
        figures[f"{device.replace(' ', '-')}-copy.png"] = figure
    return figures
