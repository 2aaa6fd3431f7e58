"""The benchmarks run, check what they time, and their tables say what the rows say."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.materialize
    import benchmarks.report
    import benchmarks.rows
    import benchmarks.step

    return benchmarks


def test_quick_run_appends_nothing():
    before = {path: path.read_bytes() for path in (ROOT / "benchmarks/results").iterdir()}
    command = [sys.executable, "-m", "benchmarks", "run", "--quick", "--case", "vit_tiny_attention"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for contender in ("stream", "materialize", "S1", "S2", "eager", "compile"):
        assert contender in result.stdout
    assert before == {path: path.read_bytes() for path in (ROOT / "benchmarks/results").iterdir()}


def test_a_wrong_contender_is_not_timed(benchmarks, monkeypatch):
    monkeypatch.setitem(benchmarks.materialize.CASES, "small", (4, 6, 7, 2))
    monkeypatch.setattr(torch, "compile", lambda function: function)  # slow, and beside the point
    monkeypatch.setattr(benchmarks.materialize, "eager", lambda w, *rest: w * 1.001)
    with pytest.raises(RuntimeError, match="eager is wrong: relative error"):
        benchmarks.materialize.measure("small", 1)


def test_a_step_checks_its_gradients(benchmarks, monkeypatch):
    step = benchmarks.step
    monkeypatch.setattr(step, "WIDTH", 16)
    monkeypatch.setitem(step.CASES, "small", (20, False))
    assert set(step.measure("small", 2)) == {"frozen", "tcur", "tcur_bf16", "lora"}
    monkeypatch.setattr(step, "LIMIT", 1e-9)
    with pytest.raises(RuntimeError, match=r"tcur: gradient of .* is off by"):
        step.measure("small", 2)


def test_the_cost_rule_is_measured(benchmarks, monkeypatch):
    import benchmarks.cost_rule as cost_rule

    monkeypatch.setitem(cost_rule.CASES, "small", (3, 6, 40, 2, 20))
    timings = cost_rule.measure("small", 2)
    ways = ("materialized_z", "materialized_dense", "factored_z", "factored_dense")
    assert set(timings) == {"auto", *ways}


def test_rows_and_tables(benchmarks, monkeypatch, tmp_path):
    Timing = benchmarks.rows.Timing
    monkeypatch.setattr(benchmarks.rows, "RESULTS", tmp_path / "results")
    document = tmp_path / "performance.md"
    document.write_text("a\n<!-- begin materialize -->\nold\n<!-- end materialize -->\nb\n")
    monkeypatch.setattr(benchmarks.report, "DOCUMENTS", (document,))
    for ms in (9.0, 2.0):
        timings = {"stream": Timing(1, 1, 1, 1), "materialize": Timing(ms, ms, ms, ms)}
        benchmarks.rows.append("materialize", "some", (4, 6, 7, 2), timings)
    (row, *_) = benchmarks.rows.read()
    assert (row["op"], row["shape"], row["torch"]) == ("materialize", "4x6x7x2", torch.__version__)
    with pytest.raises(ValueError, match="expected the marks <!-- begin step -->"):
        benchmarks.report.write()
    with document.open("a") as file:
        for op in ("step", "cost_rule"):
            file.write(f"<!-- begin {op} -->\n<!-- end {op} -->\n")
    benchmarks.report.write()
    text = document.read_text()
    assert "| some | 2 | 2.00 | – | – | – | – |" in text
    assert "old" not in text
    benchmarks.report.write()
    assert document.read_text() == text
