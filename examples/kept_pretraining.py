"""Keeps the pretrained UNETRs of the demo between runs, since pretraining takes longest.

A kept UNETR is used only if nothing changed that it depends on: the settings of the run, the code
of the example, the libraries, and the processor, since another one rounds differently.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from segmentation_training import Report

#: The libraries on which data, model and training depend.
LIBRARIES = ("torch", "monai", "numpy", "scipy", "nibabel", "nilearn", "einops")
CODE = ("unetr_segmentation.py", "brain_domains.py", "segmentation_data.py")
CODE += ("segmentation_training.py",)
#: Options that only matter after the pretraining, or only name paths.
NO_MATTER = {"output", "keep", "seeds", "data", "pretrained", "volumes", "methods", "steps"}
NO_MATTER |= {"decoder_lr", "core_lr", "vit_lr", "rank", "selection", "alpha"}


def key(args: argparse.Namespace, seed: int) -> str:
    """A name that is different for every other pretraining."""
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    processor = (
        torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    )
    facts = {
        "settings": {n: v for n, v in sorted(vars(args).items()) if n not in NO_MATTER},
        "seed": seed,
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "code": {
            name: hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest()
            for name in CODE
        },
        "processor": [processor, torch.get_num_threads()],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def find(args: argparse.Namespace, seed: int) -> tuple[Path, Report] | None:
    """Weights and report of this pretraining, if they were kept."""
    weights, told = _files(args, seed)
    if not (weights.is_file() and told.is_file()):
        return None
    facts = json.loads(told.read_text())
    facts["dice"] = {int(step): dice for step, dice in facts["dice"].items()}
    return weights, Report(**facts)


def keep(
    args: argparse.Namespace, seed: int, pretrain: Callable[[Path], Report]
) -> tuple[Path, Report]:
    """Pretrains into a temporary file, which gets the name that `find` uses once it is complete."""
    weights, told = _files(args, seed)
    weights.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=weights.parent) as folder:
        fresh = Path(folder, weights.name)
        report = pretrain(fresh)
        text = Path(folder, told.name)
        text.write_text(json.dumps(asdict(report)))
        os.replace(fresh, weights)
        os.replace(text, told)
    return weights, report


def _files(args: argparse.Namespace, seed: int) -> tuple[Path, Path]:
    name = key(args, seed)
    return args.keep / f"{name}.pt", args.keep / f"{name}.json"
