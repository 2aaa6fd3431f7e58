"""The command for a machine with a GPU: its way of timing, with a GPU of stubs, and what breaks."""

import argparse
import contextlib
import importlib
import time
from pathlib import Path

import pytest
import torch

from tcur_kernels.operators import native

ROOT = Path(__file__).parent.parent


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.gpu
    import benchmarks.gpu_kernels

    return benchmarks


class Graph:
    """Stands for a CUDA graph; the calls of its replays are counted."""

    replays = 0

    def replay(self):
        Graph.replays += 1


class Event:
    """Stands for a CUDA event, a millisecond after the one before."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1.0


class Stream:
    """Stands for a CUDA stream."""

    def wait_stream(self, other):
        pass


@pytest.fixture
def bench(harness, monkeypatch, tmp_path):
    """A bench on the CPU that takes the ways of a GPU."""
    stubs = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": lambda graph: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": Stream,
        "memory_allocated": lambda device: 1_000_000,
        "max_memory_allocated": lambda device: 3_000_000,
    }
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "_sleep"):
        stubs[name] = lambda *args: None
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    gpu = harness.gpu
    clock = gpu.Clock(torch.device("cpu"), time.time() + 1000, False)
    clock.on_gpu, clock.l2_bytes = True, 1000
    rows = gpu.Rows(tmp_path / "rows.csv", gpu.facts(clock.device, "abc"))
    monkeypatch.setattr(Graph, "replays", 0)
    return gpu.Bench(clock, rows, gpu.Progress(tmp_path / "progress"))


def rows_of(harness, bench):
    return {(row.case, row.contender): row for row in harness.gpu_rows.read(bench.rows._path)}


def test_contenders_take_turns_over_sets_of_buffers(harness, bench):
    Contender = harness.gpu_bench.Contender
    assert bench.clock.sets(100) == 80
    assert bench.clock.sets(1) == harness.gpu_clock.SETS
    assert bench.clock.sets(10_000) == 1
    calls = []

    def make(name, count):
        return lambda: [lambda i=i: calls.append((name, i)) for i in range(count)]

    contenders = [
        Contender("copy", "torch", make("copy", 3)),
        Contender("ours", "cuda", make("ours", 3), share=0.5, floor_ms=1e-3),
        Contender("eager", "torch", make("eager", 1), "launched"),
        Contender("step", "wall", make("step", 1), "wall"),
        Contender("gone", "cuda", make("gone", 1), absent="not built"),
        Contender("wrong", "cuda", make("wrong", 1), check=lambda: "relative error 2"),
    ]
    bench.piece("s", "case", lambda: bench.race("s", "case", contenders, ratios=("eager",)))
    rows = rows_of(harness, bench)
    assert {i for name, i in calls if name == "ours"} == {0, 1, 2}
    copy, ours = rows["case", "copy"], rows["case", "ours"]
    assert copy.note.startswith("graph, ")
    assert copy.copy_ms is None
    assert ours.percent_of_copy == pytest.approx(100 * 0.5 * copy.ms / ours.ms)
    assert (ours.copy_ms, ours.peak_mb) == (copy.ms, 2.0)
    assert ours.host_us > 0
    assert ours.note.startswith("graph, ")
    assert "% of floor 0.001 ms" in ours.note
    # A graph holds 3 calls at least, two replays are between two events, of all rounds.
    assert Graph.replays >= 2 * 2 * harness.gpu_clock.ROUNDS
    assert rows["case", "eager"].note == "launched"
    assert rows["case", "step"].note == "wall"
    assert rows["case", "gone"].note == "absent: not built"
    assert rows["case", "wrong"].note == "WRONG: relative error 2"
    assert not any(name == "gone" for name, _ in calls)


def test_what_fails_is_a_row_and_the_next_goes_on(harness, bench, monkeypatch):
    Contender = harness.gpu_bench.Contender

    def fail():
        raise ValueError("no such\nthing")

    def exhaust():
        raise torch.OutOfMemoryError("tried to allocate")

    @contextlib.contextmanager
    def broken(graph):
        raise RuntimeError("operation not permitted")
        yield

    monkeypatch.setattr(torch.cuda, "graph", broken)
    contenders = [
        Contender("fails", "", lambda: [fail]),
        Contender("large", "", lambda: [exhaust]),
        Contender("uncaptured", "", lambda: [int]),
        Contender("good", "", lambda: [int], "launched"),
    ]
    bench.piece("s", "case", lambda: bench.race("s", "case", contenders))
    bench.piece("s", "raises", fail)
    rows = rows_of(harness, bench)
    assert rows["case", "fails"].note == "FAILED: ValueError: no such"
    assert rows["case", "large"].note == "out of memory: OutOfMemoryError: tried to allocate"
    assert rows["case", "uncaptured"].note == "launched"
    assert rows["case", "good"].ms > 0
    assert rows["raises", ""].is_bad
    captures = [r for r in harness.gpu_rows.read(bench.rows._path) if "cannot be capt" in r.note]
    assert [row.is_bad for row in captures] == [True]
    bench.clock._until = 0
    bench.piece("s", "late", fail)
    assert rows_of(harness, bench)["late", ""].note == "left out: no time"


SECTIONS = ("gpu_ceilings.run", "gpu_operators.run", "gpu_operators.sweep", "gpu_gradients.run")
SECTIONS += ("gpu_models.training", "gpu_models.serving", "gpu_kernels.run")


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_takes_the_ways_of_a_gpu(
    harness, bench, monkeypatch, request, tmp_path, section
):
    """In toy sizes; compiled baselines and the profiler are left out."""
    module = importlib.import_module(f"benchmarks.{section.partition('.')[0]}")
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)  # there is nothing to share
    monkeypatch.setattr(torch, "compile", lambda function, backend: function)
    for name in ("gpu_kernels", "gpu_models"):
        own = importlib.import_module(f"benchmarks.{name}")
        monkeypatch.setattr(own, "measured", lambda *args: {"some_kernel": (2.0, 3.0)})
    monkeypatch.setattr(harness.gpu_kernels.shutil, "which", lambda *args, **how: None)
    bench.tiny = bench.clock.tiny = True
    files = [tmp_path] if section.startswith("gpu_kernels") else []
    getattr(module, section.partition(".")[2])(bench, *files)
    rows = harness.gpu_rows.read(bench.rows._path)
    assert [row for row in rows if row.is_bad] == []
    assert any(row.ms is not None for row in rows)
    assert not any("left out" in row.note for row in rows)


def test_a_lost_device_ends_the_process_and_the_next_goes_on_behind_it(harness, bench, monkeypatch):
    Contender = harness.gpu_bench.Contender
    DeviceLost = harness.gpu_bench.DeviceLost
    path, dead = bench.progress._path, []

    def illegal():
        dead.append(True)
        raise RuntimeError("an illegal memory access was encountered")

    def empty_cache():
        if dead:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    ran = []

    def case():
        contenders = [
            Contender("before", "", lambda: [lambda: ran.append("before")], "launched"),
            Contender("breaks", "", lambda: [illegal], "launched"),
            Contender("after", "", lambda: [lambda: ran.append("after")], "launched"),
        ]
        bench.race("s", "case", contenders)

    bench.piece("s", "first", lambda: ran.append("first"))
    with pytest.raises(DeviceLost):
        bench.piece("s", "case", case)
    dead.clear()
    progress = harness.gpu.Progress(path)
    assert progress.latest() == "s case|s breaks "
    bench.progress = progress
    bench.piece("s", "first", lambda: ran.append("again"))
    bench.piece("s", "case", case)
    assert ran.count("first") == 1
    assert "again" not in ran
    rows = rows_of(harness, bench)
    assert rows["case", "breaks"].is_bad
    assert rows["case", "before"].ms > 0
    assert rows["case", "after"].ms > 0


SECTION = """
import os, pathlib, signal, time
from benchmarks.gpu_bench import DeviceLost
from benchmarks.gpu_clock import Contender
from benchmarks.gpu_rows import Row

def run(bench):
    def crash():
        os.kill(os.getpid(), signal.SIGSEGV)

    def lose():
        bench.rows.add(Row("s", "lost", "", note="FAILED: lost"))
        raise DeviceLost

    def hang():
        pathlib.Path(__file__).with_name("hangs").touch()
        time.sleep(1000)

    contenders = [Contender("good", "", lambda: [int]), Contender("bad", "", lambda: [crash])]
    bench.piece("s", "race", lambda: bench.race("s", "race", contenders))
    bench.piece("s", "hang", hang)
    bench.piece("s", "lost", lose)
    bench.piece("s", "last", lambda: bench.rows.add(Row("s", "last", "", note="reached")))
"""


def test_a_section_goes_on_behind_what_breaks_it(harness, monkeypatch, tmp_path):
    gpu = harness.gpu
    (tmp_path / "breaking_section.py").write_text(SECTION)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    args = argparse.Namespace(out=tmp_path, device="cpu", tiny=True, commit="abc")
    rows = gpu.Rows(tmp_path / "rows.csv", gpu.facts(torch.device("cpu"), "abc"))
    # Minutes are over as soon as the section hangs, and none before, however slow this machine is.
    real_time, hangs = time.time, tmp_path / "hangs"
    monkeypatch.setattr(gpu.time, "time", lambda: real_time() + (5000 if hangs.exists() else 0))
    driver = gpu.Driver(args, rows, time.time() + 20_000)
    driver.run("s", gpu.Section("breaking_section", "run", 20_000, stuck=3000), tmp_path)
    found = gpu.read(tmp_path / "rows.csv")
    notes = [(row.case, row.contender, row.note) for row in found]
    assert notes[0][0] == "race|s bad "
    assert notes[0][2].startswith("FAILED: SIGSEGV")
    assert notes[1:] == [
        ("race", "good", ""),
        ("hang", "", "FAILED: stopped after 3000 s without an end"),
        ("lost", "", "FAILED: lost"),
        ("last", "", "reached"),
    ]
    assert found[1].ms > 0
    lines = gpu.shortened([f"a {i}" for i in range(9)] + ["b 1", "c " + "x" * 99], 5, 20)
    assert lines == ["a 0", "a 1", "a 2", "a: 6 more in table.txt", "b 1", "c " + "x" * 17 + "…"]


def test_without_nvcc_it_goes_on_with_triton_alone(harness, bench, monkeypatch, tmp_path):
    build = importlib.import_module("benchmarks.gpu_build")
    command = "import sys; print('nvcc fatal: {0}'); sys.exit('{0}' == 'cuda')"
    monkeypatch.setattr(build, "COMMAND", command)
    monkeypatch.setattr(build, "built", list)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    bench.device = argparse.Namespace(type="cuda")
    log = tmp_path / "build.log"
    build.run(bench, log)
    rows = rows_of(harness, bench)
    assert rows["cuda", ""].note == "FAILED: nvcc fatal: cuda; Triton alone from here on"
    assert rows["cuda", ""].is_bad
    assert rows["cpu", ""].note == "passed"
    assert "nvcc fatal: cuda" in log.read_text()
    # What is not here is a row of its own, and ends nothing.
    monkeypatch.setattr(native, "_cuda", lambda: (None, "no _cuda.torch.so"))
    operators = importlib.import_module("benchmarks.gpu_operators")
    assert operators.backends(bench.device) == ["cuda", "triton"]
    assert operators.why_absent("cuda", bench.device) == "no _cuda.torch.so"


def test_counters_and_names_of_kernels(harness, bench):
    kernels = harness.gpu_kernels
    name = "void tcur::(anonymous namespace)::materialize_kernel<(int)12, true>(tcur::Args)"
    assert kernels.short(name) == "materialize_kernel<12, true>"
    assert kernels.short("_folded_kernel") == "_folded_kernel"
    header = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    table = [
        "==PROF== Connected",
        header,
        '"0","spin_kernel(long)","gpu__time_duration.sum","us","1.5"',
        '"1","mix_kernel(Args)","gpu__time_duration.sum","ns","1,500"',
        '"1","mix_kernel(Args)","launch__registers_per_thread","register/thread","64"',
        '"2","spin_kernel(long)","gpu__time_duration.sum","us","1.5"',
    ]
    assert kernels._read(bench, "\n".join(table))
    (row,) = harness.gpu_rows.read(bench.rows._path)
    assert (row.case, row.contender, row.backend) == (
        "materialize vit_b_attention", "mix_kernel", "cuda"
    )  # fmt: skip
    assert row.ms == pytest.approx(1.5e-3)
    assert "registers 64" in row.note
    assert not kernels._read(bench, "==ERROR== no counters")


def test_the_last_words_of_pytest_are_understood(harness):
    import benchmarks.gpu_checks as checks

    text = (
        "...F\n=== short test summary info ===\nFAILED tests/test_device.py::test_x[a - b] - assert"
        "\n1 failed, 3 passed, 2 warnings in 4.56s\n"
    )
    found, failures = checks.summary(text)
    assert found == "1 failed, 3 passed, 2 warnings in 4.56s"
    assert failures == ["tests/test_device.py::test_x[a - b] - assert"]
    assert checks.summary("nothing") == ("", [])


def test_what_it_tests_is_there(harness):
    checks = importlib.import_module("benchmarks.gpu_checks")
    assert all((ROOT / "tests" / name).exists() for name in checks.SUITE)
