"""The layer that replaces an adapted layer in a peft model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..layers.reading import UnreadableWeight, effective_weight, read_weight
from ..layers.rows import rows_of
from ..layers.switching import refuse_other_core
from ..layers.w_eff import is_within_backward
from ..layers.weights import Place
from ..operators.contract import HALVES
from ..operators.eager import Dithered, added_to_product, is_traced
from .hosted import AdapterStack, host, place_of
from .rows import NamedRows, Owner

#: peft's own message for a broken adapter, which its users know.
BROKEN = "NaNs detected in the merged weights. The adapter {} seems to be broken"


class TCURLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer with tCURLoRA adapters.

    Args:
        base_layer: the adapted ``nn.Linear`` or ``Conv1D``; it keeps its weight and is still
            called.
        owner: stands for the tuner, with its rows and stacks.

    Attributes:
        tcur_stacks: adapter name -> the stack that contains the layer's slices.
        tcur_places: adapter name -> the place in that stack.
    """

    adapter_layer_names = ("tcur_stacks",)
    other_param_names = ("tcur_places",)

    tcur_stacks: nn.ModuleDict

    # of BaseTunerLayer
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    get_base_layer: Callable[[], nn.Module]

    def __init__(self, base_layer: nn.Module, owner: Owner) -> None:
        super().__init__()
        self.tcur_owner = owner
        self.tcur_base = place_of(base_layer)
        self.out_features, self.in_features = self.tcur_base.shape
        host(base_layer)
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self.tcur_remerge: list[str] = []
        # Not registered as a submodule. The tuner owns the stacks, so that a core, which all layers
        # of a stack share, has just one name in the model.
        object.__setattr__(self, "tcur_stacks", nn.ModuleDict())
        self.tcur_places: dict[str, Place] = {}

    def add(self, adapter_name: str, stack: AdapterStack, place: Place) -> None:
        """Stores the layer's place in the stack of a new adapter."""
        self.tcur_stacks[adapter_name] = stack
        self.tcur_places[adapter_name] = place

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Maps ``x`` [..., in_features] to [..., out_features] with the active adapters."""
        self._begin()
        compute = self._compute()
        if compute is not None:
            kwargs["tcur"] = compute
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y

    def _compute(self) -> Callable[[Tensor], Tensor] | None:
        """The function that the base layer must apply; None if it computes as usual."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return None
        rows: NamedRows | None = rows_of(self.tcur_owner)
        if rows is not None:
            return lambda x: self._by_rows(x, rows)
        active = [] if self.merged else self._adapted_by(self.active_adapters)
        if len(active) > 1:
            return lambda x: self._by_all(x, active)
        if not active:
            return None
        place = self.tcur_places[active[0]]
        return lambda x: place.stack.forward_slices(x, place)

    def _adapted_by(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.tcur_places]

    def _begin(self) -> None:
        """Before the layer computes: waits while another thread changes what all threads share.

        Refuses to recompute a checkpointed layer with other adapters than in its forward.
        """
        self.tcur_owner.let_changes_end()
        if is_traced() or not is_within_backward() or not torch.is_grad_enabled():
            return
        active = () if self.disable_adapters or self.merged else self.active_adapters
        for name, stacks in self.tcur_owner.stacks.items():
            if name not in active and any(stack.is_pending for stack in stacks):
                refuse_other_core()

    def _by_all(self, x: Tensor, names: list[str]) -> Tensor:
        """Applies the layer with several adapters at once, rounded once."""
        weight, bias = self.tcur_base.weight, self.tcur_base.bias
        dtype = weight.dtype
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        update = self._update(names)
        for name in names:
            self.tcur_places[name].ran = True
        with torch.autocast(x.device.type, enabled=False):
            if dtype not in HALVES:
                return nn.functional.linear(x, weight + update.to(dtype), bias)
            # Each update alone may be too small to change the last bit of the result or weight.
            added = nn.functional.linear(x.to(update.dtype), update).to(dtype)
            if bias is not None:
                added = Dithered.apply(added, bias)
            return added_to_product(x, weight, added)

    def _by_rows(self, x: Tensor, rows: NamedRows) -> Tensor:
        """Applies the layer with an adapter for each row."""
        names = self._names_of_rows(x, rows)
        if rows.lead is not None:
            if rows.lead not in self.tcur_places:
                return self._plain(x)
            place = self.tcur_places[rows.lead]
            with rows.cores_of(place.stack, self):
                y: Tensor = place.stack.forward_slices(x, place)
            return y
        parts, order = [], []
        for name in dict.fromkeys(names):
            own = torch.tensor([each == name for each in names], device="cpu")
            order.append(own.nonzero().flatten().to(x.device))
            part = x[order[-1]]
            if name in self.tcur_places:
                place = self.tcur_places[name]
                parts.append(place.stack.forward_slices(part, place))
            else:
                parts.append(self._plain(part))
        return torch.cat(parts)[torch.cat(order).argsort()]

    def _names_of_rows(self, x: Tensor, rows: NamedRows) -> tuple[str, ...]:
        """The adapter names of the rows of ``x``; refuses another number of rows."""
        names = rows.of(self)
        if x.shape[0] != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {x.shape[0]} respectively."
            )
        return names

    def _plain(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.tcur_base.weight, self.tcur_base.bias)

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, including adapters, in the base's layout.

        For models that read it and never call the layer. The gradient reaches the cores.

        Raises:
            RuntimeError: its values are used in a batch where each row has its own adapter; or a
                checkpointed layer is recomputed with other adapters.
        """
        self._begin()
        base: Tensor = self.get_base_layer().weight  # type: ignore[assignment]
        if self._compute() is None:
            return base
        if rows_of(self.tcur_owner) is not None:
            return UnreadableWeight.of(base)
        return read_weight(base, self._places(self.active_adapters))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update by one adapter, in the layout of the weight and in at least fp32."""
        return self._stored(self._update([adapter]))

    def _update(self, names: list[str]) -> Tensor:
        """The sum of these adapters' updates, ``[out_features, in_features]``."""
        total = sum(place.stack.update(place) for place in self._places(names))
        assert isinstance(total, Tensor)
        return total

    def _places(self, names: list[str]) -> list[Place]:
        return [self.tcur_places[name] for name in self._adapted_by(names)]

    def _stored(self, weight: Tensor) -> Tensor:
        """Brings ``[out_features, in_features]`` into the layout of the base weight."""
        return self.tcur_base.in_layout(weight)

    @torch.no_grad()
    def merged_weight(self, adapter_names: list[str]) -> Tensor:
        """The base weight plus the updates of these adapters, added in fp32 and rounded once."""
        places = self._places(adapter_names)
        return self._stored(effective_weight(*places) if places else self.tcur_base.weight)

    def merged_weights(self, adapter_names: list[str]) -> list[Tensor]:
        """All weights of the layer as `merged_weight` gives them."""
        return [self.merged_weight(adapter_names)]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the base weight and keeps a copy of it.

        Args:
            safe_merge: whether to refuse a merged weight that is not finite.
            adapter_names: by default the active ones.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = self._adapted_by(names)
        if not names:
            return
        merged = self.merged_weight([*self.merged_adapters, *names])
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                "safe_merge: expected finite merged weights, got NaN or Inf by "
                f"{', '.join(names)}; {BROKEN.format(', '.join(names))}"
            )
        if self.tcur_base.backup is None:
            self.tcur_base.keep()
            self._tell_places()
        with torch.no_grad():
            self.tcur_base.stored.copy_(merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restores the base weight bit for bit from the copy that `merge` kept."""
        if self.tcur_base.backup is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.tcur_base.restore()
        self._tell_places()
        self.merged_adapters.clear()

    def _tell_places(self) -> None:
        """Tells the places about the copy, since C and R are slices of the base weight."""
        for place in self.tcur_places.values():
            place.backup = self.tcur_base.backup

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Like ``nn.Module.state_dict``; it holds the base weight even while merged."""
        state = super().state_dict(*args, **kwargs)
        backup = self.tcur_base.backup
        if backup is not None:
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            keep_vars = kwargs.get("keep_vars", len(args) > 2 and args[2])
            state[f"{prefix}base_layer.weight"] = backup if keep_vars else backup.detach()
        return state

    def _load_from_state_dict(self, *args: Any) -> None:
        """Loads the base weight; `merge_again` follows once the whole checkpoint is loaded."""
        if self.tcur_base.backup is not None:
            self.tcur_remerge = list(self.merged_adapters)
            self.unmerge()
        super()._load_from_state_dict(*args)

    def merge_again(self) -> None:
        """Merges the adapters that were merged before a checkpoint was loaded."""
        names, self.tcur_remerge = self.tcur_remerge, []
        if names:
            self.merge(adapter_names=names)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TCURLinear:
        """Like ``nn.Module._apply``; the copy that `merge` keeps moves, too."""
        super()._apply(fn, recurse)
        if self.tcur_base.backup is not None:
            self.tcur_base.backup = fn(self.tcur_base.backup)
            self._tell_places()
        return self

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True, since the update is a matrix (of rank up to n3 * r)."""
        return True

    def __repr__(self) -> str:
        return "tcur." + super().__repr__()
