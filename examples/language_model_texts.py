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
        name: what tables call it.
        training: most of it.
        validation: what learning rates are chosen by.
        test: what is reported.
    """

    name: str
    training: Tensor
    validation: Tensor
    test: Tensor


def read_text(path: Path, encode: Encode, context: int) -> Text:
    """A text file as numbers: 85 % to train on, 5 % to choose by, 10 % to report.

    Raises:
        SystemExit: no such file, not UTF-8, or too short for the context.
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
    """A vocabulary of the characters of some files; encoding and decoding by it."""
    alphabet = sorted({c for path in paths for c in path.read_text(encoding="utf-8")})
    numbers = {character: number for number, character in enumerate(alphabet)}
    return lambda text: [numbers[c] for c in text], lambda ids: "".join(alphabet[i] for i in ids)


def batches(numbers: Tensor, context: int, batch: int, generator: torch.Generator) -> Tensor:
    """Random windows ``[batch, context]``."""
    starts = torch.randint(len(numbers) - context, (batch,), generator=generator)
    return numbers[starts[:, None] + torch.arange(context)]


def windows(numbers: Tensor, context: int) -> Tensor:
    """All of it in consecutive windows ``[n, context]``, a rest shorter than that left out."""
    return numbers[: len(numbers) // context * context].view(-1, context)
