"""The example of two clients that share cores: one round of it, as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tolerance import PROMISE

EXAMPLE = Path(__file__).parent.parent / "examples" / "federated.py"


def test_two_clients_and_the_mean_of_what_they_learn(tmp_path):
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--rounds", "1"]
    command += ["--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (apart,) = re.findall(r"W_eff is off its mean by (\S+)", done.stdout)
    assert 0 < float(apart) < PROMISE["ieee"]
    assert "Adapter.average of the files of the clients: the same cores" in done.stdout
    (before,) = re.findall(r"before the clients learn: (\S+)%", done.stdout)
    (after,) = re.findall(r"federated adapter: (\S+)%", done.stdout)
    alone = re.findall(r"round 1, client [01]: (\S+)% after its own digits", done.stdout)
    assert len(alone) == 2
    assert float(after) > max(map(float, (before, *alone)))
    names = {"averaged.safetensors", "federated.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == names


def test_what_it_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import federated

    with pytest.raises(SystemExit):
        federated.main(["--rounds", "0", "--output", str(tmp_path / "out")])
    assert "--rounds: expected at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
