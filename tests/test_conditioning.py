"""benchmarks.conditioning: what it trains, how it chooses rates, and that tables are current."""

import argparse
import copy
import csv
import statistics

import pytest
import torch
from torch import nn

from benchmarks.conditioning import experiment, methods, records, report, tasks


class Small(tasks.Task):
    """Fits numbers; the accuracy falls with the loss."""

    head, head_rate, layers, steps = ("head",), 1e-2, ["body.*"], 3

    def __init__(self, args, seed):
        torch.manual_seed(seed)
        body = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        self.base = nn.ModuleDict({"body": body, "head": nn.Linear(8, 2)})
        self.inputs, self.targets = torch.randn(40, 8), torch.randn(40, 2)

    def loss(self, model, generator):
        rows = torch.randint(40, (8,), generator=generator)
        y = model["head"](model["body"](self.inputs[rows]))
        return (y - self.targets[rows]).square().mean()

    @torch.no_grad()
    def accuracy(self, model, part):
        y = model["head"](model["body"](self.inputs))
        return 1 / (1 + float((y - self.targets).square().mean()))


@pytest.fixture
def made(tmp_path, monkeypatch):
    """An experiment with the small task, whose rows go to a folder of their own."""
    monkeypatch.setattr(records, "FILE", tmp_path / "rows" / "accuracies.csv")
    monkeypatch.setitem(tasks.TASKS, "small", Small)
    monkeypatch.setitem(experiment.RATES, "small", (1e-3, 1e-2))
    monkeypatch.setitem(experiment.RANKS, "small", (2, 4))
    return lambda: experiment.Experiment("small", argparse.Namespace())


CORES = ("cores:orthonormal:norm:2", "cores:slices:inverse:2:layer", "cores:orthonormal:gradient:2")


@pytest.mark.parametrize(
    ("name", "trained"),
    [("head", 0), ("full", 3 * 72), ("lora:1", 3 * 16), *((name, 12) for name in CORES)],
)
def test_a_method_trains_what_it_says(name, trained):
    task = Small(None, 0)
    before = copy.deepcopy(task.base.state_dict())
    model, count = methods.train(task, name, 1e-2, seed=0)
    assert count == trained
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


def test_the_tables_are_those_of_the_rows():
    """docs/decomposition.md has what `python -m benchmarks.conditioning report` writes."""
    page = report.PAGE.read_text(encoding="utf-8")
    rows = {records.key(row): row for row in records.read()}
    for name, table in report.tables(rows).items():
        assert f"<!-- begin {name} -->\n{table}<!-- end {name} -->\n" in page
        assert table.count("\n") > 10
    assert report.PLOT.is_file()


def test_what_the_page_says_of_the_recommended_rate():
    rows = {records.key(row): row for row in records.read()}
    compared = 0
    for task in ("minilm", "letters", "digits"):
        head = float(rows[task, "head", 0.0, 0]["test"])
        for rank in experiment.RANKS[task]:
            curve = report._curve(rows, task, f"cores:orthonormal:norm:{rank}")
            if curve is None:
                continue
            compared += 1
            assert curve[3 * report.RATE] >= head
            assert task == "digits" or curve[report.RATE] >= max(curve.values()) - 0.01
    assert compared >= 12
    worst = rows["minilm", "cores:slices:norm:32", 1e-3, 0]
    best = report._curve(rows, "minilm", "cores:slices:norm:8")
    assert max(best, key=best.__getitem__) == 1e-3
    assert float(worst["test"]) < float(rows["minilm", "head", 0.0, 0]["test"])


def test_what_the_page_says_of_bases_and_rules():
    """Differences from the default, in standard errors over five seeds."""
    rows = {records.key(row): row for row in records.read()}

    def apart(task, method):
        every = report._tests(rows, task, method), report._tests(rows, task, report.OURS)
        pairs = zip(*every, strict=True)
        found = [ours - theirs for theirs, ours in pairs]
        return statistics.mean(found) / (statistics.stdev(found) / len(found) ** 0.5)

    published = {task: apart(task, "cores:slices:norm:8") for task in tasks.TASKS}
    assert abs(published["minilm"]) < 2
    assert abs(published["digits"]) < 2
    assert published["letters"] > 5
    for rule in experiment.RULES:
        for basis in ("orthonormal", "slices"):
            assert apart("digits", f"cores:{basis}:{rule}:8") > -2.5
    assert apart("minilm", "cores:orthonormal:gradient:8") > 0
    assert -5 < apart("letters", "cores:orthonormal:gradient:8") < -2


def test_the_report_writes_them(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    names = ("conditioning_methods", "conditioning_rates")
    page.write_text("".join(f"<!-- begin {n} -->\nold\n<!-- end {n} -->\n" for n in names))
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "PLOT", tmp_path / "plot.png")
    assert report.write() == [page, tmp_path / "plot.png"]
    assert "old" not in page.read_text()
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_minilm_reads_a_folder_of_transformers_and_wordnet(tmp_path):
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "thing", "of", "kind"]
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(tmp_path)
    config = transformers.BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    lines = ["  1 This software and database is being provided to you"]
    for number in range(26 * 120):
        lines.append(f"{number:08} {3 + number % 26:02} n 01 x 0 000 | a thing of kind; not this")
    (tmp_path / "data.noun").write_text("\n".join(lines) + "\n")
    args = argparse.Namespace(minilm=tmp_path, wordnet=tmp_path / "data.noun")
    task = tasks.MiniLM(args, 0)
    assert [len(task._parts[part][0]) for part in task._parts] == [26 * 32, 26 * 20, 1500]
    ids, labels = task._parts["training"]
    assert labels.bincount().tolist() == [32] * 26
    assert ids[0] == [2, 5, 6, 7, 8, 3]  # up to the semicolon
    model = task.model()
    assert task.loss(model, torch.Generator().manual_seed(0)).isfinite()
    assert 0 <= task.accuracy(model, "validation") <= 0.2
    names = [name for name, _ in methods._layers(model, task)]
    assert len(names) == 6
    assert all(name.startswith("encoder.encoder.layer.0.") for name in names)


@pytest.mark.parametrize("name", ["digits", "letters"])
def test_the_tasks_of_the_examples(name, monkeypatch):
    """With models of the smallest size that the examples have, which are not pretrained."""
    module = {"digits": "vit_classifier", "letters": "language_model"}[name]
    example = tasks._example(module)
    small = example.parse_args(["--smoke"])
    small.context = 96
    made = example.new_base(small)
    monkeypatch.setitem(tasks._BASES, name, (made[0] if name == "letters" else made).eval())
    task = tasks.TASKS[name](argparse.Namespace(), 1)
    model, count = methods.train(task, "head", 0.0, seed=1)
    assert count == 0
    assert 0 <= task.accuracy(model, "validation") <= 1
    assert task.loss(model, torch.Generator().manual_seed(0)).isfinite()
    assert list(methods._layers(model, task))
