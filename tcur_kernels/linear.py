"""The linear layer of a stack, and what is asked of the layers that make one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .distributed import is_sharded
from .kept import Stack


class TProductLinear(nn.Linear):
    """``nn.Linear`` whose weight is adapted as one or more consecutive slices of a stack.

    A drop-in: same call, same ``weight`` and ``bias`` (the very parameters of the layer it
    replaces), same ``state_dict``. The core belongs to ``stack``, not to the layer.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        stack: the stack this layer belongs to.
        slice_index: its first slice.
    """

    stack: Stack

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        stack: Stack,
        slice_index: int,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        # Not registered as a submodule: the core must have one name and one owner.
        object.__setattr__(self, "stack", stack)
        self.slice_index = slice_index
        self.slices = out_features // stack.n1

    @classmethod
    def from_linear(cls, linear: nn.Linear, stack: Stack, slice_index: int) -> TProductLinear:
        """The layer that takes the place of ``linear`` and shares its parameters."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device="meta",
            dtype=linear.weight.dtype,
            stack=stack,
            slice_index=slice_index,
        )
        layer.weight = linear.weight
        layer.bias = linear.bias
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., in_features] -> [..., out_features], with the stack's update."""
        return self.stack.forward_slices(input, self)

    def extra_repr(self) -> str:
        """That of ``nn.Linear``, and the place in the stack."""
        last = self.slice_index + self.slices - 1
        where = f"{self.slice_index}" if self.slices == 1 else f"{self.slice_index}-{last}"
        return f"{super().extra_repr()}, slice={where} of {self.stack.n3}, rank={self.stack.rank}"


def check_linears(linears: Sequence[nn.Linear]) -> None:
    """Refuses layers that cannot share a stack, naming what was expected and what came."""
    if not linears:
        raise ValueError("linears: expected at least one nn.Linear, got none")
    for linear in linears:
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linears: expected nn.Linear, got {type(linear).__name__}")
        weight, first = linear.weight, linears[0].weight
        if is_sharded(weight):
            raise ValueError(
                "linears: expected whole weights, got sharded ones; adapt first, then fully_shard"
            )
        if not weight.dtype.is_floating_point:
            raise TypeError(f"linears: expected a floating dtype, got {weight.dtype}")
        if weight.requires_grad:
            raise ValueError("linears: expected frozen weights, got one with requires_grad=True")
        if weight.shape[1] != first.shape[1]:
            raise ValueError(
                f"linears: expected {first.shape[1]} in_features as in the first layer, "
                f"got {weight.shape[1]}"
            )
        if (weight.dtype, weight.device) != (first.dtype, first.device):
            raise ValueError(
                f"linears: expected {first.dtype} on {first.device} as in the first layer, "
                f"got {weight.dtype} on {weight.device}"
            )


def slices_in(linear: nn.Linear, n1: int) -> int:
    """How many slices of n1 rows a layer takes."""
    if linear.out_features % n1:
        raise ValueError(
            f"linears: expected out_features to be a multiple of {n1}, got {linear.out_features}"
        )
    return linear.out_features // n1
