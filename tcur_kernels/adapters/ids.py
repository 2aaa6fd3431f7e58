"""Ids of adapters as servers have them: for rows, for tokens, and for sequences that are packed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layers.rows import Per, check_per
from ..operators.checks import check_adapter_ids

#: The id of a row without an adapter.
NO_ADAPTER = -1

#: Names of adapters for rows, or for the tokens of each row; None: no adapter.
Names = Sequence[str | None] | Sequence[Sequence[str | None]]


def check_ids(
    adapter_ids: Tensor,
    adapters: int,
    device: torch.device,
    per: Per,
    cu_seqlens: Tensor | None,
    repeat: Any,
) -> tuple[Tensor, Per]:
    """Checks what `Adapter.batch` is given, and turns ids of packed sequences to ids of tokens.

    Args:
        adapter_ids: int64 ``[B]``, with per="token" ``[B, T]`` or ``[T]``, or with ``cu_seqlens``
            ``[S]``; each from -1 to adapters - 1.
        adapters: how many there are.
        device: of their cores.
        per: what an id belongs to.
        cu_seqlens: int32 or int64 ``[S + 1]``: where the sequences of a packed row begin, and where
            the last one ends.
        repeat: how rows repeat, which tokens cannot.

    Returns:
        The ids ``[B]``, ``[B, T]`` or ``[T]``, and what each belongs to.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says what was expected.
    """
    check_per(per)
    if not isinstance(adapter_ids, Tensor):
        raise TypeError(f"adapter_ids: expected a torch.Tensor, got {type(adapter_ids).__name__}")
    if per == "row" and adapter_ids.ndim == 2:
        raise ValueError(
            f"adapter_ids: expected [B] with per='row', got {list(adapter_ids.shape)}; ids of "
            "tokens need per='token'"
        )
    if per == "token" and adapter_ids.ndim not in (1, 2):
        raise ValueError(f"adapter_ids: expected [T] or [B, T], got {list(adapter_ids.shape)}")
    flat = adapter_ids.flatten() if per == "token" else adapter_ids
    check_adapter_ids(flat, adapters, device, least=NO_ADAPTER)
    if cu_seqlens is not None:
        if per == "token":
            raise ValueError("cu_seqlens: expected None with per='token', got a tensor")
        adapter_ids, per = _ids_of_packed(adapter_ids, cu_seqlens), "token"
    check_per(per, repeat)
    return adapter_ids, per


def without_negatives(adapter_ids: Tensor, adapters: int) -> Tensor:
    """The ids, where rows without an adapter go by the core of zeros after those of all adapters.

    On an accelerator, where ids are not looked at, one that is too large stays too large.
    """
    shifted = adapter_ids + (adapter_ids >= adapters)
    return torch.where(adapter_ids == NO_ADAPTER, adapters, shifted)


def _ids_of_packed(adapter_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """An id for each token ``[T]``, from one for each sequence."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: expected a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected dtype int32 or int64, got {cu_seqlens.dtype}")
    wanted = [len(adapter_ids) + 1]
    if list(cu_seqlens.shape) != wanted:
        raise ValueError(
            f"cu_seqlens: expected {wanted} for {len(adapter_ids)} ids of sequences, got "
            f"{list(cu_seqlens.shape)}"
        )
    bounds = cu_seqlens.tolist()  # once for a batch; not once for a layer
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens: expected 0 as the first entry, got {bounds[0]}")
    for before, after in itertools.pairwise(bounds):
        if after < before:
            raise ValueError(
                f"cu_seqlens: expected entries in ascending order, got {after} after {before}"
            )
    lengths = cu_seqlens.diff().to(adapter_ids)
    return adapter_ids.repeat_interleave(lengths, output_size=bounds[-1])


def distinct(names: Names) -> list[str]:
    """The adapters that are named, each once, in order.

    Raises:
        TypeError, ValueError: these are no names, or not as many in each row.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"names: expected a sequence of names, got {type(names).__name__}")
    rows: Sequence[Any] = [names] if all(map(_is_name, names)) else names
    for row in rows:
        if isinstance(row, str) or not isinstance(row, Sequence):
            raise TypeError(f"names: expected names of rows or of tokens, got {names!r}")
        if len(row) != len(rows[0]):
            raise ValueError(
                f"names: expected as many in each row, got {len(rows[0])} and {len(row)}"
            )
        for name in row:
            if not _is_name(name):
                raise TypeError(f"names: expected names or None, got {type(name).__name__}")
    return [name for name in dict.fromkeys(n for row in rows for n in row) if name is not None]


def ids_of(names: Names, numbers: Mapping[str, int], device: torch.device) -> Tensor:
    """The ids ``[B]`` of named rows, or ``[B, T]`` of named tokens; see `distinct`."""

    def of(entry: Any) -> Any:
        if _is_name(entry):
            return NO_ADAPTER if entry is None else numbers[entry]
        return [of(name) for name in entry]

    return torch.tensor([of(entry) for entry in names], dtype=torch.int64, device=device)


def _is_name(entry: Any) -> bool:
    return entry is None or isinstance(entry, str)
