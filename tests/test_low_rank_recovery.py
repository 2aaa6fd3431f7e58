"""The example recovers what it says, at a coarse resolution."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "low_rank_recovery.py"


@pytest.mark.filterwarnings("default")  # of nilearn and what it imports
def test_a_brain_from_a_few_rows_and_columns(tmp_path, monkeypatch, capsys):
    arguments = ["--rank", "5", "--resolution", "8", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert "tubal rank 5 of the truncated brain" in lines[2]
    assert float(lines[3].split()[-1]) < 1e-10
    of_whole, best = (float(word.strip(",")) for word in lines[4].split() if word[0].isdigit())
    assert best <= of_whole < 1
    assert (tmp_path / "out" / "low_rank_recovery.png").read_bytes()[:4] == b"\x89PNG"
