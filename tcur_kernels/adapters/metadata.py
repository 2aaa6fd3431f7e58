"""What a user keeps with an adapter: values that JSON can hold."""

from __future__ import annotations

import math
from typing import Any


def checked_metadata(value: Any) -> dict[str, Any]:
    """A copy of a dict of what JSON can hold; tuples become lists, as they do in a file.

    Raises:
        TypeError: it is no dict, or holds something that JSON cannot hold; the message says where.
    """
    if not isinstance(value, dict):
        raise TypeError(f"metadata: expected a dict, got {type(value).__name__}")
    try:
        copied: dict[str, Any] = _copied("metadata", value)
    except RecursionError:
        raise TypeError(
            "metadata: expected a dict that ends, got one that holds itself or is nested too deeply"
        ) from None
    return copied


def _copied(where: str, value: Any) -> Any:
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: expected strings as keys, got {key!r}")
        return {key: _copied(f"{where}[{key!r}]", own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(f"{where}[{index}]", own) for index, own in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{where}: expected a finite number, got {value}")
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(
        f"{where}: expected what JSON can hold (dict, list, str, int, float, bool or None), got "
        f"{type(value).__name__}"
    )
