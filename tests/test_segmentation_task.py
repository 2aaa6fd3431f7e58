"""The segmentation job on a user's own files, as far as `--check` goes; and its report."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

import tcur_kernels as tcur
from segmentation_files import phantom, tiny_unetr, write, write_dataset


@pytest.fixture
def check(job, tmp_path, capsys, monkeypatch):
    """Runs `--check` with more options on weights and volumes; returns what it prints."""
    import unetr_segmentation

    monkeypatch.chdir(tmp_path)
    torch.save(tiny_unetr().state_dict(), "unetr.pt")
    write_dataset(tmp_path)

    def run(*options):
        argv = ["--data", "dataset.json", "--pretrained", "unetr.pt", "--num-heads", "4", "--check"]
        unetr_segmentation.main([*argv, *options])
        return capsys.readouterr().out

    return run


def test_a_check_says_everything_and_writes_nothing(check, tmp_path):
    before = sorted(tmp_path.iterdir())
    said = check()
    for text in (
        "UNETR of window 32x32x32, 1 channels in, 2 out, feature_size 4, hidden_size 48",
        "window: taken to be a cube",
        "resampled to 1.5 x 1.25 x 2 mm (median of the training volumes; else --spacing)",
        "stack 48x48: 48 matrices of 48 x 48 share one core of 48 x 8 x 8 numbers",
        "training[1]",
        "validation[0]",
        "voxels of 1.5x1.25x2 mm, axes RAS; voxels: background",
        "it is padded",
        "All volumes of dataset.json and the weights are fit for training.",
    ):
        assert text in said, text
    assert said.count("\n") < 25
    assert sorted(tmp_path.iterdir()) == before
    assert "1-3  vit.blocks.0.attn.qkv" in check("--verbose")
    assert "resampled to 2 x 1 x 3 mm (--spacing)" in check("--spacing", "2", "1", "3")
    assert "share one core" not in check("--methods", "decoder")


def test_all_problems_are_in_one_report(check, tmp_path, capsys):
    nan, label = phantom()
    nan[0, 0, 0] = np.nan
    write(tmp_path / "training1_image.nii.gz", nan)
    write(tmp_path / "validation0_label.nii.gz", 3 * label)
    with pytest.raises(SystemExit) as refused:
        check()
    message = str(refused.value)
    assert message.startswith("--data: 2 problem(s) in dataset.json:")
    assert "training[1]: expected finite numbers in " in message
    assert "validation[0]: expected classes 0 to 1 in " in message
    assert "--labels 3=1" in message
    assert "training[0]" in capsys.readouterr().out


def test_targets_and_rank_are_checked_before_work(check):
    said = check("--targets", "attn.qkv", "--rank", "4")
    assert "36 matrices of 48 x 48 share one core of 36 x 4 x 4 numbers" in said
    assert "48x96" not in said
    for options, message in (
        (["--targets", "attn.nothing"], "--targets: expected a module that matches 'attn.nothing'"),
        (["--rank", "49"], "--rank: expected at most 48, the narrowest layer, got 49"),
        (["--volumes", "3"], "--volumes: expected at most the 2 training volumes, got 3"),
        (["--out-channels", "3"], "--out-channels: expected 2, .*--new-head .*, got 3"),
        (["--labels", "1=2"], "--labels: expected classes below 2, got 1=2"),
        (["--hidden-size", "96"], "--hidden-size: expected 48, .*, got 96"),
    ):
        with pytest.raises(SystemExit, match=message):
            check(*options)
    assert check("--volumes", "1").count("training[1]") == 0


def test_another_structure_takes_a_new_head(check, tmp_path):
    for name in ("training0", "training1", "validation0"):
        label = phantom()[1]
        label[0, 0, :3] = 4
        write(tmp_path / f"{name}_label.nii.gz", label)
    with pytest.raises(SystemExit, match=r"got 4; --labels 4=1 makes .*, --new-head starts "):
        check()
    message = r"--labels 4=2 makes them, --out-channels 5 takes them as they are.*, got 0, 1, 4 in"
    with pytest.raises(SystemExit, match=message):
        check("--new-head")
    assert "output layer: new, 3 classes" in check("--new-head", "--labels", "4=2")
    said = check("--new-head", "--out-channels", "5")
    assert "output layer: new, 5 classes" in said
    assert "note: no training volume has class 2 (2)" in said
    assert "output layer" not in check("--labels", "4=1")


def test_a_new_head_is_trained_and_read_again(job, check, tmp_path, capsys):
    """Without a row for the network before: its output layer was drawn."""
    import unetr_segmentation

    argv = ["--data", "dataset.json", "--pretrained", "unetr.pt", "--num-heads", "4", "--smoke"]
    argv += ["--new-head", "--out-channels", "3", "--methods", "head", "--output", "run"]
    unetr_segmentation.main(argv)
    said = capsys.readouterr().out
    assert "zero-shot" not in said
    assert "Scored on 1 validation volumes, which also chose the best step" in said
    assert "class 2" in said  # the table of classes
    assert "tcurlora" not in said
    adapted = job.adapted.load_adapted(tmp_path / "unetr.pt", tmp_path / "run" / "head.safetensors")
    assert adapted.recipe.new_head
    assert adapted.model.out.conv.conv.weight.shape[0] == 3
    # It is there and complete: it is not replaced by accident, and --resume trains nothing.
    with pytest.raises(
        SystemExit, match=r"--output: expected .* --overwrite .*, got run/head\.saf"
    ):
        unetr_segmentation.main(argv)
    unetr_segmentation.main([*argv, "--resume"])
    assert "output layer only: done in an earlier run" in capsys.readouterr().out


def test_outputs_that_cannot_be_written(check, tmp_path, capsys):
    import unetr_segmentation

    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        check("--output", "file")
    assert "--output: expected a folder, got file" in capsys.readouterr().err
    argv = ["--data", "dataset.json", "--pretrained", "unetr.pt", "--num-heads", "4"]
    with pytest.raises(SystemExit, match=r"files: expected to be read and written, got .*file"):
        unetr_segmentation.main([*argv, "--output", "file/run"])


def test_the_table_of_several_seeds(job):
    """Means and deviations, per class, with what is undefined left out and counted."""
    nan = float("nan")

    def run(seed, dice, hd95):
        by_class = {"dice": [[dice, 0.5], [nan, 0.25]], "hd95": [[hd95, 3.0], [nan, nan]]}
        scores = {"dice": [dice, 0.25], "hd95": [hd95, nan], "by_class": by_class}
        nothing = {"dice": [0.0, 0.0], "hd95": [nan, nan], "by_class": by_class}
        report = vars(job.training.Report(10, 0.5, 100.0, 4, [1.0], {4: 0.5}))
        norms = {"core_norm": {"8x8": [0.1, 0.2]}, "grad_norm": {"8x8": [3.0, 4.0]}}
        return {
            "seed": seed,
            "scores": {"zero-shot": nothing, "tCURLoRA": scores},
            "reports": {"tCURLoRA": {**report, **norms}},
            "scored": "test",
            "volumes": 2,
        }

    recipe = job.preparation.Recipe(
        job.unetr.Architecture(1, 3, (32, 32, 32), 4, 48, 96, 4),
        (1.0, 1.0, 2.5),
        names={1: "liver"},
    )
    text = job.report.table([run(0, 0.75, 10.0), run(1, 0.25, 20.0)], recipe)
    for expected in (
        "tCURLoRA 0.375 ± 0.177 15.0 ± 7.1 10 0.50 ± 0.00 100 ± 0 4 4",
        "zero-shot 0.000 ± 0.000 - 0 - - -",
        "tCURLoRA: no HD95 in 2 of 4 volumes",
        "liver tCURLoRA 0.500 15.0 2",
        "class 2 tCURLoRA 0.375 3.0 4",
        "Scored on 2 test volumes a seed, by which nothing was chosen.",
        "resampled to 1 x 1 x 2.5 mm",
        "seed 1, tCURLoRA, 8x8: ||U|| 0 -> 0.2, ||dL/dU|| 3 -> 4",
        "||U||: the Frobenius norm of the core",
    ):
        assert expected in " ".join(text.split()), (expected, text)


def test_scores_are_defined_as_the_table_says(job, monkeypatch):
    """Dice and HD95 by hand, on two classes: one that is missed, one that is not there."""
    truth = torch.zeros(1, 8, 8, 8)
    truth[0, 2:4, 2:4, 2:4] = 1
    found = torch.zeros_like(truth)
    found[0, 2:4, 2:4, 3:5] = 1  # half of it, one voxel of 2.5 mm too far
    found[0, 7, 7, 7] = 2  # a class that this volume does not have
    recipe = job.preparation.Recipe(
        job.unetr.Architecture(1, 4, (32, 32, 32), 4, 48, 96, 4), (1.0, 1.0, 2.5)
    )
    logits = torch.stack([(found == c).float() for c in range(4)], 1)
    monkeypatch.setattr(job.evaluation, "predict", lambda *_: logits)
    volume = {"image": truth, "label": MetaTensor(truth), "entry": {"image": "x"}}
    scores = job.evaluation.evaluate(recipe, None, [volume], list(job.evaluation.MEASURES))
    assert scores["dice"] == [0.5]
    assert scores["hd95"] == [2.5]
    for name, first in {"iou": 4 / 12, "sensitivity": 4 / 8, "specificity": 500 / 504}.items():
        assert scores["by_class"][name][0][0] == pytest.approx(first, rel=1e-6)
    assert scores["by_class"]["specificity"][0][1] == pytest.approx(511 / 512, rel=1e-6)
    assert np.isnan(scores["by_class"]["sensitivity"][0][1:]).all()
    assert scores["sensitivity"] == [0.5]
    (dice,), (hd95,) = scores["by_class"]["dice"], scores["by_class"]["hd95"]
    assert (dice[0], hd95[0]) == (0.5, 2.5)
    assert np.isnan([*dice[1:], *hd95[1:]]).all()
    # Nothing found where there is something: Dice 0, and no distance.
    logits = torch.stack([torch.ones(1, 8, 8, 8), *[torch.zeros(1, 8, 8, 8)] * 3], 1)
    scores = job.evaluation.evaluate(recipe, None, [volume])
    assert scores["dice"] == [0.0]
    assert np.isnan(scores["hd95"]).all()


def test_a_network_that_computes_nan_is_not_reported(job, check, monkeypatch, tmp_path):
    """Nor one whose adapter computes something else once it is loaded."""
    import unetr_segmentation

    argv = ["--data", "dataset.json", "--pretrained", "unetr.pt", "--num-heads", "4", "--smoke"]

    def nan(*_):
        raise job.evaluation.NotFiniteError("the prediction of x")

    with monkeypatch.context() as patch:
        patch.setattr(unetr_segmentation, "run_seed", nan)
        with pytest.raises(SystemExit, match="got NaN or Inf in the prediction of x"):
            unetr_segmentation.main([*argv, "--output", "run"])
    assert not (tmp_path / "run" / "results.json").exists()

    model = tiny_unetr()
    adapter = tcur.adapt(model, rank=2)
    sizes = job.unetr.Architecture(1, 2, (32, 32, 32), 4, 48, 96, 4)
    recipe = job.preparation.Recipe(sizes, (1.0, 1.0, 1.0))
    image = torch.rand(1, 32, 32, 32)
    logits = job.evaluation.predict(recipe, model, image)
    found = unetr_segmentation.round_trip(recipe, adapter, image, logits)
    assert found == {"loaded": 0, "merged": 0, "unmerged": 0}
    with pytest.raises(RuntimeError, match="the loaded adapter predicts something else"):
        unetr_segmentation.round_trip(recipe, adapter, image, logits + 1)
