"""Where the base weights of `materialize` lie: one stack, or the weights of separate layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Base(NamedTuple):
    """The base weights, as the kernels take them."""

    tensor: Tensor  # the stack, or the first layer's weight
    places: Tensor  # of slices in separate layers, see `_table`
    # "stack", one tensor; "layers", a matrix for each slice; "beside", some hold several slices
    kind: str = "none"
    aligned: int = 1  # every place is a multiple of it, so a thread can load that many at once


def base_of(
    weights: Sequence[Tensor], counts: Sequence[int], n1: int, n2: int, unused: Tensor
) -> Base:
    """Returns the base for ``weights``, of which each holds ``counts`` slices."""
    layers, beside = weights[0].ndim == 2, len(counts) < sum(counts)
    if layers and not all(weight.is_contiguous() for weight in weights):
        # Kernels read contiguous weights, so these must be copied. Within one tensor the distances
        # are the same in every call, so `_table` does not keep a table for every copy.
        if beside:
            copy = torch.cat([weight.flatten() for weight in weights])
            parts = copy.split([weight.numel() for weight in weights])
            weights = [part.view(n1, -1) for part in parts]
        else:
            weights, layers = [torch.stack(list(weights))], False
    base = weights[0].contiguous()
    if not layers:
        return Base(base, unused, "stack")
    addresses = [weight.data_ptr() for weight in weights]
    size = base.element_size()
    distances = tuple((address - addresses[0]) // size for address in addresses)
    aligned = 16 // size if all(address % 16 == 0 for address in addresses) else 1
    if not beside:
        return Base(base, _table(distances, base.device), "layers", aligned)
    places = _places_beside(distances, counts, n1, n2)
    return Base(base, _table(places, base.device), "beside", math.gcd(aligned, n2))


def _places_beside(
    distances: Sequence[int], counts: Sequence[int], n1: int, n2: int
) -> tuple[int, ...]:
    """Returns where each slice lies, for layers that hold ``counts`` slices side by side.

    The result is three rows of n3 numbers. The first is the distance of each slice from the first
    layer's weight, in elements. The second is where the slice begins in W_eff, in units of n2. The
    third is how many slices its layer holds, which is the distance of its rows, in units of n2.
    """
    places: list[tuple[int, int, int]] = []
    for distance, count in zip(distances, counts, strict=True):
        matrix = len(places) * n1
        places += [(distance + s * n2, matrix + s, count) for s in range(count)]
    return tuple(itertools.chain(*zip(*places, strict=True)))


@cache
def _table(places: tuple[int, ...], device: torch.device) -> Tensor:
    """Copies `_places_beside`, or distances alone, to the device as int64, and keeps the copy.

    The copy depends on these numbers alone, so it never becomes wrong. It is never freed, because a
    captured graph may read it as long as the process lives. It takes 8 bytes a number, once for
    each set of weights that stays where it is.

    Raises:
        RuntimeError: the copy would have to be made while a CUDA graph is captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "weights: expected layers whose addresses are on the device already, as after one call "
            "before the capture of a CUDA graph, got layers that are seen in a capture first"
        )
    return torch.tensor(places, dtype=torch.int64, device=device)
