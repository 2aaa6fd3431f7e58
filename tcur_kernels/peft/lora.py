"""Writes an adapter of a peft model as a LoRA, without an SVD of any weight."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel

from ..adapters.lora_file import (
    LoraExport,
    are_transposed,
    checked_layers,
    refuse_learned,
    updates_of,
    write_lora,
)
from .model import TCURModel


def save_as_lora(
    model: PeftModel,
    path: str | Path,
    rank: int | None = None,
    adapter_name: str = "default",
    dtype: torch.dtype = torch.float32,
) -> LoraExport:
    """Writes an adapter of tCURLoRA as a LoRA that peft, and servers such as vLLM, can load.

    peft's own function of that name forms the update of every layer and decomposes it. This one
    knows that the update is a product of thin matrices, takes the smallest rank that is exact, and
    says how large the error of each layer is. See `tcur_kernels.Adapter.to_lora`.

    Args:
        model: from ``get_peft_model(model, TCURConfig(...))`` or ``PeftModel.from_pretrained``.
        path: the directory; made if it does not exist.
        rank: of the LoRA; None for the exact one. See `tcur_kernels.Adapter.to_lora`.
        adapter_name: of the adapter.
        dtype: of A and B.

    Returns:
        What was written, with the error of every layer; print it.

    Raises:
        TypeError: ``model`` has no adapters of tCURLoRA, ``rank`` is not an int, or ``dtype`` is
            not floating.
        FileExistsError: ``path`` is a file.
        ValueError: there is no such adapter, it has ``modules_to_save``, which this does not write,
            or a layer with several names; no server takes ``rank``; or ``dtype`` does not hold the
            numbers. Nothing is written then.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, TCURModel):
        raise TypeError(
            f"model: expected a PeftModel with adapters of TCURConfig, got {type(model).__name__}"
        )
    if adapter_name not in tuner.plans:
        known = ", ".join(tuner.plans)
        raise ValueError(f"adapter_name: expected one of {known}, got {adapter_name!r}")
    config = tuner.peft_config[adapter_name]
    refuse_learned(sorted(config.modules_to_save or ()))
    plans = tuner.plans[adapter_name].stacks
    members = [member.module for plan in plans for member in plan.members]
    stacks = {stack.name: stack for stack in tuner.owner.stacks[adapter_name]}
    places = [place for plan in plans for place in stacks[plan.name].places]
    layouts = {name: place.layout for name, place in zip(members, places, strict=True)}
    is_transposed = are_transposed(layouts)
    layers = [tuner.model.get_submodule(name) for name in members]
    return write_lora(
        path,
        updates_of(plans, stacks, None),
        checked_layers(tuner.model, plans, layers, is_transposed),
        rank,
        dtype,
        config.base_model_name_or_path,
        config.task_type,
    )
