"""The command that tries versions: how a cell can end, and the table of the README."""

import json
import subprocess
from types import SimpleNamespace

import pytest

import environments
import versions
from benchmarks import appending
from versions import CELLS, Cell

FACTS = {"version": "1", "python": "3.11.7", "torch": "2", "triton": "", "peft": "0.18.0"}
FACTS |= {"transformers": "5", "numpy": "2", "processor": "some", "isa": "avx2"}


class Environment:
    """One that installs nothing; what its commands print is given."""

    python = "python"

    def __init__(self, output="5 passed, 2 skipped in 1.0s", status=0, error=None):
        self.output, self.status, self.error = output, status, error
        self.folder, self.removed = object(), 0

    def make(self, python):
        pass

    def install(self, *packages, without):
        if self.error:
            raise RuntimeError(self.error)

    def test(self, files, chosen):
        return SimpleNamespace(stdout=self.output, returncode=self.status)

    def remove(self):
        self.removed += 1


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "ROWS", tmp_path / "versions.csv")
    monkeypatch.setattr(versions, "PAGE", tmp_path / "README.md")
    versions.PAGE.write_text("<!-- begin versions -->\n<!-- end versions -->\n")
    monkeypatch.setattr(versions, "CELLS", (Cell("3.11", peft="0.18.0"),))
    loaded = SimpleNamespace(stdout=f"{json.dumps(FACTS)}\n", returncode=0)
    monkeypatch.setattr(versions, "run", lambda command, **more: loaded)
    return loaded


def tried(monkeypatch, environment, *arguments):
    monkeypatch.setattr(Cell, "environment", environment)
    status = versions.main([*arguments])
    return status, appending.read(versions.ROWS) if versions.ROWS.exists() else []


def test_a_cell_that_passed(home, monkeypatch):
    environment = Environment()
    status, (row,) = tried(monkeypatch, environment)
    assert (status, environment.removed) == (0, 1)
    assert list(row) == list(versions.COLUMNS)
    wanted = {**FACTS, "cell": "Python 3.11, peft 0.18.0", "passed": "5", "skipped": "2"}
    assert (wanted | {"failed": "0", "wrong": ""}).items() <= row.items()
    table = versions.PAGE.read_text()
    assert "| 3.11.7 | 2 | – | 0.18.0 | 5 | 2 | 5 passed, 2 skipped |" in table


@pytest.mark.parametrize(
    ("environment", "wrong"),
    [
        (Environment("1 failed, 3 passed, 1 error in 2s", 1), "pytest ended with 1"),
        (Environment("", 5), "pytest ended with 5"),
        (Environment(error="no such release"), "cannot be installed"),
    ],
)
def test_a_cell_that_did_not(home, monkeypatch, capsys, environment, wrong):
    status, (row,) = tried(monkeypatch, environment)
    assert (status, row["wrong"]) == (1, wrong)
    assert wrong in versions.PAGE.read_text()
    if environment.status == 1:
        assert (row["passed"], row["failed"]) == ("3", "2")
    assert (environment.error or environment.output) in capsys.readouterr().out


def test_a_library_that_does_not_load(home, monkeypatch, capsys):
    home.returncode, home.stdout = 1, "undefined symbol"
    status, (row,) = tried(monkeypatch, Environment())
    assert (status, row["wrong"]) == (1, "does not load")
    assert "undefined symbol" in capsys.readouterr().out


def test_a_python_that_is_not_here(home, monkeypatch):
    monkeypatch.setattr(versions, "CELLS", (Cell("3.99"),))
    status, (row,) = tried(monkeypatch, Environment())
    assert (status, row["wrong"]) == (1, "not tried: no Python 3.99 here")


def test_a_part_of_the_tests_is_no_row(home, monkeypatch):
    environment = Environment()
    status, rows = tried(monkeypatch, environment, "--tests", "test_api.py", "--keep")
    assert (status, rows, environment.removed) == (0, [], 0)


def test_an_environment_stays_until_its_last_cell(home, monkeypatch):
    cells = (Cell("3.11", peft="0.18.0"), Cell("3.11"))
    monkeypatch.setattr(versions, "CELLS", cells)
    environment = Environment()
    status, rows = tried(monkeypatch, environment)
    assert (status, len(rows), environment.removed) == (0, 2, 1)


def test_what_is_asked_for_is_not_pinned():
    packages, free = Cell("3.11", torch="2.10.0", transformers="4.57.6").packages()
    assert packages[:3] == ("torch==2.10.0", "peft", "transformers==4.57.6")
    assert free == ("huggingface_hub", "setuptools", "tokenizers", "torch", "transformers")
    assert Cell("3.12").packages()[1] == ()


def test_constraints_leave_packages_out(tmp_path, monkeypatch):
    text = "torch==1\nnumpy==2; python_version >= '3.11'\ntorchao==3\n"
    (tmp_path / "constraints.txt").write_text(text)
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    assert environments.constraints(("numpy", "torch")).read_text() == "torchao==3\n"


def test_an_interpreter_is_asked_for_its_version(tmp_path, monkeypatch):
    """A name on the PATH may have nothing behind it, or another version."""
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "python3.99").write_text("#!/bin/sh\necho not found; exit 127\n")
    (tmp_path / "python3.99").chmod(0o755)
    assert environments.interpreter("3.99") is None
    real = tmp_path / "pyenv" / "versions" / "3.99.1" / "bin" / "python"
    real.parent.mkdir(parents=True)
    real.write_text("#!/bin/sh\necho 3.99\n")
    real.chmod(0o755)
    assert environments.interpreter("3.99") == real
    own = ".".join(map(str, __import__("sys").version_info[:2]))
    found = environments.interpreter(own)
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=True)
    assert said.stdout.startswith(f"Python {own}")


def test_the_cells_are_those_that_are_claimed():
    """The oldest and newest of what pyproject.toml and constraints.txt have, in each row of one."""
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    assert {"3.10", "3.11", "3.12", "3.13", "3.14"} == {cell.python for cell in CELLS}
    project = (environments.ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.10"' in project
    oldest = {"torch": "2.10", "peft": "0.18", "transformers": "4.57"}
    for name, version in oldest.items():
        assert f'"{name}>={version}' in project
        asked = [getattr(cell, name) for cell in CELLS if getattr(cell, name)]
        assert min(asked).startswith(version)


def test_the_page_has_what_the_rows_give():
    page = versions.PAGE.read_text(encoding="utf-8")
    table = versions.table(appending.read(versions.ROWS))
    assert f"<!-- begin versions -->\n{table}<!-- end versions -->\n" in page
