"""Tables of the documents, made from the newest row of every device, case and contender."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import rows

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "docs" / "performance.md", ROOT / "README.md")
BEGIN, END = "<!-- begin {op} -->\n", "<!-- end {op} -->\n"
#: op -> columns, each a ratio of two contenders' medians; the first numerator is ours.
LAYOUT = {
    "materialize": (
        ("materialize", "stream"),
        ("S1", "materialize"),
        ("S2", "materialize"),
        ("eager", "materialize"),
        ("compile", "materialize"),
    ),
    "step": (
        ("tcur", "frozen"),
        ("tcur_bf16", "frozen"),
        ("lora", "frozen"),
        ("tcur", "lora"),
        ("tcur_bf16", "lora"),
    ),
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
    """Markdown of one operator: ratios of medians of the newest rows."""
    columns = LAYOUT[op]
    ours = columns[0][0]
    newest: dict[tuple[str, str], dict[str, float]] = {}
    for row in recorded:
        if row["op"] == op:
            case = newest.setdefault((row["device"], row["case"]), {})
            case[row["contender"]] = float(row["median_ms"])
    columns = [pair for pair in columns if pair[0] != pair[1]]
    heads = ["device", "case", f"{ours}, ms", *(f"{top} / {bottom}" for top, bottom in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for (device, case), ms in newest.items():
        ratios = [_ratio(ms.get(top), ms.get(bottom)) for top, bottom in columns]
        lines.append("| " + " | ".join([device, case, f"{ms[ours]:.4g}", *ratios]) + " |")
    return "\n".join(lines) + "\n"


def _ratio(numerator: float | None, denominator: float | None) -> str:
    if numerator is None or denominator is None:
        return "–"
    return f"{numerator / denominator:.2f}"


def write() -> list[Path]:
    """Puts the tables between their marks in the documents that have them; returns the documents.

    Raises:
        ValueError: no document has marks for an operator.
    """
    recorded = rows.read()
    texts = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    for op in LAYOUT:
        begin, end = BEGIN.format(op=op), END.format(op=op)
        holders = [path for path, text in texts.items() if begin in text and end in text]
        if not holders:
            names = " or ".join(path.name for path in DOCUMENTS)
            raise ValueError(f"{names}: expected the marks {begin.strip()} and {end.strip()}")
        for path in holders:
            head, rest = texts[path].split(begin)
            texts[path] = head + begin + table(op, recorded) + end + rest.split(end)[1]
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return list(texts)
