"""The tables of what is broken on purpose: they fit the sources, and leave out no kernel."""

import ast
import csv
import sys
from collections import Counter
from pathlib import Path

import pytest

import equivalent
import pymutants
import python_mutants
import triton_mutants
from forking import SURVIVED, UNREACHED, Forks
from mutant import PACKAGE, Mutant, functions
from swapping import NotSwappable, broken, changed, is_swappable
from tcur_kernels.operators import checks, cost
from triton_table import TABLE


def test_every_row_fits_and_is_python():
    """And is there once; `mutants` refuses what does not stand in its function once."""
    mutants = triton_mutants.mutants()
    for mutant in mutants:
        ast.parse(mutant.text)
        assert mutant.lines()
    assert len({(mutant.path, mutant.text) for mutant in mutants}) == len(mutants)


def test_every_kernel_is_broken_in_ten_ways():
    """Kernels that are launched each; functions that kernels call, and modules, together."""
    compiled, launched = triton_mutants.kernels()
    assert len(launched) >= 12
    assert len(compiled) >= 23
    rows = {(m, f): len(each) for m, of in TABLE.items() for f, each in of.items()}
    assert not {kernel for kernel in compiled if kernel not in rows}
    assert not {kernel: rows[kernel] for kernel in launched if rows[kernel] < 10}
    of_module = Counter()
    for (module, _), count in rows.items():
        of_module[module] += count
    assert min(of_module.values()) >= 10


def test_equivalent_mutants_still_stand_in_the_sources():
    """What stood on these lines may not have been rewritten, and each row has a reason."""
    for row in equivalent.rows():
        source = (PACKAGE / f"{row['module']}.py").read_text(encoding="utf-8")
        stripped = " ".join(line.strip() for line in source.splitlines())
        assert row["before"] in stripped, row
        assert row["before"] != row["after"]
        assert row["reason"].strip()
    path = Path(equivalent.__file__).with_suffix(".csv")
    with path.open(encoding="utf-8", newline="") as file:
        assert tuple(next(csv.reader(file))) == equivalent.COLUMNS


def test_what_is_broken_and_what_looks_are_there():
    """Files are named in lists, and pytest would stop at one that was renamed."""
    for path in (*python_mutants.files(), *triton_mutants.files()):
        assert path.is_file(), path
    tests = Path(__file__).parent
    names = [*python_mutants.TESTS[: python_mutants.TESTS.index("-k")], *pymutants.OF_TRITON[:6]]
    assert not [name for name in names if not (tests / name).exists()]


def test_functions_are_exchanged_and_come_back(tmp_path):
    path = Path(cost.__file__)
    name, node = next(iter(functions(ast.parse(path.read_text(encoding="utf-8")))))
    function = getattr(sys.modules[cost.__name__], name)
    lines = path.read_text(encoding="utf-8").splitlines()
    at = node.body[-1].lineno - 1
    lines[at] = " " * node.body[-1].col_offset + "raise ZeroDivisionError('broken')"
    for further in range(at + 1, node.body[-1].end_lineno):
        lines[further] = ""
    before = function.__code__
    with broken(path, "\n".join(lines), tmp_path / "cost.py"):
        assert function.__code__ is not before
        assert "broken" in str(function.__code__.co_consts)
    assert function.__code__ is before


def test_what_runs_at_import_is_told_apart():
    path = Path(checks.__file__)
    text = path.read_text(encoding="utf-8")
    assert not is_swappable(path, text + "\nLIMIT = 1\n")
    with pytest.raises(LookupError):
        is_swappable(path, text + "\n\n# the same\n")
    with pytest.raises(NotSwappable):
        changed(compile("x = 1", "a", "exec"), compile("x = 2", "a", "exec"))


def test_tests_that_a_mutant_gives_another_name_are_left_out(tmp_path):
    path = Path(cost.__file__)
    text = path.read_text(encoding="utf-8") + "\nLIMIT = 1\n"
    mutant = Mutant(path, "", "a line more", text, 1, 1)
    forks = Forks([mutant], [path], tmp_path, 1.0, None, None, None)
    here = "tests/test_pymutants.py::test_what_runs_at_import_is_told_apart"
    gone = "tests/test_pymutants.py::test_of_no_such_name[1]"
    assert forks._imported(mutant, [gone, here]) == (SURVIVED, "")
    assert forks._imported(mutant, [gone]) == (UNREACHED, "")
