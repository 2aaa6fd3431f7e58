"""Loads the volumes and builds the UNETR of the segmentation example."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import nibabel as nib
import torch
from monai.data import CacheDataset, load_decathlon_datalist
from monai.networks.nets import UNETR
from monai.transforms import (
    Compose,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    RandAffined,
    RandFlipd,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSpatialCropd,
    Spacingd,
    SpatialPadd,
)
from torch import nn


def fail(argument: str, expected: str, came: object) -> NoReturn:
    """Ends the program with a message about what an argument should be and what it was."""
    raise SystemExit(f"{argument}: expected {expected}, got {came}")


def read_section(datalist: Path, section: str) -> list[dict[str, str]]:
    """Image and label files of one section, checked before anything is trained."""
    try:
        entries = load_decathlon_datalist(datalist, is_segmentation=True, data_list_key=section)
    except (ValueError, KeyError, TypeError) as error:
        fail("--data", f"a Decathlon datalist with {section!r}", f"{datalist} ({error})")
    for entry in entries:
        shapes = {}
        for key in ("image", "label"):
            if not Path(entry.get(key, "")).is_file():
                wanted = f"the NIfTI file of each {key} in {section!r} of {datalist}"
                fail("--data", wanted, f"{entry.get(key)!r}, which is no file")
            shapes[key] = nib.load(entry[key]).shape[:3]
        if shapes["image"] != shapes["label"]:
            wanted = f"{entry['label']} of its image's shape {shapes['image']}"
            fail("--data", wanted, shapes["label"])
    return entries


def preparation(args: argparse.Namespace) -> list[Callable[[Any], Any]]:
    """Transforms applied once to every volume: same orientation, spacing and intensity scale."""
    keys = ["image", "label"]
    return [
        LoadImaged(keys, ensure_channel_first=True),
        Orientationd(keys, axcodes="RAS", labels=None),
        Spacingd(keys, pixdim=args.spacing, mode=("bilinear", "nearest")),
        NormalizeIntensityd("image", channel_wise=True),
        SpatialPadd(keys, args.img_size),
    ]


def augmentation(args: argparse.Namespace) -> list[Callable[[Any], Any]]:
    """Random transforms applied to training volumes at every step."""
    keys = ["image", "label"]
    return [
        *(RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in args.mirror),
        RandAffined(
            keys,
            prob=0.9,
            rotate_range=(0.05, 0.05, 0.3),
            translate_range=(6, 6, 1),
            scale_range=(0.1, 0.1, 0.1),
            mode=("bilinear", "nearest"),
            padding_mode="border",
        ),
        RandSpatialCropd(keys, args.img_size, random_size=False),
        RandScaleIntensityd("image", 0.2, prob=0.8),
        RandShiftIntensityd("image", 0.2, prob=0.8),
    ]


def load_volumes(
    args: argparse.Namespace, entries: list[dict[str, str]], augment: bool
) -> CacheDataset:
    """Loads and prepares the volumes, and keeps them in memory."""
    transform = Compose(preparation(args) + (augmentation(args) if augment else []))
    volumes = CacheDataset(entries, transform, num_workers=2, progress=False)
    for entry, volume in zip(entries, volumes._cache, strict=True):
        channels, highest = volume["image"].shape[0], int(volume["label"].max())
        if channels != args.in_channels:
            fail("--in-channels", f"the {channels} of {entry['image']}", args.in_channels)
        if highest >= args.out_channels:
            wanted = f"more than {highest}, the highest label of {entry['label']}"
            fail("--out-channels", wanted, args.out_channels)
    return volumes


def build_unetr(args: argparse.Namespace, weights: Path | None) -> nn.Module:
    """A UNETR of the given size, with ``weights`` loaded."""
    model = UNETR(
        in_channels=args.in_channels,
        out_channels=args.out_channels,
        img_size=args.img_size,
        feature_size=args.feature_size,
        hidden_size=args.hidden_size,
        mlp_dim=args.mlp_dim,
        num_heads=args.num_heads,
    )
    if weights is not None:
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).splitlines()[0]
            fail("--pretrained", "a state dict that torch.save wrote", f"{weights} ({reason})")
        state = state.get("state_dict", state)
        for name, tensor in model.state_dict().items():
            came = tuple(state[name].shape) if name in state else "no such entry"
            if came != tuple(tensor.shape):
                wanted = (
                    f"{name} of shape {tuple(tensor.shape)}, as the UNETR of the size flags has"
                )
                fail("--pretrained", wanted, came)
        model.load_state_dict(state, strict=False)
    return model.to(args.device)
