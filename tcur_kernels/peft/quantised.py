"""The layer that replaces an adapted quantised layer in a peft model."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..layers.quantised_linear import plain_linear
from ..layers.quantised_route import check_gradient
from ..layers.rows import rows_of
from ..operators.eager import added_to_rounded
from .layer import TCURLinear
from .rows import NamedRows

#: What merging in place says.
REFUSED = (
    "merge_adapter: expected weights that W_eff can be written to, got quantised ones, which would "
    "round the update away; merge_and_unload() puts plain layers in their place"
)


class TCURQuantisedLinear(TCURLinear):
    """A quantised layer with tCURLoRA adapters: the library's product, and the update added to it.

    The base layer stays as it is, and computes with its own forward.
    """

    #: The dtype of the plain layer that merging makes; the tuner sets it.
    tcur_merged_dtype = torch.float32

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Maps ``x`` [..., in_features] to [..., out_features] with the active adapters."""
        self._begin()
        product: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return product
        rows: NamedRows | None = rows_of(self.tcur_owner)
        if rows is not None:
            return self._with_rows(product, x, rows)
        active = self._adapted_by(self.active_adapters)
        if len(active) > 1:
            return self._with_all(product, x, active)
        return self._with(product, x, active[0] if active else None)

    def _with(self, product: Tensor, x: Tensor, name: str | None) -> Tensor:
        """The product, with the update of one adapter if it adapts this layer."""
        place = None if name is None else self.tcur_places.get(name)
        if place is None:
            return product
        y: Tensor = place.stack.add_update(product, x, place)
        return y

    def _with_all(self, product: Tensor, x: Tensor, names: list[str]) -> Tensor:
        """The product with the updates of several adapters, rounded once."""
        check_gradient(product, x, self.tcur_base)
        update = self._update(names)
        for name in names:
            self.tcur_places[name].ran = True
        with torch.autocast(x.device.type, enabled=False):
            added = nn.functional.linear(x.to(update.dtype), update)
        return added_to_rounded(product, added)

    def _with_rows(self, product: Tensor, x: Tensor, rows: NamedRows) -> Tensor:
        """The product with the update of an adapter for each row."""
        names = self._names_of_rows(x, rows)
        if rows.lead is not None:
            if rows.lead not in self.tcur_places:
                return product
            with rows.cores_of(self.tcur_places[rows.lead].stack, self):
                return self._with(product, x, rows.lead)
        parts, order = [], []
        for name in dict.fromkeys(names):
            own = torch.tensor([each == name for each in names], device="cpu")
            order.append(own.nonzero().flatten().to(x.device))
            parts.append(self._with(product[order[-1]], x[order[-1]], name))
        return torch.cat(parts)[torch.cat(order).argsort()]

    @property
    def weight(self) -> Tensor:
        """The packed weight of the base layer, which says nothing of the adapters."""
        weight: Tensor = self.get_base_layer().weight  # type: ignore[assignment]
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses to write to a packed weight.

        Raises:
            ValueError: an adapter of this layer is to be merged.
        """
        if self._adapted_by(check_adapters_to_merge(self, adapter_names)):
            raise ValueError(REFUSED)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer; or, merged, a plain layer with the dequantised weight plus the updates.

        The tuner has checked by now that the merged weight is finite.
        """
        names = self._adapted_by(check_adapters_to_merge(self, adapter_names)) if merge else []
        if not names:
            return self.get_base_layer()
        weight = self.tcur_base.weight
        update = self._update(names)
        return plain_linear(
            self.tcur_base, weight.to(update.dtype) + update, self.tcur_merged_dtype
        )
