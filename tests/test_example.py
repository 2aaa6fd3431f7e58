"""The segmentation example: the whole of it on tiny volumes, and what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tcur_kernels as tcur
from plain import Plain
from tolerance import assert_composition_close

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import unetr_segmentation

    return unetr_segmentation


def run_demo(folder, *arguments):
    """What a smoke run prints, and the lines of its progress."""
    command = [sys.executable, str(EXAMPLES / "unetr_segmentation.py"), "--smoke", *arguments]
    command += ["--output", str(folder), "--keep", str(folder / "kept")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    told = [int(part) for part in re.findall(r"all (\d+)%, \d+:\d\d left", result.stderr)]
    assert told == sorted(told)
    assert told[-1] == 100
    return result.stdout, result.stderr


def test_the_demo_end_to_end(example, tmp_path):
    output, lines = run_demo(tmp_path)
    for text in ("HD95", "||U|| 0 ->", "adapter merged: logits differ by"):
        assert text in output
    for stage in ("pretraining ", "source volumes "):
        assert stage in lines
    results = json.loads((tmp_path / "results.json").read_text())
    (run,) = results["runs"]
    reports = run["reports"]
    assert set(run["scores"]) == {"zero-shot", *reports}
    pairs = [("tCURLoRA", "decoder-only"), ("core + output layer", "output layer only")]
    for ours, frozen in pairs:
        cores = reports[ours]["parameters"] - reports[frozen]["parameters"]
        assert cores == (48 + 12 + 12) * 8 * 8
        for stack in ("24x24", "48x24", "24x48"):
            assert reports[ours]["core_norm"][stack][-1] > 0
            assert all(norm > 0 for norm in reports[ours]["grad_norm"][stack])
    assert run["round_trip"]["loaded"] == run["round_trip"]["unmerged"] == 0
    check_predictions(example, tmp_path)
    for picture in ("slices.png", "curves.png"):
        assert (tmp_path / picture).stat().st_size > 10_000

    # The next run has the same base, and pretrains nothing.
    output, lines = run_demo(tmp_path, "--methods", "head")
    (file,) = (tmp_path / "kept").glob("*.pt")
    assert f"pretraining: kept from an earlier run, {file}" in output
    for stage in ("pretraining ", "source volumes "):
        assert stage not in lines
    (again,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    for name in ("zero-shot", "output layer only"):
        assert again["scores"][name] == run["scores"][name]
    assert again["pretraining"] == run["pretraining"]


def check_predictions(example, folder):
    """The logits of the trained model, of its process, and of the adapter loaded and merged."""
    args = example.parse_args(["--smoke"])
    (weights,) = (folder / "kept").glob("*.pt")
    adapter = tcur.load_adapter(
        example.build_unetr(args, weights).eval(), folder / "tcurlora.safetensors"
    )
    held_out = example.read_section(folder / "target" / "dataset.json", "validation")
    image = example.load_volumes(args, held_out, augment=False)[0]["image"].as_tensor()
    plain, double = Plain(adapter), Plain(adapter, torch.float64)
    plain.eval = double.eval = lambda: None  # they are
    exact = example.predict(args, double, image.double())
    trained = load_file(folder / example.PROBE)["logits"]
    merged = example.predict(args, adapter.merge(), image)
    for logits in (trained, merged):
        assert_composition_close(logits, lambda: example.predict(args, plain, image), exact)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "x.json"], "--data expects --pretrained beside it"),
        (["--data", "x.json", "--pretrained", "x.pt"], "--data: expected a file, got x.json"),
        (["--img-size", "96", "96", "20"], "--img-size: expected multiples of UNETR's patch 16"),
        (["--num-heads", "5"], "--num-heads: expected a divisor of --hidden-size 192, got 5"),
        (["--rank", "0"], "--rank: expected more than 0, got 0"),
    ],
)
def test_bad_arguments(example, capsys, arguments, message):
    with pytest.raises(SystemExit):
        example.parse_args(arguments)
    assert message in capsys.readouterr().err


def write_volume(path, shape):
    nib.save(nib.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)), path)


def test_bad_files(example, tmp_path):
    args = example.parse_args(["--img-size", "16", "16", "16"])
    datalist = tmp_path / "dataset.json"

    def refuses(function, message, *call):
        with pytest.raises(SystemExit, match=message):
            function(*call)

    datalist.write_text(json.dumps({"training": [{"image": "a.nii.gz", "label": "b.nii.gz"}]}))
    refuses(example.read_section, "--data: expected .*'validation'", datalist, "validation")
    refuses(example.read_section, "--data: expected the NIfTI file", datalist, "training")
    write_volume(tmp_path / "a.nii.gz", (8, 8, 8))
    write_volume(tmp_path / "b.nii.gz", (8, 8, 9))
    refuses(
        example.read_section,
        r"--data: expected .* of its image's shape \(8, 8, 8\), got \(8, 8, 9\)",
        datalist,
        "training",
    )
    checkpoint = tmp_path / "unetr.pt"
    checkpoint.write_bytes(b"no checkpoint")
    refuses(example.build_unetr, "--pretrained: expected a state dict", args, checkpoint)
    torch.save({"out.conv.conv.bias": torch.zeros(7)}, checkpoint)
    refuses(example.build_unetr, "--pretrained: expected .* of shape .*, got", args, checkpoint)


def test_the_progress_counts_volumes_of_ones_own(example, tmp_path):
    for name in ("image.nii", "label.nii"):
        write_volume(tmp_path / name, (8, 8, 8))
    (tmp_path / "unetr.pt").touch()
    entries = [{"image": "image.nii", "label": "label.nii"}] * 3
    datalist = tmp_path / "dataset.json"
    datalist.write_text(json.dumps({"training": entries, "validation": entries}))
    arguments = ["--data", str(datalist), "--pretrained", str(tmp_path / "unetr.pt")]
    args = example.parse_args([*arguments, "--methods", "head", "--steps", "10"])
    evaluated = 2 * 3 * example.EVALUATION_SECONDS  # the base and the method
    wanted = 10 * example.METHODS["head"].seconds + evaluated
    assert example.work(args, 0) == pytest.approx(wanted)
