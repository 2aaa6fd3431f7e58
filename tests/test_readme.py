"""The README's code runs as it stands, and its plain-torch twin is the same function."""

import re
from pathlib import Path

import torch

import tcur_kernels as tcur
from cases import make_case
from oracle import w_eff
from tolerance import assert_close

BLOCKS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL
)


def test_the_ten_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    output = capsys.readouterr().out.splitlines()
    assert 0.5 < float(output[0]) < 1.1
    assert output[1] == str(6 * 4 * 4)
    assert output[2].startswith("stack 64x64: 6 slices of 64 x 64, rank 4, ")
    assert (tmp_path / "adapter.safetensors").is_file()


def test_the_two_columns():
    case = make_case(6, 5, 7, 2)
    columns = [(line[:66].rstrip(), line[66:]) for line in BLOCKS[1].splitlines()]
    left = "\n".join(column for column, _ in columns if column)
    right = "\n".join(column for _, column in columns)
    names = {"w": case.weight, "c": case.lateral, "u": case.core, "r": case.horizontal}
    results = []
    for code in (left, right):
        scope = {**names, "alpha": 0.5, "tcur": tcur, "torch": torch}
        exec(compile(code, "README.md", "exec"), scope)
        results.append(scope["w_eff"])
    exact = w_eff(case.weight, case.lateral, case.core, case.horizontal, 0.5)
    assert_close(results[0], results[1], exact)
