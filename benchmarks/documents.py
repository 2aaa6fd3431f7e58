"""Generated tables in the documents, each between two marks with its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill as wrap

from tcur_kernels.files.whole import replacing

BEGIN, END = "<!-- begin {name} -->\n", "<!-- end {name} -->\n"


def fill(tables: Mapping[str, str], documents: Sequence[Path]) -> list[Path]:
    """Writes each table between its marks, in every document that has them.

    Args:
        tables: name in the marks -> Markdown.
        documents: where to look for marks.

    Returns:
        The documents.

    Raises:
        ValueError: no document has the marks of a table. Nothing is written then.
    """
    texts = {path: path.read_text(encoding="utf-8") for path in documents}
    for name, table in tables.items():
        begin, end = BEGIN.format(name=name), END.format(name=name)
        holders = [path for path, text in texts.items() if begin in text and end in text]
        if not holders:
            names = " or ".join(path.name for path in documents)
            raise ValueError(f"{names}: expected the marks {begin.strip()} and {end.strip()}")
        for path in holders:
            head, rest = texts[path].split(begin)
            texts[path] = head + begin + table + end + rest.split(end)[1]
    for path, text in texts.items():
        with replacing(path) as fresh:
            fresh.write_text(text, encoding="utf-8")
    return list(texts)


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def paragraph(sentences: str, indent: str = "") -> str:
    """Sentences, in lines that are no wider than a page; all but the first are indented."""
    return wrap(sentences, 100, subsequent_indent=indent, break_on_hyphens=False) + "\n"


def span(numbers: Sequence[float], form: str = ".2f") -> str:
    """The least and the greatest number; one of them where both read the same."""
    least, most = format(min(numbers), form), format(max(numbers), form)
    return least if least == most else f"{least} to {most}"
