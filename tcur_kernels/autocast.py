"""What autocast must not reach: mathematics that decides its own precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def keys(*names: str) -> torch._C.DispatchKeySet:
    """A set of dispatch keys by their names."""
    each = [torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names]
    together = each[0]
    for one in each[1:]:
        together = together | one
    return together


AUTOCAST = keys("AutocastCPU", "AutocastCUDA", "AutocastMPS", "AutocastXPU")


def without_autocast() -> Any:
    """Context in which autocast reaches no product; a tenth of what ``torch.autocast`` costs."""
    return torch._C._ExcludeDispatchKeyGuard(AUTOCAST)


def outside_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The same, where it may be traced."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
