"""Reentrant activation checkpointing: what would lose gradients of cores is refused.

torch's reentrant checkpoint runs its block with gradients off, and a second time within the
backward, but only if one of its inputs requires grad.
"""

from __future__ import annotations

import threading
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointFunction


class _Running(threading.local):
    """Whether this thread runs a checkpoint whose block will never run with gradients."""

    loses_gradients = False


_running = _Running()


@cache
def watch() -> None:
    """Has every reentrant checkpoint note what it does with gradients; called for each new stack.

    Whether gradients were on, so that somebody expects them, can only be known before
    ``CheckpointFunction`` is applied. autograd turns them off before it calls its forward. Neither
    its context nor a frame on the stack then knows what they were.
    """
    apply = CheckpointFunction.apply

    @wraps(apply)
    def noting(*args: Any) -> Any:
        before = _running.loses_gradients
        if torch.is_grad_enabled():
            _running.loses_gradients = not any(
                isinstance(each, Tensor) and each.requires_grad for each in args
            )
        try:
            return apply(*args)
        finally:
            _running.loses_gradients = before

    CheckpointFunction.apply = noting  # type: ignore[method-assign]


def refuse_lost_gradients() -> None:
    """Must be called wherever a core that requires grad is used, but not in traced code.

    Raises:
        RuntimeError: a reentrant checkpoint would leave the core without a gradient.
    """
    if _running.loses_gradients and not torch.is_grad_enabled():
        raise RuntimeError(
            "checkpoint: expected use_reentrant=False, or an input that requires grad, got a "
            "reentrant checkpoint whose inputs require none: the adapted layers in it would get no "
            "gradient. In transformers, pass "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or call "
            "model.enable_input_require_grads()"
        )


class ReentrantGuard:
    """Refuses reentrant checkpointing under DDP, which would silently give wrong gradients.

    Many layers share a core. Reentrant checkpointing runs a separate backward in every checkpointed
    block, so the gradient of the core arrives in pieces. DDP takes the first piece for the whole
    gradient and averages only that; the processes then diverge. With ``static_graph=True`` DDP
    waits for all pieces.

    The guard recognises the first pass of a reentrant checkpoint because gradients are off in the
    forward of DDP, and the second pass because it runs within a backward.
    """

    def __init__(self) -> None:
        self._suspect = False

    def check(self) -> None:
        """Must be called in every forward of a trained stack.

        Raises:
            RuntimeError: this is the second pass of a reentrant checkpoint under DDP.
        """
        if torch._C._current_graph_task_id() == -1:
            ddp = DistributedDataParallel._active_ddp_module
            self._suspect = ddp is not None and not torch.is_grad_enabled() and not ddp.static_graph
        elif self._suspect and torch.is_grad_enabled():
            raise RuntimeError(
                "reentrant activation checkpointing under DistributedDataParallel gives wrong "
                "gradients of a core that layers share: pass use_reentrant=False to checkpoint "
                "(gradient_checkpointing_kwargs={'use_reentrant': False} in transformers), or "
                "static_graph=True to DDP"
            )
