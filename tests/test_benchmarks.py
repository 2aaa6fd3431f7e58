"""The benchmarks run, check what they time, and their tables say what the rows say."""

import csv
import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch

from tcur_kernels.operators import native

ROOT = Path(__file__).parent.parent


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.cast
    import benchmarks.materialize
    import benchmarks.memory
    import benchmarks.methods
    import benchmarks.report
    import benchmarks.rows
    import benchmarks.scaling
    import benchmarks.step

    return benchmarks


def test_quick_run_appends_nothing():
    def contents():
        found = (ROOT / "benchmarks/results").rglob("*.csv")
        return {path: path.read_bytes() for path in found}

    before = contents()
    command = [sys.executable, "-m", "benchmarks", "run", "--quick", "--case", "vit_tiny_attention"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for contender in ("stream", "materialize", "S1", "S2", "eager", "compile"):
        assert contender in result.stdout
    assert before == contents()


def test_a_wrong_contender_is_not_timed(benchmarks, monkeypatch):
    monkeypatch.setitem(benchmarks.materialize.CASES, "small", (4, 6, 7, 2))
    monkeypatch.setattr(torch, "compile", lambda function: function)  # slow, and beside the point
    monkeypatch.setattr(benchmarks.materialize, "eager", lambda w, *rest: w * 1.001)
    with pytest.raises(RuntimeError, match="eager is wrong: relative error"):
        benchmarks.materialize.measure("small", 1)


def test_a_step_checks_its_gradients(benchmarks, monkeypatch):
    step = benchmarks.step
    monkeypatch.setattr(benchmarks.methods, "WIDTH", 32)
    monkeypatch.setitem(step.CASES, "small", (20, False))
    methods = {"frozen", "tcur", "tcur_bf16", "lora", "fourierft", "full"}
    assert set(step.measure("small", 2)) == methods
    monkeypatch.setitem(step.CASES, "small_autocast", (20, True))
    assert set(step.measure("small_autocast", 2)) == methods - {"tcur_bf16"}
    monkeypatch.setattr(step, "LIMIT", 1e-9)
    with pytest.raises(RuntimeError, match=r"tcur: gradient of .* is off by"):
        step.measure("small", 2)


def test_the_cost_rule_is_measured(benchmarks, monkeypatch):
    import benchmarks.cost_rule as cost_rule

    monkeypatch.setitem(cost_rule.CASES, "small", (3, 6, 40, 2, 20))
    timings = cost_rule.measure("small", 2)
    ways = ("materialized_z", "materialized_dense", "factored_z", "factored_dense")
    assert set(timings) == {"auto", *ways}


def test_steps_of_a_small_model_are_checked(benchmarks, monkeypatch):
    import benchmarks.small as small

    sizes = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 48}
    monkeypatch.setattr(small, "SIZE", {**sizes, "num_attention_heads": 2})
    ranks = {f"tcur_{rank}": lambda model, rank=rank: small.cores(model, rank) for rank in (2, 8)}
    kept = {name: small.METHODS[name] for name in ("lora_8", "head", "full")}
    monkeypatch.setattr(small, "METHODS", kept | ranks)
    assert set(small.measure("minilm_16x22", 2)) == set(small.METHODS)

    def other(model):
        torch.nn.init.normal_(model.classifier.weight)
        return model

    monkeypatch.setattr(small, "METHODS", kept | {"other": other})
    with pytest.raises(RuntimeError, match="other: losses"):
        small.measure("minilm_16x22", 2)


def test_overhead_is_measured_and_checked(benchmarks, monkeypatch, capsys):
    import benchmarks.overhead as overhead

    monkeypatch.setattr(overhead, "LAYERS", 8)
    names = {"linear", *overhead.MODES, *(f"{mode}_kernels" for mode in overhead.MODES)}
    assert set(overhead.measure("tiny_16", 2)) == names
    assert "factored: a layer takes" in capsys.readouterr().out
    monkeypatch.setattr(overhead, "LIMIT", 1e-12)
    with pytest.raises(RuntimeError, match="gradients of the core differ by"):
        overhead.measure("tiny_16", 2)


def test_scaling_and_cast(benchmarks, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setitem(benchmarks.scaling.CASES, "small", (4, 6, 9, 2))
    contenders = {"stream", "materialize", "stream_1", "materialize_1"}
    assert set(benchmarks.scaling.measure("small", 2)) == contenders
    assert torch.get_num_threads() == threads
    monkeypatch.setitem(benchmarks.cast.CASES, "small", (4, 6, 9, 2))
    assert set(benchmarks.cast.measure("small", 2)) == {"autocast", "copy", "materialize"}
    right = benchmarks.cast.tcur.materialize

    def wrong(*args, out=None):
        return right(*args) if out is None else 1.1 * right(*args, out=out)

    monkeypatch.setattr(benchmarks.cast.tcur, "materialize", wrong)
    with pytest.raises(RuntimeError, match="materialize to bf16 is wrong"):
        benchmarks.cast.measure("small", 2)


def test_memory_is_measured_in_children(benchmarks, monkeypatch):
    memory = benchmarks.memory
    monkeypatch.setattr(benchmarks.methods, "WIDTH", 128)
    monkeypatch.setitem(memory.CASES, "small", (64,))
    monkeypatch.setattr(memory, "CONTENDERS", ("lora", "tcur"))
    peaks = memory.measure("small", 1)
    assert peaks["lora"].ratio == 1
    assert peaks["tcur"].peak_mb > 0
    assert peaks["tcur"].ratio == peaks["tcur"].peak_mb / peaks["lora"].peak_mb
    monkeypatch.setattr(memory, "CONTENDERS", ("nothing", "lora"))
    with pytest.raises(RuntimeError, match="nothing: the child process failed"):
        memory.measure("small", 1)


def test_serving_is_measured_and_checked(benchmarks, monkeypatch):
    import benchmarks.serving as serving

    monkeypatch.setattr(benchmarks.methods, "WIDTH", 16)
    monkeypatch.setitem(serving.CASES, "small", (5, 4, 3))
    timings = serving.measure("small", 2)
    assert set(timings) == {"one", "one_by_factors", "thousand", "frozen"}
    monkeypatch.setattr(serving, "LIMIT", 1e-12)
    with pytest.raises(RuntimeError, match="row 0 is off by"):
        serving.measure("small", 2)


def test_a_neighbour_runs_only_beside(benchmarks, monkeypatch):
    """It is stopped while a method runs alone, and killed at the end."""
    from benchmarks import neighbour

    monkeypatch.setattr(benchmarks.methods, "WIDTH", 32)
    states = {}

    def once(contenders, yardstick, rounds):
        for name, run in contenders.items():
            before = [Path(f"/proc/{each.pid}/stat").read_text().split()[2] for each in started]
            run()
            states[name] = before
        return {name: neighbour.Timing(1, 1, 1, 1) for name in contenders}

    started, popen = [], neighbour.subprocess.Popen

    def start(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(neighbour.subprocess, "Popen", start)
    monkeypatch.setattr(neighbour, "interleave", once)
    for is_same, methods in ((False, ("frozen",)), (True, ("tcur",))):
        monkeypatch.setattr(neighbour, "METHODS", methods)
        monkeypatch.setitem(neighbour.CASES, "small", (3, is_same))
        timings = neighbour.measure("small", 1)
        assert [*timings] == [each for name in methods for each in (name, f"{name}_beside")]
        assert all(state == "T" for before in states.values() for state in before)
        assert all(each.poll() is not None for each in started)
        started.clear()


def test_kernels_can_be_forced(benchmarks):
    """To another instruction set and cache, which then name the rows."""
    before = native.cpu_facts()
    least = before["isa_runnable"][-1]
    try:
        native.force(least, 256 * 1024)
        assert benchmarks.rows.device_name(True).endswith(f"-{least}-256K-forced")
    finally:
        native.force(before["isa_chosen"], before["l2_cache"])
    own = f"-{before['isa_chosen']}-{before['l2_cache'] // 1024}K"
    assert benchmarks.rows.device_name().endswith(own)


def test_rules_are_timed(benchmarks, monkeypatch):
    import benchmarks.selection as selection

    monkeypatch.setitem(selection.CASES, "small", (3, 8, 6, 2))
    assert set(selection.measure("small", 2)) == {"read", *selection.RULES}
    monkeypatch.setitem(selection.RULES, "norm", (([0, 1], [0, 1]), "zero"))
    choose = selection.tcur.tensor_cur

    def mistaken(*args):
        d = choose(*args)
        return replace(d, columns=d.columns + 1)

    monkeypatch.setattr(selection.tcur, "tensor_cur", mistaken)
    with pytest.raises(RuntimeError, match="norm is wrong: C or R are not the chosen slices"):
        selection.measure("small", 2)


def test_memory_of_rules_is_measured_in_children(benchmarks, monkeypatch):
    import benchmarks.selection_memory as memory

    monkeypatch.setattr(memory, "RULES", {"norm2": "norm2"})
    peaks = memory.measure("files_16x1024x1024", 1)
    assert set(peaks) == {"weights", "norm2"}
    assert peaks["weights"].peak_mb == pytest.approx(67.1, abs=0.1)
    workspace = memory.CASES["files_16x1024x1024"][4] * memory.MIB
    assert 0 < peaks["norm2"].peak_mb < workspace / 1e6
    monkeypatch.setattr(memory, "RULES", {"nothing": None})
    with pytest.raises(RuntimeError, match="nothing: the child process failed"):
        memory.measure("files_16x1024x1024", 1)


def test_rows_and_tables(benchmarks, monkeypatch, tmp_path):
    Timing = benchmarks.rows.Timing
    monkeypatch.setattr(benchmarks.rows, "RESULTS", tmp_path / "results")
    document = tmp_path / "performance.md"
    document.write_text(
        "a\n<!-- begin materialize -->\nthe former table\n<!-- end materialize -->\nb\n"
    )
    monkeypatch.setattr(benchmarks.report, "DOCUMENTS", (document,))
    monkeypatch.setattr(benchmarks.report, "PLOTS", tmp_path)
    for ms in (9.0, 2.0):
        timings = {"stream": Timing(1, 1, 1, 1), "materialize": Timing(ms, ms, ms, ms)}
        benchmarks.rows.append("materialize", "some", (4, 6, 7, 2), timings)
    scaled = {f"{name}{end}": timings["stream"] for name in timings for end in ("", "_1")}
    benchmarks.rows.append("scaling", "n3_12", (12, 6, 7, 2), scaled)
    (row, *_) = benchmarks.rows.read()
    assert (row["op"], row["shape"], row["torch"]) == ("materialize", "4x6x7x2", torch.__version__)
    peaks = {"lora": benchmarks.memory.Peak(2, 1), "tcur": benchmarks.memory.Peak(1, 0.5)}
    costs = {"linear": Timing(8, 8, 8, 1), "materialized": Timing(38, 38, 38, 4.75)}
    benchmarks.rows.append("overhead", "tiny_16", (8, 16, 4, 2), costs)
    path = benchmarks.rows.append("memory", "vit_b_mlp_9_tokens", (9,), peaks)
    assert path.stem.endswith("-memory")
    with pytest.raises(ValueError, match="expected the marks <!-- begin cast -->"):
        benchmarks.report.write()
    with document.open("a") as file:
        for op in benchmarks.report.texts().keys() - {"materialize"}:
            file.write(f"<!-- begin {op} -->\n<!-- end {op} -->\n")
    written = benchmarks.report.write()
    names = [path.name.rsplit("-", 1)[1] for path in written[1:]]
    assert names == ["streaming.png", "step.png", "copy.png"]
    text = document.read_text()
    assert "| vit_b_mlp_9_tokens | 1 | 0.50 | – | – | – |" in text
    assert "| some | 2 | 2.00 | – | – | – | – |" in text
    assert "| tiny_16 | 38 | 4.75 | – | – | – | 30 | – |" in text
    assert "the former table" not in text
    benchmarks.report.write()
    assert document.read_text() == text


def test_sentences_say_so_where_the_rule_is_beaten(benchmarks):
    rule = benchmarks.report.sentences.rule
    case = {"auto": 10.0, "materialized_z": 9.95, "factored_z": 11.0}
    values = {("here", "vit_b_up_16"): case, ("here", "vit_b_up_64"): {**case, "factored_z": 9.0}}
    assert rule(values) == (
        "On here the rule's way is the fastest or within 1 % of it in 1 of 2 cases. At worst "
        "another way takes 10 % less (vit_b_up_64)."
    )


def test_dry_run_of_the_gpu_command(tmp_path):
    """`python -m benchmarks.gpu` in toy sizes on the CPU: every row is on disk.

    Sections that `test_gpu_harness.py` runs need no process of their own again.
    """
    chosen = ["materialize", "step", "tests", "sanitizer", "unetr"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny"]
    command += ["--commit", "abc1234", "--out", tmp_path, "--section", *chosen]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    with open(tmp_path / "rows.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    sections = {row["section"] for row in rows}
    assert sections == {"build", *chosen}
    assert {row["commit"] for row in rows} == {"abc1234"}
    timed = {(row["section"], row["contender"]) for row in rows if row["ms"]}
    forms = ("copy", "stack", "layers", "eager", "compile", "S1", "S2")
    ways = ("frozen", "full", "lora_8", "lora_32", "tcur", "tcur_bf16")
    assert {("materialize", form) for form in forms} <= timed
    assert {("step", way) for way in ways} <= timed
    assert {("unetr", way) for way in ("full", "lora_32", "curlora_2", "tcur_8")} <= timed
    shares = [r for r in rows if r["section"] == "materialize" and r["contender"] == "layers"]
    for row in shares:
        if row["ms"]:
            share = 100 * float(row["copy_ms"]) / float(row["ms"])
            assert float(row["percent_of_copy"]) == pytest.approx(share, rel=1e-3)
    assert not [
        row for row in rows if row["note"].startswith(("FAILED", "WRONG", "left out: no time"))
    ]
    assert "rows, 0 failed" in result.stdout


def test_what_goes_wrong_on_a_gpu_is_a_row_and_an_exit_status(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.gpu_build as gpu_build

    command = [sys.executable, "-c", "raise SystemExit('torn')"]
    assert gpu_build.logged(command, tmp_path / "log", 1000) == "FAILED: torn"
    command = [sys.executable, "-c", "import time; time.sleep(1000)"]
    assert gpu_build.logged(command, tmp_path / "log", 0.2) == "FAILED: not done after 0 s"
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", tmp_path]
    if not torch.cuda.is_available():
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert "--device: expected a device that is here" in result.stderr


def test_tuning_offers_candidates_and_writes_the_table_it_read(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import tune

    path = tmp_path / "launch.csv"
    tune.write(list(tune.launch.table()), path)
    assert tune.launch.parse(path.read_text()) == tune.launch.table()
    assert path.read_text().splitlines()[0] == tune.TABLE.read_text().splitlines()[0]
    for row in tune.launch.table():
        offered = list(tune.candidates(row))
        assert offered[0] == row
        assert len(set(offered)) == len(offered) > 4
    monkeypatch.setattr("sys.argv", ["tune", "--list", "--kernel", "materialize"])
    tune.main()
    assert capsys.readouterr().out.count("materialize") == len(
        {row for row in tune.launch.table() if (row.kernel, row.arch) == ("materialize", "sm_80")}
    )
    row = tune.launch.table()[1]
    changes = [
        sum(a != b for a, b in zip(astuple(row), astuple(other), strict=True))
        for other in tune.candidates(row)
    ]
    assert changes == sorted(changes)
    if not torch.cuda.is_available():
        monkeypatch.setattr("sys.argv", ["tune"])
        with pytest.raises(SystemExit, match="no GPU to time on"):
            tune.main()


class FakeClock:
    """A device on which 16 warps are the fastest, 8 cannot be compiled, and time runs out."""

    on_gpu, device = False, torch.device("cpu")

    def __init__(self, launch, row, seconds):
        self.launch, self.row, self.left = launch, row, seconds

    def prepare(self, contender, capture):
        self.left -= 1
        rows = [row for row in self.launch.table() if row.kernel == self.row.kernel]
        (changed,) = [row for row in rows if row not in TABLE] or [self.row]
        if changed.warps == 8 and changed != self.row:
            raise RuntimeError("out of shared memory")
        return changed

    def time(self, ready):
        return 1.0 / ready.warps


TABLE = []


def test_tuning_takes_the_fastest_and_writes_as_it_goes(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import tune

    monkeypatch.setattr(tune, "workload", lambda row, device: (int, None))
    TABLE[:] = tune.launch.table()
    rows = [row for row in TABLE if (row.kernel, row.arch) == ("materialize", "sm_80")]
    tuner = tune.Tuner(FakeClock(tune.launch, rows[0], 1000), "sm_90")
    best = tuner.tune(rows[0], 0)
    assert (best.warps, best.arch) == (16, "sm_90")
    assert "candidates on cpu: 0.0625 ms against" in best.reason
    assert "RuntimeError: out of shared memory" in capsys.readouterr().out
    tuner.clock.left = 3
    tune.write_tuned(tuner, rows[:1], tmp_path / "launch.csv")
    written = tune.launch.parse((tmp_path / "launch.csv").read_text())
    assert len(written) == len(TABLE) + 1
    assert tuner.clock.left == 0
    monkeypatch.setattr(FakeClock, "time", lambda self, ready: 1 - 0.001 * ready.warps)
    tuner.clock.left = 100
    assert tuner.tune(rows[0], 0).warps == rows[0].warps  # not worth it
