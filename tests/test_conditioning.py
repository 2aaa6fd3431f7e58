"""benchmarks.conditioning: what it trains, how it chooses rates, and that tables are current."""

import copy
import csv
import functools
import statistics

import pytest
import torch
from torch import nn

from benchmarks.comparison import tasks
from benchmarks.comparison.tasks.base import Sources
from benchmarks.comparison.training import train
from benchmarks.conditioning import experiment, methods, records, report
from small_task import Small


@pytest.fixture
def made(tmp_path, monkeypatch):
    """An experiment with the small task, whose rows go to a folder of their own."""
    monkeypatch.setattr(records, "FILE", tmp_path / "rows" / "accuracies.csv")
    monkeypatch.setitem(tasks.TASKS, "small", Small)
    monkeypatch.setitem(experiment.RATES, "small", (1e-3, 1e-2))
    monkeypatch.setitem(experiment.RANKS, "small", (2, 4))
    return lambda: experiment.Experiment("small", Sources())


CORES = ("cores:orthonormal:norm:2", "cores:slices:inverse:2:layer", "cores:orthonormal:gradient:2")


@pytest.mark.parametrize(
    ("name", "trained"),
    [("head", 0), ("full", 3 * 72), ("lora:1", 3 * 16), *((name, 12) for name in CORES)],
)
def test_a_method_trains_what_it_says(name, trained):
    task = Small(Sources(), 40, 0)
    before = copy.deepcopy(task.base.state_dict())
    found = train(task, methods.method(name), 1e-2, seed=0)
    model = found.model
    assert found.numbers == trained
    assert not torch.equal(model["head"].weight, before["head.weight"])
    changed = model["body"][0](torch.ones(8)) - nn.functional.linear(
        torch.ones(8), before["body.0.weight"], before["body.0.bias"]
    )
    assert bool(changed.any()) == (name != "head")
    assert all(torch.equal(before[key], value) for key, value in task.base.state_dict().items())


def test_a_search_takes_the_rate_that_validation_prefers(made):
    experiment.compare(made(), ["cores:orthonormal:norm:2", "head"], (0, 1))
    rows = {records.key(row): row for row in records.read()}
    rate = experiment.chosen(rows, "small", "cores:orthonormal:norm:2")
    seeds = {(r, s) for _, m, r, s in rows if m != "head"}
    searched = {(r, s) for r in (1e-3, 1e-2) for s in experiment.SEARCH}
    assert seeds == searched | {(rate, seed) for seed in experiment.MORE}
    scores = dict.fromkeys((0.001, 0.01), 0.0)
    for (_, method, tried, seed), row in rows.items():
        if method != "head" and seed in experiment.SEARCH:
            scores[tried] += float(row["validation"])
    assert rate == max(scores, key=scores.__getitem__)
    assert {s for _, m, _, s in rows if m == "head"} == {0, 1, 2, 3, 4}


def test_what_is_recorded_is_not_trained_again(made, capsys):
    experiment.sweep(made(), ["cores:slices:norm:2"], (0, 1))
    first = records.FILE.read_text()
    assert capsys.readouterr().out.count("cores:slices:norm:2") == 2
    experiment.sweep(made(), ["cores:slices:norm:2"], (0, 1))
    assert records.FILE.read_text() == first
    experiment.sweep(made(), None, (1, 2))  # every second method: those in slices
    with open(records.FILE, newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert {row["method"] for row in found} == {"cores:slices:norm:2", "cores:slices:norm:4"}
    assert list(found[0]) == list(records.FIELDS)


@functools.cache
def _recorded():
    return {records.key(row): row for row in records.read()}


def test_the_tables_are_those_of_the_rows():
    """The pages have what `python -m benchmarks.conditioning report` writes."""
    pages = "".join(page.read_text(encoding="utf-8") for page in report.PAGES)
    rows = _recorded()
    for name, table in report.tables(rows).items():
        assert f"<!-- begin {name} -->\n{table}<!-- end {name} -->\n" in pages
    assert report.PLOT.is_file()


def test_what_the_page_says_of_the_recommended_rate():
    rows = _recorded()
    short, compared = {}, 0
    for task in ("minilm", "letters", "digits"):
        head = float(rows[task, "head", 0.0, 0]["test"])
        for rank in experiment.RANKS[task]:
            curve = report._curve(rows, task, f"cores:orthonormal:norm:{rank}")
            compared += 1
            assert curve[3 * report.RATE] >= head
            if task != "digits" and curve[report.RATE] < max(curve.values()) - 0.01:
                short[task, rank] = round(max(curve.values()) - curve[report.RATE], 3)
    assert compared == 15
    assert short == {("minilm", 64): 0.011}
    curve = report._curve(rows, "minilm", "cores:orthonormal:norm:64")
    assert round(max(curve.values()) - curve[3 * report.RATE], 3) == 0.071
    validation = {
        rate: float(rows["minilm", "cores:orthonormal:norm:64", rate, 0]["validation"])
        for rate in experiment.RATES["minilm"]
    }
    assert max(validation, key=validation.__getitem__) == report.RATE
    at_32, at_64 = (
        float(rows["minilm", f"cores:slices:norm:{rank}", 1e-3, 0]["test"]) for rank in (32, 64)
    )
    assert 1 / 26 < at_32 < float(rows["minilm", "head", 0.0, 0]["test"])
    assert at_64 < 1 / 26
    best = report._curve(rows, "minilm", "cores:slices:norm:8")
    assert max(best, key=best.__getitem__) == 1e-3


def _apart(task, method, other=report.OURS):
    """How much better `method` is than `other`, in standard errors over five seeds."""
    pairs = zip(*(report._tests(_recorded(), task, one) for one in (method, other)), strict=True)
    found = [a - b for a, b in pairs]
    return statistics.mean(found) / (statistics.stdev(found) / len(found) ** 0.5)


WIDE = "cores:orthonormal:norm:32"


def test_what_the_page_says_of_bases():
    for task in ("minilm", "digits"):
        assert abs(_apart(task, "cores:slices:norm:8")) < 2
    assert _apart("letters", "cores:slices:norm:8") < -5
    for task in ("minilm", "letters"):
        assert _apart(task, WIDE, "cores:slices:norm:32") > 3
    assert abs(_apart("digits", WIDE, "cores:slices:norm:32")) < 2


def test_what_the_page_says_of_rules():
    better = {
        (basis, rule): [_apart(task, f"cores:{basis}:{rule}:8") for task in experiment.NAMES]
        for basis in ("orthonormal", "slices")
        for rule in experiment.RULES
    }
    assert sum(map(len, better.values())) == 36
    for found in better.values():
        assert max(found) < 3
        assert sum(gain > 2 for gain in found) <= 1
    gradient = dict(zip(experiment.NAMES, better["orthonormal", "gradient"], strict=True))
    assert gradient["letters"] > 2 > max(gradient["minilm"], gradient["digits"])
    for task in experiment.NAMES:
        assert _apart(task, "cores:slices:inverse:8:layer") < -3


def test_what_the_pages_say_of_lora():
    """At equal numbers cores are better on minilm; at nine times the numbers LoRA is as good."""
    rows = _recorded()

    def trained(task, method):
        return int(rows[task, method, 1e-3, 0]["trained"])

    assert 0.85 < trained("minilm", WIDE) / trained("minilm", "lora:1") < 1
    assert trained("minilm", "lora:8") == 9 * trained("minilm", WIDE)
    assert 1 < trained("digits", "lora:8") / trained("digits", WIDE) < 1.2
    assert trained("letters", "lora:8") == 2 * trained("letters", WIDE)
    assert _apart("minilm", WIDE, "lora:1") > 3
    assert abs(_apart("minilm", WIDE, "lora:8")) < 2
    assert abs(_apart("digits", WIDE, "lora:8")) < 2
    assert _apart("letters", WIDE, "lora:8") < -3
    more, less = (statistics.mean(report._tests(rows, "letters", m)) for m in ("lora:8", WIDE))
    assert round(more - less, 3) == 0.003
    assert all(_apart(task, "lora:8") > 2 for task in ("minilm", "letters"))
    assert all(_apart(task, WIDE) > 3 for task in ("minilm", "letters"))
    assert _apart("letters", WIDE, "full") < -3
    assert max(abs(_apart(task, WIDE, "full")) for task in ("minilm", "digits")) < 2


def test_the_report_writes_them(tmp_path, monkeypatch):
    """Into the pages that have the marks; marks that no page has are missed."""
    pages = tmp_path / "page.md", tmp_path / "other.md"
    names = ("conditioning_methods", "conditioning_rates")
    marks = [f"<!-- begin {name} -->\nold\n<!-- end {name} -->\n" for name in names]
    pages[0].write_text(marks[0])
    pages[1].write_text("no marks")
    monkeypatch.setattr(report, "PAGES", pages)
    monkeypatch.setattr(report, "PLOT", tmp_path / "plot.png")
    with pytest.raises(ValueError, match="expected the marks <!-- begin conditioning_rates -->"):
        report.write()
    assert pages[0].read_text() == marks[0]
    pages[0].write_text("".join(marks))
    assert report.write() == [*pages, tmp_path / "plot.png"]
    assert "old" not in pages[0].read_text()
    assert pages[1].read_text() == "no marks"
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
