"""Finds out which UNETR a checkpoint belongs to, and builds it.

Nearly everything can be read from the shapes of the weights. What cannot is the number of attention
heads, the sides of the window (only their product shows), and the kind of some normalisations.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from monai.networks.nets import UNETR
from torch import Tensor, nn

from segmentation.checkpoints import LANDMARK, Checkpoint
from segmentation.files import fail
from segmentation.names import folded

PATCH = 16  # voxels per side, fixed in MONAI's UNETR
BLOCKS = 12  # of the transformer, fixed too

_FIRST = "encoder1.layer.conv1.conv.weight"
_HEAD = "out.conv.conv."
_EMBEDDING = "vit.patch_embedding.patch_embeddings."

#: Names of ``--norm-name`` -> MONAI's ``norm_name``.
NORMS: dict[str, Any] = {
    "instance": "instance",
    "instance-affine": ("instance", {"affine": True}),
    "batch": "batch",
    "group": ("group", {"num_groups": 8}),
}

#: Some versions of MONAI have all of it, some the norm alone, and those up to 1.3 nothing.
_CROSS = r"vit\.blocks\.\d+\.(norm_)?cross_attn\."
#: Entries that some versions of MONAI write and no UNETR computes with: pattern -> what they are.
_UNUSED = {
    _CROSS: "cross attention, which a UNETR never uses",
    r"vit\.patch_embedding\.cls_token$": "a class token, which a UNETR never uses",
    r"(en|de)coder\d.*\.(conv3|norm3)\.": "shortcut convolutions that old versions of MONAI stored "
    "without using them",
}
#: What unexpected or missing entries mean, and what to do: pattern -> meaning.
_FOREIGN = {
    r"^tcur[._]": "an adapted model; adapter.merge(inplace=False).state_dict() gives plain weights",
    r"lora_|base_layer|modules_to_save": "a model adapted by peft; save the state dict of "
    "model.merge_and_unload() for plain weights",
    r"^vit\.blocks\.(1[2-9]|[2-9]\d)\.": f"more blocks than the {BLOCKS} of MONAI's UNETR",
    r"norm\d\.": "a normalisation that --norm-name does not have",
    r"": "parts that a UNETR does not have; if it computes the same without them, save it without",
}
_LACKING = {
    r"^out\.": "no output layer; --new-head starts a new one",
    r"^(encoder|decoder)\d": "no convolutional part, or not all of it: the weights of a "
    "transformer alone, or of another network",
    r"^vit\.blocks\.": f"not all of the {BLOCKS} blocks of MONAI's UNETR, or not all their parts",
    r"": "the file is not whole, or another network wrote it",
}


@dataclass(frozen=True)
class Architecture:
    """The arguments of MONAI's UNETR."""

    in_channels: int
    out_channels: int
    img_size: tuple[int, ...]
    feature_size: int
    hidden_size: int
    mlp_dim: int
    num_heads: int
    proj_type: str = "conv"
    norm_name: str = "instance"  # a key of NORMS
    conv_block: bool = True
    res_block: bool = True
    qkv_bias: bool = False

    @classmethod
    def of_json(cls, facts: Mapping[str, Any]) -> Architecture:
        """The architecture that `as_json` described."""
        return cls(**{**facts, "img_size": tuple(facts["img_size"])})

    def as_json(self) -> dict[str, Any]:
        """Plain values, for the metadata of an adapter."""
        return {**asdict(self), "img_size": list(self.img_size)}

    def arguments(self) -> dict[str, Any]:
        """Keywords for `monai.networks.nets.UNETR`."""
        return {**self.as_json(), "norm_name": NORMS[self.norm_name]}

    def build(self) -> nn.Module:
        """The network, with random weights."""
        return UNETR(**self.arguments())

    def __str__(self) -> str:
        window = "x".join(map(str, self.img_size))
        return (
            f"UNETR of window {window}, {self.in_channels} channels in, {self.out_channels} out, "
            f"feature_size {self.feature_size}, hidden_size {self.hidden_size}, mlp_dim "
            f"{self.mlp_dim}, num_heads {self.num_heads}, proj_type {self.proj_type}, norm "
            f"{self.norm_name}, qkv_bias {self.qkv_bias}, conv_block {self.conv_block}, res_block "
            f"{self.res_block}"
        )


def read_architecture(
    checkpoint: Checkpoint, flags: Mapping[str, Any], new_head: bool = False
) -> tuple[Architecture, list[str]]:
    """The architecture of a checkpoint, and notes on what was guessed.

    Args:
        checkpoint: the weights.
        flags: fields of `Architecture` that the user gave; None where not given. What the shapes
            tell must agree with them.
        new_head: whether the output layer is started anew, with any number of classes.
    """
    state = checkpoint.state
    notes: list[str] = []
    _check_kind(checkpoint)
    seen: dict[str, Any] = {
        "in_channels": state[_FIRST].shape[1],
        "feature_size": state[_FIRST].shape[0],
        "hidden_size": state[LANDMARK].shape[2],
        "mlp_dim": state["vit.blocks.0.mlp.linear1.weight"].shape[0],
        "proj_type": "conv" if f"{_EMBEDDING}weight" in state else "perceptron",
        "conv_block": "encoder2.blocks.0.0.conv.weight" in state,
        "res_block": "decoder5.conv_block.conv3.conv.weight" in state,
        "qkv_bias": any(re.fullmatch(r"vit\.blocks\.\d+\.attn\.qkv\.bias", n) for n in state),
    }
    if not new_head:
        if f"{_HEAD}weight" not in state:
            wanted = f"{_HEAD}weight in {checkpoint.file}, the output layer"
            fail("--pretrained", wanted, "none; --new-head starts a new one")
        seen["out_channels"] = state[f"{_HEAD}weight"].shape[0]
    for name, value in seen.items():
        given = flags.get(name)
        if given is not None and given != value:
            hint = "; --new-head starts another output layer" if name == "out_channels" else ""
            wanted = f"{value}, as the weights in {checkpoint.file} have{hint}"
            fail(f"--{name.replace('_', '-')}", wanted, given)
    if new_head:
        seen["out_channels"] = flags["out_channels"]
    seen["img_size"] = _window(checkpoint, flags.get("img_size"), notes)
    seen["num_heads"] = _heads(checkpoint, flags.get("num_heads"), notes)
    seen["norm_name"] = read_norm(checkpoint, flags.get("norm_name"), notes)
    return Architecture(**seen), notes


def load_unetr(
    architecture: Architecture, checkpoint: Checkpoint, new_head: bool = False
) -> tuple[nn.Module, list[str]]:
    """The UNETR with the weights of the checkpoint, and notes on entries that did not matter."""
    notes: list[str] = []
    model = architecture.build()
    wanted, state = model.state_dict(), dict(checkpoint.state)
    if new_head:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("out.")}
        state |= {name: tensor for name, tensor in wanted.items() if name.startswith("out.")}
    for pattern, meaning in _UNUSED.items():
        needless = [name for name in state if name not in wanted and re.match(pattern, name)]
        if needless:
            notes.append(f"not needed: {folded(needless)} ({meaning})")
        state = {name: tensor for name, tensor in state.items() if name not in needless}
    fresh = [name for name in wanted if name not in state and re.match(_CROSS, name)]
    if fresh:
        meaning = "cross attention, which not every MONAI stores and a UNETR never uses"
        notes.append(f"not in the file: {folded(fresh)} ({meaning})")
    state |= {name: wanted[name] for name in fresh}
    lines = _explained("unexpected", [name for name in state if name not in wanted], _FOREIGN)
    lines += _explained("missing", [name for name in wanted if name not in state], _LACKING)
    unlike = defaultdict(list)
    for name in (name for name in wanted if name in state):
        came, needed = _kind(state[name]), _kind(wanted[name])
        if came != needed:
            unlike[f"{came} in place of {needed}"].append(name)
    lines += [f"{what}: {folded(names)}" for what, names in unlike.items()]
    if lines:
        _refuse(checkpoint, f"the entries of a {architecture}", lines)
    model.load_state_dict(state)
    return model, notes


def _kind(tensor: Tensor) -> str:
    """What two entries must have in common: the shape, and whether they hold integers."""
    kind = "numbers" if tensor.is_floating_point() else "integers"
    return f"{kind} of shape {list(tensor.shape)}"


def _refuse(checkpoint: Checkpoint, wanted: str, lines: Sequence[str]) -> NoReturn:
    fail(
        "--pretrained",
        f"{wanted} in {checkpoint.file}",
        "differences:" + "".join(f"\n  {one}" for one in lines),
    )


def _explained(what: str, names: Sequence[str], meanings: Mapping[str, str]) -> list[str]:
    """For every meaning of names that are missing or not expected, a line with these names."""
    by_meaning: dict[str, list[str]] = defaultdict(list)
    for name in names:
        meaning = next(m for pattern, m in meanings.items() if re.search(pattern, name))
        by_meaning[meaning].append(name)
    return [
        f"{len(group)} {what} ({meaning}): {folded(group)}" for meaning, group in by_meaning.items()
    ]


def _check_kind(checkpoint: Checkpoint) -> None:
    """Refuses 2D networks, other patches, and files without the parts that sizes are read from."""
    state, file = checkpoint.state, checkpoint.file
    needed = [_FIRST, "vit.blocks.0.mlp.linear1.weight"]
    conv, perceptron = f"{_EMBEDDING}weight", f"{_EMBEDDING}1.weight"
    missing = [name for name in needed if name not in state]
    if conv not in state and perceptron not in state:
        missing.append(conv)
    if missing:
        _refuse(checkpoint, "a whole UNETR", _explained("missing", missing, _LACKING))
    shape = state[_FIRST].shape
    if len(shape) != 5:
        fail("--pretrained", "a UNETR for 3D volumes", f"{file}, one for {len(shape) - 2}D images")
    channels, patch = shape[1], PATCH**3
    embeds = list(state[conv if conv in state else perceptron].shape[1:])
    fits = [channels, PATCH, PATCH, PATCH] if conv in state else [patch * channels]
    if embeds != fits:
        came = f"{file}, which embeds {embeds} in place of {fits} numbers"
        fail("--pretrained", f"a UNETR with patches of {PATCH}³ voxels", came)
    positions = list(state[LANDMARK].shape)
    if len(positions) != 3:
        wanted = f"position embeddings [1, patches, hidden] in {file}"
        fail("--pretrained", wanted, f"{LANDMARK} of shape {positions}")


def _window(checkpoint: Checkpoint, given: Any, notes: list[str]) -> tuple[int, ...]:
    """The window, whose number of patches the position embeddings have."""
    patches = checkpoint.state[LANDMARK].shape[1]
    of = f"{patches} patches of {PATCH}³ voxels"
    if given is not None:
        if not _has_patches(given, patches):
            window = "x".join(map(str, given))
            fail("--img-size", f"a window of {of}, as {checkpoint.file} has", window)
        return tuple(given)
    told = checkpoint.told.get("img_size")
    sides = [told] * 3 if isinstance(told, int) else told
    if isinstance(sides, (list, tuple)) and _has_patches(sides, patches):
        notes.append(f"window: {'x'.join(map(str, sides))}, as it stands beside the weights")
        return tuple(sides)
    if told is not None:
        notes.append(f"img_size {told} beside the weights is ignored: they have {of}")
    side = round(patches ** (1 / 3))
    if side**3 != patches:
        wanted = f"the three sides in voxels, since {checkpoint.file} tells only their product"
        fail("--img-size", wanted, f"none ({of})")
    notes.append(f"window: taken to be a cube, since it has {patches} patches; else --img-size")
    return (side * PATCH,) * 3


def _has_patches(sides: Sequence[Any], patches: int) -> bool:
    """Whether a window of such sides has so many patches."""
    whole = len(sides) == 3 and all(isinstance(side, int) and side % PATCH == 0 for side in sides)
    return whole and math.prod(side // PATCH for side in sides) == patches


def _heads(checkpoint: Checkpoint, given: int | None, notes: list[str]) -> int:
    """The number of attention heads, which no shape tells."""
    hidden, told = checkpoint.state[LANDMARK].shape[2], checkpoint.told.get("num_heads")
    if given is not None:
        if hidden % given:
            fail("--num-heads", f"a divisor of hidden_size {hidden}", given)
        return given
    if isinstance(told, int) and told > 0 and hidden % told == 0:
        notes.append(f"num_heads: {told}, as it stands beside the weights")
        return told
    if told is not None:
        notes.append(f"num_heads {told} beside the weights is ignored: hidden_size is {hidden}")
    if hidden != 768:
        wanted = f"the number of attention heads for hidden_size {hidden}, which no shape tells"
        fail("--num-heads", wanted, "none")
    notes.append("num_heads: 12, as is usual for hidden_size 768; no shape tells it")
    return 12


def read_norm(checkpoint: Checkpoint, given: str | None, notes: list[str]) -> str:
    """The kind of normalisation of the convolutional part, by MONAI's names for its entries."""
    stem, state = "encoder1.layer.norm1.", checkpoint.state
    if f"{stem}weight" not in state:
        possible = ["instance"]
    elif f"{stem}running_mean" in state:
        possible = ["batch"]
    else:
        possible = ["instance-affine", "group"]
    if given is not None and given not in possible:
        fail("--norm-name", f"{' or '.join(possible)}, as the weights have", given)
    if given == "group" and state[_FIRST].shape[0] % 8:
        wanted = (
            f"instance-affine, since 8 groups do not divide feature_size {state[_FIRST].shape[0]}"
        )
        fail("--norm-name", wanted, given)
    if given is not None or len(possible) == 1:
        return given or possible[0]
    told = checkpoint.told.get("norm_name")
    told = tuple(told) if isinstance(told, list) else told
    named = [name for name in possible if NORMS[name] == told]
    if named:
        notes.append(f"norm: {named[0]}, as it stands beside the weights")
        return named[0]
    beside = "none" if told is None else f"{told} beside the weights"
    fail("--norm-name", f"{' or '.join(possible)}, which no shape tells apart", beside)
