"""Tables and plots for the documents, from the newest row of every device, case and contender."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.figure import Figure

from tcur_kernels.files.whole import replacing

from . import gpu_report, gpu_sentences, rows, sentences, tried
from .cpu_count import report as counted
from .documents import fill

matplotlib.use("Agg")
ROOT = Path(__file__).parent.parent
#: op -> further columns, each a difference of two contenders' values.
DIFFERENCES = {"overhead": (("materialized", "linear"), ("factored", "linear"))}
DOCUMENTS = tuple(
    ROOT / name for name in ("docs/performance.md", "docs/decomposition.md", "README.md")
)
PLOTS = ROOT / "docs" / "plots"
#: op -> columns, each a ratio of two contenders' values; the first numerator is ours.
LAYOUT = {
    "materialize": (
        ("materialize", "stream"),
        ("S1", "materialize"),
        ("S2", "materialize"),
        ("eager", "materialize"),
        ("compile", "materialize"),
    ),
    "cast": (("materialize", "autocast"), ("materialize", "copy")),
    "step": (
        ("tcur", "frozen"),
        ("tcur_bf16", "frozen"),
        ("lora", "frozen"),
        ("fourierft", "frozen"),
        ("full", "frozen"),
        ("tcur", "lora"),
        ("tcur_bf16", "lora"),
    ),
    "small": (
        ("tcur_8", "lora_8"),
        ("tcur_16", "lora_8"),
        ("tcur_32", "lora_8"),
        ("lora_1", "lora_8"),
        ("head", "lora_8"),
        ("full", "lora_8"),
        ("tcur_8", "full"),
        ("tcur_32", "full"),
    ),
    "memory": (("tcur", "lora"), ("fourierft", "lora"), ("full", "lora"), ("frozen", "lora")),
    "overhead": (
        ("materialized", "linear"),
        ("factored", "linear"),
        ("materialized", "materialized_kernels"),
        ("factored", "factored_kernels"),
    ),
    "serving": (
        ("thousand", "one"),
        ("one_by_factors", "one"),
        ("thousand", "one_by_factors"),
        ("thousand", "frozen"),
    ),
    "packed": (
        ("packed", "rows"),
        ("tokens", "rows"),
        ("shuffled", "rows"),
        ("one_by_one", "rows"),
        ("rows", "frozen"),
    ),
    "ranks": (
        ("one_rank", "frozen"),
        ("padded", "one_rank"),
        ("grouped", "one_rank"),
        ("four_groups", "one_rank"),
    ),
    "store": (
        ("warm", "frozen"),
        ("cold", "warm"),
        ("cold_in_file", "warm"),
        ("own_file", "warm"),
    ),
    "store_memory": (
        ("device", "stacked"),
        ("host", "stacked"),
        ("host_with_file", "stacked"),
        ("file", "stacked"),
    ),
    "neighbour": (
        ("tcur_beside", "tcur"),
        ("frozen_beside", "frozen"),
        ("lora_beside", "lora"),
    ),
    "selection": (
        ("norm", "read"),
        ("norm2", "read"),
        ("leverage", "read"),
        ("leverage_power_1", "read"),
        ("leverage_exact", "read"),
        ("deim", "read"),
        ("inverse", "read"),
        ("uniform", "read"),
        ("norm_intersection", "read"),
        ("norm_projection", "read"),
    ),
    "selection_memory": (("norm", "weights"), ("norm2", "weights"), ("leverage", "weights")),
    "cost_rule": (
        ("auto", "auto"),
        ("materialized_z", "auto"),
        ("materialized_x", "auto"),
        ("materialized_dense", "auto"),
        ("factored_z", "auto"),
        ("factored_x", "auto"),
        ("factored_dense", "auto"),
    ),
}


def table(op: str, recorded: Sequence[dict[str, str]]) -> str:
    """Markdown table of one operator: ratios and differences of medians of the newest rows."""
    columns = LAYOUT[op]
    ours = columns[0][0]
    unit = "MB" if op.endswith("memory") else "ms"
    columns = [pair for pair in columns if pair[0] != pair[1]]
    differences = DIFFERENCES.get(op, ())
    heads = ["device", "case", f"{ours}, {unit}", *(f"{top} / {bottom}" for top, bottom in columns)]
    heads += [f"{top} - {bottom}, {unit}" for top, bottom in differences]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for (device, case), value in newest(op, recorded).items():
        cells = [_ratio(value.get(top), value.get(bottom)) for top, bottom in columns]
        cells += [_difference(value.get(top), value.get(bottom)) for top, bottom in differences]
        lines.append("| " + " | ".join([device, case, f"{value[ours]:.4g}", *cells]) + " |")
    return "\n".join(lines) + "\n"


def newest(op: str, recorded: Sequence[dict[str, str]]) -> dict[tuple[str, str], dict[str, float]]:
    """The newest rows of one operation: (device, case) -> contender -> value."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in recorded:
        if row["op"] == op:
            case = found.setdefault((row["device"], row["case"]), {})
            case[row["contender"]] = float(row["value"])
    return found


def _ratio(numerator: float | None, denominator: float | None) -> str:
    if numerator is None or denominator is None:
        return "–"
    return f"{numerator / denominator:.2f}"


def _difference(minuend: float | None, subtrahend: float | None) -> str:
    if minuend is None or subtrahend is None:
        return "–"
    return f"{minuend - subtrahend:.3g}"


def texts() -> dict[str, str]:
    """All tables and sentences, by the names in their marks."""
    recorded, on_gpus = rows.read(), gpu_report.read()
    found = {op: table(op, recorded) for op in LAYOUT}
    found |= {op: make(on_gpus) for op, make in gpu_report.TABLES.items()}
    found |= {name: say(on_gpus) for name, say in gpu_sentences.SENTENCES.items()}
    found |= {f"cpu_count{end}": say(counted.read()) for end, say in counted.TEXTS.items()}
    for name, (op, _) in sentences.SENTENCES.items():
        found[name] = sentences.written(name, newest(op, recorded))
    return found | tried.tables(tried.read())


def write() -> list[Path]:
    """Writes tables and sentences between their marks in the documents, and draws the plots.

    Returns:
        The written files.

    Raises:
        ValueError: no document has marks for an operator.
    """
    documents = fill(texts(), DOCUMENTS)
    recorded, on_gpus = rows.read(), gpu_report.read()
    drawn = [_save(figure, name) for name, figure in gpu_report.draw(on_gpus).items()]
    return [*documents, *plot(recorded), *drawn]


def plot(recorded: Sequence[dict[str, str]]) -> list[Path]:
    """Plots per cent of streaming over n3 and rank, and step time and memory over tokens."""
    PLOTS.mkdir(exist_ok=True)
    scaling, step, memory = (newest(op, recorded) for op in ("scaling", "step", "memory"))
    paths = []
    for device in sorted({device for device, _ in scaling}):
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for axis, prefix, label in zip(axes, ("n3", "rank"), ("n3", "rank (n3 = 12)"), strict=True):
            for suffix, threads in (("", "all threads"), ("_1", "one thread")):
                points = {
                    x: 100 * value["stream" + suffix] / value["materialize" + suffix]
                    for x, value in _over(scaling, device, rf"{prefix}_(\d+)")
                }
                axis.plot(points.keys(), points.values(), "o-", label=threads)
            axis.set(xlabel=label, ylabel="% of streaming", xscale="log", ylim=0)
            axis.legend()
        paths.append(_save(figure, f"{device}-streaming.png"))
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for axis, found, pattern, label in (
            (axes[0], step, r"vit_b_(\d+)_tokens", "step, ms"),
            (axes[1], memory, r"vit_b_mlp_(\d+)_tokens", "peak memory, MB"),
        ):
            series: dict[str, dict[int, float]] = {}
            for tokens, value in _over(found, device, pattern):
                for method, number in value.items():
                    series.setdefault(method, {})[tokens] = number
            for method, points in series.items():
                axis.plot(points.keys(), points.values(), "o-", label=method)
            axis.set(xlabel="tokens", ylabel=label, xscale="log", yscale="log")
            if series:
                axis.legend()
        paths.append(_save(figure, f"{device}-step.png"))
    return paths


def _over(
    found: dict[tuple[str, str], dict[str, float]], device: str, pattern: str
) -> list[tuple[int, dict[str, float]]]:
    """The cases of a device whose names match, sorted by the number in the name."""
    matches = [(re.fullmatch(pattern, case), where, case) for where, case in found]
    return sorted(
        ((int(m[1]), found[where, case]) for m, where, case in matches if m and where == device),
        key=lambda point: point[0],
    )


def _save(figure: Figure, name: str) -> Path:
    path = PLOTS / name
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=100, metadata={"Software": None})  # no version: same bytes
    pyplot.close(figure)
    return path
