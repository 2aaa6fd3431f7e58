"""The two texts of the language-model example, as numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TEXTS = Path(__file__).parent / "texts"

#: Text -> token numbers.
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Text:
    """One text in three consecutive parts, as token numbers.

    Attributes:
        name: its name in tables.
        training: most of the text.
        validation: the part that chooses learning rates.
        test: the part for the reported results.
    """

    name: str
    training: Tensor
    validation: Tensor
    test: Tensor


def read_text(path: Path, encode: Encode, context: int) -> Text:
    """Reads a text file as numbers: 85 % for training, 5 % for validation, 10 % for testing.

    Raises:
        SystemExit: the file is missing, not UTF-8, or too short for the context.
    """
    try:
        numbers = torch.tensor(encode(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path}: expected a text file in UTF-8, got {error}") from error
    first, second = int(0.85 * len(numbers)), int(0.9 * len(numbers))
    parts = numbers[:first], numbers[first:second], numbers[second:]
    if min(map(len, parts)) <= context:
        raise SystemExit(
            f"{path}: expected more than {20 * (context + 1)} tokens for a context of {context}, "
            f"got {len(numbers)}"
        )
    return Text(path.stem, *parts)


def characters(*paths: Path) -> tuple[Encode, Callable[[list[int]], str]]:
    """Encoding and decoding functions for the vocabulary of all characters in some files."""
    alphabet = sorted({c for path in paths for c in path.read_text(encoding="utf-8")})
    numbers = {character: number for number, character in enumerate(alphabet)}
    return lambda text: [numbers[c] for c in text], lambda ids: "".join(alphabet[i] for i in ids)


def batches(numbers: Tensor, context: int, batch: int, generator: torch.Generator) -> Tensor:
    """Random windows ``[batch, context]``."""
    starts = torch.randint(len(numbers) - context, (batch,), generator=generator)
    return numbers[starts[:, None] + torch.arange(context)]


def windows(numbers: Tensor, context: int) -> Tensor:
    """Consecutive windows ``[n, context]``; a shorter rest at the end is left out."""
    return numbers[: len(numbers) // context * context].view(-1, context)
