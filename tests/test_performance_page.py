"""docs/performance.md has no figure that a hand wrote: the report command writes them from rows."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
#: A measured figure, as far as a pattern can tell: a number with a unit of time, speed or share, a
#: number with a fraction, so many times, so many cases, and the words for such ratios. Whole
#: numbers alone are sizes and counts.
FIGURE = re.compile(
    r"[\d.,]*\d\s(?:ns|ms|µs|per\scent|[GT]B/s|GHz)\b|[\d.,]*\d\s?%|\b\d+\.\d+\b|\b\d+\stimes\b"
    r"|\b\d+\sof\s(?:the\s)?\d+\b|\b(?:all|in)\s\d+\scases\b"
    r"|\b(?:half|halves|twice|third|thirds|quarter|quarters)\b"
)
#: What a hand may write, and why it is not a figure that rows could contradict.
ALLOWED = {
    "vectors of AVX2 are half as wide": "the width of a register",
    "the half spectrum": "half of the frequencies",
    "The target was half of": "an aim",
    "lent for half an hour": "how long the machine was there",
    "is half the time of a copy": "the definition of a floor",
    "takes half of the pipe of fp32": "how a multiprocessor is made",
    "For the others 90 % of the data sheet is assumed": "an assumption of the model",
    "meets W_eff twice": "what a step does",
    "80 registers for a third block": "an ordinal",
    "so 32 times the warp instructions": "the lanes of a warp",
    "less than a third of them": "checked by tests/test_kernels_issue.py",
}
GENERATED = re.compile(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->\n", re.DOTALL)


def by_hand(page):
    """The text outside marks, without code, addresses and line ends."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", "`", GENERATED.sub("\n\n", page))
    return re.sub(r"\s+", " ", text)


def figures(page):
    text = by_hand(page)
    for phrase in ALLOWED:
        text = text.replace(phrase, "")
    return [text[max(0, m.start() - 40) : m.end() + 20] for m in FIGURE.finditer(text)]


def test_no_figure_stands_outside_of_the_marks():
    assert figures(PAGE.read_text(encoding="utf-8")) == []


def test_every_exception_is_needed():
    assert [one for one in ALLOWED if one not in by_hand(PAGE.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "sentence",
    [
        "In all 16 cases it is the fastest.",
        "It is within 1 % of it.",
        "It takes 0.12 to 0.26 per weight.",
        "It took 745\nµs.",
        "It moves 3 TB/s.",
        "In 11 of the 16 cases it is the fastest.",
        "It takes two thirds of the time.",
        "It is 3 times as long.",
    ],
)
def test_figures_are_found(sentence):
    assert figures(sentence)
    assert not figures(f"<!-- begin some -->\n{sentence}\n<!-- end some -->\n")


def test_sizes_are_none():
    assert not figures("48 x 768 x 768 at r = 8, tiles for 512 KiB, commit 80b9ee2, `-m a 0.5 ms`.")


def test_what_stands_between_the_marks_is_what_the_rows_give(monkeypatch):
    """Of the CPU, the GPU and what was tried by hand; nobody has changed it or forgotten to."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import report

    pages = "".join(path.read_text(encoding="utf-8") for path in report.DOCUMENTS)
    for name, text in report.texts().items():
        assert f"<!-- begin {name} -->\n{text}<!-- end {name} -->\n" in pages, name


def test_sentences_hold_for_any_rows(monkeypatch):
    """For none at all, and for several machines, of which each has its own."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import gpu_sentences, sentences

    for say in gpu_sentences.SENTENCES.values():
        assert say([]).endswith("\n") or say([]) == ""
    for name in sentences.SENTENCES:
        assert sentences.written(name, {}).endswith("\n")
    case = {"materialize": 3.0, "autocast": 2.0}
    values = {("one", "a"): case, ("other", "a"): {**case, "autocast": 6.0}, ("other", "b"): case}
    assert sentences.cast(values) == (
        "On one it takes 1.50 of the time of autocast's cast. "
        "On other it takes 0.50 to 1.50 of the time of autocast's cast."
    )


def test_aims_are_counted_as_the_table_rounds(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import gpu_sentences

    row = {"section": "core_grad_dense", "device": "some", "backend": "cuda", "note": ""}
    rows = [
        {**row, "case": case, "contender": "stack", "ms": "1", "percent_of_copy": share}
        for case, share in (("a", "59.4"), ("b", "59.6"))
    ]
    assert gpu_sentences.reached(rows) == (
        "- On some: The dense gradient reaches 59 to 60 % of its floor. The aim of 60 % is reached "
        "by 1 of 2.\n"
    )
