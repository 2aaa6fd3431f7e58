"""The layer that peft puts in the place of an adapted one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..functional import slice_update
from ..nn import TProductStack
from ..places import Place


class TCURLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer with tCURLoRA adapters.

    Args:
        base_layer: the adapted ``nn.Linear`` or ``Conv1D``; it keeps its weight.

    Attributes:
        tcur_stacks: adapter name -> the stack this layer has its place in.
        tcur_places: adapter name -> that place.
        tcur_rows: see `rows.rows_by_adapter`: the adapter of each row of the batch; or one adapter,
            the stacks of which hold the cores of all rows.
    """

    adapter_layer_names = ("tcur_stacks",)
    other_param_names = ("tcur_places",)

    tcur_stacks: nn.ModuleDict
    tcur_backup: Tensor | None

    # of BaseTunerLayer
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    get_base_layer: Callable[[], nn.Module]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = Place(base_layer).weight.shape
        self.merged_adapters: list[str] = []
        # Kept off module registration: the tuner owns the stacks, and a core that all layers of a
        # stack share has one name in the model.
        object.__setattr__(self, "tcur_stacks", nn.ModuleDict())
        self.tcur_places: dict[str, Place] = {}
        self.tcur_rows: str | tuple[str, ...] | None = None
        # The base weight while merged; a buffer, so that it moves with the layer.
        self.register_buffer("tcur_backup", None, persistent=False)

    def add(self, adapter_name: str, stack: TProductStack, place: Place) -> None:
        """Gives the layer its place in the stack of a new adapter."""
        self.tcur_stacks[adapter_name] = stack
        self.tcur_places[adapter_name] = place

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x`` [..., in_features] -> [..., out_features] with the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if isinstance(self.tcur_rows, tuple):
            return self._forward_rows(x, self.tcur_rows)
        wanted = self.active_adapters if self.tcur_rows is None else [self.tcur_rows]
        active = [name for name in wanted if name in self.tcur_places]
        if self.disable_adapters or self.merged or not active:
            y: Tensor = self.base_layer(x, *args, **kwargs)
            return y
        first, *others = active
        place = self.tcur_places[first]
        y = self._stack(first).forward_slices(x, place)
        for name in others:
            y = y + nn.functional.linear(x.to(y.dtype), self.get_delta_weight(name).to(y.dtype))
        return y

    def _forward_rows(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        """``x`` with an adapter for each row, one adapter after another."""
        each, rest = divmod(x.shape[0], len(names))
        if rest:
            raise ValueError(
                f"adapter_names: expected one for each of {x.shape[0]} rows, got {len(names)}"
            )
        parts, order = [], []
        for name in dict.fromkeys(names):
            rows = torch.tensor([own == name for own in names]).repeat_interleave(each)
            order.append(rows.nonzero().flatten().to(x.device))
            part = x[order[-1]]
            if name in self.tcur_places:
                parts.append(self._stack(name).forward_slices(part, self.tcur_places[name]))
            else:
                parts.append(self.base_layer(part))
        return torch.cat(parts)[torch.cat(order).argsort()]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of the weight by one adapter, oriented as the weight, dtype of the core."""
        stack, place = self._stack(adapter), self.tcur_places[adapter]
        update = slice_update(
            stack.factors, stack.core, place.slice_index, place.slices, stack.alpha
        )
        return update.t() if place.transposed else update

    def merged_weight(self, adapter_names: list[str]) -> Tensor:
        """The base weight plus the updates of these adapters: added in fp32, rounded once."""
        base = self.tcur_backup
        if base is None:
            base = self.get_base_layer().get_parameter("weight")
        names = [name for name in adapter_names if name in self.tcur_places]
        with torch.no_grad():
            updates = [self.get_delta_weight(name) for name in names]
            total = sum(updates, base.to(updates[0].dtype)) if updates else base
            return total.to(base.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the base weight, keeping a copy of it.

        Args:
            safe_merge: refuse to write a weight that is not finite.
            adapter_names: default the active ones.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.tcur_places]
        if not names:
            return
        weight = self.get_base_layer().get_parameter("weight")
        merged = self.merged_weight([*self.merged_adapters, *names])
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"safe_merge: expected finite merged weights, got NaN or Inf by {', '.join(names)}"
            )
        if self.tcur_backup is None:
            self.tcur_backup = weight.detach().clone()
            self._tell_places(self.tcur_backup)
        with torch.no_grad():
            weight.copy_(merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restores the base weight bit for bit from the copy that `merge` kept."""
        if self.tcur_backup is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with torch.no_grad():
            self.get_base_layer().get_parameter("weight").copy_(self.tcur_backup)
        self.tcur_backup = None
        self._tell_places(None)
        self.merged_adapters.clear()

    def _tell_places(self, backup: Tensor | None) -> None:
        """C and R are slices of the base weight, which is the copy while merged."""
        for place in self.tcur_places.values():
            place.backup = backup

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the update is a matrix, of rank up to n3 * r."""
        return True

    def _stack(self, adapter: str) -> TProductStack:
        stack = self.tcur_stacks[adapter]
        assert isinstance(stack, TProductStack)
        return stack

    def __repr__(self) -> str:
        return "tcur." + super().__repr__()
