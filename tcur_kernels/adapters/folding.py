"""Many names of modules in few words: numbers that run are folded, as in ``blocks.0-11.mlp``."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from .linear_maps import is_fused

#: A number within a name. One with leading zeros is text, because it would lose them.
_NUMBER = re.compile(r"(?<!\d)(0|[1-9]\d*)(?!\d)")


def layers_in_short(slices: Mapping[str, int]) -> list[str]:
    """Names of the layers of a stack, folded, in the order of their first slices.

    Args:
        slices: name of a layer -> how many matrices of the stack it holds, in their order.
    """
    order = {name: index for index, name in enumerate(slices)}
    found = []
    for count in dict.fromkeys(slices.values()):
        for text, names in folded(name for name, own in slices.items() if own == count).items():
            each = " each" if len(names) > 1 else ""
            fused = ": fused q, k, v" if count == 3 and is_fused(names[0]) else ""
            cut = f" ({count} matrices{each}{fused})" if count > 1 else ""
            found.append((order[names[0]], text + cut))
    return [text for _, text in sorted(found)]


def folded(names: Iterable[str]) -> dict[str, list[str]]:
    """Folds names that are equal but for their numbers.

    A folded name stands for all combinations of the numbers in it, and each of these was given:
    ``a.0-1.b.2,4`` stands for ``a.0.b.2``, ``a.0.b.4``, ``a.1.b.2`` and ``a.1.b.4``.

    Returns:
        Folded name -> the names that it stands for, in the order given. The numbers are in the
        order in which they first came, and so are the folded names.
    """
    alike: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for name in names:
        parts = _NUMBER.split(name)
        alike[tuple(parts[::2])].append(tuple(parts[1::2]))
    found = {}
    for texts, numbers in alike.items():
        rows = {row: [row] for row in numbers}
        for position in reversed(range(len(texts) - 1)):
            rows = _folded_at(position, rows)
        for row, own in rows.items():
            found[_joined(texts, row)] = [_joined(texts, each) for each in own]
    return found


_Rows = dict[tuple[str, ...], list[tuple[str, ...]]]


def _folded_at(position: int, rows: _Rows) -> _Rows:
    """Folds the rows that differ at one position alone; maps them to what they stand for."""
    equal: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for row in rows:
        equal[row[:position] + row[position + 1 :]].append(row)
    made = {}
    for rest, own in equal.items():
        run = _runs([int(row[position]) for row in own])
        whole = (*rest[:position], run, *rest[position:])
        made[whole] = [each for row in own for each in rows[row]]
    return made


def _runs(numbers: Sequence[int]) -> str:
    """Numbers in their order, with each run of successive ones as its first and last."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if run[1:] else f"{run[0]}" for run in runs)


def _joined(texts: Sequence[str], numbers: Sequence[str]) -> str:
    """The name of alternating texts and numbers."""
    return "".join(text + number for text, number in zip(texts, (*numbers, ""), strict=True))
