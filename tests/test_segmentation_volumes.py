"""The segmentation job looks at every volume before it trains, and prepares right ones alike."""

import itertools
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from segmentation_files import (
    OBLIQUE,
    SPACING,
    assert_prepared_alike,
    check,
    phantom,
    prepared,
    problem,
    recipe_of,
    reoriented,
    with_one,
    write,
    write_dataset,
    write_pair,
)


def test_a_good_dataset(job, tmp_path):
    file = write_dataset(tmp_path, 2, 1, 1)
    sections = job.datalist.read_datalist(file)
    assert {section: len(entries) for section, entries in sections.items()} == {
        "training": 2,
        "validation": 1,
        "test": 1,
    }
    watched = []

    def watch(volumes):
        for volume in volumes:
            watched.append(volume[:2])
            yield volume

    recipe = recipe_of(job, names=job.datalist.class_names(file))
    found = job.volumes.check_volumes(recipe, sections, watch=watch)
    assert watched == [("training", 0), ("training", 1), ("validation", 0), ("test", 0)]
    assert not found.problems
    assert found.rows[0] == (
        "training[0]     training0_image.nii.gz: 20x22x18 voxels of 1.5x1.25x2 mm, axes RAS; "
        "voxels: background 7,770, box 150"
    )
    assert found.notes[0] == (
        "training[0]: training0_image.nii.gz has 20x22x18 voxels at the spacing of the training, "
        "less than the window 32x32x32; it is padded"
    )
    assert len(found.rows) == len(found.notes) == 4
    images = {section: [{"image": e["image"]} for e in es] for section, es in sections.items()}
    found = job.volumes.check_volumes(recipe, images)
    assert not found.problems
    assert found.rows[3].endswith("axes RAS")


def test_what_is_as_large_as_the_window_is_not_padded(job, tmp_path):
    entry = write_pair(tmp_path, shape=(32, 33, 40))
    found = check(job, entry)
    assert found.notes == found.problems == []
    assert prepared(job, entry)["image"].shape == (1, 32, 33, 40)


@pytest.mark.parametrize("affine", [None, OBLIQUE], ids=["straight", "oblique"])
def test_any_orientation_of_a_label_on_the_same_grid(job, tmp_path, affine):
    entry = write_pair(tmp_path, affine=affine)
    triples = itertools.product("RLAPIS", repeat=3)
    codes = [axes for axes in triples if len({"RLAPIS".index(c) // 2 for c in axes}) == 3]
    assert len(codes) == 48
    for number, axes in enumerate(codes):
        turned = {**entry, "label": reoriented(entry["label"], axes, tmp_path / "turned.nii.gz")}
        if number % 6 == 0:
            assert not check(job, turned).problems
        assert_prepared_alike(job, entry, turned, spacing=(1.7, 1.1, 2.3))


@pytest.mark.parametrize("axes", ["LPS", "PIR", "SLA"])
def test_any_orientation_of_both(job, tmp_path, axes):
    entry = write_pair(tmp_path)
    turned = {k: reoriented(f, axes, tmp_path / f"{k}.nii.gz") for k, f in entry.items()}
    found = check(job, turned)
    assert not found.problems
    assert f"axes {axes}" in found.rows[0]
    assert_prepared_alike(job, entry, turned)


def test_headers_that_are_rounded(job, tmp_path):
    """Sides are rounded at the new spacing; image and label must be rounded alike."""
    entry = write_pair(tmp_path)
    for size in (1 - 1e-6, 1 + 1e-6):
        affine = nib.load(entry["image"]).affine * [[size], [size], [size], [1]]
        label = write(tmp_path / "rounded.nii.gz", phantom()[1], affine)
        rounded = {**entry, "label": str(label)}
        assert not check(job, rounded).problems
        for spacing in ((1.5 * 19 / 18.5, 1.25 * 21 / 20.5, 2 * 17 / 16.5), (1.7, 1.1, 2.3)):
            assert_prepared_alike(job, entry, rounded, spacing=spacing)


def with_forms(source, target, sform, qform_code):
    """Writes a file again with voxel sizes of its qform, and another sform."""
    nifti = nib.load(source)
    nifti.set_qform(np.diag([*SPACING, 1.0]), 1)
    nifti.set_sform(np.diag([*sform, 1.0]), 1)
    nifti.header["pixdim"][1:4] = SPACING
    nifti.header["qform_code"] = qform_code
    nib.save(nib.Nifti1Image(nifti.dataobj, None, nifti.header), target)
    return str(target)


@pytest.mark.parametrize("qform_code", [0, 1])
def test_headers_that_contradict_themselves(job, tmp_path, qform_code):
    """MONAI takes the qform of a file whose sform has other voxel sizes than its pixdim."""
    entry = write_pair(tmp_path)
    target = tmp_path / "forms.nii"
    rounded = with_forms(entry["label"], target, (1.5001, 1.25, 2.0), qform_code)
    assert not check(job, {**entry, "label": rounded}).problems
    assert_prepared_alike(job, entry, {**entry, "label": rounded})
    other = with_forms(entry["image"], target, (-1.51, 1.25, 2.0), qform_code)
    grids = "20x22x18 voxels of 1.51x1.25x2 mm, axes LAS in its sform, and 20x22x18 voxels of 1.5x"
    text = problem(job, {**entry, "image": other})
    assert text.startswith(f"expected a header of {other} that tells one grid, got {grids}")
    nifti = nib.load(other)
    mended = tmp_path / "mended.nii"
    nib.save(nib.Nifti1Image(nifti.dataobj, nifti.affine), mended)
    assert not check(job, {"image": str(mended)}).problems


def test_values_that_are_classes(job, tmp_path):
    """Scaled integers, as float, and values that --labels makes classes."""
    label = phantom()[1]
    entry = write_pair(tmp_path)
    scaled = write(tmp_path / "scaled.nii.gz", label * np.float32(0.9999))
    assert not check(job, {**entry, "label": str(scaled)}).problems
    assert_prepared_alike(job, entry, {**entry, "label": str(scaled)})
    mask = write(tmp_path / "mask.nii.gz", label * np.uint8(255))
    mapped = {**entry, "label": str(mask)}
    assert not check(job, mapped, labels={255: 1}).problems
    assert_prepared_alike(job, entry, mapped, labels={255: 1})
    # Exchanged at once, not one after the other.
    swapped = write(tmp_path / "swapped.nii.gz", np.where(label == 1, 0, 1).astype(np.int16))
    mapped = {**entry, "label": str(swapped)}
    assert "background 7,770" not in check(job, mapped).rows[0]
    changes = {"labels": {0: 1, 1: 0}, "names": {0: "background"}}
    assert "background 7,770" in check(job, mapped, **changes).rows[0]
    label = prepared(job, mapped, labels={0: 1, 1: 0})["label"]
    assert torch.equal(label, prepared(job, entry)["label"])


@pytest.mark.parametrize("shape", [(5, 4, 3), (20, 20, 1), (1, 1, 2)])
def test_tiny_volumes_are_padded(job, tmp_path, shape):
    entry = write_pair(tmp_path, shape=shape)
    found = check(job, entry)
    assert not found.problems
    text = f"has {'x'.join(map(str, shape))} voxels at the spacing of the training, less than"
    assert text in found.notes[0]
    assert prepared(job, entry)["image"].shape == (1, 32, 32, 32)


def test_channels_in_one_file_or_in_several(job, tmp_path):
    images = [phantom(seed=seed)[0] for seed in range(3)]
    entry = write_pair(tmp_path)
    together = {**entry, "image": str(write(tmp_path / "4d.nii.gz", np.stack(images, 3)))}
    files = [str(write(tmp_path / f"{i}.nii.gz", image)) for i, image in enumerate(images)]
    files[1] = reoriented(files[1], "PIL", tmp_path / "turned.nii.gz")
    affine = nib.load(files[2]).affine
    affine[0, 1] = 1e-6  # rounding, for which MONAI alone would refuse the file
    write(Path(files[2]), images[2], affine)
    apart = {**entry, "image": files}
    for one in (together, apart):
        assert not check(job, one, channels=3).problems
    assert_prepared_alike(job, together, apart, channels=3)
    assert prepared(job, apart)["image"].meta["filename_or_obj"] == files[0]
    # One channel as 4D, and a list of one file.
    single = {**entry, "image": str(write(tmp_path / "1.nii.gz", phantom()[0][..., None]))}
    assert not check(job, single).problems
    assert_prepared_alike(job, entry, single)
    assert_prepared_alike(job, entry, {**entry, "image": [entry["image"]]})


def test_the_spacing_needs_headers_alone(job, tmp_path):
    sizes = [(1.0, 2.0, 3.0), (1.5, 1.0, 5.0), (0.00012346, 9.0, 4.0)]
    entries = []
    for number, size in enumerate(sizes):
        file = write(tmp_path / f"{number}.nii", phantom()[0], np.diag([*size, 1.0]))
        with file.open("r+b") as opened:
            opened.truncate(352)
        entries.append({"image": [str(file)]})
    entries.append({"image": str(tmp_path / "none.nii")})
    assert job.volumes.median_spacing(entries) == (1.0, 2.0, 4.0)
    assert job.volumes.median_spacing(entries[2:]) == (0.0001235, 9.0, 4.0)
    assert job.volumes.median_spacing(entries[3:]) == (1.0, 1.0, 1.0)


def test_what_is_worth_a_note(job, tmp_path):
    first, second = write_pair(tmp_path, "a"), write_pair(tmp_path, "b")
    os.symlink(first["image"], tmp_path / "link.nii.gz")
    linked = {"image": str(tmp_path / "link.nii.gz"), "label": first["label"]}
    sections = {"training": [first, second], "validation": [linked], "test": [{**second}]}
    found = job.volumes.check_volumes(recipe_of(job, classes=4), sections)
    assert not found.problems
    notes = [note for note in found.notes if "padded" not in note]
    assert notes == [
        "validation[0]: link.nii.gz and a_label.nii.gz already in training[0]",
        "test[0]: b_image.nii.gz and b_label.nii.gz already in training[1]",
        "no training volume has class 2 (2)",
        "no training volume has class 3 (3)",
    ]
    for key in first:
        nifti = nib.load(first[key])
        nifti.set_sform(None)
        nifti.set_qform(None)
        nib.save(nib.Nifti1Image(np.asarray(nifti.dataobj), None, nifti.header), first[key])
    (note, _) = check(job, first).notes
    assert note == (
        "training[0]: a_image.nii.gz does not say how its axes lie in the patient (sform_code and "
        "qform_code are 0); they are taken to be LAS"
    )


def test_one_report_for_the_whole_datalist(job, tmp_path):
    good = write_pair(tmp_path, "good")
    both = {
        "image": str(write(tmp_path / "a.nii.gz", with_one(np.nan)(phantom()[0]))),
        "label": str(write(tmp_path / "b.nii.gz", 3 * phantom()[1])),
    }
    sections = {
        "training": [good, {**good, "image": str(tmp_path / "no.nii.gz")}, both],
        "validation": [both, good],
    }
    found = job.volumes.check_volumes(recipe_of(job), sections)
    wanted = [
        f"training[1]: expected a NIfTI file at {tmp_path / 'no.nii.gz'}, got none (No such",
        f"training[2]: expected finite numbers in {both['image']}, got NaN or Inf in 1 of 7,920",
        f"training[2]: expected classes 0 to 1 in {both['label']}, got 3; --labels 3=1 makes a",
        f"validation[0]: expected finite numbers in {both['image']}, got NaN",
        f"validation[0]: expected classes 0 to 1 in {both['label']}, got 3",
    ]
    assert len(found.problems) == len(wanted)
    assert all(map(str.startswith, found.problems, wanted))
    assert [row.split()[0] for row in found.rows] == ["training[0]", "validation[1]"]


def test_what_a_transform_raises_is_a_problem(job, tmp_path, monkeypatch):
    def fails(*_arguments):
        raise RuntimeError("wrapped") from ValueError("no room\nat all")

    monkeypatch.setattr(job.volumes, "preparation", lambda *_: fails)
    entry = write_pair(tmp_path)
    assert (
        problem(job, entry) == f"expected {entry['image']} to be prepared, got an error (no room)"
    )


def test_the_highest_class_in_labels(job, tmp_path):
    entry, label = write_pair(tmp_path), phantom()[1]

    def highest(factor, labels=None, *more):
        file = str(write(tmp_path / "label.nii.gz", label * np.uint8(factor)))
        sections = {"training": [{**entry, "label": file}, *more], "test": [entry]}
        return job.volumes.highest_class(labels or {}, sections)

    assert highest(1) == 1
    assert highest(2) == 2
    assert highest(255, {255: 1}) == 1
    with pytest.raises(SystemExit) as refused:
        highest(255)
    assert str(refused.value) == (
        "--data: expected classes 0 to 2 for a new output layer (--labels 255=2 makes them, "
        "--out-channels 256 takes them as they are), got 0, 1, 255 in the labels, 255 in "
        f"{tmp_path / 'label.nii.gz'}"
    )
    with pytest.raises(SystemExit, match="--labels 4=2 makes them, --out-channels 10 takes"):
        highest(4, {4: 9})
    # Labels that cannot be read may have what is lacking; `check_volumes` tells of them.
    half = str(write(tmp_path / "half.nii.gz", label * np.float32(0.5)))
    assert highest(255, None, {**entry, "label": half}) == 255
    assert job.volumes.highest_class({}, {"test": [{"image": entry["image"]}]}) == 0
