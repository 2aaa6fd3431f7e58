"""What must not be lost without a word: gradients of another core, and layers that never run."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..operators.eager import LatestSum


class LateGradient:
    """Gives a core that is frozen by now the gradient of a graph that it was trained in.

    autograd drops the gradient of a leaf that asks for none any more, without a word. A hook on the
    leaf still gets it, and stays there: a core that is trained, frozen and trained again has one.
    """

    @classmethod
    def keep(cls, core: nn.Parameter) -> None:
        """For a core that is about to be frozen, or just was."""
        hooks = core._backward_hooks or {}
        if any(isinstance(hook, cls) for hook in hooks.values()):
            return
        is_trained = core.requires_grad
        core.requires_grad_(True).register_hook(cls(core))  # torch takes none on a frozen leaf
        core.requires_grad_(is_trained)

    def __init__(self, core: nn.Parameter) -> None:
        self._core = weakref.ref(core)

    def __call__(self, grad: Tensor) -> None:
        """The hook."""
        core = self._core()
        if core is not None and not core.requires_grad:
            grad = grad.detach().to(core.dtype)
            core.grad = grad.clone() if core.grad is None else core.grad + grad


class ForwardCore:
    """Refuses to compute a checkpoint again with another core than that of its forward.

    Activation checkpointing runs a layer a second time, within the backward. It compares shapes and
    not values, so another adapter would go unseen, and the gradient would be that of a mixture.
    """

    def __init__(self) -> None:
        self._latest: tuple[int, int] | None = None

    def check(self, core: tuple[int, int], sums: LatestSum) -> None:
        """To be called in every forward of a trained stack, with what tells its cores apart.

        ``sums`` knows of graphs of other cores that wait for their backward: it may be theirs.

        Raises:
            RuntimeError: a second forward, maybe with another core than the first one.
        """
        if torch._C._current_graph_task_id() == -1:
            self._latest = core
        elif torch.is_grad_enabled() and (
            self._latest not in (None, core) or sums.is_former_pending()
        ):
            refuse_other_core()


def refuse_other_core() -> NoReturn:
    """For a layer that activation checkpointing computes again, with another core maybe.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "core: expected the adapter of the forward where activation checkpointing computes a layer "
        "again, got another one; call backward before another adapter is activated, and within the "
        "batch of many"
    )


#: So many layers a warning names.
_NAMED = 5


def warn_of_unused(caller: str, names: Sequence[str]) -> None:
    """Names adapted layers that the model did without, if there are any."""
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        warnings.warn(
            f"{caller}: {', '.join(names[:_NAMED])}{more} never ran: adapted layers that the model "
            "neither called nor read while it used others; their slices of the cores are not "
            "trained",
            stacklevel=3,
        )
