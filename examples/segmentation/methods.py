"""What each method trains, and how it is saved and loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tcur_kernels as tcur
from segmentation.files import fail, whole_file
from segmentation.preparation import Recipe


@dataclass(frozen=True)
class Method:
    """What a method trains: parameters by prefixes of their names, and cores if it has any."""

    label: str
    trains: tuple[str, ...]
    cores: bool = False
    seconds: float = 0.2  # per step of the demo on two cores, for the progress


DECODER = ("decoder", "out")
#: The first two are compared. The others help to explain the comparison: they show what can be
#: reached without the decoder, and with the whole transformer, which bounds every adapter of it.
METHODS = {
    "decoder": Method("decoder-only", DECODER, seconds=0.19),
    "tcurlora": Method("tCURLoRA", DECODER, cores=True, seconds=0.24),
    "head": Method("output layer only", ("out",), seconds=0.11),
    "core": Method("core + output layer", ("out",), cores=True, seconds=0.19),
    "vit-head": Method("full ViT + output layer", ("out", "vit")),
    "vit": Method("full ViT + decoder", (*DECODER, "vit")),
    "full": Method("full fine-tuning", ("",)),
}
#: Entries of the metadata of files: the format of adapters, and the digest of what was frozen.
_ADAPTER, _FROZEN = "tcur_kernels.adapter", "frozen_sha256"
PRETRAINING = Method("pretraining", ("",), seconds=0.27)


@dataclass(frozen=True)
class Settings:
    """How to train; every value is an option of examples/unetr_segmentation.py."""

    steps: int
    validate_every: int
    patience: int
    decoder_lr: float
    core_lr: float
    vit_lr: float
    rank: int
    alpha: float
    selection: str
    basis: str
    targets: tuple[str, ...] | None
    mirror: tuple[int, ...]
    device: str
    threads: int | None  # of torch; None: as torch chooses


class Trainee:
    """A network in training: what of it trains, and how to keep, restore and save that.

    Attributes:
        model: the network.
        groups: parameters and learning rates, for an optimizer.
        adapter: of the methods with cores.
        recipe: saved with whatever was trained.
    """

    def __init__(self, model: nn.Module, method: Method, settings: Settings, recipe: Recipe):
        """Freezes what the method freezes.

        The decoder has the same learning rate in every method. The cores have one of their own.
        """
        self.model, self.recipe = model, recipe
        self.adapter: tcur.Adapter | None = None
        rates = {"cores": settings.core_lr, "decoder": settings.decoder_lr}
        rates["rest"] = settings.vit_lr
        if method.cores:
            self.adapter = tcur.adapt(
                model,
                targets=None if settings.targets is None else list(settings.targets),
                rank=settings.rank,
                alpha=settings.alpha,
                selection=settings.selection,
                basis=settings.basis,
                train_also=[f"{prefix}*" for prefix in method.trains],
            )
            self.adapter.metadata = recipe.as_metadata()
        else:
            for name, parameter in model.named_parameters():
                parameter.requires_grad = name.startswith(method.trains)
        kinds: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
        for name, parameter in self._trained():
            is_core = name.startswith("tcur.")
            kind = "cores" if is_core else "decoder" if name.startswith(DECODER) else "rest"
            kinds[kind].append(parameter)
        self.groups = [{"params": ps, "lr": rates[kind]} for kind, ps in kinds.items() if ps]

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def count(self) -> int:
        """The number of trained scalars."""
        return sum(parameter.numel() for _, parameter in self._trained())

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes: trained parameters, and the statistics of batch norms."""
        buffers = [(n, b) for n, b in self.model.named_buffers() if not n.startswith("tcur.")]
        return {name: tensor.detach() for name, tensor in [*self._trained(), *buffers]}

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of `tensors`."""
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Writes a snapshot back."""
        for name, tensor in self.tensors().items():
            tensor.copy_(snapshot[name])

    def save(self, file: Path) -> None:
        """Writes what was trained and the recipe."""
        if self.adapter is not None:
            self.adapter.save(file)
            return
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors().items()}
        metadata = {name: json.dumps(v) for name, v in self.recipe.as_metadata().items()}
        metadata[_FROZEN] = digest_without(self.model, tensors)
        with whole_file(file) as fresh:
            save_file(tensors, fresh, metadata=metadata)


def read_recipe(file: Path) -> Recipe:
    """The recipe in a file that `Trainee.save` wrote."""
    if not file.is_file():
        fail("--adapter", "a file that examples/unetr_segmentation.py wrote", f"{file}: no file")
    try:
        with safe_open(file, framework="pt") as opened:
            plain = opened.metadata() or {}
        if plain.get("format") == _ADAPTER:
            metadata = tcur.read_metadata(file)
        else:
            metadata = {name: json.loads(text) for name, text in plain.items() if text[:1] == "{"}
    except (SafetensorError, ValueError) as error:
        fail("--adapter", "a whole safetensors file", f"{file} ({error})")
    return Recipe.of_metadata(metadata, file)


def load_trained(model: nn.Module, file: Path) -> tcur.Adapter | None:
    """Loads what `Trainee.save` wrote into the base; returns the adapter of methods with cores."""
    try:
        with safe_open(file, framework="pt") as opened:
            told = opened.metadata() or {}
        if told.get("format") == _ADAPTER:
            return tcur.load_adapter(model, file)
        state = load_file(file)
        foreign = model.load_state_dict(state, strict=False).unexpected_keys
        if foreign:
            raise ValueError(f"entries that the network lacks: {', '.join(foreign)}")
        if digest_without(model, state) != told.get(_FROZEN):
            raise ValueError("its weights are not those that the training began with")
    except (SafetensorError, ValueError, RuntimeError) as error:
        fail("--adapter", f"{file} to fit the network in --pretrained", f"an error ({error})")
    return None


def digest_without(model: nn.Module, trained: Mapping[str, Tensor]) -> str:
    """Digest of all weights but the trained ones, by which a file knows its base."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name not in trained:
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
