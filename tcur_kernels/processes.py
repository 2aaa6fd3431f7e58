"""What several processes ask of a stack: sharded weights, and checkpointing under DDP."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def is_sharded(tensor: object) -> bool:
    """Whether a process holds a part of the tensor only (FSDP2 outside of the module's forward)."""
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module costs an import of its own


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered if it is sharded: then all processes must call this."""
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
    """Refuses reentrant checkpointing under DDP, where it would be wrong without a word.

    A core belongs to many layers. Reentrant checkpointing runs a backward of its own in every
    checkpointed block, so the gradient of the core arrives in pieces; DDP takes the first piece for
    the whole, averages it, and the processes part ways. With ``static_graph=True`` DDP waits.

    The first pass of a reentrant checkpoint is known by gradients that are off in the forward of
    DDP, its second by running inside of a backward.
    """

    def __init__(self) -> None:
        self._suspect = False

    def check(self) -> None:
        """To be called in every forward of a trained stack.

        Raises:
            RuntimeError: the second pass of a reentrant checkpoint under DDP.
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
