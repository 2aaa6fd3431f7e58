"""Reads the weights of a UNETR, or of a SwinUNETR, from whatever file they are in.

Weights may lie in a dictionary of a training loop, beside optimizer and epoch, under names with a
prefix, or in a MONAI bundle.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from segmentation.files import fail
from segmentation.names import folded
from segmentation.weight_files import load

#: Every UNETR has this entry; what stands before it is a prefix.
LANDMARK = "vit.patch_embedding.position_embeddings"
#: Parts of names that wrappers insert: torch.compile, FSDP, and checkpointing of activations.
_WRAPPER = r"(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)"
#: Arguments of a UNETR that shapes may not tell.
TOLD = ("img_size", "num_heads", "norm_name")


@dataclass(frozen=True)
class Kind:
    """A kind of network that is looked for in files.

    Attributes:
        name: MONAI's name for its class.
        landmark: matches the name of an entry that each such network has; what stands before the
            network's own names is a group.
        foreign: parts of names in files without one -> what the file holds, and what to do.
    """

    name: str
    landmark: re.Pattern[str]
    foreign: Mapping[str, str]


def _with_wrappers(pattern: str) -> re.Pattern[str]:
    """A pattern of names into which wrappers may have inserted parts of theirs after any dot."""
    return re.compile(pattern.replace(r"\.", rf"\.{_WRAPPER}*"))


_DEEPEST = 3  # levels of dictionaries that are searched for weights
_ADAPTERS = {
    ".core.": "an adapter of tcur_kernels; give the weights that it was trained on",
    ".lora_": "an adapter of peft; save merge_and_unload().state_dict() of the adapted model",
    "flat_param": "parameters that FSDP flattened; save the full state dict",
}
_SWIN = "and this job is for UNETR; examples/swin_unetr_segmentation.py takes it"
UNETR = Kind(
    "UNETR",
    _with_wrappers(r"(|.*[.])vit\.patch_embedding\.position_embeddings"),
    {
        ".swinViT.": f"a SwinUNETR, {_SWIN}",
        ".layers1.0.blocks.": f"the transformer of a SwinUNETR, {_SWIN}",
        **_ADAPTERS,
        ".blocks.0.attn.qkv.weight": "a ViT without the rest of a UNETR",
        ".encoder.stages.": "a network of nnU-Net, and this job is for MONAI's UNETR",
    },
)
#: Of the whole network, or of its transformer alone, which self-supervision gives.
SWIN_UNETR = Kind(
    "SwinUNETR",
    _with_wrappers(r"(|.*?[.])(?:(?:swinViT|swin_vit)\.)?patch_embed\.proj\.weight"),
    {
        ".vit.patch_embedding.": "a UNETR; examples/unetr_segmentation.py takes it",
        **_ADAPTERS,
        ".encoder.stages.": "a network of nnU-Net, and this job is for MONAI's SwinUNETR",
    },
)


@dataclass(frozen=True)
class Checkpoint:
    """Weights by the names that MONAI's UNETR has for them.

    Attributes:
        file: where they were read.
        state: name -> tensor.
        told: those of `TOLD` that stand beside the weights (Lightning, MONAI bundles).
        notes: what a user should know of the reading, one sentence each.
    """

    file: Path
    state: dict[str, Tensor]
    told: dict[str, Any]
    notes: tuple[str, ...]


def read_checkpoint(path: Path, entry: str | None = None, kind: Kind = UNETR) -> Checkpoint:
    """Reads a file, or the weights of a MONAI bundle if ``path`` is its folder.

    Args:
        path: the file or folder.
        entry: which weights to take if a file holds several networks, as the refusal lists them.
        kind: of network.
    """
    file, told = _find_file(path, kind)
    content = load(file)
    told = {**_hyper_parameters(content), **told}
    networks = _networks(kind, content)
    found = {_label(keys, prefix): (node, prefix) for keys, node, prefix in networks}
    if not found:
        came = f"{file}, which holds {_describe(kind, content)}"
        fail("--pretrained", f"weights of MONAI's {kind.name}", came)
    if entry is None and len(found) > 1:
        one = "--entry NAME takes one of them"
        fail("--pretrained", f"one network ({one})", f"{file} with {', '.join(found)}")
    if entry is not None and entry not in found:
        fail("--entry", f"one of {', '.join(found)}", entry)
    label = next(iter(found)) if entry is None else entry
    node, prefix = found[label]
    state: dict[str, Tensor] = {}
    beside = []
    for name, value in node.items():
        if str(name).startswith(prefix) and isinstance(value, Tensor):
            state[re.sub(_WRAPPER, "", str(name)[len(prefix) :])] = value
        else:
            beside.append(str(name))
    notes = [f"weights: {file}" + (f", {label}" if label != "plain" else "")]
    if beside:
        notes.append(f"left aside, since they are no weights of the network: {folded(beside)}")
    state = _as_fp32(file, state, notes)
    return Checkpoint(file, state, {k: told[k] for k in TOLD if k in told}, tuple(notes))


def _find_file(path: Path, kind: Kind) -> tuple[Path, dict[str, Any]]:
    """The file with the weights, and what a bundle around it says about the network."""
    wanted = "a file, or the folder of a MONAI bundle with models/model.pt"
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        fail("--pretrained", wanted, f"{path} ({getattr(error, 'strerror', None) or error})")
    if path.is_dir():
        for name in ("models/model.pt", "models/model.safetensors"):
            if (path / name).is_file():
                return path / name, _bundle_network(path, kind)
        fail("--pretrained", wanted, f"the folder {path} without one")
    if not path.is_file():
        fail("--pretrained", wanted, f"{path}, which is no ordinary file")
    if path.resolve().parent.name == "models":
        return path, _bundle_network(path.resolve().parent.parent, kind)
    return path, {}


def _bundle_network(bundle: Path, kind: Kind) -> dict[str, Any]:
    """The arguments of the network in the configs of a bundle.

    Of references, those to a plain value in the same file are followed.
    """
    for file in sorted((bundle / "configs").glob("*")):
        if file.suffix not in (".json", ".yaml", ".yml"):
            continue
        read = json.loads if file.suffix == ".json" else yaml.safe_load
        try:
            config = read(file.read_text())
        except (OSError, ValueError, yaml.YAMLError):
            continue  # what it says is only of help
        values = config.values() if isinstance(config, dict) else []
        for network in (value for value in values if isinstance(value, dict)):
            if str(network.get("_target_")).split(".")[-1] == kind.name:
                told = {
                    name: config.get(value[1:]) if str(value).startswith("@") else value
                    for name, value in network.items()
                }
                return {k: v for k, v in told.items() if not str(v).startswith(("@", "$", "%"))}
    return {}


def _networks(
    kind: Kind, content: Any, keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any], str]]:
    """Every such network in nested dictionaries: keys of its dictionary, that, and its prefix."""
    if not isinstance(content, Mapping):
        return
    for name, value in content.items():
        landmark = kind.landmark.fullmatch(str(name))
        if landmark and isinstance(value, Tensor):
            yield keys, content, landmark.group(1)
    if len(keys) < _DEEPEST:
        for name, value in content.items():
            yield from _networks(kind, value, (*keys, str(name)))


def _label(keys: tuple[str, ...], prefix: str) -> str:
    """How messages and ``--entry`` call a network in a file, such as ``state_dict/module.``."""
    return "/".join([*keys, prefix] if prefix else keys) or "plain"


def _hyper_parameters(content: Any) -> dict[str, Any]:
    """What Lightning, or a loop that stores its options, says about the network."""
    told: dict[str, Any] = {}
    for key in ("hyper_parameters", "config", "args"):
        held = content.get(key) if isinstance(content, Mapping) else None
        held = vars(held) if isinstance(held, argparse.Namespace) else held
        told |= held if isinstance(held, dict) else {}
    return told


def _as_fp32(file: Path, state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The weights in fp32 and in memory of their own; NaN and Inf are refused."""
    others = {str(t.dtype) for t in state.values() if t.is_floating_point()} - {"torch.float32"}
    if others:
        notes.append(f"weights in {', '.join(sorted(others))} are made torch.float32")
    broken = []
    for name, tensor in state.items():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        # The copy drops the rest of the file, such as an optimizer's state.
        state[name] = tensor.detach().as_subclass(Tensor).to(dtype, copy=True)
        if not torch.isfinite(state[name]).all():
            broken.append(name)
    if broken:
        fail("--pretrained", f"finite numbers in {file}", f"NaN or Inf in {folded(broken)}")
    return state


def _describe(kind: Kind, content: Any) -> str:
    """What a file without such a network holds, in words."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    names = list(_names_of(content))
    for part, meaning in kind.foreign.items():
        if any(part in f".{name}" for name in names):
            return meaning
    return folded(names) if names else "nothing"


def _names_of(content: Mapping[Any, Any], depth: int = 0) -> Iterator[str]:
    for name, value in content.items():
        if isinstance(value, Mapping) and depth < _DEEPEST:
            yield from _names_of(value, depth + 1)
        else:
            yield str(name)
