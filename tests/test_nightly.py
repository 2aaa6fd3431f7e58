"""The nightly command: every way in which a program can end is a row that says so."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

import nightly
from benchmarks import appending
from nightly import PROGRAMS, Program
from test_performance_page import figures

GOOD = {"kind": "calls", "tried": 7, "right": 5, "refused": 2, "crashes": 0, "silent": 0}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Rows, page and logs in a folder of the test."""
    monkeypatch.setattr(nightly, "ROWS", tmp_path / "nightly.csv")
    monkeypatch.setattr(nightly, "PAGE", tmp_path / "trust.md")
    monkeypatch.setattr(nightly, "LOGS", tmp_path / "logs")
    nightly.PAGE.write_text("a\n<!-- begin nightly -->\n<!-- end nightly -->\nb\n")
    return tmp_path


def program(home, code, name="fake", minutes=1.0):
    path = home / f"{name}.py"
    path.write_text(code)
    return Program(name, f"python {path}", minutes)


def result(**others):
    return f"RESULT {json.dumps(GOOD | others)}"


def night(monkeypatch, *programs):
    """The exit status, and the rows."""
    monkeypatch.setattr(nightly, "PROGRAMS", programs)
    status = nightly.main([])
    return status, appending.read(nightly.ROWS)


def test_a_result_is_a_row_and_a_line_of_the_table(home, monkeypatch, capsys):
    code = f"print('some progress')\nprint({result(what='all', seed=3, seconds_each=0.5)!r})"
    status, (row,) = night(monkeypatch, program(home, code))
    assert status == 0
    assert list(row) == list(nightly.COLUMNS)
    wanted = {"program": "fake", "kind": "calls", "what": "all", "tried": "7", "right": "5"}
    wanted |= {"refused": "2", "caught": "", "crashes": "0", "silent": "0", "seed": "3"}
    wanted |= {"more": "seconds_each 0.5", "wrong": ""}
    assert wanted.items() <= row.items()
    assert all(row[name] for name in ("time", "commit", "processor", "isa", "torch", "python"))
    text = nightly.PAGE.read_text()
    assert "| calls all | 7 | 5 | 2 | – | 0 | 0 | seconds_each 0.5 |" in text
    assert text.startswith("a\n<!-- begin nightly -->\n| what")
    assert text.endswith("|\n<!-- end nightly -->\nb\n")
    assert "tried 7, right 5, refused 2, caught 0, crashes 0, silent 0: all right" in (
        capsys.readouterr().out
    )


def test_a_program_may_have_several_results(home, monkeypatch):
    code = f"print({result(kind='asan')!r})\nprint({result(kind='tsan')!r})"
    status, rows = night(monkeypatch, program(home, code))
    assert (status, [row["kind"] for row in rows]) == (0, ["asan", "tsan"])
    assert rows[0]["time"] == rows[1]["time"]
    assert len(nightly.newest(rows)["fake"]) == 2


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        (f"print({result(silent=1)!r}); raise SystemExit(1)", "ended with status 1"),
        (f"print({result(crashes=2)!r})", ""),
        (f"print({result(silent=1)!r})", ""),
        (f"print({result()!r}); raise SystemExit(3)", "ended with status 3"),
        ("import os; os.kill(os.getpid(), 11)", "ended with status -11"),
        ("print('nothing')", "no RESULT in the last line"),
        (f"print({result()!r}); print('and more')", "no RESULT in the last line"),
        ("print('RESULT {oh')", "RESULT: expected a JSON object, got 'RESULT {oh'"),
        ("print('RESULT [1]')", "RESULT: expected an object with a kind, got 'RESULT [1]'"),
        (f"print({result(tried=0)!r})", "RESULT: tried: expected something that was tried, got 0"),
        (f"print({result(silent=-1)!r})", "RESULT: silent: expected a count, got -1"),
        (
            """print('RESULT {"kind": "a", "tried": 1}')""",
            "RESULT: crashes: expected a count, got None",
        ),
        (f"print({result(crashes=None)!r})", "RESULT: crashes: expected a count, got None"),
        (f"print({result(right=0.5)!r})", "RESULT: right: expected a count, got 0.5"),
        (f"print({result(right=True)!r})", "RESULT: right: expected a count, got True"),
    ],
)
def test_what_is_wrong_is_said_and_the_night_goes_on(home, monkeypatch, capsys, code, wrong):
    good = program(home, f"print({result()!r})", "good")
    status, (row, other) = night(monkeypatch, program(home, code), good)
    assert status == 1
    assert row["wrong"] == wrong
    assert not nightly.is_right(row)
    assert nightly.is_right(other)
    if " with status -11" in wrong:
        assert (row["tried"], row["crashes"], row["silent"]) == ("", "1", "")
    said = capsys.readouterr().out
    assert "1 of 1 WRONG" in said
    assert said.endswith("1 of 2 WRONG\n")
    assert str(nightly.LOGS / "fake.log") in said
    assert wrong in nightly.PAGE.read_text()


def is_running(pid):
    """Whether a process is there, and not only its exit status."""
    try:
        stat = Path("/proc", pid, "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_a_program_that_runs_too_long_is_killed_with_what_it_started(home, monkeypatch):
    child = home / "child"
    code = (
        "import subprocess, sys, time, pathlib\n"
        f"one = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(one.pid))\n"
        "time.sleep(600)"
    )
    status, (row,) = night(monkeypatch, program(home, code, minutes=0.1))
    assert status == 1
    assert row["wrong"] == "killed after 0.1 minutes"
    assert row["crashes"] == "1"
    # It was sent a signal, and is gone once it has run again.
    end = time.monotonic() + 60
    while is_running(child.read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_newest_rows_of_each_program_are_shown(home, monkeypatch):
    once = program(home, f"print({result(tried=1000, kind='one')!r})", "one")
    night(monkeypatch, once)
    other = program(home, f"print({result(kind='other')!r})", "other")
    night(monkeypatch, other)
    again = program(home, f"print({result(tried=2000, kind='one')!r})", "one")
    monkeypatch.setattr(nightly, "now", lambda: "2099-01-01T00:00:00+00:00")
    status, rows = night(monkeypatch, again)
    assert (status, len(rows)) == (0, 3)
    monkeypatch.setattr(nightly, "PROGRAMS", (other, again))
    lines = nightly.table(rows).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["7", "2,000"]
    assert "2099-01-01" in lines[1]


def test_mutants_count_what_was_caught(home, monkeypatch):
    made = {"kind": "mutants", "language": "cpu", "tried": 9, "caught": 8, "survived": [4]}
    made |= {"hung": [], "kernels": {str(n): n for n in range(9)}, "of": {"a": 1, "b": 2}}
    program_of = program(home, f"print('RESULT ' + {json.dumps(made)!r})")
    status, (row,) = night(monkeypatch, program_of)
    assert status == 0
    assert (row["what"], row["tried"], row["caught"], row["crashes"]) == ("cpu", "9", "8", "")
    assert row["more"] == "survived 4, kernels (9 parts), of a 1 and b 2"
    assert "| mutants cpu | 9 | – | – | 8 | – | – |" in nightly.PAGE.read_text()


def test_some_programs_can_be_chosen(home, monkeypatch, capsys):
    programs = [program(home, f"print({result()!r})", name) for name in ("one", "other")]
    monkeypatch.setattr(nightly, "PROGRAMS", programs)
    assert nightly.main(["--only", "other"]) == 0
    assert [row["program"] for row in appending.read(nightly.ROWS)] == ["other"]
    with pytest.raises(SystemExit):
        nightly.main(["--only", "none"])
    assert "invalid choice: 'none'" in capsys.readouterr().err


def test_programs_find_the_package_and_the_interpreter(home, monkeypatch):
    code = (
        "import json, sys, tcur_kernels\n"
        "found = [sys.executable, tcur_kernels.__file__]\n"
        f"print('RESULT ' + json.dumps({GOOD!r} | dict(found=found)))"
    )
    _, (row,) = night(monkeypatch, program(home, code))
    package = os.path.join(nightly.ROOT, "tcur_kernels", "__init__.py")
    assert row["more"] == f"found {sys.executable} and {package}"


def test_the_page_has_what_the_rows_give():
    page = nightly.PAGE.read_text(encoding="utf-8")
    table = nightly.table(appending.read(nightly.ROWS))
    assert f"<!-- begin nightly -->\n{table}<!-- end nightly -->\n" in page


def test_the_page_has_no_figure_of_a_hand():
    """What came out stands between the marks alone."""
    assert figures(nightly.PAGE.read_text(encoding="utf-8")) == []


def test_the_page_explains_every_program():
    page = nightly.PAGE.read_text(encoding="utf-8")
    names = {one.name.partition("-")[0] for one in PROGRAMS}
    assert [name for name in sorted(names) if f"- **{name}**" not in page] == []
    assert len({one.name for one in PROGRAMS}) == len(PROGRAMS)
