"""Datalists, and the recipe by which volumes are prepared in training and afterwards alike."""

import json

import numpy as np
import pytest
import torch

from segmentation_files import (
    phantom,
    prepared,
    recipe_of,
    write,
    write_datalist,
    write_pair,
)
from tolerance import same_mathematics

PAIR = {"image": "a.nii.gz", "label": "b.nii.gz"}


def refusal(function, *arguments):
    with pytest.raises(SystemExit) as refused:
        function(*arguments)
    message = str(refused.value)
    assert message.startswith("--data: ")
    assert "expected" in message
    assert ", got " in message
    return message


def test_paths_are_relative_to_the_datalist(job, tmp_path):
    several = {"image": ["imagesTr/a.nii.gz", "/other/b.nii.gz"], "label": "./c.nii.gz", "fold": 0}
    file = write_datalist(tmp_path, training=[PAIR, several], validation=[PAIR])
    # As an editor of Windows writes it.
    file.write_text(file.read_text(), encoding="utf-8-sig")
    pair = {"image": f"{tmp_path}/a.nii.gz", "label": f"{tmp_path}/b.nii.gz"}
    images = [f"{tmp_path}/imagesTr/a.nii.gz", "/other/b.nii.gz"]
    assert job.datalist.read_datalist(file) == {
        "training": [pair, {"image": images, "label": f"{tmp_path}/c.nii.gz"}],
        "validation": [pair],
    }


@pytest.mark.parametrize("test", [["a.nii.gz"], [{"image": "a.nii.gz"}], None])
def test_a_test_section_without_labels(job, tmp_path, test):
    """The Decathlon and nnU-Net have one; it cannot be scored."""
    sections = {} if test is None else {"test": test}
    file = write_datalist(tmp_path, training=[PAIR], validation=[PAIR], **sections)
    assert set(job.datalist.read_datalist(file)) == {"training", "validation"}
    file = write_datalist(tmp_path, training=[PAIR], validation=[PAIR], test=[PAIR])
    assert set(job.datalist.read_datalist(file)) == {"training", "validation", "test"}


def test_everything_wrong_with_a_datalist_in_one_report(job, tmp_path):
    training = [
        PAIR,
        "a.nii.gz",
        {"image": "a.nii.gz"},
        {"label": "a.nii.gz"},
        {"image": [], "label": "b.nii.gz"},
        {"image": ["a", 3], "label": "b"},
        {"image": "a", "label": ["b"]},
        {"image": "", "label": "b"},
        {"image": "same.nii.gz", "label": "same.nii.gz"},
    ]
    file = write_datalist(tmp_path, training=training, test=["a.nii.gz", PAIR])
    wanted = 'expected {"image": file, "label": file}, got'
    assert refusal(job.datalist.read_datalist, file).splitlines() == [
        f"--data: 10 problem(s) in {file}:",
        f"  training[1]: {wanted} 'a.nii.gz'",
        f"  training[2]: {wanted} None for 'label'",
        f"  training[3]: {wanted} None for 'image'",
        f"  training[4]: {wanted} [] for 'image'",
        f"  training[5]: {wanted} ['a', 3] for 'image'",
        f"  training[6]: {wanted} ['b'] for 'label'",
        f"  training[7]: {wanted} '' for 'image'",
        f"  training[8]: {wanted} same.nii.gz for both",
        "  expected a list of volumes under 'validation' (some of the training volumes), got none",
        f"  test[0]: {wanted} 'a.nii.gz'",
    ]
    for entries, came in (([], "[]"), ({"a": 1}, "{'a': 1}"), (3, "3")):
        file = write_datalist(tmp_path, training=entries, validation=[PAIR])
        message = f"  expected a list of volumes under 'training', got {came}"
        assert refusal(job.datalist.read_datalist, file).endswith(message)


@pytest.mark.parametrize("text", ["", "no JSON", '{"training": [}', b"\xff\xfe\x00", "[" * 10**5])
def test_files_that_are_no_datalist(job, tmp_path, text):
    file = tmp_path / "dataset.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(job.datalist.read_datalist, file)
    assert message.startswith(f"--data: expected a datalist in JSON, got {file} (")


def test_json_that_is_no_datalist(job, tmp_path):
    file = tmp_path / "dataset.json"
    file.write_text("[1, 2]")
    message = refusal(job.datalist.read_datalist, file)
    assert message == f"--data: expected a datalist with sections, got a list in {file}"
    assert refusal(job.datalist.read_datalist, tmp_path).startswith("--data: expected a datalist")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({"0": "background", "1": "liver"}, {0: "background", 1: "liver"}),
        ({"background": 0, "liver": 1}, {0: "background", 1: "liver"}),
        ({"background": 0, "whole tumour": [1, 2], "core": "3"}, {0: "background", 3: "core"}),
        (["background", "liver"], {}),
        ({"²": "two"}, {}),
        (None, {}),
    ],
)
def test_names_of_classes(job, tmp_path, labels, names):
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps({"labels": labels}))
    assert job.datalist.class_names(file) == names


def test_a_recipe_travels_in_metadata(job):
    changes = {
        "entry": "state_dict/module.",
        "new_head": True,
        "intensity_range": (-175.0, 250.0),
        "labels": {255: 1},
        "names": {1: "liver"},
        "overlap": 0.5,
    }
    for recipe in (recipe_of(job), recipe_of(job, **changes)):
        metadata = json.loads(json.dumps(recipe.as_metadata()))
        assert job.preparation.Recipe.of_metadata(metadata, "file") == recipe
    assert (recipe.name_of(1), recipe.name_of(2)) == ("liver", "class 2")
    for metadata, came in (({}, "without a recipe"), ({"version": 9}, "with one of version 9")):
        wrapped = {job.preparation.KEY: metadata}
        with pytest.raises(SystemExit, match=f"^--adapter: expected a file that .* file, {came}$"):
            job.preparation.Recipe.of_metadata(wrapped, "file")


def test_what_the_preparation_makes(job, tmp_path):
    image, label = phantom()
    entry = write_pair(tmp_path)
    volume = prepared(job, entry, spacing=(3, 2.5, 4))
    assert volume["image"].shape == volume["label"].shape == (1, 32, 32, 32)
    assert volume["image"].pixdim.tolist() == [3, 2.5, 4]
    assert volume["label"].unique().tolist() == [0, 1]
    volume = prepared(job, entry)
    inner = tuple(slice((32 - side) // 2, (32 - side) // 2 + side) for side in image.shape)
    np.testing.assert_array_equal(volume["label"][0][inner], label)
    expected = (image - image.mean()) / image.std()
    assert same_mathematics(volume["image"][0][inner].as_tensor(), torch.from_numpy(expected))
    volume = prepared(job, entry, intensity_range=(-1.0, 3.0))
    expected = np.clip((image + 1) / 4, 0, 1)
    assert same_mathematics(volume["image"][0][inner].as_tensor(), torch.from_numpy(expected))


def test_training_sees_windows_of_image_and_label_alike(job, tmp_path):
    recipe = recipe_of(job)
    (volume,) = job.preparation.load_volumes(recipe, [write_pair(tmp_path, shape=(40, 36, 33))])
    assert set(volume) == {"image", "label", "entry"}
    volume["image"] = volume["label"].clone()
    augment = job.preparation.augmentation(recipe, (0, 1, 2)).set_random_state(0)
    for _ in range(3):
        window = augment(volume)
        assert window["image"].shape == window["label"].shape == (1, 32, 32, 32)
        assert window["label"].unique().tolist() == [0, 1]
        inside = window["image"][window["label"] == 1].mean()
        assert inside > window["image"][window["label"] == 0].mean() + 0.5


def test_a_volume_that_broke_since_it_was_checked(job, tmp_path):
    entry = write_pair(tmp_path)
    write(tmp_path / "a_image.nii.gz", phantom()[0][:, :, :, None, None, None])
    with pytest.raises(SystemExit) as refused:
        job.preparation.load_volumes(recipe_of(job), [{"image": entry["image"]}])
    assert str(refused.value).startswith(
        f"--data: expected a volume that can be read at {entry['image']}, got an error ("
    )
    (tmp_path / "a_image.nii.gz").write_text("text")
    with pytest.raises(SystemExit, match="--data: expected a volume that can be read at"):
        job.preparation.load_volumes(recipe_of(job), [entry])
    assert torch.is_tensor(prepared(job, {"image": entry["label"]})["image"])
