"""benchmarks.comparison: which trainings it does, what it records, and what it says of the rows."""

import math
import os
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
from scipy import stats

from benchmarks.comparison import __main__ as program
from benchmarks.comparison import experiment, methods, plots, process, records, report, summary
from benchmarks.comparison.methods.base import Method, Prepared, RefusedError
from benchmarks.comparison.tasks import TASKS
from benchmarks.comparison.tasks.base import DivergedError, Sources
from benchmarks.comparison.training import train
from small_task import Small

CHOSEN = ["head", "full", "lora:1", "tcurlora:8"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The file of rows of a run of the program with the small task alone."""
    kept = dict(TASKS)
    monkeypatch.setattr(experiment, "ROUNDS", 2)
    TASKS.clear()
    TASKS["small"] = Small
    yield tmp_path / "rows" / "rows.csv"
    TASKS.clear()
    TASKS.update(kept)  # in their order


def run(file, *options):
    program.main(["run", "--rows", str(file), "--seeds", "3", *options])
    return records.read(file)


def of(rows, **wanted):
    return [
        row
        for key, row in rows.items()
        if all(getattr(key, name) == value for name, value in wanted.items())
    ]


def test_a_run_searches_then_reports_then_times(small, capsys):
    rows = run(small, "--methods", *CHOSEN)
    assert 3 * 3 <= len(of(rows, part="search")) <= 3 * 6
    assert len(of(rows, part="reported")) == 4 * 3 * 2
    assert len(of(rows, part="timed")) == 4
    (before,) = of(rows, part="before")
    task = Small(Sources(), 40, 0)
    assert float(before["test"]) == pytest.approx(task.score(task.model(), "test"), rel=1e-5)
    assert summary.details(before)["error"] == pytest.approx(
        1 / float(before["test"]) - 1, rel=1e-4
    )
    assert {row["state"] for row in rows.values()} == {"done"}
    plan = experiment.Plan(Sources(), ["small"], CHOSEN, CHOSEN, range(3))
    for name in CHOSEN:
        rates = {key.rate: row for key, row in rows.items() if key[3::3] == (name, "search")}
        best = max(rates, key=lambda rate: float(rates[rate]["validation"]), default=0.0)
        assert plan.chosen("small", name, rows) == best
        assert {key.rate for key in rows if key[3::3] == (name, "reported")} == {best}
    assert all(row["test"] == "" for row in of(rows, part="search"))
    for row in of(rows, part="reported", method="lora:1"):
        assert int(row["trained"]) == 3 * 16
        assert summary.details(row)["error"] == pytest.approx(1 / float(row["test"]) - 1, rel=1e-4)
        assert len(row["curve"].split()) == 3
        assert float(row["file_kb"]) > 0
        assert float(row["kept"]) != float(row["kept_before"])
    for row in of(rows, part="reported", method="head"):
        assert row["kept"] == row["kept_before"]
    assert all(float(row["step_ms"]) > 0 for row in of(rows, part="timed"))
    assert "9/9, 0 min left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("named", "at_sizes"), [([], methods.FEW), (["--methods", "ssf", "head"], ("ssf", "head"))]
)
def test_all_methods_at_one_size_and_a_few_at_others(small, named, at_sizes, monkeypatch):
    monkeypatch.setattr(experiment.Plan, "chosen", lambda *_: 1e-3)
    plan = program.plan_of(program.parse_args(["run", *named]))
    trained = [(key.size, key.method) for key in plan.reported("small", {}) if key.seed == 4]
    every = tuple(methods.METHODS) if not named else at_sizes
    assert trained == [(40, name) for name in every] + [(20, name) for name in at_sizes]


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (0, [-1, 0, 1]),
        (1, [-1, 0, 1, 2]),
        (2, [-1, 0, 1, 2, 3]),
        (9, [-1, 0, 1, 2, 3, 4]),
        (-2, [-3, -2, -1, 0, 1]),
        (None, [-4, -3, -2, -1, 0, 1]),
    ],
)
def test_a_search_goes_on_while_the_best_rate_is_at_an_end(small, best, tried):
    """`best` is the power of the best rate; None: all trainings diverge."""
    plan = experiment.Plan(Sources(), ["small"], ["lora:1"], [])
    powers = {plan.rate("small", "lora:1", power): power for power in range(-9, 10)}
    rows = {}
    while keys := plan.searches("small", rows):
        assert plan.chosen("small", "lora:1", rows) is None
        for key in keys:
            validation = "" if best is None else str(-abs(powers[key.rate] - best))
            rows[key] = {"state": "done", "validation": validation}
    assert sorted(powers[key.rate] for key in rows) == tried
    wanted = None if best is None else plan.rate("small", "lora:1", min(best, 4))
    assert plan.chosen("small", "lora:1", rows) == wanted


def test_what_a_process_reports_is_what_training_here_gives(small):
    rows = run(small, "--methods", "tcurlora:8", "--parts", "search")
    for key, row in rows.items():
        task = Small(Sources(), key.size, key.seed)
        trained = train(task, methods.method(key.method), key.rate, key.seed)
        assert float(row["validation"]) == pytest.approx(
            task.score(trained.model, "test"), rel=1e-5
        )
        assert float(row["curve"].split()[0]) == pytest.approx(trained.curve[0], rel=1e-3)


def test_a_run_goes_on_where_it_was_interrupted(small):
    first = run(small, "--methods", "lora:1", "--parts", "search")
    small.write_bytes(small.read_bytes()[:-20])  # the last row was cut short
    with pytest.raises(records.RowsError, match=f"expected {len(records.FIELDS)} values in line "):
        records.read(small)
    kept = small.read_text().splitlines()[:-1]
    rows = run(small, "--methods", "lora:1", "head")
    assert small.read_text().splitlines()[: len(kept)] == kept
    assert [row["validation"] for row in of(rows, part="search")] == [
        row["validation"] for row in first.values()
    ]
    whole = small.read_text()
    assert run(small, "--methods", "lora:1", "head") == rows
    assert small.read_text() == whole


@pytest.mark.parametrize("data", ["has a new head", "diverges"])
def test_a_model_that_has_no_score_before_adaptation(small, monkeypatch, data):
    def diverges(self, model):
        raise DivergedError("the loss is not finite")

    if data == "diverges":
        monkeypatch.setattr(Small, "tested", diverges)
    monkeypatch.setattr(Small, "new_head", data == "has a new head")
    rows = run(small, "--methods", "head", "--parts", "before")
    states = [row["state"] for row in of(rows, part="before")]
    why = "none: the head is new" if Small.new_head else "diverged: the loss is not finite"
    assert states == [why]
    assert math.isnan(summary.untrained(rows, "default", "small"))


def test_nothing_is_reported_without_a_search(small):
    """A method without a rate would be left out, and nobody told."""
    run(small, "--methods", "lora:1", "--parts", "search")
    asked = ("--methods", "lora:1", "ssf", "head", "--parts", "reported", "--sizes")
    told = "reported trainings of small after a search of training size {}, got no whole search of "
    for sizes, missing in ((["20"], "lora:1, ssf"), (["20", "40"], "ssf")):
        with pytest.raises(SystemExit, match=told.format(sizes[-1]) + missing + "$"):
            run(small, *asked, *sizes)


def test_a_signal_leaves_whole_rows_and_no_processes(tmp_path):
    """Of a program of its own; Ctrl-C ends it in the same way."""
    file, errors = tmp_path / "rows.csv", tmp_path / "errors.txt"
    arguments = ["run", "--quick", "--tasks", "digits", "--parts", "search", "--rows", str(file)]
    with open(errors, "w") as told:
        started = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.comparison", *arguments],
            stdout=subprocess.PIPE,
            stderr=told,
            text=True,
            start_new_session=True,
        )
    assert started.stdout.readline().startswith("1/36")
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=60)
    assert started.returncode == 1
    assert errors.read_text().strip().endswith("interrupted; the same command goes on")
    assert 1 <= len(records.read(file)) < 60
    with pytest.raises(ProcessLookupError):
        os.killpg(started.pid, 0)


def test_two_runs_do_not_write_to_one_file(small):
    with (
        records.writing(small),
        pytest.raises(SystemExit, match="expected no other run to write to it"),
    ):
        run(small)


def _method(prepare):
    return Method("a method of the test", "here", prepare)


def _broken(model, task, seed):
    (weight,) = (p for n, p in model.named_parameters() if n == "body.0.weight")

    def spoil(step):
        if step == 1:
            weight.data.fill_(math.inf)

    return Prepared([weight], lambda path: path.write_text(""), after_step=spoil)


def _refuses(model, task, seed):
    raise RefusedError("layers of 9 inputs are expected")


def _dies(model, task, seed):
    os.kill(os.getpid(), signal.SIGKILL)


def _raises(model, task, seed):
    raise KeyError("a name")


def test_trainings_that_go_wrong_have_rows_that_say_so(small, monkeypatch):
    monkeypatch.setitem(methods.METHODS, "broken", _method(_broken))
    monkeypatch.setitem(methods.METHODS, "refuses", _method(_refuses))
    rows = run(small, "--methods", "broken", "refuses", "head", "--parts", "search", "reported")
    states = {row["state"] for row in of(rows, method="broken")}
    assert states == {"diverged: the loss is nan at step 3"}
    assert len(of(rows, method="broken")) == experiment.MOST
    (row,) = of(rows, method="refuses")[-1:]
    assert row["state"] == "refused: layers of 9 inputs are expected"
    assert len(of(rows, method="refuses")) < 3
    text = report.scores(rows, "default", "small")
    assert "head alone" in text
    assert "a method of the test does not take this model: layers of 9 inputs are expected" in text


def test_a_process_that_goes_down_is_told_and_the_others_go_on(small, monkeypatch, capfd):
    monkeypatch.setitem(methods.METHODS, "dies", _method(_dies))
    monkeypatch.setitem(methods.METHODS, "raises", _method(_raises))
    told = r"(?s)some trainings did not end.*dies.* ended with -9.*raises.*: KeyError: 'a name'"
    with pytest.raises(SystemExit, match=told):
        run(small, "--methods", "dies", "raises", "head", "--parts", "search", "reported")
    assert "KeyError: 'a name'" in capfd.readouterr().err
    rows = records.read(small)
    assert {key.method for key in rows} == {"head"}
    assert len(rows) == 6


def test_some_processes_run_at_once(tmp_path):
    """And an error in the reader of the results stops those that are left."""

    def meet(number):
        (tmp_path / str(number)).touch()
        give_up = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 4:
            assert time.monotonic() < give_up
            time.sleep(0.01)
        return {"n": number}

    found = dict(process.run([(n, lambda n=n: meet(n)) for n in range(4)], 4))
    assert found == {n: {"n": n} for n in range(4)}
    begun = time.monotonic()
    running = process.run([(0, dict), (1, lambda: time.sleep(60))], 2)
    next(running)
    running.close()
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "lora"], "expected one of head, full, .*, got 'lora'"),
        (["--texts", "setup.py"], "--rows: expected a file of your own beside --texts, got none"),
        (["--texts", "none.csv"], "--texts: expected a file or a folder, got none.csv: none"),
    ],
)
def test_wrong_options(small, options, message, monkeypatch):
    monkeypatch.setattr(records, "FILE", small)
    with pytest.raises(SystemExit, match=message):
        program.main(["run", *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run", "--tasks", "letter"], "invalid choice: 'letter'"),
        (["run", "--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["run", "--jobs", "0"], "--jobs: expected at least 1, got 0"),
    ],
)
def test_wrong_numbers_and_names(options, message, capsys):
    with pytest.raises(SystemExit):
        program.main(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "pictures"])
def test_the_repositorys_pages_are_not_written_from_other_rows(command, tmp_path):
    page = report.PAGES[0].read_bytes()
    with pytest.raises(SystemExit, match=r"--output: expected a folder beside --rows .*, got none"):
        program.main([command, "--rows", str(tmp_path / "own.csv")])
    assert report.PAGES[0].read_bytes() == page


def test_rows_of_something_else_are_refused(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match=r"rows.csv: expected the columns time, commit"):
        program.main(["report", "--rows", str(file), "--output", str(tmp_path)])
    assert file.read_text() == "a,b\n1,2\n"
    with pytest.raises(SystemExit, match="expected rows of reported trainings, got none"):
        program.main(["report", "--rows", str(tmp_path / "none.csv"), "--output", str(tmp_path)])


def made_row(**values):
    """A row of a training, with these values."""
    plain = dict.fromkeys(records.FIELDS, "")
    plain |= {"data": "default", "task": "small", "size": 40, "seed": 0, "part": "reported"}
    plain |= {"state": "done", "trained": 9, "validation": 0.5, "test": 0.5, "kept_before": 0.25}
    plain |= {"kept": 0.25, "details": "error=1", "peak_mb": 3, "file_kb": 1, "curve": "1 2"}
    return {name: str(value) for name, value in {**plain, **values}.items()}


def keyed(rows):
    return {records.key(row): row for row in rows}


def test_means_intervals_and_paired_differences():
    scores = {"tcurlora:8": (0.6, 0.7, 0.65), "lora:8": (0.5, 0.75, 0.6)}
    rows = keyed(
        made_row(method=name, rate=1e-3, seed=seed, test=value)
        for name, values in scores.items()
        for seed, value in enumerate(values)
    )
    rows |= keyed(
        made_row(method=name, rate=rate, seed=100, part="search", test="", validation=value)
        for name in scores
        for rate, value in ((1e-3, 0.6), (3e-3, 0.6), (1e-2, 0.5))
    )
    found = summary.summaries(rows, "default", "small", 40)
    ours, lora = found["tcurlora:8"], found["lora:8"]
    low, high = stats.t.interval(
        0.95, 2, statistics.fmean(scores["lora:8"]), stats.sem(scores["lora:8"])
    )
    interval = summary.interval(lora.numbers("test"))
    assert interval.mean - interval.half == pytest.approx(low)
    assert interval.mean + interval.half == pytest.approx(high)
    apart = lora.apart(ours)
    differences = [a - b for a, b in zip(*reversed(scores.values()), strict=True)]
    assert apart.mean == pytest.approx(statistics.fmean(differences))
    assert apart.half == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(differences))
    assert (ours.rate, ours.is_edge) == (1e-3, True)
    assert f"{summary.interval([0.5]):.3f}" == "0.500"
    assert f"{apart:+.3f}" == f"{apart.mean:+.3f} ± {apart.half:.3f}"


def test_rates_at_which_a_training_diverged_are_not_chosen():
    rows = keyed(
        made_row(method="full", rate=rate, seed=seed, part="search", test="", validation=value)
        for rate, values in ((1e-4, (0.5, 0.5)), (1e-3, (0.9, "")))
        for seed, value in enumerate(values)
    )
    assert summary.best_rate(summary.searched(rows)) == 1e-4
    assert summary.best_rate({}) is None
    rows |= keyed(
        made_row(method="full", rate=1e-4, seed=seed, **end)
        for seed, end in enumerate(({}, {"test": "", "state": "diverged: at step 3"}))
    )
    found = summary.summaries(rows, "default", "small", 40)["full"]
    assert (list(found.rows), found.diverged, found.rate) == ([0], 1, 1e-4)


def test_a_report_of_a_users_rows(small, tmp_path, capsys):
    (tmp_path / "own.csv").write_text("text,label\n")
    rows = run(small, "--methods", *CHOSEN, "--texts", str(tmp_path / "own.csv"))
    (data,) = {key.data for key in rows}
    assert data.startswith("texts=own.csv:")
    output = tmp_path / "report"
    program.main(["report", "--rows", str(small), "--output", str(output)])
    page = (output / "comparison.md").read_text()
    assert f"# {data}" in page
    for name in CHOSEN:
        assert page.count(f"| {methods.METHODS[name].label} |") == 3  # scores, sizes, measures
    assert "| method | 20 | 40 |" in page
    assert "| method | error |" in page
    (before,) = of(rows, part="before")
    assert f"Before adaptation, score is {float(before['test']):.3f} and score without" in page
    for name in ("comparison", "comparison_curves", "comparison_sizes"):
        assert (output / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "own.csv").write_text("text,label\nother,data\n")
    more = run(small, "--methods", "head", "--texts", str(tmp_path / "own.csv"))
    assert len({key.data for key in more}) == 2


def test_what_is_kept_may_be_unknown(small):
    """As of a user's volumes, of which none is from before."""
    unknown = {"kept": "nan", "kept_before": "nan"}
    rows = keyed(made_row(method="head", rate=0.0, seed=seed, **unknown) for seed in range(5))
    text = report.scores(rows, "default", "small")
    assert "| 0.500 ± 0.000 | – | – | – | 3 MB |" in text
    assert "Before adaptation" not in text
    rows |= keyed([made_row(method="none", rate=0.0, part="before", test="0.25")])
    text = report.scores(rows, "default", "small")
    assert "Before adaptation, score is 0.250.\n" in text


def test_fewer_seeds_and_divergence_are_told(small):
    rows = keyed(
        made_row(method=name, rate=rate, seed=seed, **end)
        for name, rate, count in (("head", 0.0, 5), ("lora:8", 1e-3, 3))
        for seed in range(count)
        for end in ({"test": "", "state": "diverged: at step 3"} if seed == 2 else {},)
    )
    rows |= keyed([made_row(method="lora:8", rate=1e-3, seed=100, part="search", test="")])
    text = report.scores(rows, "default", "small")
    assert "| 0.500 ± 0.000 (1 of 5 diverged) |" in text
    assert "| 0.500 ± 0.000 (1 of 3 diverged, 3 seeds) |" in text
    assert report.by_size(rows, "default", "small") == ""
    found = summary.summaries(rows, "default", "small", 40)
    assert set(found) == {"head", "lora:8"}
    assert set(plots.with_all_seeds(found)) == {"head"}
    rows |= keyed([made_row(method="head", rate=0.0, seed=0, size=20)])
    by_size = report.by_size(rows, "default", "small")
    assert "| head alone | 0.500 (1 seed) | 0.500 ± 0.000 (1 of 5 diverged) |" in by_size
    assert "LoRA" not in by_size


def test_one_thread_in_every_process(small, monkeypatch):
    monkeypatch.setattr(
        Small, "tested", lambda self, model: (0.0, {"error": float(torch.get_num_threads())})
    )
    rows = run(small, "--methods", "head", "--parts", "reported")
    assert {row["details"] for row in rows.values()} == {"error=1"}
