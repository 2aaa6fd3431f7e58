"""The layer that peft puts in the place of an adapted one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..eager import HALVES, Dithered, added_to_product
from .effective import EffectiveWeight
from .hosted import AdapterStack, BasePlace, host
from .rows import Owner, Rows, rows_of

#: What peft's users know a broken adapter by.
BROKEN = "NaNs detected in the merged weights. The adapter {} seems to be broken"


class TCURLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer with tCURLoRA adapters.

    Args:
        base_layer: the adapted ``nn.Linear`` or ``Conv1D``; it keeps its weight, and is called.
        owner: of the tuner, for `rows.rows_of`.

    Attributes:
        tcur_stacks: adapter name -> the stack this layer has its place in.
        tcur_places: adapter name -> that place.
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

    def __init__(self, base_layer: nn.Module, owner: Owner) -> None:
        super().__init__()
        self.tcur_owner = owner
        # The base weight while merged; a buffer, so that it moves with the layer.
        self.register_buffer("tcur_backup", None, persistent=False)
        self.tcur_base = self._place(base_layer)
        self.out_features, self.in_features = self.tcur_base.weight.shape
        host(base_layer)
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        # Kept off module registration: the tuner owns the stacks, and a core that all layers of a
        # stack share has one name in the model.
        object.__setattr__(self, "tcur_stacks", nn.ModuleDict())
        self.tcur_places: dict[str, BasePlace] = {}

    def _place(self, base_layer: nn.Module) -> BasePlace:
        place = BasePlace(base_layer)
        place.layer = self
        return place

    def add(self, adapter_name: str, stack: AdapterStack, place: BasePlace) -> None:
        """Gives the layer its place in the stack of a new adapter."""
        place.layer = self
        self.tcur_stacks[adapter_name] = stack
        self.tcur_places[adapter_name] = place

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x`` [..., in_features] -> [..., out_features] with the active adapters."""
        compute = self._compute()
        if compute is not None:
            kwargs["tcur"] = compute
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y

    def _compute(self) -> Callable[[Tensor], Tensor] | None:
        """What the base layer is to compute; None: what it does by itself."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return None
        rows = rows_of(self.tcur_owner)
        if rows is not None:
            return lambda x: self._by_rows(x, rows)
        active = [] if self.merged else self._adapted_by(self.active_adapters)
        if len(active) > 1:
            return lambda x: self._by_all(x, active)
        if not active:
            return None
        stack, place = self._stack(active[0]), self.tcur_places[active[0]]
        return lambda x: stack(place, x)

    def _adapted_by(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.tcur_places]

    def _by_all(self, x: Tensor, names: list[str]) -> Tensor:
        """``x`` with several adapters at once, rounded once."""
        weight, bias = self.tcur_base.weight, self.tcur_base.bias
        dtype = weight.dtype
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        update = self._update(names)
        with torch.autocast(x.device.type, enabled=False):
            if dtype not in HALVES:
                return nn.functional.linear(x, weight + update.to(dtype), bias)
            # Each alone may be too small for the last bit of the result, or of the weight.
            added = nn.functional.linear(x.to(update.dtype), update).to(dtype)
            if bias is not None:
                added = Dithered.apply(added, bias)
            return added_to_product(x, weight, added)

    def _by_rows(self, x: Tensor, rows: Rows) -> Tensor:
        """``x`` with an adapter for each row."""
        names = rows.of(self)
        if x.shape[0] != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {x.shape[0]} respectively."
            )
        if rows.lead is not None:
            if rows.lead not in self.tcur_places:
                return self._plain(x)
            stack = self._stack(rows.lead)
            with rows.cores_of(stack, self):
                y: Tensor = stack(self.tcur_places[rows.lead], x)
            return y
        parts, order = [], []
        for name in dict.fromkeys(names):
            own = torch.tensor([each == name for each in names])
            order.append(own.nonzero().flatten().to(x.device))
            part = x[order[-1]]
            if name in self.tcur_places:
                parts.append(self._stack(name)(self.tcur_places[name], part))
            else:
                parts.append(self._plain(part))
        return torch.cat(parts)[torch.cat(order).argsort()]

    def _plain(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.tcur_base.weight, self.tcur_base.bias)

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, adapters included, stored as the base's is.

        For models that read it and never call the layer. The gradient reaches the cores.

        Raises:
            ValueError: when its values are used where each row of a batch has its own adapter.
        """
        base: Tensor = self.get_base_layer().weight  # type: ignore[assignment]
        if self._compute() is None:
            return base
        if torch.compiler.is_compiling():  # which drops what nobody uses
            return self._effective_weight()
        return EffectiveWeight(base, self._effective_weight)

    def _effective_weight(self) -> Tensor:
        if rows_of(self.tcur_owner) is not None:
            raise ValueError(
                "adapter_names: expected a model that calls its adapted layers, got one that "
                "computes with the weight of one, which is another for each row"
            )
        return self._sum_of_weights(self._adapted_by(self.active_adapters))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of the weight by one adapter, oriented as the weight, dtype of the core."""
        return self._stored(self._update([adapter]))

    def _update(self, names: list[str]) -> Tensor:
        """The sum of these adapters' updates, ``[out_features, in_features]``."""
        total = sum(self._stack(name)(self.tcur_places[name]) for name in names)
        assert isinstance(total, Tensor)
        return total

    def _stored(self, weight: Tensor) -> Tensor:
        """``[out_features, in_features]`` oriented as the base stores it."""
        return weight.t() if self.tcur_base.transposed else weight

    def _sum_of_weights(self, names: list[str]) -> Tensor:
        """The base weight plus those updates, as stored: added in fp32, rounded once."""
        base = self.tcur_base.weight
        if not names:
            return self._stored(base)
        update = self._update(names)
        return self._stored((base.to(update.dtype) + update).to(base.dtype))

    def merged_weight(self, adapter_names: list[str]) -> Tensor:
        """The base weight plus the updates of these adapters: added in fp32, rounded once."""
        with torch.no_grad():
            return self._sum_of_weights(self._adapted_by(adapter_names))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the base weight, keeping a copy of it.

        Args:
            safe_merge: refuse to write a weight that is not finite.
            adapter_names: default the active ones.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = self._adapted_by(names)
        if not names:
            return
        weight: Tensor = self.get_base_layer().weight  # type: ignore[assignment]
        merged = self.merged_weight([*self.merged_adapters, *names])
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                "safe_merge: expected finite merged weights, got NaN or Inf by "
                f"{', '.join(names)}; {BROKEN.format(', '.join(names))}"
            )
        if self.tcur_backup is None:
            self.tcur_backup = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restores the base weight bit for bit from the copy that `merge` kept."""
        if self.tcur_backup is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with torch.no_grad():
            self.get_base_layer().weight.copy_(self.tcur_backup)  # type: ignore[operator]
        self.tcur_backup = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the update is a matrix, of rank up to n3 * r."""
        return True

    def _stack(self, adapter: str) -> AdapterStack:
        stack = self.tcur_stacks[adapter]
        assert isinstance(stack, AdapterStack)
        return stack

    def __repr__(self) -> str:
        return "tcur." + super().__repr__()
