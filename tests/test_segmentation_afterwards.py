"""What comes after a training: label maps of new volumes, plain checkpoints, and MONAI bundles."""

import json
import subprocess
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.nets import UNETR
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from plain import Plain
from segmentation_files import phantom, reoriented, tiny_unetr, write, write_pair
from tolerance import assert_composition_close


@pytest.fixture
def scripts(job):
    """The two scripts as modules."""
    import export
    import predict

    return predict, export


@pytest.fixture
def trained(job, tmp_path):
    """Makes base and file of a network whose parts were all moved, as training moves them."""

    def make(method="tcurlora", **changes):
        base, file = tmp_path / "unetr.pt", tmp_path / f"{method}.safetensors"
        model = tiny_unetr(**changes)
        torch.save({"state_dict": model.state_dict()}, base)
        heads = {"num_heads": 4, "norm_name": changes.get("norm_name")}
        checkpoint = job.checkpoints.read_checkpoint(base)
        architecture, _ = job.unetr.read_architecture(checkpoint, heads)
        names = {1: "lesion"}
        recipe = job.preparation.Recipe(architecture, (1.5, 1.25, 2.0), names=names)
        settings = job.options.training_settings(job.options.parse_args(["--smoke"]))
        trainee = job.methods.Trainee(model, job.methods.METHODS[method], settings, recipe)
        torch.manual_seed(1)
        with torch.no_grad():
            for group in trainee.groups:
                for parameter in group["params"]:
                    parameter += 0.2 * torch.randn_like(parameter)
        trainee.save(file)
        return base, file, trainee

    return make


def options(base, file, *others):
    return ["--pretrained", str(base), "--adapter", str(file), *map(str, others)]


@pytest.mark.parametrize("method", ["tcurlora", "core", "decoder", "full"])
def test_label_maps_lie_on_the_grids_of_the_images(scripts, job, trained, method, tmp_path, capsys):
    """Small, large, turned, oblique, 4D and scaled ones; and each is the prediction in training."""
    predict, _ = scripts
    base, file, trainee = trained(method)
    folder = tmp_path / "images"
    image, _ = phantom((30, 36, 40))
    oblique = nib.affines.from_matvec(
        nib.eulerangles.euler2mat(0.3, 0.1, 0.2) @ np.diag([1.0, 2.0, 1.5]), [4, -9, 30]
    )
    plain = write(folder / "plain.nii.gz", image)
    write(folder / "small.nii", phantom((9, 20, 7))[0])
    write(folder / "oblique.nii.gz", image, oblique)
    write(folder / "channel.nii.gz", image[..., None])
    write(folder / "integers.nii.gz", (100 * image).astype(np.int16), np.diag([3, 0.5, 2, 1]))
    reoriented(plain, "LPI", folder / "turned.nii.gz")
    found = tmp_path / "found"
    predict.main(options(base, file, "--images", folder, "--output", found, "--device", "cpu"))
    output = capsys.readouterr().out
    assert "values: 0 background, 1 lesion" in output
    assert len(list(found.iterdir())) == 6
    for source in folder.iterdir():
        one, original = nib.load(found / predict.name_of({"image": source})), nib.load(source)
        assert one.shape == original.shape[:3]
        assert np.array_equal(one.affine, original.affine)
        assert one.get_data_dtype() == np.uint8
        assert one.header["sform_code"] == original.header["sform_code"]
        milliliters = np.prod(nib.affines.voxel_sizes(original.affine)) / 1000
        volume = milliliters * np.count_nonzero(one.dataobj)
        assert f"{found / predict.name_of({'image': source})}: lesion {volume:.1f} ml" in output

    def map_of(name):
        return np.asanyarray(nib.load(found / name).dataobj)

    # On the grid of the training nothing is resampled: the map is the prediction itself.
    volume = job.preparation.load_volumes(trainee.recipe, [{"image": str(plain)}])[0]["image"]
    logits = job.evaluation.predict(trainee.recipe, trainee.model, volume)[0]
    padded = [w - s for w, s in zip(logits.shape[1:], image.shape, strict=True)]
    inside = [slice(p // 2, p // 2 + s) for p, s in zip(padded, image.shape, strict=True)]
    assert np.array_equal(map_of("plain.nii.gz"), logits.argmax(0).numpy()[tuple(inside)])
    assert 0 < map_of("plain.nii.gz").mean() < 1
    assert np.array_equal(map_of("channel.nii.gz"), map_of("plain.nii.gz"))
    # A volume that is stored the other way round is segmented alike.
    back = reoriented(found / "turned.nii.gz", "RAS", tmp_path / "back.nii.gz")
    assert np.array_equal(np.asanyarray(nib.load(back).dataobj), map_of("plain.nii.gz"))


def test_images_may_come_from_a_datalist(scripts, trained, tmp_path, capsys):
    predict, _ = scripts
    base, file, _ = trained(in_channels=2)
    parts = [str(write(tmp_path / f"{c}.nii.gz", phantom(seed=c)[0])) for c in range(2)]
    both = np.stack([phantom(seed=c)[0] for c in range(2)], -1)
    write(tmp_path / "both.nii.gz", both)
    datalist = tmp_path / "dataset.json"
    datalist.write_text(json.dumps({"test": [{"image": parts}, "both.nii.gz"]}))
    found = tmp_path / "found"
    predict.main(options(base, file, "--images", datalist, "--output", found))
    one, other = (np.asanyarray(nib.load(found / n).dataobj) for n in ("0.nii.gz", "both.nii.gz"))
    assert np.array_equal(one, other)
    for content, came in (({}, "None"), ({"test": []}, r"\[\]"), ({"test": [3]}, "3")):
        datalist.write_text(json.dumps(content))
        with pytest.raises(SystemExit, match=f"--images: expected .*, got {came}"):
            predict.main(options(base, file, "--images", datalist, "--output", found))


def test_what_predict_refuses(scripts, trained, tmp_path):
    predict, _ = scripts
    base, file, _ = trained()
    good = write_pair(tmp_path, "good")["image"]
    nan = phantom()[0]
    nan[3, 4, 5] = np.nan
    bad, empty = write(tmp_path / "nan.nii.gz", nan), tmp_path / "empty"
    empty.mkdir()
    found = tmp_path / "found"

    def refuses(message, *arguments, given=(base, file)):
        with pytest.raises(SystemExit, match=message):
            predict.main(options(*given, *arguments))

    images = ["--images", good, bad, tmp_path / "none.nii.gz", "--output", found]
    refuses(r"--images: 2 problem\(s\) in .*:\s+images\[1\]: .*nan\.nii\.gz.*NaN", *images)
    assert not found.exists()
    refuses("--images: expected a folder with", "--images", empty, "--output", found)
    refuses("--output: expected another folder", "--images", good, "--output", tmp_path)
    twice = ["--images", good, write_pair(tmp_path / "b", "good")["image"], "--output", found]
    refuses("--images: expected different names", *twice)
    torch.save(tiny_unetr(1).state_dict(), base)
    refuses("--adapter: expected .* to fit", "--images", good, "--output", found)
    text = tmp_path / "x.safetensors"
    text.write_text("no adapter")
    refuses("--adapter: expected a whole", "--images", good, "--output", found, given=(base, text))
    gone = tmp_path / "gone.safetensors"
    refuses("--adapter: expected a file", "--images", good, "--output", found, given=(base, gone))


def test_a_network_that_computes_nan_segments_nothing(scripts, trained, monkeypatch, tmp_path):
    predict, _ = scripts
    base, file, _ = trained("head")
    image = write_pair(tmp_path, "good")["image"]
    nan = torch.full((1, 2, 32, 32, 32), float("nan"))
    monkeypatch.setattr(predict, "predict", lambda *_: nan)
    with pytest.raises(SystemExit, match=r"got NaN or Inf in the prediction of .*good_image"):
        predict.main(options(base, file, "--images", image, "--output", tmp_path / "found"))
    assert not (tmp_path / "found").exists()


def test_entries_that_the_network_lacks(job, trained, tmp_path):
    _, file, _ = trained("head")
    foreign = {**load_file(file), "neck.weight": torch.zeros(2)}
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(foreign, file, metadata=metadata)
    with pytest.raises(SystemExit, match=r"--adapter: .* \(entries that the network lacks: neck"):
        job.methods.load_trained(tiny_unetr(), file)


def test_files_of_others_are_no_adapters(job, trained, tmp_path):
    """An adapter that another program saved, and one of a future version of this."""
    _, _, trainee = trained()
    for metadata, message in (
        ({}, "--adapter: expected a file that .*, without a recipe"),
        ({"segmentation": {"version": 7}}, "--adapter: expected .* version 1, got .* version 7"),
    ):
        trainee.adapter.metadata = metadata
        trainee.adapter.save(tmp_path / "other.safetensors")
        with pytest.raises(SystemExit, match=message):
            job.methods.read_recipe(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("tcurlora", {"qkv_bias": True}),
        ("core", {"norm_name": "batch", "proj_type": "perceptron"}),
        ("decoder", {"in_channels": 2, "out_channels": 3}),
    ],
)
def test_exports_are_plain_and_compute_the_same(
    scripts, job, trained, method, changes, tmp_path, capsys
):
    """The command that is printed builds the network that loads the checkpoint."""
    _, export = scripts
    base, file, trainee = trained(method, **changes)
    weights, bundle = tmp_path / "plain.pt", tmp_path / "bundle"
    export.main(options(base, file, "--checkpoint", weights, "--bundle", bundle))
    build, load = [line.strip() for line in capsys.readouterr().out.splitlines()[1:3]]
    scope = {"torch": torch, "monai": __import__("monai")}
    exec(f"{build}\n{load}", scope)
    plain = scope["model"].eval()
    assert type(plain) is UNETR
    expected = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(tensor, expected[n]) for n, tensor in plain.state_dict().items())
    model, x = trainee.model.eval(), torch.rand(1, changes.get("in_channels", 1), 32, 32, 32)
    with torch.no_grad():
        if trainee.adapter is None:
            assert torch.equal(plain(x), model(x))
        else:
            slow, exact = Plain(trainee.adapter), Plain(trainee.adapter, torch.float64)
            assert_composition_close(plain(x), lambda: slow(x), exact(x.double()))
    # What was exported is a checkpoint for the next training.
    flags = {"num_heads": 4, "norm_name": changes.get("norm_name")}
    again, _ = job.unetr.read_architecture(job.checkpoints.read_checkpoint(weights), flags)
    assert again == trainee.recipe.architecture


def test_what_export_refuses(scripts, trained, tmp_path, capsys):
    _, export = scripts
    base, file, _ = trained()
    there = tmp_path / "there"
    there.mkdir()
    for name in ("--checkpoint", "--bundle"):
        with pytest.raises(SystemExit, match=f"{name}: expected a path that is free, got "):
            export.main(options(base, file, name, there))
    with pytest.raises(SystemExit):
        export.main(options(base, file))
    assert "--checkpoint, --bundle: expected at least one" in capsys.readouterr().err


def test_a_merged_network_that_computes_something_else_is_not_written(
    scripts, trained, monkeypatch, tmp_path
):
    _, export = scripts
    base, file, _ = trained()
    monkeypatch.setattr(export.Adapted, "merged", lambda self: tiny_unetr(3))
    with pytest.raises(RuntimeError, match="the merged network computes something else"):
        export.main(options(base, file, "--checkpoint", tmp_path / "x.pt"))
    assert not (tmp_path / "x.pt").exists()


def test_a_bundle_finds_what_predict_finds(scripts, job, trained, tmp_path):
    """By `monai.bundle`, in a process of its own, with other orientations and spacings.

    The other way to scale intensities is that of tests/test_segmentation_walk.py.
    """
    predict, export = scripts
    base, file, trainee = trained()
    trainee.adapter.metadata = replace(trainee.recipe, intensity_range=(-1.0, 4.0)).as_metadata()
    trainee.save(file)
    folder, bundle = tmp_path / "images", tmp_path / "bundle"
    image, _ = phantom((30, 36, 40))
    reoriented(write(folder / "a.nii.gz", image), "PIR", folder / "b.nii.gz")
    write(folder / "c.nii.gz", image, np.diag([2.2, 1.0, 1.1, 1]))
    export.main(options(base, file, "--bundle", bundle))
    predict.main(options(base, file, "--images", folder, "--output", tmp_path / "ours"))
    command = [sys.executable, "-m", "monai.bundle", "run"]
    command += ["--config_file", str(bundle / "configs" / "inference.json")]
    command += ["--bundle_root", str(bundle), "--dataset_dir", str(folder)]
    command += ["--output_dir", str(tmp_path / "monai")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz"):
        ours, others = (nib.load(tmp_path / who / name) for who in ("ours", "monai"))
        assert np.array_equal(np.asanyarray(ours.dataobj), np.asanyarray(others.dataobj))
        assert np.array_equal(ours.affine, others.affine)
    # The bundle can be trained further.
    checkpoint = job.checkpoints.read_checkpoint(bundle)
    architecture, _ = job.unetr.read_architecture(checkpoint, {})
    assert architecture == trainee.recipe.architecture
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"]["1"] == "lesion"
