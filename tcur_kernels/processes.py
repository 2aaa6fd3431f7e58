"""Support for several processes: sharded weights, and checkpointing under DDP."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


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
