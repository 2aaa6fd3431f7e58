"""Averages adapter files, as a server of federated learning does (FedAvg).

Adapters of one base with the same indices share C and R, and an update is linear in its core. So
the mean of the cores is the core of the mean of the updates.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .file import Contents, read_contents

#: What the header of a file calls the parts of a stack, where that is no word of the interface.
_WORDS = {
    "members": "layers",
    "stored": "places of weights",
    "rows": "rows of R",
    "columns": "columns of C",
    "dtype": "dtype of the base",
    "sha256": "weights of the base",
}

#: Longer values (hashes) are not printed.
_LONG = 40


def average(weights: Mapping[str | Path, float], out: str | Path) -> None:
    """Writes the weighted mean of adapter files, as federated averaging does; needs no model.

    The files share C and R, so the mean of the cores gives the mean of the W_eff, exactly. What
    else was trained, and buffers such as the statistics of batch norms, are averaged number by
    number; integers are rounded. Sums are formed in fp64 and rounded once. Metadata and stored
    C and R are kept where all files have the same.

    Args:
        weights: path of a file -> its weight, such as the number of its training samples. They
            are divided by their sum.
        out: the file, written atomically.

    Raises:
        FileNotFoundError, TypeError, ValueError: a file or a weight is wrong, the weights have
            a sum of 0 or less, files differ in more than numbers, or numbers have no mean. The
            message says which. Nothing is written then.
    """
    shares = _shares(weights)
    paths = list(shares)
    # One after the other, so that only two files and the mean are in memory.
    common = read_contents(paths[0])
    means = {name: Mean(name, tensor) for name, tensor in _averaged(common).items()}
    for path in paths:
        contents = read_contents(path)
        _check_alike(common, contents, paths[0], path)
        common = _in_common(common, contents)
        for name, tensor in _averaged(contents).items():
            means[name].add(tensor, shares[path], path)
    found = {name: mean.result() for name, mean in means.items()}
    common.write(Path(out), common.tensors() | found)


class Mean:
    """The weighted mean of one tensor: summed in fp64 and rounded once.

    Args:
        name: of the tensor, for errors.
        first: its value in the first file.
    """

    def __init__(self, name: str, first: Tensor) -> None:
        self._name, self._first, self._is_same = name, first, True
        wide = torch.promote_types(first.dtype, torch.float64)  # complex numbers stay complex
        self._total = torch.zeros(first.shape, dtype=wide, device=first.device)
        self._broken: Path | None = None

    def add(self, tensor: Tensor, share: float, path: Path) -> None:
        """Adds the value of a file."""
        self._is_same = self._is_same and torch.equal(tensor, self._first)
        if self._broken is None and not torch.isfinite(tensor).all():
            self._broken = path
        self._total += tensor.to(self._total.dtype) * share

    def result(self) -> Tensor:
        """The mean; what is the same in all files stays as it is.

        Raises:
            ValueError: files differ in a tensor of booleans, or in one that is not finite.
        """
        dtype = self._first.dtype
        if self._is_same:
            return self._first
        if dtype == torch.bool:
            raise ValueError(
                f"weights: expected adapters with the same {self._name}, whose booleans have no "
                "mean, got different ones"
            )
        is_whole = not (dtype.is_floating_point or dtype.is_complex)
        mean = (self._total.round() if is_whole else self._total).to(dtype)
        if self._broken is not None or not torch.isfinite(mean).all():
            where = "their mean" if self._broken is None else self._broken
            raise ValueError(
                f"weights: expected finite numbers in {self._name}, got NaN or Inf in {where}"
            )
        return mean


def _shares(weights: Mapping[str | Path, float]) -> dict[Path, float]:
    """The share of each file in the mean; together they are 1.

    Raises:
        TypeError: ``weights`` does not map paths to numbers.
        ValueError: there are none, one is not finite, or their sum is not above 0.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights: expected {{path: weight}}, got {type(weights).__name__}")
    for path, weight in weights.items():
        if not isinstance(path, str | Path):
            raise TypeError(f"weights: expected paths, got {type(path).__name__}")
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            raise TypeError(f"weights: expected numbers, got {type(weight).__name__} for {path}")
        if not math.isfinite(weight):
            raise ValueError(f"weights: expected finite numbers, got {weight} for {path}")
    total = math.fsum(weights.values())
    if total <= 0:
        raise ValueError(f"weights: expected numbers with a sum above 0, got a sum of {total:g}")
    shares: dict[Path, float] = {}
    for path, weight in weights.items():
        shares[Path(path)] = shares.get(Path(path), 0.0) + float(weight) / total
    return shares


def _averaged(contents: Contents) -> dict[str, Tensor]:
    """What is averaged of a file: all its tensors but C and R."""
    bare = tuple(replace(stored, factors=None) for stored in contents.stacks)
    return replace(contents, stacks=bare).tensors()


def _check_alike(one: Contents, other: Contents, first: Path, path: Path) -> None:
    """Refuses two files that differ in more than the values of their tensors.

    Raises:
        ValueError: they do; the message names what differs.
    """

    def same(what: str, wanted: object, came: object) -> None:
        if wanted == came:
            return
        if isinstance(wanted, tuple | list) or len(str(wanted)) > _LONG:
            wanted, came = "that are the same", "others"
        raise ValueError(f"weights: expected {what} {wanted} at {path}, as at {first}, got {came}")

    same("names of stacks", *([s.plan.name for s in each.stacks] for each in (one, other)))
    for mine, theirs in zip(one.stacks, other.stacks, strict=True):
        entries = mine.as_json(), theirs.as_json()
        for key in sorted(entries[0], key=_WORDS.__contains__):  # settings first
            what = f"{_WORDS.get(key, key)} in stack {mine.plan.name}"
            same(what, *(entry[key] for entry in entries))
    same("patterns of train_also", one.train_also, other.train_also)
    same("frozen weights outside of the stacks", one.frozen_sha256, other.frozen_sha256)
    values = _averaged(one), _averaged(other)
    for name in sorted(values[0].keys() | values[1].keys()):
        kinds = [f"{v[name].dtype} {list(v[name].shape)}" if name in v else "none" for v in values]
        same(f"tensor {name}:", *kinds)


def _in_common(one: Contents, other: Contents) -> Contents:
    """``one`` without the metadata that differ, and without C and R unless both have them."""
    metadata = {
        key: value
        for key, value in one.metadata.items()
        if key in other.metadata and other.metadata[key] == value
    }
    stacks = tuple(
        replace(mine, factors=mine.factors if theirs.factors is not None else None)
        for mine, theirs in zip(one.stacks, other.stacks, strict=True)
    )
    return replace(one, stacks=stacks, metadata=metadata)
