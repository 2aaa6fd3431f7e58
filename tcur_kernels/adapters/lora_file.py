"""Writes the directory of a LoRA adapter, as Hugging Face peft does: its config and its tensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files.whole import clear, exchanging, new_directory, replacing
from ..layers.stack import TProductStack
from ..matrices import Layout
from ..operators.factors import check_floating_dtype
from ..processes import is_sharded
from .folding import folded
from .linear_maps import find_weights
from .lora import SERVED_RANKS, Update, exact_rank, lora_of, served_rank
from .plan import StackPlan

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

#: The task types that peft knows; its ``AutoPeftModel`` classes choose a model by them.
TASK_TYPES = (
    "CAUSAL_LM",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)


@dataclass(frozen=True)
class LoraExport:
    """What `Adapter.to_lora` has written; ``print`` shows it.

    Attributes:
        path: the directory.
        rank: the LoRA rank that was written, the same for all layers.
        exact_rank: the rank at which all layers are exact. If ``rank`` is smaller, the layers are
            the best approximations of that rank.
        dtype: of the tensors.
        errors: name of a layer -> ‖update - B A‖_F / ‖update‖_F, with A and B as they were written;
            0 if the update is zero. Computed in fp64.
    """

    path: Path
    rank: int
    exact_rank: int
    dtype: torch.dtype
    errors: Mapping[str, float]

    @property
    def max_lora_rank(self) -> int | None:
        """The ``--max-lora-rank`` that vLLM needs; None if the rank is more than it takes."""
        return served_rank(self.rank)

    def describe(self) -> str:
        """Like ``str``, but with a line for every layer."""
        return "\n".join([*self._head(), *(f"  {n}: {e:.1e}" for n, e in self.errors.items())])

    def __str__(self) -> str:
        lines = self._head()
        for text, names in folded(self.errors).items():
            own = sorted(self.errors[name] for name in names)
            shown = dict.fromkeys(f"{error:.1e}" for error in (own[0], own[-1]))
            lines.append(f"  {text}: {' to '.join(shown)}")
        return "\n".join(lines)

    def _head(self) -> list[str]:
        kind = "exact" if self.rank >= self.exact_rank else f"exact at rank {self.exact_rank}"
        server = f"vLLM: --max-lora-rank {self.max_lora_rank}"
        if self.max_lora_rank is None:
            server = f"vLLM: takes no rank above {SERVED_RANKS[-1]}; export with that rank for it"
        return [
            f"{self.path}: LoRA of rank {self.rank} ({kind}), {self.dtype}",
            server,
            "relative error of the update of each layer:",
        ]


@dataclass(frozen=True)
class Layers:
    """Where updates belong.

    Attributes:
        plans: the stacks.
        modules: names of all modules of the model, among which peft looks for the layers.
        is_transposed: whether any layer is stored (in, out).
    """

    plans: tuple[StackPlan, ...]
    modules: tuple[str, ...]
    is_transposed: bool


def lora_rank(plans: Sequence[StackPlan], rank: int | None) -> tuple[int, int]:
    """The LoRA rank to write for a wanted one, and the exact rank of all stacks.

    Raises:
        TypeError: ``rank`` is not an int.
        ValueError: no server takes that rank.
    """
    exact = max(map(exact_rank, plans))
    if rank is None:
        return exact, exact
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank: expected an int or None, got {type(rank).__name__}")
    served = served_rank(rank)
    if rank < 1 or served is None:
        listed = ", ".join(map(str, SERVED_RANKS))
        raise ValueError(
            f"rank: expected 1 to {SERVED_RANKS[-1]}, which is rounded up to one of those that "
            f"vLLM takes ({listed}), or None, got {rank}"
        )
    return min(served, exact), exact


def write_lora(
    path: str | Path,
    updates: Iterable[Update],
    layers: Layers,
    rank: int | None,
    dtype: torch.dtype,
    base_model: str | None,
    task_type: str | None,
) -> LoraExport:
    """Writes a LoRA directory; other files in it stay, and after an error it is as it was.

    Args:
        path: the directory; made if it does not exist.
        updates: of the stacks, in the order of the plan. They are taken one after the other.
        layers: where they belong.
        rank: see `Adapter.to_lora`.
        dtype: of the tensors.
        base_model: for ``base_model_name_or_path``.
        task_type: of peft, one of `TASK_TYPES` or None.

    Raises:
        TypeError, ValueError: ``rank``, ``dtype`` or ``task_type`` is wrong, or the dtype does not
            hold the numbers.
        FileExistsError: ``path`` is a file.
        OSError: it cannot be written. The directory is as it was, except that where it holds no
            ``adapter_config.json``, the tensors may be there without one.
    """
    path = Path(path)
    check_floating_dtype("dtype", dtype)
    if task_type is not None and task_type not in TASK_TYPES:
        raise ValueError(
            f"task_type: expected one of {', '.join(TASK_TYPES)} or None, got {task_type!r}"
        )
    written, exact = lora_rank(layers.plans, rank)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"path: expected a directory, got a file at {path}")
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for update in updates:
        for layer in lora_of(update, written, dtype):
            tensors[f"base_model.model.{layer.name}.lora_A.weight"] = layer.a
            tensors[f"base_model.model.{layer.name}.lora_B.weight"] = layer.b
            errors[layer.name] = layer.error
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": written,
        "lora_alpha": written,  # so that peft multiplies by 1: the scale is in B
        "target_modules": _targets(list(errors), layers.modules),
        "fan_in_fan_out": layers.is_transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }
    _write(path, tensors, json.dumps(config, indent=2) + "\n")
    return LoraExport(path, written, exact, dtype, errors)


def _targets(names: list[str], modules: Iterable[str]) -> list[str] | str:
    """The ``target_modules`` by which peft finds these layers and no others.

    peft also takes a module whose name ends with a listed name, after a dot. If there is one, the
    names become a regular expression, which must match the whole name.
    """
    own = set(names)
    others = [module for module in modules if module not in own]
    ends = {other[i + 1 :] for other in others for i, sign in enumerate(other) if sign == "."}
    if not own & ends:
        return sorted(names)
    return "|".join(map(re.escape, names))


def _write(path: Path, tensors: Mapping[str, Tensor], config: str) -> None:
    """Writes both files so that they are never of two adapters, whenever the process is killed.

    Links in the directory are replaced, not followed: nothing outside of it is written.
    """
    path = Path(os.path.realpath(path))
    for written in (path, path / CONFIG, path / TENSORS):  # an earlier call may have come otherwise
        clear(written, follows=False)

    def save(file: Path) -> None:
        save_file(dict(tensors), file, metadata={"format": "pt"})

    if not path.exists() or not any(path.iterdir()):
        with new_directory(path) as place:
            (place / CONFIG).write_text(config, encoding="utf-8")
            save(place / TENSORS)
    elif not (path / CONFIG).exists():  # without it, the directory holds no adapter
        with replacing(path / CONFIG, follows=False) as config_file:
            config_file.write_text(config, encoding="utf-8")
            with replacing(path / TENSORS, follows=False) as file:
                save(file)
    elif (path / CONFIG).read_bytes() == config.encode():
        with replacing(path / TENSORS, follows=False) as file:
            save(file)
    else:
        with exchanging(path, (CONFIG, TENSORS)) as place:
            (place / CONFIG).write_text(config, encoding="utf-8")
            save(place / TENSORS)


def updates_of(
    plans: Iterable[StackPlan], stacks: Mapping[str, TProductStack], key: str | None
) -> list[Update]:
    """The updates by the core of that name in each stack; None stands for the active one.

    Raises:
        ValueError: a core is sharded or offloaded, or C and R do not belong to the base.
    """
    updates = []
    for plan in plans:
        stack = stacks[plan.name]
        core = stack.core_of(key)
        if is_sharded(core) or core.is_meta:
            raise ValueError(
                f"adapter: expected whole cores, got a sharded or offloaded one in stack "
                f"{plan.name}; save the adapter, and convert it on one process"
            )
        stack.certify()
        updates.append(Update(plan, stack.factors, core, stack.scale))
    return updates


def layers_of(model: nn.Module, plans: Sequence[StackPlan]) -> Layers:
    """The layers of these stacks in a model that `adapt` adapted.

    Raises:
        ValueError: LoRA of peft is something else for a layer than the update of its weight: it is
            a projection of an ``nn.MultiheadAttention``, or has several names.
    """
    weights = find_weights(model)
    found = [weights[member.module] for plan in plans for member in plan.members]
    is_transposed = are_transposed({layer.name: layer.place.layout for layer in found})
    refuse_attention([layer.name for layer in found if layer.owner != layer.name])
    return checked_layers(model, plans, [layer.module for layer in found], is_transposed)


def checked_layers(
    model: nn.Module, plans: Sequence[StackPlan], layers: Iterable[nn.Module], is_transposed: bool
) -> Layers:
    """The layers of these stacks in a model.

    Raises:
        ValueError: a layer has several names.
    """
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    several = [names[id(layer)] for layer in layers if names[id(layer)][1:]]
    if several:
        raise ValueError(
            "model: expected layers with one name each, since peft adapts a module under the "
            f"first of its names alone, got {'; '.join(' = '.join(each) for each in several[:5])}"
        )
    return Layers(tuple(plans), tuple(own[0] for own in names.values()), is_transposed)


def are_transposed(layouts: Mapping[str, Layout]) -> bool:
    """Whether some linear layers are stored (in, out), given the layout of each weight.

    Raises:
        ValueError: a weight is not that of a linear layer.
    """
    others = [name for name, layout in layouts.items() if layout not in ("matrix", "transposed")]
    if others:
        more = f" and {len(others) - 5} more" if others[5:] else ""
        raise ValueError(
            "model: expected linear layers, got convolutions or experts, which are not written as "
            f"LoRA: {', '.join(others[:5])}{more}"
        )
    return "transposed" in layouts.values()


def refuse_attention(names: Sequence[str]) -> None:
    """Refuses projections of an ``nn.MultiheadAttention``, if there are any."""
    if names:
        more = f" and {len(names) - 5} more" if names[5:] else ""
        raise ValueError(
            "model: expected layers that are modules of their own, got projections of an "
            f"nn.MultiheadAttention, which peft adapts as a whole: {', '.join(names[:5])}{more}"
        )


def refuse_learned(names: Sequence[str]) -> None:
    """Refuses what was trained beside the cores, if there is anything."""
    if names:
        more = f" and {len(names) - 5} more" if names[5:] else ""
        raise ValueError(
            "adapter: expected one of cores alone, which LoRA can hold, got values of "
            f"{', '.join(names[:5])}{more} that were trained, or changed by training"
        )
