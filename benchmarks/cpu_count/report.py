"""Rows of what was counted, and their table in docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import appending, documents

from . import cases

PATH = Path(__file__).parents[1] / "results" / "counted" / "cpu_count.csv"
KEY = ("case", "isa", "processor", "tiles_for")
FIELDS = ("time", "commit", *KEY, "weights", *cases.COLUMNS)
Row = dict[str, str]


def key_of(shape: Sequence[int], isa: str, processor: str, cache: int) -> Row:
    """What names a row."""
    case = "x".join(map(str, shape))
    return dict(zip(KEY, (case, isa, processor, f"{cache // cases.KIB} KiB"), strict=True))


def append(key: Row, commit: str, counted: Mapping[str, float], path: Path = PATH) -> None:
    """Adds a row to the file, with the names of its columns if it is new.

    Args:
        key: what was counted.
        commit: of the code when it was loaded.
        counted: numbers per weight.
        path: the file.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    numbers = {name: f"{value:.6g}" for name, value in counted.items()}
    appending.append(path, FIELDS, [{"time": now, "commit": commit, **key, **numbers}])


def read(path: Path = PATH) -> list[Row]:
    """The newest row of everything that was counted, in the order of `cases`."""
    newest = {tuple(row[name] for name in KEY): row for row in appending.read(path)}
    keys = [key_of(shape, *one) for shape in cases.SHAPES for one in cases.SETTINGS]
    wanted = [tuple(key.values()) for key in keys]
    return [newest[key] for key in wanted if key in newest]


def table(rows: Sequence[Row]) -> str:
    """The table in Markdown, all per weight."""
    heads = ["case", "instructions of", "caches of", "tiles for", "instructions", "FMAs"]
    heads += ["other vector", "loads", "stores", "on the stack", "bytes loaded, stored"]
    heads += ["L2 to L1, back", "beyond to L2, back", "cycles: arithmetic", "loads", "stores"]
    heads += ["instructions", "L1 to L2", "binds"]
    return documents.table(heads, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    numbers = {name: float(row[name]) for name in cases.COLUMNS}
    needed = cases.cycles(cases.MACHINES[row["processor"]], numbers)
    binds = max(needed, key=lambda name: needed[name])
    counts = ("instructions", "fmas", "vector", "loads", "stores", "stack")
    pairs = (("loaded_bytes", "stored_bytes"), ("bytes_l1", "bytes_l1_back"))
    pairs += (("bytes_l2", "bytes_l2_back"),)
    return [
        *(row[name] for name in KEY),
        *(f"{numbers[name]:.2f}" for name in counts),
        *(f"{numbers[a]:.1f}, {numbers[b]:.1f}" for a, b in pairs),
        *(f"{value:.2f}" for value in needed.values()),
        binds,
    ]


def says(rows: Sequence[Row]) -> str:
    """AVX2 beside AVX-512 at r = 8, where both were counted."""
    ranks = [row for row in rows if row["case"].endswith("x8")]
    both = [
        {row["case"]: row for row in ranks if (row["isa"], row["processor"]) == one[:2]}
        for one in cases.SETTINGS
    ]
    names = [name for name in both[0] if name in both[1]]
    wide, narrow = (
        [{name: float(found[case][name]) for name in cases.COLUMNS} for case in names]
        for found in both
    )
    instructions, fmas, loads = (
        documents.span([b[name] / a[name] for a, b in zip(wide, narrow, strict=True)], ".1f")
        for name in ("instructions", "fmas", "loads")
    )
    # What a core needs for each part; moves between caches are left out of the comparison.
    needed = [cases.cycles(cases.MACHINES[cases.SETTINGS[1][1]], numbers) for numbers in narrow]
    parts = [[each[name] for name in ("arithmetic", "loads", "instructions")] for each in needed]
    apart = documents.span([100 * (max(part) / min(part) - 1) for part in parts], ".0f")
    return documents.paragraph(
        f"At r = 8, AVX2 executes {instructions} times AVX-512's instructions, {fmas} times its "
        f"FMAs and {loads} times its reads. On a Zen 2 the cycles of arithmetic, reads and "
        f"instructions are then {apart} % apart."
    )


#: What follows "cpu_count" in the names of marks -> what writes the text between them.
TEXTS: dict[str, Callable[[Sequence[Row]], str]] = {"": table, "_says": says}
