"""Finds out which SwinUNETR a checkpoint belongs to, builds it, and loads what the file has of it.

A checkpoint may hold the whole network, or its Swin transformer alone, as self-supervised
pretraining gives it (``model_swinvit.pt``). Whatever does not fit is reported, and so is what the
network has and the file does not. The latter keeps random numbers, and has to be trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from monai.networks.nets import SwinUNETR
from torch import Tensor, nn

from segmentation.checkpoints import Checkpoint
from segmentation.files import fail
from segmentation.names import folded
from segmentation.unetr import NORMS, read_norm

STAGES = 4  # of the transformer, fixed in MONAI's SwinUNETR
HALVINGS = 5  # by the patches and by each stage: windows are multiples of patch_size ** 5
DOWNSAMPLE = ("merging", "mergingv2")

_PATCHES = "swinViT.patch_embed.proj.weight"
_HEAD = "out.conv.conv.weight"
#: What entries mean that do not fit: pattern of the name in the file -> meaning.
_FOREIGN = {
    r"(rotation|contrastive)_head|convTrans3d|(^|\.)norm\.(weight|bias)$|(^|\.)conv\.": "parts of "
    "the self-supervised pretraining, which a segmentation does not need",
    r"lora_|base_layer|modules_to_save": "an adapter of peft",
    r"": "no part of this network",
}


@dataclass(frozen=True)
class SwinArchitecture:
    """The arguments of MONAI's SwinUNETR, and the window that it sees at once."""

    in_channels: int
    out_channels: int
    img_size: tuple[int, ...]
    feature_size: int
    depths: tuple[int, ...] = (2, 2, 2, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    patch_size: int = 2
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    patch_norm: bool = False
    use_v2: bool = False
    norm_name: str = "instance"  # a key of `segmentation.unetr.NORMS`
    downsample: str = "merging"

    @classmethod
    def of_json(cls, facts: Mapping[str, Any]) -> SwinArchitecture:
        """The architecture that `as_json` described."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()})

    def as_json(self) -> dict[str, Any]:
        """Plain values, for the metadata of an adapter."""
        facts = asdict(self).items()
        return {name: list(v) if isinstance(v, tuple) else v for name, v in facts}

    def build(self) -> nn.Module:
        """The network, with random weights."""
        arguments = {**asdict(self), "norm_name": NORMS[self.norm_name]}
        del arguments["img_size"]  # a SwinUNETR takes windows of many sizes
        return SwinUNETR(**arguments)

    @property
    def multiple(self) -> int:
        """The sides of a window are multiples of it."""
        return self.patch_size**HALVINGS

    def __str__(self) -> str:
        told = ", ".join(f"{k} {v}" for k, v in self.as_json().items() if k != "img_size")
        return f"SwinUNETR of window {'x'.join(map(str, self.img_size))}, {told}"


def read_architecture(
    checkpoint: Checkpoint, flags: Mapping[str, Any], new_head: bool = False
) -> tuple[SwinArchitecture, list[str]]:
    """The architecture of a checkpoint, and notes on what was guessed.

    Args:
        checkpoint: the weights.
        flags: "img_size", "downsample", and "in_channels", "out_channels" and "norm_name", which
            may be None for what the file has. If the numbers of channels are others than in the
            file, the layers that depend on them are not loaded.
        new_head: whether the output layer is started anew.
    """
    state, file = {m: t for m, (_, t) in by_model_names(checkpoint.state).items()}, checkpoint.file
    patches = state[_PATCHES].shape
    if len(patches) != 5 or len(set(patches[2:])) != 1:
        came = f"{file}, which embeds {list(patches[1:])}"
        fail("--pretrained", "a SwinUNETR for 3D volumes with patches of one side", came)
    depths, heads = [], []
    for stage in range(1, STAGES + 1):
        stem = f"swinViT.layers{stage}.0.blocks."
        blocks = {n.removeprefix(stem).split(".")[0] for n in state if n.startswith(stem)}
        table = state.get(f"{stem}0.attn.relative_position_bias_table")
        if table is None:
            wanted = f"{STAGES} stages of a SwinUNETR in {file}"
            fail("--pretrained", wanted, f"no {stem}0.attn.relative_position_bias_table")
        depths.append(len(blocks))
        heads.append(table.shape[1])
    side = round(table.shape[0] ** (1 / 3))
    if side**3 != table.shape[0] or side % 2 == 0:
        came = f"{table.shape[0]} relative positions in {file}"
        fail("--pretrained", "attention windows that are cubes", came)
    first = "swinViT.layers1.0.blocks.0."
    hidden, width = state[f"{first}mlp.linear1.weight"].shape
    notes: list[str] = []
    in_channels, out_channels = flags.get("in_channels"), flags.get("out_channels")
    if out_channels is None:
        if new_head or _HEAD not in state:
            wanted = "the number of classes with background"
            fail("--out-channels", wanted, f"none, and {file} gives no output layer")
        out_channels = state[_HEAD].shape[0]
    architecture = SwinArchitecture(
        in_channels=patches[1] if in_channels is None else in_channels,
        out_channels=out_channels,
        img_size=tuple(flags["img_size"]),
        feature_size=patches[0],
        depths=tuple(depths),
        num_heads=tuple(heads),
        window_size=(side + 1) // 2,
        patch_size=patches[2],
        mlp_ratio=hidden / width,
        qkv_bias=f"{first}attn.qkv.bias" in state,
        patch_norm="swinViT.patch_embed.norm.weight" in state,
        use_v2=any(name.startswith("swinViT.layers1c.") for name in state),
        norm_name=_norm(checkpoint, state, flags.get("norm_name"), notes),
        downsample=flags["downsample"],
    )
    multiple, sides = architecture.multiple, architecture.img_size
    # Instance norms need two voxels where the transformer is at its coarsest.
    if any(side % multiple for side in sides) or sides == (multiple,) * 3:
        wanted = f"multiples of {multiple}, not all of them {multiple}"
        fail("--img-size", wanted, " ".join(map(str, sides)))
    notes.append(f"downsample: {architecture.downsample}, which no shape tells; else --downsample")
    return architecture, notes


def load_swin(
    architecture: SwinArchitecture, checkpoint: Checkpoint, new_head: bool = False
) -> tuple[nn.Module, list[str], list[str]]:
    """The SwinUNETR with all that fits of a checkpoint.

    Returns:
        The network; sentences on what of the file did not fit and what of the network got no
        value; and the names of the parameters that got none, which have to be trained.
    """
    model = architecture.build()
    wanted, notes = model.state_dict(), []
    taken: dict[str, Tensor] = {}
    unfit: dict[str, list[str]] = {}
    for name, (own, tensor) in by_model_names(checkpoint.state).items():
        if new_head and name.startswith("out."):
            why = "the output layer, which --new-head starts anew"
        elif name not in wanted:
            why = next(what for pattern, what in _FOREIGN.items() if re.search(pattern, own))
        elif tensor.shape != wanted[name].shape:
            why = f"shape {list(tensor.shape)} in place of {list(wanted[name].shape)}"
        else:
            taken[name] = tensor
            continue
        unfit.setdefault(why, []).append(own)
    model.load_state_dict({**wanted, **taken})
    for why, names in unfit.items():
        notes.append(f"not taken from the file: {folded(names)} ({why})")
    parameters = {name for name, _ in model.named_parameters()}
    fresh = [name for name in wanted if name not in taken]
    if fresh:
        notes.append(f"not in the file, so they begin anew: {folded(fresh)}")
    count = sum(wanted[name].numel() for name in taken)
    whole = sum(tensor.numel() for tensor in wanted.values())
    notes.append(f"{len(taken)} of {len(wanted)} entries, {count / whole:.1%} of the numbers")
    return model, notes, [name for name in fresh if name in parameters]


def has_head(checkpoint: Checkpoint) -> bool:
    """Whether the file has an output layer."""
    return _HEAD in by_model_names(checkpoint.state)


def by_model_names(state: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """The entries by the names that MONAI's SwinUNETR has for them: -> name in the file, tensor.

    Self-supervised pretraining has no network around the transformer, or calls the transformer
    ``swin_vit``. It calls the layers of a perceptron ``fc1`` and ``fc2``.
    """
    inner = _PATCHES.removeprefix("swinViT.")
    prefix = next(p for p in ("swinViT.", "swin_vit.", "") if f"{p}{inner}" in state)
    named = {}
    for own, tensor in state.items():
        inside = own.startswith(prefix)
        name = f"swinViT.{own.removeprefix(prefix)}" if inside else own
        named[re.sub(r"\.mlp\.fc([12])\.", r".mlp.linear\1.", name)] = (own, tensor)
    return named


def _norm(
    checkpoint: Checkpoint, state: dict[str, Tensor], given: str | None, notes: list[str]
) -> str:
    """The kind of normalisation of the convolutional part, which a file may lack."""
    if not any(name.startswith("encoder1.") for name in state):
        return given or "instance"
    return read_norm(replace(checkpoint, state=state), given, notes)
