"""How a quantised layer computes: the library's product is there, and the update is added to it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autocast import is_autocast
from ..operators.eager import added_to_rounded, is_traced
from ..operators.functional import update_linear
from .groups import Group, GroupedRows
from .route import Operands, Routed
from .rows import rows_of
from .weights import Place


class QuantisedRoute(Routed):
    """The part of a stack that its quantised layers use."""

    def add_update(self, product: Tensor, x: Tensor, place: Place) -> Tensor:
        """The library's ``product`` of a layer, with its bias, plus the update of ``x``.

        The update goes through the factors. The sum is formed in at least fp32 and rounded once, to
        the dtype of the product, so that small updates survive in the mean.

        Args:
            product: ``[..., out_features]``.
            x: what the layer was given, ``[..., in_features]``.
            place: the weight.

        Raises:
            RuntimeError: the library's product has no gradient with respect to ``x``, which needs
                one; or the base changed and is not in memory.
            ValueError: ``x`` is nested, or does not fit the batch of adapters.
        """
        if not self.enabled:
            return product
        if x.is_nested:
            raise ValueError(
                "x: expected an ordinary tensor for a quantised layer, got a nested one"
            )
        traced = is_traced()
        if not traced:
            check_gradient(product, x, place)
            if not self.base.knows(place):
                self._look()
        batch = rows_of(self)
        if isinstance(batch, GroupedRows):
            core, adapter_ids = batch.groups[0].cores, None
        else:
            core, adapter_ids = self._core_for(x, batch, traced)
        source, dtype, precision, wide = x, x.dtype, self.precision, self.base.factors.dtype
        if is_autocast(x) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            precision = "bf16" if dtype == torch.bfloat16 else precision
        if wide == torch.float64 or dtype == torch.float64:
            dtype, precision = wide, "ieee" if wide == torch.float64 else precision
        x = x.to(dtype)
        operands = Operands(x, source, None, None, place, core, adapter_ids, dtype, precision)
        if not traced:
            place.ran = True
        if isinstance(batch, GroupedRows):
            update = self._update_by_groups(operands, batch, traced)
        elif traced or not self._is_plain(operands):
            update = self._update_by_operators(operands)
        else:
            update = self._by_node(operands)
        return added_to_rounded(product, update)

    def _update_by_groups(self, given: Operands, batch: GroupedRows, traced: bool) -> Tensor:
        """The update in a batch whose groups have other C and R: one call for each group."""
        if not traced:
            self.follow_groups(batch)
        return batch.forward(
            given.x,
            lambda x, ids, group: self._update_by_operators(
                given._replace(x=x, core=group.cores, adapter_ids=ids), group
            ),
        )

    def _update_by_operators(self, given: Operands, group: Group | None = None) -> Tensor:
        """The update through the operators, which check everything and which a compiler can see.

        Args:
            group: whose C and R to use; by default those of the stack.
        """
        factors = self.base.factors if group is None else group.factors
        core, adapter_ids = given.core, given.adapter_ids
        if given.x.is_meta:  # only shapes matter
            factors, core = factors.to("meta"), core.to("meta")
            adapter_ids = None if adapter_ids is None else adapter_ids.to("meta")
        place = given.place
        return update_linear(
            given.x,
            factors,
            core,
            place.slice_index,
            place.slices,
            self.scale if group is None else group.scale,
            precision=given.precision,
            adapter_ids=adapter_ids,
        )


def check_gradient(product: Tensor, x: Tensor, place: Place) -> None:
    """Refuses a product of the library without a gradient for tokens that need one.

    Raises:
        RuntimeError: so it is.
    """
    if torch.is_grad_enabled() and x.requires_grad and not product.requires_grad:
        raise RuntimeError(
            f"x: expected a product with a gradient by {place.name or 'the layer'}, whose input "
            f"needs one, got none: {place.kind} does not train through the layer here"
        )
