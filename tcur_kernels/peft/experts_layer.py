"""The layer that replaces a module with adapted experts in a peft model."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..adapters.linear_maps import place_of_experts
from ..layers.reading import effective_weight
from ..layers.rows import rows_of
from ..layers.weights import Place
from .experts import host_experts
from .hosted import AdapterStack
from .layer import BROKEN, TCURLinear
from .rows import Owner


class TCURExperts(TCURLinear):
    """A module with experts, some of whose parameters have tCURLoRA adapters.

    Other attributes than its own are those of the module.

    Args:
        base_layer: the module; it keeps its parameters and its forward.
        owner: stands for the tuner, with its rows and stacks.

    Attributes:
        tcur_stacks: adapter name -> the stacks that contain slices of the module.
        tcur_places: adapter name -> parameter -> the place in its stack.
        tcur_bases: parameter -> the place of its base weight.
    """

    tcur_places: dict[str, dict[str, Place]]  # type: ignore[assignment]

    def __init__(self, base_layer: nn.Module, owner: Owner) -> None:
        nn.Module.__init__(self)
        self.tcur_owner = owner
        self.tcur_bases: dict[str, Place] = {}
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self.tcur_remerge: list[str] = []
        object.__setattr__(self, "tcur_stacks", nn.ModuleDict())  # see `TCURLinear`
        self.tcur_places = {}
        host_experts(base_layer, self)

    def add_parameter(self, adapter_name: str, key: str, stack: AdapterStack, place: Place) -> None:
        """Stores the place of a parameter in a stack of a new adapter."""
        if adapter_name not in self.tcur_stacks:
            self.tcur_stacks[adapter_name] = nn.ModuleList()
            self.tcur_places[adapter_name] = {}
        self.tcur_stacks[adapter_name].append(stack)  # type: ignore[operator]
        self.tcur_places[adapter_name][key] = place
        if key not in self.tcur_bases:
            self.tcur_bases[key] = place_of_experts(self.base_layer, key)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_layer, name)

    @property
    def weight(self) -> Any:
        """The parameter of that name, if the module has one; see `HostedExperts`."""
        return self.base_layer.weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module, which reads its parameters."""
        self._begin()
        if self.disable_adapters and self.merged:
            self.unmerge()
        self._check_rows()
        return self.base_layer(*args, **kwargs)

    def _check_rows(self) -> None:
        """Refuses a batch in which rows go by adapters of their own."""
        rows = rows_of(self.tcur_owner)
        if rows is not None and not self.disable_adapters and self._adapted_by([*rows.names]):
            raise ValueError(
                "adapter_names: expected one adapter for all rows where experts are adapted, got "
                "a batch of many: tokens of many rows come to an expert together; call set_adapter "
                "and run the rows of each adapter by themselves"
            )

    def active_places(self, parameter: str) -> list[Place]:
        """The places of a parameter in the stacks of the adapters that count at present."""
        if self.disable_adapters or self.merged:
            return []
        self._begin()
        self._check_rows()
        if rows_of(self.tcur_owner) is not None:
            return []
        return self._places_of(parameter, self.active_adapters)

    def _places_of(self, parameter: str, names: list[str]) -> list[Place]:
        every = [self.tcur_places[name] for name in self._adapted_by(names)]
        return [places[parameter] for places in every if parameter in places]

    def get_delta_weight(self, adapter: str) -> dict[str, Tensor]:  # type: ignore[override]
        """The update of each parameter by one adapter, in its layout and in at least fp32."""
        return {
            key: place.in_layout(place.stack.update(place))
            for key, place in self.tcur_places[adapter].items()
        }

    @torch.no_grad()
    def _merged(self, adapter_names: list[str]) -> dict[str, Tensor]:
        """Parameters with the updates of these adapters, added in fp32 and rounded once."""
        found = {key: self._places_of(key, adapter_names) for key in self.tcur_bases}
        return {
            key: places[0].in_layout(effective_weight(*places))
            for key, places in found.items()
            if places
        }

    def merged_weights(self, adapter_names: list[str]) -> list[Tensor]:
        """The base weights plus the updates of these adapters."""
        return [*self._merged(adapter_names).values()]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the base weights and keeps copies of these; see `TCURLinear.merge`."""
        names = self._adapted_by(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        merged = self._merged([*self.merged_adapters, *names])
        if safe_merge and not all(torch.isfinite(weight).all() for weight in merged.values()):
            raise ValueError(
                "safe_merge: expected finite merged weights, got NaN or Inf by "
                f"{', '.join(names)}; {BROKEN.format(', '.join(names))}"
            )
        for key, weight in merged.items():
            base = self.tcur_bases[key]
            if base.backup is None:
                base.keep()
            base.stored.copy_(weight)
        self._tell_places()
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restores the base weights bit for bit from the copies that `merge` kept."""
        for base in self.tcur_bases.values():
            base.restore()
        self._tell_places()
        self.merged_adapters.clear()

    def _tell_places(self) -> None:
        for places in self.tcur_places.values():
            for key, place in places.items():
                place.backup = self.tcur_bases[key].backup

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Like ``nn.Module.state_dict``; it holds the base weights even while merged."""
        state = nn.Module.state_dict(self, *args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        keep_vars = kwargs.get("keep_vars", len(args) > 2 and args[2])
        for key, base in self.tcur_bases.items():
            if base.backup is not None:
                kept = base.backup if keep_vars else base.backup.detach()
                state[f"{prefix}base_layer.{key}"] = kept
        return state

    def _load_from_state_dict(self, *args: Any) -> None:
        """Loads the base weights; `merge_again` follows once the whole checkpoint is loaded."""
        if self.merged:
            self.tcur_remerge = list(self.merged_adapters)
            self.unmerge()
        nn.Module._load_from_state_dict(self, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> TCURExperts:
        """Like ``nn.Module._apply``; the copies that `merge` keeps move, too."""
        nn.Module._apply(self, fn, recurse)
        for base in self.tcur_bases.values():
            if base.backup is not None:
                base.backup = fn(base.backup)
        self._tell_places()
        return self

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False, since LoRA would have a pair of matrices for each expert."""
        return False
