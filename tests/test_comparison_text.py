"""What docs/comparison.md and README.md say of benchmarks.comparison, against the recorded rows."""

import itertools
import statistics
from collections import Counter

import pytest
import torch

from benchmarks.comparison import records, report, summary
from benchmarks.comparison.methods import FEW, METHODS
from benchmarks.comparison.tasks import TASKS, markers, volumes


def test_the_tables_are_those_of_the_rows():
    """The pages have what `python -m benchmarks.comparison report` writes."""
    page, readme = (page.read_text(encoding="utf-8") for page in report.PAGES)
    tables = report.tables(records.read())
    for name, table in tables.items():
        assert f"<!-- begin {name} -->\n{table}<!-- end {name} -->\n" in page
    assert page.count("<!-- begin ") == len(tables)
    assert f"<!-- begin comparison -->\n{tables['comparison']}<!-- end comparison -->\n" in readme
    assert (report.PLOTS / "comparison.png").is_file()


def _recorded(task):
    return summary.summaries(records.read(), "default", task, TASKS[task].searched)


def _better(one, other):
    """Whether the 95 % interval of the paired difference is above zero."""
    apart = one.apart(other)
    return apart.mean > apart.half


def _alike(one, other):
    """Whether the interval contains zero."""
    apart = one.apart(other)
    return abs(apart.mean) < apart.half


def test_what_the_page_says_of_texts_and_images():
    digits, letters = _recorded("digits"), _recorded("letters")
    for found, share in ((digits, 2 / 5), (letters, 1 / 4)):
        ours, wide = found["tcurlora:8"], found["tcurlora:32"]
        lora = found["lora:1"]
        assert ours.middle("trained") / lora.middle("trained") == pytest.approx(share, abs=0.03)
        assert _alike(lora, ours)
        full = summary.interval(found["full"].numbers("test")).mean
        assert full == max(summary.interval(one.numbers("test")).mean for one in found.values())
        assert (_better if found is digits else _alike)(wide, found["lora:8"])
        assert wide.middle("trained") < found["lora:8"].middle("trained")
        assert _better(ours, found["tinylora"])
        assert found["tinylora"].middle("trained") <= ours.middle("trained")
    assert letters["tcurlora:32"].middle("trained") * 2 == letters["lora:8"].middle("trained")
    for found, name in ((digits, "psoft"), (letters, "vera")):
        assert _better(found[name], found["tcurlora:8"])
    kept = {name: summary.interval(one.numbers("kept")).mean for name, one in digits.items()}
    order = sorted((name for name in kept if name != "head"), key=kept.__getitem__)
    assert {"fourierft", "tcurlora:8", "curlora", "tinylora", "tcurlora:32"} == set(order[:5])
    assert kept["lora:8"] > kept["tcurlora:8"] + 0.3
    minilm = _recorded("minilm")
    ours, wide = minilm["tcurlora:8"], minilm["tcurlora:32"]
    assert all(_better(minilm[name], ours) for name in ("lora:1", "psoft", "vera", "adapter"))
    assert _better(minilm["psoft"], wide)
    assert all(_alike(minilm[name], wide) for name in ("lora:1", "lora:8"))
    assert minilm["psoft"].middle("trained") < wide.middle("trained")
    assert minilm["tinylora"].middle("trained") == ours.middle("trained")
    step = minilm["lora:8"].step_ms
    assert ours.step_ms / step == pytest.approx(1, abs=0.05)
    assert wide.step_ms / step == pytest.approx(1.25, abs=0.05)
    assert all(_better(ours, minilm[name]) for name in ("tinylora", "head"))
    assert minilm["lora:1"].middle("trained") == 18 * ours.middle("trained")
    best = max(summary.interval(one.numbers("test")).mean for one in minilm.values())
    assert summary.interval(minilm["adapter"].numbers("test")).mean == best
    at = [summary.summaries(records.read(), "default", "minilm", size) for size in (8, 32, 128)]
    for name in ("lora:1", "lora:8"):
        leads = [one[name].apart(one["tcurlora:8"]).mean for one in at]
        assert leads == sorted(leads, reverse=True)
    assert _better(at[0]["lora:1"], at[0]["tcurlora:32"])
    assert _alike(at[2]["lora:1"], at[2]["tcurlora:32"])


def test_what_the_page_says_of_the_published_form():
    for task in TASKS:
        found = _recorded(task)
        told = _better if task == "letters" else _alike
        assert told(found["tcurlora:8"], found["tcurlora:published"])


def test_what_the_page_says_in_short():
    found = {task: _recorded(task) for task in TASKS}
    for task, measured in found.items():
        rate, wide = measured["tcurlora:8"].rate, measured["tcurlora:32"].rate
        assert rate == 1e-3 if task == "minilm" else rate >= 9e-3
        assert wide <= rate
    kept = found["digits"]["lora:8"], found["digits"]["tcurlora:8"], found["digits"]["tcurlora:32"]
    lora, *cores = (summary.interval(one.numbers("kept")) for one in kept)
    assert all(one.mean + one.half < lora.mean - lora.half for one in cores)


def test_what_the_page_says_of_volumes():
    frozen = _recorded("frozen")
    ours = frozen["tcurlora:8"]
    means = {name: summary.interval(one.numbers("test")).mean for name, one in frozen.items()}
    page = " ".join(report.PAGES[0].read_text(encoding="utf-8").split())
    head, cores, full = (f"{means[name]:.3f}" for name in ("head", "tcurlora:8", "full"))
    assert f"from {head} to {cores}, and training everything to {full}." in page
    for name, times in (("lora:1", 6), ("lora:8", 48)):
        assert _alike(frozen[name], ours)
        assert frozen[name].middle("trained") == times * ours.middle("trained")
    every = summary.of_task(records.read(), "default", "frozen").items()
    spans = []
    for names in (("lora:1", "lora:8"), ("tcurlora:8", "tcurlora:32")):
        found = [
            validation
            for name in names
            for validation in summary.searched(
                {key: row for key, row in every if (key.method, key.part) == (name, "search")}
            ).values()
        ]
        spans.append(f"between {min(found):.2f} and {max(found):.2f}")
    assert f"Dice on validation data is {spans[0]}, and that of cores {spans[1]}." in page
    assert [name for name, one in frozen.items() if _better(one, ours)] == ["road"]
    assert not [name for name, one in frozen.items() if _better(one, frozen["tcurlora:32"])]
    assert max(means, key=means.__getitem__) == "road"
    assert frozen["road"].middle("trained") == 3.5 * ours.middle("trained")
    assert _better(frozen["head"], frozen["tinylora"])
    tried = summary.searched(
        {key: row for key, row in every if (key.method, key.part) == ("tinylora", "search")}
    )
    low, middle, high = (tried[rate] for rate in sorted(tried))
    assert low < middle > high
    assert middle < min(found) / 2  # `found` has what cores did at all rates of their search
    assert sum(dice > means["head"] + 0.1 for dice in frozen["lotr"].numbers("test")) == 2
    measured = _recorded("volumes")
    before = summary.untrained(records.read(), "default", "volumes")
    head, full = (summary.interval(measured[name].numbers("test")) for name in ("head", "full"))
    text = f"{before:.3f} before adaptation, {head.mean:.3f} with the decoder trained alone"
    assert f"the Dice is {text}, and {full.mean:.3f} with everything trained." in page
    assert before < head.mean - head.half
    assert head.mean + head.half < full.mean - full.half
    sees = {
        name: sum(dice > 0.69 for dice in one.numbers("test")) for name, one in measured.items()
    }
    once = dict.fromkeys(("tcurlora:32", "psoft", "fourierft", "ssf", "curlora"), 1)
    assert {name: count for name, count in sees.items() if count} == {"full": 5, "road": 3, **once}
    never = [measured[name].middle("test") for name, count in sees.items() if not count]
    assert all(round(dice, 1) == 0.6 for dice in never)
    full = measured.pop("full")
    assert {name for name, one in measured.items() if not _better(full, one)} == {"road"}
    assert _alike(full, measured["road"])


BESIDE_THE_HEAD = [name for name in FEW if name != "head"]


@pytest.mark.parametrize(
    ("task", "size", "better"),
    [
        ("volumes", 1, ()),
        ("volumes", 2, ("lora:1", "lora:8")),
        ("volumes", 5, ("full",)),
        ("frozen", 1, ()),
        ("frozen", 2, ("tcurlora:8", "tcurlora:32", "lora:1", "full")),
        ("frozen", 5, BESIDE_THE_HEAD),
        ("frozen", 10, BESIDE_THE_HEAD),
    ],
    ids=str,
)
def test_what_the_page_says_of_fewer_volumes(task, size, better):
    found = summary.summaries(records.read(), "default", task, size)
    assert set(FEW) <= set(found)
    head = found["head"]
    for name in set(FEW) - {"head"}:
        assert len(found[name].rows) == 5
        assert (_better if name in better else _alike)(found[name], head)
    if task == "frozen":
        pairs = list(itertools.permutations(BESIDE_THE_HEAD, 2))
        told = [pair for pair in pairs if _better(*(found[name] for name in pair))]
        known = {1: [("tcurlora:8", "lora:1")], 2: [("full", "lora:8")]}
        assert told == known.get(size, [])
    elif size == 2:
        assert _better(found["tcurlora:8"], found["tcurlora:32"])
        assert all(_alike(found["tcurlora:8"], found[name]) for name in better)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_complete(task):
    """All methods that take the model, with five seeds and a time."""
    found = _recorded(task)
    assert set(found) == set(METHODS) - set(summary.refusals(records.read(), "default", task))
    for one in found.values():
        assert len(one.rows) == 5
        assert one.step_ms > 0


def test_the_sides_of_the_validation_volumes():
    drawn = markers.volumes(markers.NEW, volumes.COUNTS["validation"], "of validation")
    sides = markers.side_of(torch.stack([volume["label"].as_tensor() for volume in drawn]))
    assert (int(sides.sum()), len(sides)) == (7, 8)


def test_what_the_readme_says():
    readme = " ".join(report.PAGES[1].read_text(encoding="utf-8").split())
    found = {task: _recorded(task) for task in TASKS}
    minilm, frozen = found["minilm"], found["frozen"]
    times, lost = (
        minilm["lora:8"].middle("trained") / minilm["tcurlora:8"].middle("trained"),
        minilm["lora:8"].apart(minilm["tcurlora:8"]).mean,
    )
    assert f"trains {times:.0f} times fewer numbers than LoRA of rank 8 on minilm" in readme
    assert f"loses {lost:.3f} of accuracy." in readme
    times = frozen["lora:8"].middle("trained") / frozen["tcurlora:8"].middle("trained")
    assert f"With a frozen decoder it trains {times:.0f} times fewer" in readme
    assert _alike(frozen["lora:8"], frozen["tcurlora:8"])
    for task, measured in found.items():
        wide, lora = measured["tcurlora:32"], measured["lora:8"]
        assert wide.middle("trained") < lora.middle("trained")
        assert (_better if task == "digits" else _alike)(wide, lora)
        assert not [name for name, one in measured.items() if _better(one, measured["full"])]
    assert _alike(minilm["adapter"], minilm["full"])
    assert _better(minilm["psoft"], minilm["tcurlora:32"])
    assert minilm["psoft"].middle("trained") < minilm["tcurlora:32"].middle("trained")
    assert all(_alike(found[task]["road"], found[task]["full"]) for task in ("volumes", "frozen"))
    assert _better(frozen["road"], frozen["tcurlora:8"])


def test_how_long_it_takes():
    assert _hours("minilm", "letters", "digits") < 3
    assert round(_hours("volumes")) == 3
    assert round(2 * _hours("frozen")) == 2 * 3.5


def _hours(*tasks):
    """By the seconds of the recorded trainings, on the machine that was quickest at each part."""
    medians, counts = {}, Counter()
    for key, row in records.read().items():
        if key.task in tasks and key.part != "timed":
            part = (key.task, key.size, key.part)
            counts[part] += 1
            medians.setdefault((part, row["device"], row["commit"]), []).append(
                float(row["seconds"] or 0)
            )
    quickest = {
        part: min(statistics.median(own) for (p, *_), own in medians.items() if p == part)
        for part in counts
    }
    return sum(counts[part] * quickest[part] for part in counts) / 2 / 3600
