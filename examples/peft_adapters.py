"""What the peft examples share: adapting a copy of a base, saving and loading an adapter."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn


def adaptable(base: nn.Module, config: PeftConfig | None) -> nn.Module:
    """A copy of the base with an adapter; without a config, all its parameters are trained."""
    model = copy.deepcopy(base)
    if config is None:
        return model.requires_grad_(True)
    with _calm():
        return get_peft_model(model, config)


def round_trip(
    model: PeftModel, base: nn.Module, folder: Path, inputs: Mapping[str, Tensor]
) -> dict[str, float]:
    """Saves the adapter, loads it onto a fresh base, and merges it.

    Returns:
        "loaded" and "merged": the largest differences from the logits of ``model``; "kilobytes":
        the size of the file.
    """
    with _calm():
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    with torch.no_grad():
        logits = model(**inputs).logits
        result = {"loaded": (loaded(**inputs).logits - logits).abs().max().item()}
        merged = loaded.merge_and_unload(safe_merge=True)
        result["merged"] = (merged(**inputs).logits - logits).abs().max().item()
    size = (folder / "adapter_model.safetensors").stat().st_size
    return {**result, "kilobytes": size / 1024}


def round_trip_note(result: Mapping[str, Any]) -> str:
    """One line about a round trip."""
    return (
        f"{result['method']}: logits of the loaded adapter differ by {result['loaded']:.2g} at "
        f"most, merged by {result['merged']:.2g}"
    )


@contextmanager
def _calm() -> Iterator[None]:
    """Suppresses warnings of peft that do not matter here.

    They are about a renamed property of transformers; about Conv1D, which peft handles well; and
    about a base without a directory, whose vocabulary has not changed.
    """
    with warnings.catch_warnings():
        for message in (
            ".is_gradient_checkpointing",
            "fan_in_fan_out is set to False",
            "Could not find a config file",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield
