"""Rank and alpha per layer, by ``rank_pattern`` and ``alpha_pattern``, which mean what LoRA's mean.

A key is the end of a layer's name, or a regular expression for such an end. Of several keys that
match a layer, the first one counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from peft.utils.other import get_pattern_key

#: Fields of the config -> the field that has the value of all other layers.
PATTERNS = {"rank_pattern": "rank", "alpha_pattern": "alpha"}


class Patterned(Protocol):
    """The fields of `config.TCURConfig` that say the rank and alpha of each layer."""

    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]


def check_rank(argument: str, value: Any) -> None:
    """Refuses what is no rank.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{argument}: expected at least 1, got {value}")


def check_alpha(argument: str, value: Any) -> None:
    """Refuses what is no scale.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{argument}: expected a finite number, got {value}")


def checked_pattern(config: Patterned, argument: str) -> dict[str, Any]:
    """The pattern in this field of a config, as a dictionary; None is an empty one.

    Raises:
        TypeError, ValueError: it is no dictionary, or a key or value in it is wrong.
    """
    given = getattr(config, argument)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        wanted = f"{{name or regular expression: {PATTERNS[argument]}}}"
        raise TypeError(f"{argument}: expected a dict {wanted}, got {type(given).__name__}")
    check = {"rank": check_rank, "alpha": check_alpha}[PATTERNS[argument]]
    for key, value in given.items():
        if not isinstance(key, str):
            raise TypeError(f"{argument}: expected keys of type str, got {key!r}")
        try:
            re.compile(key)
        except re.error as error:
            wanted = "names or regular expressions"
            raise ValueError(f"{argument}: expected {wanted}, got {key!r} ({error})") from error
        check(f"{argument}[{key!r}]", value)
    return dict(given)


def rank_of(config: Patterned, layer: str) -> int:
    """The rank of a layer, by its name in the model."""
    return config.rank_pattern.get(_key(config.rank_pattern, layer), config.rank)


def alpha_of(config: Patterned, layer: str) -> float:
    """The alpha of a layer, by its name in the model."""
    return config.alpha_pattern.get(_key(config.alpha_pattern, layer), config.alpha)


def check_matches(config: Patterned, layers: Iterable[str]) -> None:
    """Refuses a key that decides about none of the targeted layers; LoRA ignores such a key.

    Raises:
        ValueError: the message names the key.
    """
    names = list(layers)
    for argument in PATTERNS:
        pattern = getattr(config, argument)
        used = {_key(pattern, name) for name in names}
        for key in pattern:
            if key not in used:
                raise ValueError(
                    f"{argument}: expected keys that match a targeted layer which no earlier key "
                    f"matches, got {key!r}"
                )


def _key(pattern: Mapping[str, Any], layer: str) -> str:
    key: str = get_pattern_key(list(pattern), layer)
    return key
