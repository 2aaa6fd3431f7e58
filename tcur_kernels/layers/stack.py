"""The stack: weights of one shape that share one trained core, and how their layers use it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import ReentrantGuard
from ..decompose import Selection, Slices
from ..decompose.slices import MAX_WORKSPACE, check_rank
from ..decompose.tensor import select_slices
from ..operators import cost
from ..operators.basis import DEFAULT_BASIS, Basis, check_basis, converted, scale_of
from ..operators.checks import check_cores, check_finite
from ..operators.dispatch import check_precision
from ..operators.factors import CURFactors, Precision
from .base import Base, is_here
from .groups import GroupedRows
from .linear import as_places, check_weights
from .quantised import REFUSED, kinds_of, slices_of_places
from .quantised_route import QuantisedRoute
from .rows import Per, Repeat, Rows, check_per, check_repeat, using_rows
from .weights import Place

#: What a copy of a stack has anew.
_REBUILT = {"_lock", "gate", "_kept", "_projected", "_gradient_sum", "_calls", "_forward_core"}


class TProductStack(QuantisedRoute):
    """All slices of one shape; owns the trained core, the frozen factors and W_eff.

    The weights stay with their layers. The stack only refers to them; nothing but `merge` copies or
    changes them. If a layer's weight is slice l of the stack, the layer computes with
    ``W_l + scale * (C * U * R)_l``. The core U starts at zero.

    Args:
        linears: layers in the order of their slices. The order matters, because the t-product is a
            circular convolution along it. They must have the same in_features, dtype and device,
            and their weights must not require grad. If the out_features of a layer is m times the
            smallest one, the layer takes m consecutive slices (a fused q, k, v projection takes
            three). May also be places of weights in modules that are adapted in place, see
            `weights.Place` and `attention.adapt_in_place`.
        rank: r, 1 to min(n1, n2).
        alpha: scale of the update, on top of that of the basis; see ``scale``.
        selection: rule for the slices, see `tensor_cur`.
        mode: "auto" (see `cost`), "materialized" or "factored".
        generator: for rules that draw at random.
        n1: rows of a slice, default the smallest out_features.
        precision: of the products of tokens with the factors: "ieee", or "bf16" for operands
            rounded to bf16 (a gradient error of about 4e-3). Under autocast to bf16 it is "bf16".
        factors: the slices for C and R, if they are not to be slices of these weights, for example
            because they come from a base in another dtype. The selection then only records their
            indices.
        source: where to read the weights from, to choose the slices and take C and R. Needed for
            layers on the meta device; by default the layers themselves.
        max_workspace, progress: for that reading, see `tensor_cur`.
        name: of the stack, for messages.
        basis: "slices": C and R are slices of the weights. "orthonormal": they are isometric
            factors that span the same; see `operators.basis`.

    Attributes:
        core: Parameter ``[n3, r, r]``, fp32 (fp64 for fp64 weights), whatever dtype the model is
            cast to. If there are several (`add_core`), the active one; the others are frozen.
        layers: the modules that hold the weights. If ``linears`` were layers, these are
            `TProductLinear` layers that share their parameters.
        places: where the weights are stored, in the order of their slices.
        merges: how often `merge` was called.
        is_unsettled: whether a checkpoint was loaded that `settle` has not processed yet.
        base: C and R, and the check that they still agree with the present weights.
        quantised: how the weights are quantised; empty if none is.
        rows, columns: the chosen indices I and J.
        basis: as given.
        scale: what C * U * R is multiplied by: alpha, in the orthonormal basis times √(n1 n2) /
            (2 r).

    Raises:
        TypeError, ValueError: an argument is wrong; the message says what was expected.
    """

    def __init__(
        self,
        linears: Sequence[nn.Linear] | Sequence[Place],
        rank: int = 8,
        alpha: float = 1.0,
        selection: Selection = "norm",
        mode: cost.Mode = "auto",
        generator: torch.Generator | None = None,
        n1: int | None = None,
        precision: Precision = "ieee",
        factors: CURFactors | None = None,
        source: Slices | None = None,
        max_workspace: int = MAX_WORKSPACE,
        progress: bool = False,
        name: str = "",
        basis: Basis = DEFAULT_BASIS,
    ) -> None:
        super().__init__()
        self.mode = cost.check_mode(mode)
        self.alpha = check_finite("alpha", alpha)
        places = as_places(linears, n1)
        check_weights(places)
        self.name, self.places = name, places
        self.quantised = kinds_of(places)
        if self.quantised and mode == "materialized":
            raise ValueError(
                f"mode: expected 'auto' or 'factored' for quantised weights "
                f"({', '.join(self.quantised)}), whose product is the library's, got 'materialized'"
            )
        self.n1, self.n2 = places[0].out_features // places[0].slices, places[0].in_features
        self.n3 = sum(place.slices for place in places)
        self.rank = rank
        check_rank("rank", rank, self.n1, self.n2)

        if source is None:
            source = slices_of_places("linears", places, max_workspace, progress, self.n1)
        self.precision = check_precision(precision, source.device)
        self.base = self._base_of(source, selection, generator, factors, check_basis(basis))
        factors = self.base.factors
        core = torch.zeros(self.n3, rank, rank, dtype=factors.dtype, device=source.device)
        self.register_parameter("core", nn.Parameter(core))

        self.enabled, self.merges = True, 0
        self._guard = ReentrantGuard()
        self._is_looked_over = self.is_unsettled = False
        self._reset()
        for place in places:
            place.stack = self
            place.remember()

    def _base_of(
        self,
        source: Slices,
        selection: Selection,
        generator: torch.Generator | None,
        factors: CURFactors | None,
        basis: Basis,
    ) -> Base:
        """Chooses the slices, and takes C and R of them unless they are given."""
        rows, columns = select_slices(source, self.rank, selection, generator)
        source.check_finite()
        is_own = factors is None
        if factors is None:
            factors = CURFactors(source.columns(columns), source.rows(rows), basis)
        elif factors.basis != basis:
            factors = CURFactors(*factors.slices, basis)
        sizes = (self.n3, self.n1, self.n2, self.rank)
        if (factors.n3, factors.n1, factors.n2, factors.rank) != sizes:
            raise ValueError(
                f"factors: expected n3, n1, n2, rank {', '.join(map(str, sizes))}, got {factors}"
            )
        indices = (rows.tolist(), columns.tolist())
        return Base(self.name, self.places, indices, factors.to(source.device), is_own)

    # -- C, R and the base

    @property
    def layers(self) -> list[nn.Module]:
        """The modules that hold the weights, in the order of their slices."""
        return list(dict.fromkeys(place.module for place in self.places))

    @property
    def lateral(self) -> Tensor:
        """C ``[n3, n1, r]``, in the basis of the stack."""
        return self.factors.lateral

    @property
    def horizontal(self) -> Tensor:
        """R ``[n3, r, n2]``, in the basis of the stack."""
        return self.factors.horizontal

    @property
    def rows(self) -> tuple[int, ...]:
        """The indices I of the rows that R consists of."""
        return self.base.rows

    @property
    def columns(self) -> tuple[int, ...]:
        """The indices J of the columns that C consists of."""
        return self.base.columns

    def converted(self, basis: Basis) -> list[Tensor]:
        """The values of `every_core` in another basis, in their dtypes; nothing is changed yet.

        Raises:
            ValueError: a core cannot be written in that basis with the precision of its dtype.
        """
        slices, cores = self.factors.slices, self.every_core()
        if basis == self.basis:
            return [core.detach().clone() for core in cores]
        sizes = (1.0, self.n1, self.n2, self.rank)  # alpha, which may be 0, stays
        ratio = scale_of(self.basis, *sizes) / scale_of(basis, *sizes)
        return [converted(c.detach(), slices, basis, ratio).to(c.dtype) for c in cores]

    @torch.inference_mode(False)  # a later training step uses the new factors, too
    @torch.no_grad()
    def adopt(self, basis: Basis, values: Sequence[Tensor]) -> None:
        """Changes to a basis in which the cores have these values; see `converted`."""
        key = self.indices_key
        for core, value in zip(self.every_core(), values, strict=True):
            core.copy_(value)
            core.grad = None
        self.base.change_basis(basis)
        if key in self.holder._buffers:
            self.holder._buffers[self.indices_key] = self.holder._buffers.pop(key)
        self._look()

    def certify(self) -> None:
        """Checks that C and R are slices of the base weights; see `Base.certify`."""
        self._look()
        self.base.certify()

    def was_misused(self, place: Place) -> None:
        """Called when W_eff, as read from a weight, was written through a view."""
        self.base.misuse = (
            f"weight: expected a view of W_eff that is not written to, got a write in place to a "
            f"part of the weight of {place.name or 'a layer'}, which would be lost; write to its "
            "base_weight"
        )
        self.base.suspect()

    def loaded(self, place: Place) -> None:
        """Called when a checkpoint has loaded the base weight of a place."""
        self.base.suspect(place)
        self._kept.invalidate()
        self.is_unsettled = True

    def train(self, mode: bool = True) -> TProductStack:
        """Like ``nn.Module.train``; averaged weights may be swapped in, so W_eff is in doubt."""
        self.doubt()
        return super().train(mode)

    @contextmanager
    def batch(
        self,
        cores: Tensor,
        adapter_ids: Tensor,
        repeat: Repeat | None = None,
        per: Per = "row",
    ) -> Iterator[None]:
        """Context in which row b of a batch uses ``cores[adapter_ids[b]]``, in this thread.

        Args:
            cores: ``[A, n3, r, r]``, dtype and device of ``core``; the gradient reaches them.
            adapter_ids: int64 ``[B]``. The batch must be the first axis of every input.
            repeat: how rows repeat if a layer gets a multiple of B rows: "each" row several times
                in a row (beams, windows), or "all" rows several times (guidance). If None, such an
                input is refused.
            per: "row", or "token": ids are then ``[B, T]`` for inputs ``[B, T, in_features]``, or
                ``[T]`` for inputs ``[T, in_features]`` or ``[1, T, in_features]``.

        Raises:
            TypeError, ValueError: the cores or ids do not fit.
        """
        check_per(per, repeat)
        is_flat = per == "row" or not isinstance(adapter_ids, Tensor)
        check_cores(cores, self.factors, adapter_ids if is_flat else adapter_ids.flatten())
        check_repeat(repeat)
        try:
            with using_rows(self, Rows(cores, adapter_ids, repeat, per)):
                yield
        finally:
            self._projected.forget()

    @contextmanager
    def grouped(self, rows: GroupedRows) -> Iterator[None]:
        """Context in which the rows of a batch use the C, R and cores of their groups."""
        with using_rows(self, rows):
            yield

    def merge(self) -> None:
        """Writes W_eff into the layers' weights and keeps a copy of the base weights."""
        if self.is_merged:
            raise ValueError("merge: expected an unmerged stack, got one that is merged already")
        if self.quantised:
            raise ValueError(REFUSED)
        for place in self.places:
            if not is_here(place):
                raise ValueError(
                    "merge: expected whole weights, got sharded or offloaded ones; save the "
                    "adapter, and merge it into a model on one process"
                )
        self._look()
        for place in self.places:
            place.keep()
        self._write_w_eff()
        self.merges += 1

    def unmerge(self) -> None:
        """Restores the base weights, bit for bit, from the copies that `merge` kept."""
        if not self.is_merged:
            raise ValueError("unmerge: expected a merged stack, got one that is not merged")
        for place in self.places:
            place.restore()

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return (
            f"n3={self.n3}, n1={self.n1}, n2={self.n2}, rank={self.rank}, alpha={self.alpha}, "
            f"basis={self.basis}, mode={self.mode}"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy or pickle of the stack omits W_eff and other caches; they are rebuilt on demand.
        return {key: value for key, value in self.__dict__.items() if key not in _REBUILT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()
