"""Writes many names of parameters in few words."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence


def folded(names: Iterable[str]) -> str:
    """All the names, with what differs in braces, as a shell would expand them.

    ``vit.blocks.{0..11}.norm1.{weight,bias}`` is 24 names.
    """
    rows = [tuple((part,) for part in name.split(".")) for name in names]
    for place in reversed(range(max(map(len, rows), default=0))):
        groups: dict[tuple[object, ...], list[str]] = defaultdict(list)
        for row in rows:
            if place < len(row):
                groups[(row[:place], row[place + 1 :])] += row[place]
            else:
                groups[(row, None)] = []
        rows = [
            before if after is None else (*before, tuple(parts), *after)
            for (before, after), parts in groups.items()
        ]
    return ", ".join(".".join(map(braces, row)) for row in rows)


def braces(parts: Sequence[str]) -> str:
    """One part of a name, or several in braces; a run of numbers by its ends."""
    numbers = [int(part) for part in parts if re.fullmatch(r"0|[1-9]\d*", part)]
    if len(numbers) == len(parts) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return parts[0] if len(parts) == 1 else f"{{{','.join(parts)}}}"
