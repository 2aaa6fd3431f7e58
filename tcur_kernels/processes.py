"""Support for several processes: sharded weights, which is the first, and what a fork changes."""

from __future__ import annotations

import os
from functools import cache
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor


def is_sharded(tensor: object) -> bool:
    """Whether a process holds only a part of the tensor (FSDP2 outside of the module's forward)."""
    return hasattr(tensor, "full_tensor")  # a DTensor; isinstance would need an expensive import


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; if it is sharded, all processes must call this to gather it."""
    if not is_sharded(tensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def is_first_process() -> bool:
    """Whether this is the only process, or rank 0."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or (
        distributed.get_rank() == 0
    )


class Forked(Protocol):
    """What has locks, or something that one process alone may write."""

    def was_forked(self, is_child: bool) -> None:
        """Called after a fork, in the parent and in the child."""


_told: WeakSet[Forked] = WeakSet()


def tell_of_forks(owner: Forked) -> None:
    """Has an object told of every fork of this process, for as long as it lives."""
    _watch_forks()
    _told.add(owner)


@cache
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
        os.register_at_fork(
            after_in_parent=lambda: _was_forked(False), after_in_child=lambda: _was_forked(True)
        )


def _was_forked(is_child: bool) -> None:
    """Tells everyone; a child begins with one thread of torch.

    A child has none of the threads that OpenMP keeps, yet OpenMP would wait for them forever. The
    workers of a DataLoader begin with one thread for the same reason.
    """
    if is_child:
        torch.set_num_threads(1)
    for owner in list(_told):
        owner.was_forked(is_child)
