"""The segmentation job says what is wrong with a volume before it trains."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segmentation_files import (
    OBLIQUE,
    check,
    phantom,
    prepared,
    problem,
    with_one,
    write,
    write_dataset,
    write_pair,
)

# Two files that do not go together


FLIPS = {
    "flipped": np.diag([-1.0, 1, 1, 1]),
    "flipped in y": np.diag([1.0, -1, 1, 1]),
    "flipped in z": np.diag([1.0, 1, -1, 1]),
    "shifted": np.array([[1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    "turned": np.array([[-1.0, 0, 0, 19], [0, -1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    "scaled": np.diag([1.1, 1, 1, 1]),
}


@pytest.mark.parametrize("how", FLIPS)
@pytest.mark.parametrize("affine", [np.diag([1.5, 1.25, 2, 1]), OBLIQUE], ids=["diag", "oblique"])
def test_a_label_that_does_not_lie_on_its_image(job, tmp_path, how, affine):
    entry = write_pair(tmp_path, affine=affine)
    label = write(tmp_path / "moved.nii.gz", phantom()[1], affine @ FLIPS[how])
    text = problem(job, entry, {**entry, "label": str(label)})
    assert text.startswith(
        f"expected {label} on the grid of {entry['image']}, 20x22x18 voxels of 1.5x1.25x"
    )
    assert "mm, axes RAS, got 20x22x18 voxels of 1." in text
    assert "mm away: it is flipped, turned or shifted against it, or its header is wrong" in text


def test_files_of_different_shapes(job, tmp_path):
    entry = write_pair(tmp_path)
    label = write(tmp_path / "other.nii.gz", phantom((20, 22, 19))[1])
    text = problem(job, {**entry, "label": str(label)})
    grids = "20x22x18 voxels of 1.5x1.25x2 mm, axes RAS, got 20x22x19 voxels of 1.5x1.25x2 mm"
    assert text == (
        f"expected {label} on the grid of {entry['image']}, {grids}, axes RAS; resample one onto "
        "the other"
    )
    # The header of an image whose axes were exchanged without the voxels.
    turned = write(tmp_path / "turned.nii.gz", phantom((22, 20, 18))[1])
    assert "22x20x18" in problem(job, {**entry, "label": str(turned)})
    channels = {**entry, "image": [entry["image"], str(label)]}
    assert f"expected {label} on the grid of" in problem(job, channels, channels=2)


# Voxels that are no image, or no label


IMAGES = {
    "NaN": (with_one(np.nan), "finite numbers in {}, got NaN or Inf in 1 of 7,920 voxels"),
    "Inf": (with_one(-np.inf), "finite numbers in {}, got NaN or Inf in 1 of 7,920 voxels"),
    "constant": (lambda image: 0 * image + 3, "an image in {}, got 3 in every voxel"),
    "empty": (lambda image: 0 * image, "an image in {}, got 0 in every voxel"),
    "2D": (lambda image: image[0], "a 3D volume, or 4D with channels, in {}, got 2D, 22x18"),
    "5D": (
        lambda image: np.stack([image] * 3, -1)[:, :, :, None],
        "a 3D volume, or 4D with channels, in {}, got 5D, 20x22x18x1x3",
    ),
    "4D": (
        lambda image: np.stack([image] * 3, -1),
        "1 channel(s) in {}, as the UNETR takes, got a 4D file of 3; write those that it was "
        "trained with into files of their own",
    ),
    "without voxels": (
        lambda image: image[:0],
        "a 3D volume, or 4D with channels, in {}, got 3D, 0x22x18",
    ),
    "huge": (
        lambda image: image * 1e200,
        "finite intensities of {}, got NaN or Inf once scaled",
    ),
    "complex": (lambda image: image + 1j, "one number per voxel in {}, got complex numbers"),
    "colours": (
        lambda image: np.zeros(image.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")]),
        "one number per voxel in {}, got colours",
    ),
}


@pytest.mark.parametrize("what", IMAGES)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_images_that_are_none(job, tmp_path, what):
    change, message = IMAGES[what]
    entry = write_pair(tmp_path)
    image = change(phantom()[0].astype(np.float64))
    file = write(tmp_path / "bad.nii.gz", image)
    assert problem(job, {**entry, "image": str(file)}) == f"expected {message.format(file)}"


def test_images_of_several_channels(job, tmp_path):
    entry = write_pair(tmp_path)
    image = np.stack([phantom(seed=seed)[0] for seed in range(2)], 3)
    image[..., 1] = 7
    file = str(write(tmp_path / "4d.nii.gz", image))
    text = problem(job, {**entry, "image": file}, channels=2)
    assert text == f"expected an image in {file}, channel 1, got 7 in every voxel"
    text = problem(job, {**entry, "image": [entry["image"], file]}, channels=3)
    assert text == f"expected one channel in {file}, one of the 2 files of an image, got 2"
    text = problem(job, {**entry, "image": [entry["image"]] * 2})
    assert text.startswith(f"expected 1 channel(s) in {entry['image']}, as the UNETR takes, got 2;")


def test_intensities_out_of_the_range(job, tmp_path):
    entry = write_pair(tmp_path)
    assert not check(job, entry, intensity_range=(-3, 5)).problems
    values = prepared(job, entry, intensity_range=(-3.0, 5.0))["image"]
    assert 0 <= values.min() < values.max() <= 1
    text = problem(job, entry, intensity_range=(100.0, 250.0))
    assert text.startswith(
        f"expected intensities within --intensity-range 100 250 in {entry['image']}, got -"
    )
    assert "within" in problem(job, entry, intensity_range=(-250.0, -100.0))


LABELS = {
    "NaN": (with_one(np.nan), "classes in {}, got NaN or Inf in 1 voxels"),
    "Inf": (with_one(np.inf), "classes in {}, got NaN or Inf in 1 voxels"),
    "probabilities": (
        lambda label: np.linspace(0, 1, label.size, dtype=np.float32).reshape(label.shape),
        "whole numbers in {}, got 0.00101",
    ),
    "empty": (
        lambda label: 0 * label,
        "a structure in {}, got background in every voxel; --allow-empty accepts volumes",
    ),
    "full": (lambda label: 0 * label + 1, "background, too, in {}, got 1 in every voxel"),
    "255": (
        lambda label: 255 * label,
        "classes 0 to 1 in {}, got 255; --labels 255=1 makes a value a class, --new-head starts",
    ),
    "negative": (lambda label: label.astype(np.int16) - 1, "classes 0 to 1 in {}, got -1; "),
    "many": (
        lambda label: np.arange(label.size, dtype=np.int16).reshape(label.shape) % 9,
        "classes 0 to 1 in {}, got 2, 3, 4, 5, 6, …; --labels 8=1 makes",
    ),
    "one-hot": (
        lambda label: np.stack([1 - label, label], 3),
        "one class per voxel in {}, got a 4D file of 2 channels",
    ),
}


@pytest.mark.parametrize("what", LABELS)
def test_labels_that_are_none(job, tmp_path, what):
    change, message = LABELS[what]
    entry = write_pair(tmp_path)
    file = write(tmp_path / "bad.nii.gz", change(phantom()[1]))
    text = problem(job, {**entry, "label": str(file)})
    assert text.startswith(f"expected {message.format(file)}")


def test_empty_labels_may_be_accepted(job, tmp_path):
    entry = write_pair(tmp_path)
    label = str(write(tmp_path / "empty.nii.gz", 0 * phantom()[1]))
    empty = {**entry, "label": label}
    found = check(job, empty, entry, allow_empty=True)
    assert not found.problems
    assert found.rows[0].endswith("; voxels: background 7,920")
    assert "expected a structure" in problem(job, entry, labels={1: 0})


def test_a_structure_that_vanishes_at_the_spacing(job, tmp_path):
    image, label = phantom((40, 40, 40))
    label[0, 0, 7] = 2
    entry = {
        "image": str(write(tmp_path / "image.nii.gz", image, np.eye(4))),
        "label": str(write(tmp_path / "label.nii.gz", label, np.eye(4))),
    }
    changes = {"classes": 3, "names": {2: "dot"}}
    assert not check(job, entry, spacing=(1, 1, 1), **changes).problems
    assert problem(job, entry, spacing=(3, 3, 3), **changes) == (
        f"expected every structure of {entry['label']} to be left at --spacing 3x3x3 mm, got none "
        "of dot, which is smaller than a voxel"
    )


# Files that are no volumes


def test_paths_that_are_no_files(job, tmp_path):
    entry = write_pair(tmp_path)
    file = tmp_path / "none.nii.gz"
    wanted = f"expected a NIfTI file at {file}, got "
    missing = {**entry, "image": str(file)}
    assert problem(job, missing) == f"{wanted}none (No such file or directory)"
    write(tmp_path / "none_0000.nii.gz", phantom()[0])
    assert problem(job, missing).endswith(
        "directory; none_0000.nii.gz is there, which nnU-Net's datalists do not name)"
    )
    os.symlink("annex/objects/none", tmp_path / "link.nii.gz")
    text = problem(job, {**entry, "image": str(tmp_path / "link.nii.gz")})
    assert text.endswith("it is a link to a file that is not here, which `datalad get` may bring)")
    file.mkdir()
    assert problem(job, missing) == f"{wanted}a folder; dcm2niix makes a file of a folder of DICOM"
    assert "null byte" in problem(job, {**entry, "image": "a\0b.nii"})
    assert "name too long" in problem(job, {**entry, "image": "a" * 5000})
    text = problem(job, {**entry, "label": str(write_dataset(tmp_path))})
    assert text == (
        f"expected a NIfTI file (.nii or .nii.gz), got {tmp_path}/dataset.json; SimpleITK and "
        "nibabel convert other formats"
    )


def test_a_volume_that_may_not_be_read(job, tmp_path, monkeypatch):
    entry = write_pair(tmp_path)
    os.chmod(entry["label"], 0)
    if os.access(entry["label"], os.R_OK):  # root may read everything
        load = nib.load

        def refuse(file, *arguments):
            if str(file) == entry["label"]:
                raise PermissionError(13, "Permission denied")
            return load(file, *arguments)

        monkeypatch.setattr(nib, "load", refuse)
    assert "Permission denied" in problem(job, entry)


def test_broken_files(job, tmp_path):
    entry = write_pair(tmp_path)
    whole = Path(entry["image"]).read_bytes()
    plain = write(tmp_path / "plain.nii", phantom()[0]).read_bytes()
    broken = {
        "text.nii.gz": b"no volume\n",
        "text.nii": b"no volume\n" * 100,
        "empty.nii.gz": b"",
        "empty.nii": b"",
        "cut.nii.gz": whole[:-2000],
        "cut.nii": plain[:-2000],
        "header.nii": plain[:200],
        "plain.nii.gz": plain,
        "zipped.nii": whole,
        "zeros.nii": bytes(3000),
    }
    for name, content in broken.items():
        file = tmp_path / name
        file.write_bytes(content)
        text = problem(job, {**entry, "image": str(file)})
        assert text.startswith(f"expected a NIfTI file at {file}, got an error ("), text
        assert "\n" not in text
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1000\n")
    text = problem(job, {**entry, "image": str(file)})
    assert text.endswith("(it is a pointer of Git LFS; `git lfs pull` brings the file)")


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Modifying image pixdim")
def test_broken_bytes_never_end_in_a_traceback(job, tmp_path, caplog):
    """A file changed anywhere in its header is read as it says, or is a problem of the report."""
    entry = write_pair(tmp_path)
    plain = np.frombuffer(write(tmp_path / "plain.nii", phantom()[0]).read_bytes(), np.uint8)
    random = np.random.default_rng(0)
    entries = []
    for number in range(80):
        changed = plain.copy()
        places = random.integers(40, 348, 2)
        changed[places] = random.integers(0, 256, 2)
        file = tmp_path / f"{number}.nii"
        file.write_bytes(changed.tobytes())
        entries.append({**entry, "image": str(file)})
    found = check(job, *entries)
    assert len(found.problems) + len(found.rows) == 80
    assert len(found.problems) > 5
    assert all(": expected " in text and "\n" not in text for text in found.problems)


HEADERS = {
    "singular": ([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "got the affine [[1.0"),
    "flat": ([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]], "got the affine [[1.0"),
    "NaN": ([[np.nan, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "got the affine [[nan"),
}


@pytest.mark.parametrize("what", HEADERS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_headers_that_are_no_grid(job, tmp_path, what):
    affine, came = HEADERS[what]
    entry = write_pair(tmp_path)
    file = write(tmp_path / "bad.nii", phantom()[0], np.eye(4))
    with file.open("r+b") as opened:  # nibabel would not write it
        opened.seek(280)
        opened.write(np.array(affine[:3], np.float32).tobytes())
    text = problem(job, {**entry, "image": str(file)})
    assert text.startswith(f"expected a header of {file} that gives every axis a direction and a")
    assert came in text


@pytest.mark.parametrize(("unit", "factor"), [("meter", "1000"), ("micron", "0.001")])
def test_units_that_are_not_mm(job, tmp_path, unit, factor):
    entry = write_pair(tmp_path)
    nifti = nib.load(entry["image"])
    nifti.header.set_xyzt_units(unit)
    nib.save(nifti, tmp_path / "unit.nii.gz")
    file = str(tmp_path / "unit.nii.gz")
    assert problem(job, {**entry, "image": file}) == (
        f"expected voxel sizes of {file} in mm, got {unit}s; multiply its affine by {factor} and "
        "set the unit"
    )


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_voxel_sizes_that_cannot_be(job, tmp_path, size):
    entry = write_pair(tmp_path, affine=np.diag([size] * 3 + [1]))
    text = problem(job, entry, spacing=(1, 1, 1))
    shown = "x".join([f"{size:.3g}"] * 3)
    assert text.startswith(
        f"expected voxel sizes of {entry['image']} that go with --spacing 1x1x1 mm, got 20x22x18 "
        f"voxels of {shown} mm, axes RAS, which become "
    )
