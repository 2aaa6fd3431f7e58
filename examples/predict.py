"""Segments volumes with what examples/unetr_segmentation.py trained, each on its own grid.

Preparation, window and classes come from the file of the adapter, so they are those of the
training. For every image a label map of the same name is written, with the shape, affine and header
of the image::

    python examples/predict.py --pretrained unetr.pt --adapter runs/unetr/tcurlora.safetensors \\
        --images scans/new --output scans/found
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Invertd
from tqdm import tqdm

from segmentation.adapted import Adapted, load_adapted
from segmentation.datalist import listed_images
from segmentation.evaluation import predict
from segmentation.files import fail, plain_ends, whole_file
from segmentation.options import add_device, add_trained, check_device
from segmentation.preparation import Entry, preparation
from segmentation.volumes import check_volumes, files_of

ENDINGS = (".nii", ".nii.gz")


def main(argv: Sequence[str] | None = None) -> None:
    """Checks all images, then segments one after the other."""
    args = parse_args(argv)
    with plain_ends("interrupted; the label maps so far are whole"):
        run(args)


def run(args: argparse.Namespace) -> None:
    """Runs a command line that was parsed."""
    adapted = load_adapted(args.pretrained, args.adapter)
    recipe = adapted.recipe
    images = find_images(args.images)
    targets = [args.output / name_of(image) for image in images]
    refuse_overwriting(images, targets)
    found = check_volumes(recipe, {"images": images})
    found.tell("--images", " ".join(map(str, args.images)))
    adapted.model.to(args.device)
    lines = []
    for image, target in tqdm(list(zip(images, targets, strict=True)), ncols=100):
        mask = segment(adapted, image)
        milliliters = write_mask(files_of(image, "image")[0], mask, target)
        volumes = [
            f"{recipe.name_of(number)} {milliliters * np.count_nonzero(mask == number):.1f} ml"
            for number in range(1, recipe.classes)
        ]
        lines.append(f"{target}: {', '.join(volumes)}")
    print("\n".join(lines))
    values = ", ".join(f"{number} {recipe.name_of(number)}" for number in range(recipe.classes))
    print(f"values: {values}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line; an error ends the program with a message."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add_trained(parser)
    add(
        "--images",
        type=Path,
        nargs="+",
        required=True,
        help='NIfTI files; folders of them; or a datalist in JSON, whose "test" images are taken',
    )
    add("--output", type=Path, required=True, help="folder for the label maps")
    add_device(parser)
    args = parser.parse_args(argv)
    check_device(args.device, parser.error)
    return args


def find_images(paths: Sequence[Path]) -> list[Entry]:
    """The images that the command line names."""
    images: list[Entry] = []
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS))
            if not files:
                fail("--images", f"a folder with {' or '.join(ENDINGS)} files", f"{path} without")
            images += [{"image": str(file)} for file in files]
        elif path.suffix == ".json":
            images += listed_images(path)
        else:
            images.append({"image": str(path)})
    return images


def name_of(image: Entry) -> str:
    """The name of the label map of an image."""
    name = files_of(image, "image")[0].name
    return f"{name.removesuffix('.gz').removesuffix('.nii')}.nii.gz"


def refuse_overwriting(images: Sequence[Entry], targets: Sequence[Path]) -> None:
    """Refuses label maps that would overwrite an image, or each other."""
    inputs = {file.resolve() for image in images for file in files_of(image, "image")}
    for target in targets:
        if target.resolve() in inputs:
            fail("--output", "another folder than that of the images", target.parent)
        if targets.count(target) > 1:
            fail(
                "--images", "different names, since label maps are called like images", target.name
            )


def segment(adapted: Adapted, image: Entry) -> np.ndarray[Any, Any]:
    """The class of every voxel of an image, on the image's own grid."""
    recipe = adapted.recipe
    prepare = preparation(recipe, ["image"])
    volume = prepare(dict(image))
    logits = predict(recipe, adapted.model, volume["image"])[0].cpu()
    if not torch.isfinite(logits).all():
        raise SystemExit(
            f"expected finite numbers, got NaN or Inf in the prediction of {image['image']}"
        )
    invert = Invertd("found", prepare, orig_keys="image", nearest_interp=False, to_tensor=True)
    back = invert({**volume, "found": MetaTensor(logits.softmax(0))})
    return back["found"].argmax(0).numpy().astype(np.uint8)


def write_mask(image: Path, mask: np.ndarray[Any, Any], target: Path) -> float:
    """Writes a label map with the grid of an image; returns the milliliters of a voxel."""
    original = nib.load(image)
    header = original.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    with whole_file(target) as fresh:
        nib.save(nib.Nifti1Image(mask, original.affine, header), fresh)
    return abs(float(np.linalg.det(original.affine[:3, :3]))) / 1000


if __name__ == "__main__":
    main()
