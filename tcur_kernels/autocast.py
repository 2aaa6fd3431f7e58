"""Keeps autocast away from computations that choose their own precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def keys(*names: str) -> torch._C.DispatchKeySet:
    """A set of dispatch keys by their names."""
    each = [torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names]
    together = each[0]
    for one in each[1:]:
        together = together | one
    return together


AUTOCAST = keys("AutocastCPU", "AutocastCUDA", "AutocastMPS", "AutocastXPU")


def without_autocast() -> Any:
    """Context without autocast, at a tenth of the cost of ``torch.autocast(enabled=False)``."""
    return torch._C._ExcludeDispatchKeyGuard(AUTOCAST)


def outside_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Context without autocast that can be traced."""
    # Of other devices torch is asked, which the compilers of torch 2.10 and 2.11 cannot trace.
    if device.type in ("cpu", "cuda") or torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``; the meta device has none."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return False  # the usual case, checked quickly
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)
