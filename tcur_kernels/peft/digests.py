"""What the files of a saved adapter are verified by: digests in its config, and its plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..adapters.record import StackRecord
from ..adapters.sealing import digest_of, digest_of_json
from ..files.parsing import Fields, Source, parse, read_text, shown
from ..files.tensor_file import TensorFile

#: What a config file calls the digests: of the entries below, and of the tensors beside it.
SETTINGS, TENSORS = "settings_sha256", "tensors_sha256"

#: The entries of which the update is made. The others may be edited by hand.
_COVERED = (
    "plan",
    "format_version",
    "rank",
    "alpha",
    "rank_pattern",
    "alpha_pattern",
    "basis",
    "selection",
    "stacks",
    "target_parameters",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
)

_ADVICE = "without it in the config, the adapter loads all the same"


def digest_of_settings(config: Mapping[str, Any]) -> str:
    """SHA-256 of the entries of a config that the update is made of."""
    return digest_of_json({name: config.get(name) for name in _COVERED})


def digest_of_file(path: Path) -> str:
    """SHA-256 of the tensors of a safetensors file."""
    with TensorFile(path, "path") as file:
        return digest_of({name: file.read(name) for name in file.entries})


def read_config(path: Path) -> dict[str, Any]:
    """Reads a config file, and verifies it and the tensors that lie beside it.

    Raises:
        FileNotFoundError, ValueError: something is missing, damaged, or not what a digest says.
    """
    source = Source("path", path)
    config = parse(read_text(source), source, "the config")
    if not isinstance(config, dict):
        raise source.error("a config", shown(config))
    if not isinstance(config.get("peft_type"), str):
        raise source.error("a config with peft_type", shown(config.get("peft_type")))
    check_settings(config, source)
    tensors = path.with_name(SAFETENSORS_WEIGHTS_NAME)
    if tensors.exists():
        records = records_in(config["plan"], source) if config.get("plan") is not None else ()
        _check_tensors(tensors, config.get(TENSORS), records)
    return config


def check_settings(config: Mapping[str, Any], source: Source) -> None:
    """Refuses a config whose entries are not those of which it has a digest, if it has one.

    Raises:
        ValueError: they are not.
    """
    if config.get(SETTINGS) is not None and config[SETTINGS] != digest_of_settings(config):
        raise source.error(f"the plan and settings of {SETTINGS} ({_ADVICE})", "others")


def _check_tensors(path: Path, digest: Any, records: tuple[StackRecord, ...]) -> None:
    """Refuses tensors of another digest; cores of other shapes; and any that are not finite."""
    source = Source("path", path)
    with TensorFile(path, "path") as file:
        found = {name: file.read(name) for name in file.entries}
        file.check_unchanged()
    if digest is not None and digest != digest_of(found):
        raise source.error(f"the tensors of {TENSORS} ({_ADVICE})", "others")
    shapes = {r.plan.name: (r.plan.n3, r.plan.rank, r.plan.rank) for r in records}
    for name, tensor in found.items():
        stack = name.removesuffix(".core").rpartition("tcur_")[2]
        if name.endswith(".core") and stack in shapes and tensor.shape != shapes[stack]:
            raise source.error(f"{name} of shape {list(shapes[stack])}", list(tensor.shape))
        if tensor.dtype.is_floating_point and not torch.isfinite(tensor.float()).all():
            raise source.error(f"finite numbers in {name}", "NaN or Inf")


def records_in(plan: Any, source: Source) -> tuple[StackRecord, ...]:
    """The records of a plan as a config holds it.

    Raises:
        ValueError: the plan is damaged; the message says where.
    """
    if not isinstance(plan, list):
        raise source.error("a list of stacks", shown(plan))
    records = []
    for index, entry in enumerate(plan):
        fields = Fields(entry, source, f"stack {index}")
        records.append(StackRecord.of_json(fields, len(fields.list("rows"))))
        if "alpha" in fields:
            fields.number("alpha")
    names = [record.plan.name for record in records]
    modules = [member.module for record in records for member in record.plan.members]
    if len({*names}) != len(names) or len({*modules}) != len(modules):
        raise source.error("stacks and layers of different names", "some twice")
    return tuple(records)
