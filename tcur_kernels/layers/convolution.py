"""The convolutions of a stack: torch's own modules, adapted in place, that convolve with W_eff.

The slice of a convolution is its weight ``[out, in / groups, *kernel]`` as a matrix with one row
for each output channel. A transposed convolution stores ``[in, out / groups, *kernel]``: the weight
of the convolution whose adjoint it is. That matrix is taken as it is stored, with one row for each
input channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints import refuse_lost_gradients
from ..operators.eager import is_traced
from ..operators.factors import CURFactors
from ..operators.functional import slice_update
from .base import check_one_base
from .groups import GroupedRows
from .linear import Adapted, _AdaptedLinear
from .reading import read_weight
from .rows import Rows, rows_of
from .weights import CONVOLUTIONS, Place

_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


class _AdaptedConvolution(_AdaptedLinear):
    """A convolution with its weight in a stack. Its attributes are those of torch's module.

    ``weight`` gives W_eff, differentiable with respect to the core; ``base_weight`` is the base.
    """

    kernel_size: tuple[int, ...]
    bias: Tensor | None

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Like the forward of torch's module, with W_eff as the weight.

        In a batch of many adapters each row is convolved with the W_eff of its own adapter.

        Raises:
            ValueError: in a batch of many adapters: the input has no axis of rows, another number
                of them, or ids for single tokens. Or the base weight is a batch of several.
        """
        place = self.tcur_place
        stack = place.stack
        stack.let_changes_end()  # before it is asked whether the weight is merged
        if place.backup is not None and stack.is_unsettled:
            stack.settle()  # a checkpoint brought another base, or another core
        if stack.enabled and place.backup is not None:
            stack.refuse_rows_of_merged()
        if not stack.enabled or place.backup is not None:
            return self._convolved(input, place.stored, *args, **kwargs)
        if place.base.is_meta:  # only shapes matter, and they are the same for all cores
            return self._convolved(input, _w_eff(place, stack.core), *args, **kwargs)
        if is_traced():
            check_one_base(place.base)
        else:
            stack.base.knows(place)  # finds writes that torch's version counters miss
        rows: Rows | GroupedRows | None = rows_of(stack)
        if rows is None:
            weight = read_weight(place.stored, [place])
            return self._convolved(input, weight, *args, **kwargs)
        return self._by_rows(rows, place, input, *args, **kwargs)

    def _convolved(
        self, input: Tensor, weight: Tensor, output_size: list[int] | None = None
    ) -> Tensor:
        """What torch's module computes with this weight."""
        if not self.transposed:
            return self._conv_forward(input, weight, self.bias)  # type: ignore[operator]
        padding = self._output_padding(  # type: ignore[operator]
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            len(self.kernel_size),
            self.dilation,
        )
        convolve = _TRANSPOSED[len(self.kernel_size)]
        settings = (self.stride, self.padding, padding, self.groups, self.dilation)
        return convolve(input, weight, self.bias, *settings)

    def _by_rows(
        self, batch: Rows | GroupedRows, place: Place, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Convolves each row with W_eff of the adapter that is named for it."""
        stack, traced = place.stack, is_traced()
        rows = batch.rows if isinstance(batch, GroupedRows) else batch
        if rows.cores.requires_grad and batch is rows and not traced:
            refuse_lost_gradients()
            stack.check_checkpoints(rows.number)
        place.ran = True
        ids = _ids_of(rows, input, len(self.kernel_size) + 2)
        if traced:
            if batch is not rows:
                raise RuntimeError(
                    "batch: expected adapters of the same slices where a convolution is compiled, "
                    "got groups of others"
                )
            every = torch.stack([_w_eff(place, core) for core in rows.cores.unbind()])
            return torch.func.vmap(
                lambda row, weight: self._convolved(row, weight, *args, **kwargs)
            )(input, every[ids])
        if isinstance(batch, GroupedRows):
            stack.follow_groups(batch)
            shares = _shares_of_groups(batch, place, input, len(self.kernel_size) + 2)
        else:
            shares = [
                ((ids == each).nonzero().flatten(), _w_eff(place, rows.cores[each]))
                for each in ids.unique().tolist() or [0]
            ]
        if len(shares) == 1:
            return self._convolved(input, shares[0][1], *args, **kwargs)
        parts = [self._convolved(input[own], weight, *args, **kwargs) for own, weight in shares]
        return torch.cat(parts)[torch.cat([own for own, _ in shares]).argsort()]


def _shares_of_groups(
    batch: GroupedRows, place: Place, input: Tensor, axes: int
) -> list[tuple[Tensor, Tensor]]:
    """For each adapter in the batch the numbers of its rows, int64, and its W_eff."""
    ids = batch.rows.adapter_ids
    numbers = replace(batch.rows, adapter_ids=torch.arange(len(ids), device=ids.device))
    units = _ids_of(numbers, input, axes)  # of each row of the input, its row among the ids
    return [
        (
            torch.isin(units, group.index[group.ids == each]).nonzero().flatten(),
            _w_eff(place, group.cores[each], group.factors, group.scale),
        )
        for group in batch.groups
        for each in group.ids.unique().tolist()
    ]


def _ids_of(rows: Rows, input: Tensor, axes: int) -> Tensor:
    """The id of the adapter of each row, int64 ``[rows]``."""
    given = rows.adapter_ids
    if rows.per == "token":
        raise ValueError(
            "adapter_ids: expected one id for each row where a convolution is adapted, since its "
            f"outputs mix the positions of a row, got ids of tokens, {list(given.shape)}"
        )
    if input.ndim != axes:
        if given.shape[0] == 1 and input.ndim == axes - 1:
            return given
        raise ValueError(
            f"x: expected a batch of {axes} axes, whose first has a row for each of adapter_ids, "
            f"got {list(input.shape)}"
        )
    ids = rows.ids_for(input)
    return ids.repeat_interleave(input.shape[0] // ids.shape[0]) if ids.shape[0] else ids


def _w_eff(
    place: Place, core: Tensor, factors: CURFactors | None = None, scale: float | None = None
) -> Tensor:
    """W_eff of one core ``[n3, r, r]`` in the layout of the weight; differentiable.

    C, R and the scale are by default those of the stack.
    """
    stack, weight = place.stack, place.weight
    factors = stack.factors if factors is None else factors
    scale = stack.scale if scale is None else scale
    core = core.to(factors.dtype)
    if weight.is_meta:  # C and R may be on another device
        factors, core = factors.to("meta"), core.to("meta")
    update = slice_update(factors, core, place.slice_index, place.slices, scale)
    return place.in_layout((weight.to(update.dtype) + update).to(weight.dtype))


class TProductConv1d(_AdaptedConvolution, nn.Conv1d):
    """``nn.Conv1d`` with its weight in a stack, as ``[out, in / groups * kernel]``."""


class TProductConv2d(_AdaptedConvolution, nn.Conv2d):
    """``nn.Conv2d`` with its weight in a stack, as ``[out, in / groups * kernel]``."""


class TProductConv3d(_AdaptedConvolution, nn.Conv3d):
    """``nn.Conv3d`` with its weight in a stack, as ``[out, in / groups * kernel]``."""


class TProductConvTranspose1d(_AdaptedConvolution, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with its weight in a stack, as ``[in, out / groups * kernel]``."""


class TProductConvTranspose2d(_AdaptedConvolution, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with its weight in a stack, as ``[in, out / groups * kernel]``."""


class TProductConvTranspose3d(_AdaptedConvolution, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with its weight in a stack, as ``[in, out / groups * kernel]``."""


#: The class that each convolution gets when it is adapted.
ADAPTED: dict[type[nn.Module], type[Adapted]] = {
    nn.Conv1d: TProductConv1d,
    nn.Conv2d: TProductConv2d,
    nn.Conv3d: TProductConv3d,
    nn.ConvTranspose1d: TProductConvTranspose1d,
    nn.ConvTranspose2d: TProductConvTranspose2d,
    nn.ConvTranspose3d: TProductConvTranspose3d,
}


def is_pointwise(module: nn.Module) -> bool:
    """Whether a convolution is a linear layer: it mixes all channels, at one point at a time."""
    assert isinstance(module, CONVOLUTIONS)
    is_whole = module.groups == 1 and not module.transposed
    return is_whole and all(size == 1 for size in module.kernel_size)


def kind_of(module: nn.Module) -> str:
    """What convolutions need to have in common to share a stack, unless the user says so.

    Empty for linear layers, and for the convolutions that are linear layers.
    """
    if not isinstance(module, CONVOLUTIONS) or is_pointwise(module):
        return ""
    kernel = "x".join(map(str, module.kernel_size))
    return f"{'transposed convolution' if module.transposed else 'convolution'} of kernel {kernel}"


def described(module: nn.Module) -> str:
    """What the matrix of a convolution is, for the printed plan; empty for other modules."""
    if not isinstance(module, CONVOLUTIONS):
        return ""
    kernel = "*".join(map(str, module.kernel_size))
    first, others, name = "out", "in", "a convolution"
    rows, columns = module.out_channels, module.in_channels
    if module.transposed:
        first, others, name = "in", "out", "a transposed convolution"
        rows, columns = columns, rows
    if module.groups > 1:
        name = f"{name} in {module.groups} groups"
    return f"{name}: {rows} {first} x {columns // module.groups}*{kernel} {others}*kernel"


def kinds_in_short(described: Sequence[str]) -> str:
    """What the matrices of a stack are, given `described` of each; empty for linear layers."""
    kinds = dict.fromkeys(
        "linear layers"
        if not each
        else "transposed convolutions: in x out*kernel"
        if each.startswith("a transposed")
        else "convolutions: out x in*kernel"
        for each in described
    )
    return "" if list(kinds) == ["linear layers"] else ", ".join(kinds)
