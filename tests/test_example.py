"""The segmentation example: the whole of it on tiny volumes, and what it refuses."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from plain import Plain
from segmentation_files import EXAMPLES, write_dataset
from tolerance import assert_composition_close


@pytest.fixture
def example(job):
    """The script as a module."""
    import unetr_segmentation

    return unetr_segmentation


def smoke(folder):
    """Options of a run that is quick."""
    return ["--smoke", "--output", str(folder), "--keep", str(folder / "kept")]


def run_demo(folder, *arguments):
    """What a smoke run prints, and the lines of its progress."""
    command = [sys.executable, str(EXAMPLES / "unetr_segmentation.py"), *arguments, *smoke(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    told = [int(part) for part in re.findall(r"all (\d+)%, \d+:\d\d left", result.stderr)]
    assert told == sorted(told)
    assert told[-1] == 100
    return result.stdout, result.stderr


def test_the_demo_end_to_end(job, example, tmp_path, capfd):
    output, lines = run_demo(tmp_path, "--methods", "tcurlora", "head")
    for text in (
        "HD95",
        "share one core",
        "||U|| 0 ->",
        "adapter merged: logits differ by",
        "Dice: 2 |P ∩ T|",
    ):
        assert text in output
    for stage in ("pretraining ", "source volumes "):
        assert stage in lines
    results = json.loads((tmp_path / "results.json").read_text())
    (run,) = results["runs"]
    reports = run["reports"]
    assert set(run["scores"]) == {"zero-shot", *reports}
    ours, recipe = reports["tCURLoRA"], job.preparation.Recipe.of_metadata(results, "results.json")
    named = recipe.architecture.build().named_parameters()
    decoder = sum(p.numel() for name, p in named if name.startswith(job.methods.DECODER))
    assert ours["parameters"] - decoder == (48 + 12 + 12) * 8 * 8
    for stack in ("24x24", "48x24", "24x48"):
        assert ours["core_norm"][stack][-1] > 0
        assert all(norm > 0 for norm in ours["grad_norm"][stack])
    assert run["round_trip"]["loaded"] == run["round_trip"]["unmerged"] == 0
    check_predictions(job, tmp_path)
    for picture in ("slices.png", "curves.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    # What is listed exists, and what exists is listed, but for what the run needed itself.
    listed = set()
    for file in re.findall(rf"{tmp_path}/(\S+)", output.partition("written:")[2]):
        before, braces, after = re.fullmatch(r"([^{]*)(?:{(.*)})?(.*)", file).groups()
        listed |= {f"{before}{part}{after}" for part in (braces or "").split(",")}
    assert listed == {f.name for f in tmp_path.iterdir() if f.is_file()} - {job.training.PROBE} | {
        "target/dataset.json"
    }

    # The next run has the same base, and pretrains nothing; what is done is not trained again.
    capfd.readouterr()
    example.main(["--methods", "head", "--resume", *smoke(tmp_path)])
    output, lines = capfd.readouterr()
    assert "output layer only: done in an earlier run" in output
    (file,) = (tmp_path / "kept").glob("*.safetensors")
    assert f"pretraining: kept from an earlier run, {file}" in output
    for stage in ("pretraining ", "source volumes "):
        assert stage not in lines
    (again,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    for name in ("zero-shot", "output layer only"):
        assert again["scores"][name] == run["scores"][name]
    assert again["pretraining"] == run["pretraining"]


def check_predictions(job, folder):
    """The logits of the trained model, of its process, and of the adapter loaded and merged."""
    (weights,) = (folder / "kept").glob("*.safetensors")
    adapted = job.adapted.load_adapted(weights, folder / "tcurlora.safetensors")
    recipe, adapter = adapted.recipe, adapted.adapter
    held_out = job.datalist.read_datalist(folder / "target" / "dataset.json")["validation"]
    image = job.preparation.load_volumes(recipe, held_out[:1])[0]["image"].as_tensor()
    plain, double = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)  # modules, as `predict` takes
    plain.forward, double.forward = Plain(adapter), Plain(adapter, torch.float64)
    exact = job.evaluation.predict(recipe, double, image.double())
    trained = load_file(folder / job.training.PROBE)["logits"]
    merged = job.evaluation.predict(recipe, adapter.merge(), image)
    for logits in (trained, merged):
        assert_composition_close(
            logits, lambda: job.evaluation.predict(recipe, plain, image), exact
        )


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
def test_bad_arguments(job, capsys, arguments, message):
    with pytest.raises(SystemExit):
        job.options.parse_args(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "came"),
    [
        (["--labels", "2"], "'2'"),
        (["--labels", "2=x"], "'2=x'"),
        (["--steps", "0"], "0"),
        (["--validate-every", "-1"], "-1"),
        (["--patience", "-1"], "-1"),
        (["--spacing", "1", "nan", "1"], r"\[1.0, nan, 1.0\]"),
        (["--core-lr", "inf"], "inf"),
        (["--intensity-range", "5", "-5"], "5 -5"),
        (["--out-channels", "1"], "1"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_bad_numbers(job, capsys, arguments, came):
    argv = ["--data", __file__, "--pretrained", __file__, *arguments]
    with pytest.raises(SystemExit):
        job.options.parse_args(argv)
    message = rf"{arguments[0]}: expected .*, got {came}"
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("option", ["--check", "--new-head", "--allow-empty"])
def test_what_only_own_data_have(job, capsys, option):
    with pytest.raises(SystemExit):
        job.options.parse_args([option])
    assert f"{option} expects --data beside it" in capsys.readouterr().err


def test_targets_are_for_methods_with_cores(job, capsys):
    with pytest.raises(SystemExit):
        job.options.parse_args(["--targets", "attn.qkv", "--methods", "head"])
    assert "--targets: expected a method with cores, got head" in capsys.readouterr().err


def test_help_says_how_to_choose(job):
    advice = job.options.build_parser().format_help().partition("how to choose:")[2]
    for option in ("--check", "--methods", "--rank", "--core-lr", "--steps", "--targets"):
        assert f"\n  {option} " in advice


def test_help_has_every_default(job):
    """Every option says what it is if it is not given, unless it is a switch."""
    for action in job.options.build_parser()._actions:
        if action.nargs == 0 or action.dest in ("data", "pretrained", "entry", "norm_name"):
            continue
        assert "default" in action.help or "guessed" in action.help


def test_the_progress_counts_volumes_of_ones_own(job, example, tmp_path):
    datalist = write_dataset(tmp_path, validation=3)
    argv = ["--data", str(datalist), "--pretrained", str(datalist)]
    args = job.options.parse_args([*argv, "--methods", "head", "--steps", "10"])
    own = job.task.Task(None, datalist, job.datalist.read_datalist(datalist))
    evaluated = 2 * 3 * example.EVALUATION_SECONDS  # the base and the method
    wanted = 10 * job.methods.METHODS["head"].seconds + evaluated
    assert example.work(args, 0, own) == pytest.approx(wanted)
