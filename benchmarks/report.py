"""Tables of the documents, made from the newest row of every device, case and contender."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import rows

DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
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


def write() -> Path:
    """Puts the tables between their marks in the document and returns its path.

    Raises:
        ValueError: the document has no marks for an operator.
    """
    text = DOCUMENT.read_text(encoding="utf-8")
    recorded = rows.read()
    for op in LAYOUT:
        begin, end = BEGIN.format(op=op), END.format(op=op)
        if begin not in text or end not in text:
            raise ValueError(
                f"{DOCUMENT.name}: expected the marks {begin.strip()} and {end.strip()}"
            )
        head, rest = text.split(begin)
        text = head + begin + table(op, recorded) + end + rest.split(end)[1]
    DOCUMENT.write_text(text, encoding="utf-8")
    return DOCUMENT
