"""Guards against silent losses: gradients of a former core, and layers that never run."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..operators.gradient_sum import LatestSum


class LateGradient:
    """Delivers a late gradient to a core that was frozen after its forward.

    autograd silently drops the gradient of a leaf that no longer requires one, but a hook on the
    leaf still receives it. The hook stays on the core, so a core that is trained, frozen and
    trained again has just one.
    """

    @classmethod
    def keep(cls, core: nn.Parameter) -> None:
        """Installs the hook on a core that is about to be frozen, or just was."""
        hooks = core._backward_hooks or {}
        if any(isinstance(hook, cls) for hook in hooks.values()):
            return
        is_trained = core.requires_grad
        core.requires_grad_(True).register_hook(cls(core))  # torch takes none on a frozen leaf
        core.requires_grad_(is_trained)

    def __init__(self, core: nn.Parameter) -> None:
        self._core = weakref.ref(core)

    def __call__(self, grad: Tensor) -> None:
        """Adds the gradient to ``core.grad`` if the core is frozen; autograd does it otherwise."""
        core = self._core()
        if core is not None and not core.requires_grad:
            grad = grad.detach().to(core.dtype)
            core.grad = grad.clone() if core.grad is None else core.grad + grad


class ForwardCore:
    """Refuses to recompute a checkpointed layer with another core than in its forward.

    Activation checkpointing runs a layer a second time, within the backward. It compares shapes and
    not values, so it would not notice another adapter. The gradient would mix the two adapters.

    Threads may train in batches of their own, so each has a forward of its own to compare with. A
    backward in a thread without a forward, as autograd has them for a GPU, goes by the latest one.
    """

    def __init__(self) -> None:
        self._latest: tuple[int, int] | None = None
        self._own = threading.local()

    def check(self, core: tuple[int, int], sums: LatestSum) -> None:
        """Must be called in every forward of a trained stack; ``core`` identifies its core.

        ``sums`` knows whether graphs of former cores still await their backward. If so, the present
        backward may belong to one of them.

        Raises:
            RuntimeError: this is a second forward, possibly with another core than the first.
        """
        if torch._C._current_graph_task_id() == -1:
            self._latest = self._own.latest = core
        elif torch.is_grad_enabled():
            latest = getattr(self._own, "latest", self._latest)
            if latest not in (None, core) or sums.is_former_pending():
                refuse_other_core()


def refuse_other_core() -> NoReturn:
    """Raises the error for a layer that may be recomputed with another core than in its forward.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "core: expected the adapter of the forward where activation checkpointing computes a layer "
        "again, got another one; call backward before another adapter is activated, and within the "
        "batch of many"
    )


#: The largest number of layers that a warning names.
_NAMED = 5


def warn_of_unused(caller: str, names: Sequence[str]) -> None:
    """Warns of adapted layers that the model did not use, if there are any."""
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        warnings.warn(
            f"{caller}: {', '.join(names[:_NAMED])}{more} never ran: adapted layers that the model "
            "neither called nor read while it used others; their slices of the cores are not "
            "trained",
            stacklevel=3,
        )
