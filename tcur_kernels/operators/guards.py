"""Contexts in which operators and products run without some of torch's layers above kernels."""

from __future__ import annotations

from typing import Any

import torch

from ..autocast import AUTOCAST, keys
from . import contract

_AUTOGRAD = keys("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")
_ABOVE_KERNELS = AUTOCAST | _AUTOGRAD | contract.VIEWS


def kernels_alone() -> Any:
    """Context in which an operator is its kernel: no autograd, no autocast, no views."""
    return torch._C._ExcludeDispatchKeyGuard(_ABOVE_KERNELS)


def without_views() -> Any:
    """Context in which torch's products return tensors that autograd does not take for views.

    If a node returned a view, autograd would not let anyone change it in place.
    """
    return torch._C._ExcludeDispatchKeyGuard(contract.VIEWS)
