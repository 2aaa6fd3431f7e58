"""Keeps the pretrained UNETRs of the demo between runs, since pretraining takes longest.

A kept UNETR is used only if nothing changed that it depends on: the settings of the run, the code
of the example, the libraries, and the processor, since another one rounds differently.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from segmentation.files import whole_file
from segmentation.training import Report

#: The libraries on which data, model and training depend.
LIBRARIES = ("torch", "monai", "numpy", "scipy", "nibabel", "nilearn", "einops")
EXAMPLES = Path(__file__).parent.parent
CODE = ("brain_domains.py", "unetr_segmentation.py")
CODE += tuple(f"segmentation/{name}.py" for name in ("methods", "preparation", "training", "unetr"))


def key(settings: Mapping[str, Any], device: str) -> str:
    """A name that is different for every other pretraining.

    Args:
        settings: plain values that the pretraining depends on, the seed among them.
        device: where it runs.
    """
    on_gpu = torch.device(device).type == "cuda"
    processor = (
        torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    )
    facts = {
        "settings": dict(sorted(settings.items())),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "code": {name: hashlib.sha256((EXAMPLES / name).read_bytes()).hexdigest() for name in CODE},
        "processor": [processor, torch.get_num_threads()],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def find(folder: Path, name: str) -> tuple[Path, Report] | None:
    """Weights and report of the pretraining with this `key`, if they were kept in ``folder``."""
    weights, told = _files(folder, name)
    if not (weights.is_file() and told.is_file()):
        return None
    return weights, Report.of_json(json.loads(told.read_text()))


def keep(
    folder: Path, name: str, pretrain: Callable[[Path], tuple[Path, Report]]
) -> tuple[Path, Report]:
    """Pretrains in a temporary folder; both files get the names that `find` uses once complete.

    Args:
        folder: where to keep them.
        name: the `key`.
        pretrain: gets the temporary folder; returns the file of the weights there, and the report.
    """
    weights, told = _files(folder, name)
    with whole_file(told) as text, whole_file(weights) as fresh:
        made, report = pretrain(fresh.parent)
        os.replace(made, fresh)
        text.write_text(json.dumps(asdict(report)))
    return weights, report


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.safetensors", folder / f"{name}.json"
