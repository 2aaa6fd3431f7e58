"""``python -m tcur_kernels plan MODEL_DIR --curve PNG``, on a small model directory."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tcur_kernels import cli


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder, max_shard_size="8kB")
    return folder


def test_a_table_and_a_picture(model_dir, tmp_path):
    picture = tmp_path / "curves.png"
    command = [sys.executable, "-m", "tcur_kernels", "plan", str(model_dir), "--rank", "4"]
    command += ["--curve", str(picture), "--ranks", "1", "4", "--selections", "norm2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("stack 16x16: 8 matrices of 16 x 16 share one core of 8 x 4 x 4")
    table = lines.index("stack 16x16: 8 slices of 16 x 16, relative errors")
    assert lines[table + 1].split() == ["rank", "core", "best", "norm2"]
    rank, core, best, error = lines[table + 3].split()
    assert (rank, core) == ("4", "128")
    assert 0 < float(best) < float(error) < 1
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_plan_reads_no_weights_and_bad_input_is_named(model_dir, tmp_path, capsys):
    assert cli.main(["plan", str(model_dir), "--targets", "mlp.up_proj"]) == 0
    assert "stack 24x16: 2 matrices of 24 x 16" in capsys.readouterr().out
    for arguments, message in (
        ([str(tmp_path)], "error: model_dir: expected"),
        ([str(model_dir), "--targets", "nothing"], "error: targets: expected"),
        ([str(model_dir), "--curve", "x.png", "--ranks", "99"], "error: ranks: expected one of"),
    ):
        assert cli.main(["plan", *arguments]) == 2
        assert message in capsys.readouterr().err
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    stored = next(path for path in tmp_path.iterdir() if path.suffix == ".safetensors")
    tensors = load_file(stored)
    name = next(name for name in tensors if "proj" in name)
    tensors[name][0, 0] = torch.inf
    save_file(tensors, stored, {"format": "pt"})
    picture = tmp_path / "curves.png"
    assert cli.main(["plan", str(tmp_path), "--curve", str(picture)]) == 2
    assert f"error: weights: {name}, rows 0 to" in capsys.readouterr().err
    assert not picture.exists()
