"""Writes an adapter file as a LoRA directory; of the base, only C and R are kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from ..adapters.file import Contents, StoredStack
from ..adapters.lora import Update
from ..adapters.lora_file import (
    Layers,
    LoraExport,
    are_transposed,
    refuse_attention,
    refuse_learned,
    write_lora,
)
from .directory import ModelDirectory, factors_of, origins_of, parameters_of

#: Wraps the stacks while they are processed, to show progress, like ``tqdm``.
Progress = Callable[[Iterable[StoredStack]], Iterable[StoredStack]]

#: Names of the dtypes that A and B can have on the command line.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

#: The ends of the names of parameters that only an ``nn.MultiheadAttention`` has.
_OF_ATTENTION = (".in_proj_weight", ".q_proj_weight")


def lora_of_directory(
    directory: ModelDirectory,
    contents: Contents,
    out: str | Path,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    base_model: str | None = None,
    task_type: str | None = None,
    progress: Progress = iter,
) -> LoraExport:
    """Writes the LoRA directory of an adapter, see `Adapter.to_lora`.

    The weights are read from the files tensor by tensor, to take C and R. No model is built, except
    where transformers has other names for the tensors than the files; then it is built on the meta
    device.

    Args:
        directory: the base.
        contents: the adapter, see `adapters.file.read_contents`.
        out: the directory to write.
        rank, dtype: see `Adapter.to_lora`.
        base_model: what the config names as the base; by default the path of the directory.
        task_type: see `Adapter.to_lora`.
        progress: wraps the stacks while they are processed, for example ``tqdm``.

    Raises:
        TypeError, FileExistsError, ValueError: see `Adapter.to_lora`; or the base is not the one
            that the adapter was made for. Nothing is written then.
    """
    refuse_learned([name for _, name in contents.learned])
    tensors = tensors_of(directory, contents)
    attentions = {name.rpartition(".")[0] for name in tensors if f".{name}".endswith(_OF_ATTENTION)}
    members = [member.module for plan in contents.plan.stacks for member in plan.members]
    refuse_attention([name for name in members if name.rpartition(".")[0] in attentions])
    modules = tuple(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    layouts = [how for stack in contents.stacks for _, how, _ in stack.stored]
    is_transposed = are_transposed(dict(zip(members, layouts, strict=True)))
    origins = origins_of(directory, contents)

    def updates() -> Iterator[Update]:
        for stored in progress(contents.stacks):
            factors = factors_of(directory, origins, stored)
            yield Update(stored.plan, factors, stored.core, stored.scale)

    return write_lora(
        out,
        updates(),
        Layers(contents.plan.stacks, modules, is_transposed),
        rank,
        dtype,
        base_model or str(directory.path),
        task_type,
    )


def tensors_of(directory: ModelDirectory, contents: Contents) -> list[str]:
    """Names of the tensors of the model: those of the files if the adapter uses these names."""
    shapes = directory.shards.shapes
    if all(name in shapes for name in parameters_of(contents)):
        return list(shapes)
    return list(directory.skeleton().state_dict())
