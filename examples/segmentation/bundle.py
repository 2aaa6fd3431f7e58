"""Writes a MONAI bundle: weights, and configs that prepare, segment and write volumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from torch import Tensor

from segmentation.files import save_state, write_json
from segmentation.preparation import Recipe

_README = """\
# A UNETR adapted by tCURLoRA

The update of the adaptation is folded into the weights, so MONAI alone runs this bundle:

    python -m monai.bundle run --config_file configs/inference.json --bundle_root . \\
        --dataset_dir FOLDER --output_dir FOUND

FOLDER has NIfTI volumes of {channels} channel(s). For each of them FOUND gets a label map on the
volume's own grid, with the values {values}.
"""


def write_bundle(recipe: Recipe, state: dict[str, Tensor], folder: Path) -> None:
    """Writes the bundle of a plain UNETR into a new folder."""
    for name in ("configs", "models", "docs"):
        (folder / name).mkdir(parents=True)
    save_state(state, folder / "models" / "model.pt")
    write_json(folder / "configs" / "metadata.json", _metadata(recipe))
    write_json(folder / "configs" / "inference.json", _inference(recipe))
    values = ", ".join(f"{number} ({recipe.name_of(number)})" for number in range(recipe.classes))
    text = _README.format(channels=recipe.architecture.in_channels, values=values)
    (folder / "docs" / "README.md").write_text(text)


def _inference(recipe: Recipe) -> dict[str, Any]:
    """The config of the inference: the preparation of the training, and its inverse."""
    image = {"keys": "image"}
    intensities: dict[str, Any] = {"_target_": "NormalizeIntensityd", **image, "channel_wise": True}
    if recipe.intensity_range is not None:
        low, high = recipe.intensity_range
        limits = {"a_min": low, "a_max": high, "b_min": 0.0, "b_max": 1.0, "clip": True}
        intensities = {"_target_": "ScaleIntensityRanged", **image, **limits}
    preparation = [
        {"_target_": "LoadImaged", **image, "ensure_channel_first": True},
        {"_target_": "Orientationd", **image, "axcodes": "RAS", "labels": None},
        {"_target_": "Spacingd", **image, "pixdim": list(recipe.spacing), "mode": "bilinear"},
        intensities,
        {"_target_": "SpatialPadd", **image, "spatial_size": list(recipe.window)},
    ]
    invert = {"keys": "pred", "transform": "@preprocessing", "orig_keys": "image"}
    save = {"keys": "pred", "output_dir": "@output_dir", "output_dtype": "$numpy.uint8"}
    save |= {"output_postfix": "", "separate_folder": False, "resample": False}
    architecture = recipe.architecture.arguments()
    return {
        "imports": ["$import glob", "$import numpy"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/found'",
        "datalist": "$sorted(glob.glob(@dataset_dir + '/*.nii*'))",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {"_target_": "UNETR", **architecture},
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": preparation},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': file} for file in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(recipe.window),
            "sw_batch_size": 1,
            "overlap": recipe.overlap,
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Activationsd", "keys": "pred", "softmax": True},
                {"_target_": "Invertd", **invert, "nearest_interp": False, "to_tensor": True},
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
                {"_target_": "SaveImaged", **save},
            ],
        },
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
                "map_location": "@device",
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
    }


def _metadata(recipe: Recipe) -> dict[str, Any]:
    """What a bundle says about itself."""
    channels, window = recipe.architecture.in_channels, list(recipe.window)
    patch = {"type": "image", "spatial_shape": window, "dtype": "float32", "is_patch_data": True}
    image = {
        **patch,
        "format": "magnitude",
        "modality": "n/a",
        "num_channels": channels,
        "value_range": [],
        "channel_def": {str(number): f"channel {number}" for number in range(channels)},
    }
    found = {
        **patch,
        "format": "segmentation",
        "num_channels": recipe.classes,
        "value_range": [0, 1],
        "channel_def": {str(n): recipe.name_of(n) for n in range(recipe.classes)},
    }
    return {
        "version": "0.1.0",
        "changelog": {"0.1.0": "adapted by tCURLoRA"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"nibabel": "5", "einops": "0.8", "pytorch-ignite": "0.5"},
        "task": "segmentation of 3D volumes",
        "description": "A UNETR that was adapted to other volumes by tCURLoRA and merged.",
        "authors": "",
        "copyright": "",
        "intended_use": "Research only.",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": found}},
    }
