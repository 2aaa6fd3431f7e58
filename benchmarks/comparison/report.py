"""The tables of docs/comparison.md, or of a folder of the user, from the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from tcur_kernels.files.whole import replacing

from ..documents import fill, paragraph, table
from . import plots, records
from .methods import FEW, METHODS
from .records import Rows
from .summary import (
    Summary,
    experiments,
    interval,
    main_size,
    refusals,
    sizes,
    summaries,
    untrained,
)
from .tasks import TASKS
from .tasks.base import ROOT

PAGES = (ROOT / "docs" / "comparison.md", ROOT / "README.md")
PLOTS = ROOT / "docs" / "plots"

#: The method that others are compared with.
OURS = "tcurlora:8"


def write(file: Path, output: Path | None) -> list[Path]:
    """Writes tables and plots; returns the files.

    Args:
        file: the rows.
        output: a folder for ``comparison.md`` and the plots. None: the repository's documents,
            which have marks for the tables.

    Raises:
        RowsError: there are no rows of reported trainings.
    """
    rows = records.read(file)
    every = [(data, task) for data, task in experiments(rows) if sizes(rows, data, task)]
    if not every:
        raise records.RowsError(f"{file}: expected rows of reported trainings, got none")
    if output is None:
        return [*fill(tables(rows), PAGES), *plots.draw(rows, "default", PLOTS)]
    output.mkdir(parents=True, exist_ok=True)
    page, drawn = output / "comparison.md", []
    parts = []
    for data in dict.fromkeys(data for data, _ in every):
        parts.append(f"# {data}\n")
        for _, task in (pair for pair in every if pair[0] == data):
            own = [scores(rows, data, task), by_size(rows, data, task), measures(rows, data, task)]
            parts += [f"## {task}\n", *(text for text in own if text)]
        drawn += plots.draw(rows, data, output)
    with replacing(page) as fresh:
        fresh.write_text("\n".join(parts), encoding="utf-8")
    return [page, *drawn]


def tables(rows: Rows) -> dict[str, str]:
    """Name of the mark -> Markdown, of the repository's own tasks that have rows."""
    tasks = [task for task in TASKS if sizes(rows, "default", task)]
    found = {"comparison": shown(rows, tasks)}
    for task in tasks:
        found[f"comparison_{task}"] = scores(rows, "default", task)
        for name, text in (
            ("sizes", by_size(rows, "default", task)),
            ("measures", measures(rows, "default", task)),
        ):
            if text:
                found[f"comparison_{task}_{name}"] = text
    return found


def scores(rows: Rows, data: str, task: str) -> str:
    """Every method of a task, at the size of its search; a sentence for those that are missing."""
    kind, found = TASKS[task], summaries(rows, data, task, main_size(rows, data, task))
    heads = ["method", "numbers", "rate", kind.measure, "difference", "kept", "step", "memory"]
    most = max((len(one.rows) + one.diverged for one in found.values()), default=0)
    lines = []
    for name, summary in found.items():
        apart = None if OURS not in found or name == OURS else summary.apart(found[OURS])
        lines.append(
            [
                METHODS[name].label,
                f"{summary.middle('trained'):,.0f}",
                "–"
                if summary.rate is None
                else f"{summary.rate:g}{'*' if summary.is_edge else ''}",
                f"{interval(summary.numbers('test')):.3f}{_notes(summary, most)}",
                "–" if apart is None else f"{apart:+.3f}",
                f"{interval(summary.numbers('kept')):.3f}",
                "–" if math.isnan(summary.step_ms) else f"{summary.step_ms:.0f} ms",
                f"{summary.middle('peak_mb'):.0f} MB",
                f"{summary.middle('file_kb'):,.0f} KB",
            ]
        )
    text = table([*heads, "file"], lines)
    every = [row["kept_before"] for one in found.values() for row in one.rows.values()]
    before = [(kind.measure, untrained(rows, data, task))]
    before += [(kind.kept_measure, float(kept)) for kept in every[:1]]
    told = [f"{name} is {score:.3f}" for name, score in before if not math.isnan(score)]
    if told:
        text += "\n" + paragraph(f"Before adaptation, {' and '.join(told)}.")
    for name, why in refusals(rows, data, task).items():
        text += "\n" + paragraph(f"{METHODS[name].label} does not take this model: {why}")
    return text


def _notes(summary: Summary, most: int) -> str:
    """How many seeds diverged, and how many there are if others have more."""
    every = len(summary.rows) + summary.diverged
    notes = [f"{summary.diverged} of {every} diverged"] if summary.diverged else []
    notes += [f"{every} seed{'s' if every > 1 else ''}"] if every < most else []
    return f" ({', '.join(notes)})" if notes else ""


def by_size(rows: Rows, data: str, task: str) -> str:
    """The scores of the methods that have several sizes; empty if there are none."""
    every = sizes(rows, data, task)
    found = [summaries(rows, data, task, size) for size in every]
    shown = [name for name in METHODS if sum(name in one for one in found) > 1]
    if not shown:
        return ""
    most = max(len(one.rows) + one.diverged for at in found for one in at.values())
    lines = [
        [
            METHODS[name].label,
            *(
                f"{interval(at[name].numbers('test')):.3f}{_notes(at[name], most)}"
                if name in at
                else "–"
                for at in found
            ),
        ]
        for name in shown
    ]
    return table(["method", *map(str, every)], lines)


def measures(rows: Rows, data: str, task: str) -> str:
    """The details of the scores; empty for a task without."""
    found = summaries(rows, data, task, main_size(rows, data, task))
    names = TASKS[task].details_measured
    if not found or not names:
        return ""
    lines = [
        [METHODS[name].label, *(f"{one.detail(each):.3f}" for each in names)]
        for name, one in found.items()
    ]
    return table(["method", *names], lines)


def shown(rows: Rows, tasks: Sequence[str]) -> str:
    """A few methods on all tasks, and how many numbers they train on the first."""
    every = [summaries(rows, "default", task, main_size(rows, "default", task)) for task in tasks]
    lines = [
        [
            METHODS[name].label,
            f"{every[0][name].middle('trained'):,.0f}" if name in every[0] else "–",
            *(
                f"{interval(found[name].numbers('test')):.3f}" if name in found else "–"
                for found in every
            ),
        ]
        for name in FEW
    ]
    return table(["what trains beside the head", f"numbers ({tasks[0]})", *tasks], lines)
