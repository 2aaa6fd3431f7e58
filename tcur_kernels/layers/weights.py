"""Where modules store the weights of linear maps, and which slices of a stack a weight is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..matrices import Layout, matrix_of, shape_of, stored_of

#: The input projections of an ``nn.MultiheadAttention``. They are three separate weights, or the
#: three blocks of rows of ``in_proj_weight``, which have no names of their own.
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module is an ``nn.Linear``, not a subclass."""
    # Subclasses (the output projection of nn.MultiheadAttention, quantised layers) often compute
    # something else.
    return type(module) is nn.Linear


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is GPT-2's ``Conv1D`` of transformers: a linear layer stored (in, out)."""
    # Comparing the name of the type needs no import. The shape says nothing if it is square.
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_attention(module: nn.Module) -> bool:
    """Whether the module is an ``nn.MultiheadAttention``, not a subclass."""
    return type(module) is nn.MultiheadAttention


#: The convolutions of torch. The weights of the last three are those of their adjoints.
CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def is_convolution(module: nn.Module) -> bool:
    """Whether the module is one of torch's convolutions, not a subclass."""
    return type(module) in CONVOLUTIONS


def layout_of(module: nn.Module) -> Layout:
    """How a module holds its weight, unless the caller knows better."""
    if is_conv1d(module):
        return "transposed"
    return "convolution" if isinstance(module, CONVOLUTIONS) else "matrix"


def channels_as_in(stored: Tensor, kernel: Tensor) -> Tensor:
    """The kernel with its channels last in memory if those of ``stored`` are; differentiable.

    torch chooses by that how it convolves, and how the result lies in memory.
    """
    if kernel.stride() == stored.stride() or not stored.movedim(1, -1).is_contiguous():
        return kernel
    # A kernel of one point is contiguous in either order, so ``contiguous`` would do nothing.
    return kernel.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


#: What changes when a weight is written in place or gets other memory; see `version_of`.
Version = tuple[Any, ...]


def version_of(tensor: Tensor) -> Version:
    """A value that changes when the tensor is written in place or gets other memory.

    Inference tensors have no version counter, so for them only a change of memory is noticed.
    """
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


_PLAIN = (nn.Parameter, Tensor, type(None))


def held(module: nn.Module, name: str) -> Any:
    """The parameter of that name, or the plain tensor in its place; None if there is neither.

    This does not use the attribute, which gives W_eff on an adapted layer. FSDP1 and pruning
    replace the parameter by a plain tensor, which is stored like any other attribute.
    """
    store = module._parameters if module.__dict__.get(name) is None else module.__dict__
    tensor: Any = store.get(name)
    if type(tensor) not in _PLAIN and hasattr(tensor, "tcur_stored"):
        # Some code read the weight, moved what it got, and stored that as the weight.
        tensor = store[name] = nn.Parameter(tensor.tcur_stored, requires_grad=False)
    return tensor


#: The attribute that marks parameters the adapter froze. torch cannot swap a tensor to which weak
#: references exist, and an ordinary reference would keep its memory alive.
_FROZEN = "tcur_frozen"


def _frozen(tensor: Tensor) -> Tensor:
    """The tensor without a graph. FSDP1 gives it one if its flat parameter has trained parts."""
    return tensor if tensor.grad_fn is None else tensor.detach()


class Place:
    """A weight that forms one or more consecutive slices of a stack.

    The weight is looked up at each use, because it may be moved, sharded or loaded again.

    Args:
        module: what holds the weight, adapted or not: an ``nn.Linear``, a ``Conv1D``, a
            convolution, or, with ``projection``, an ``nn.MultiheadAttention``.
        slice_index: the first slice.
        slices: the number of slices.
        projection: one of `PROJECTIONS`.
        layout: how the parameter holds the matrix; by default see `layout_of`.
        own: the name of the parameter, unless there is a projection.

    Attributes:
        stack: the `TProductStack` that the slices belong to; the stack sets it.
        backup: the base weight as it is stored, while the module holds W_eff.
        was_trained: whether the weight required grad before it was adapted. torch chooses its
            products by that, even if no gradient is recorded.
        name: the name of the weight in its model, for messages.
        ran: whether the layer was called, or its weight read, since it was adapted.
        quantiser: how the weight is quantised, see `quantisers`; None if it is stored as numbers.
    """

    quantiser: Any = None

    def __init__(
        self,
        module: nn.Module,
        slice_index: int = 0,
        slices: int = 1,
        projection: str | None = None,
        layout: Layout | None = None,
        own: str = "weight",
    ) -> None:
        self.module, self.projection = module, projection
        self.slice_index, self.slices = slice_index, slices
        self.layout: Layout = layout_of(module) if layout is None else layout
        self.own = own
        self.stack: Any = None
        self.backup: Tensor | None = None
        self.was_trained = False
        self.name = ""
        self.ran = False
        self.out_features, self.in_features = self.shape

    @property
    def shape(self) -> tuple[int, int]:
        """The present shape of the weight, ``[out_features, in_features]``."""
        # Without the matrix itself: torch refuses to reshape a shard of some sizes.
        shape = shape_of(self.base.shape, self.layout)
        if shape is None:  # a parameter that FSDP1 flattened
            rows, columns = self.weight.shape
            return rows, columns
        return shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight."""
        return self.base.dtype

    @property
    def kind(self) -> str:
        """How the weight is quantised, such as "bitsandbytes nf4"; empty if it is not."""
        return ""

    @property
    def version(self) -> Version:
        """A value that changes when the base weight may have changed."""
        return version_of(self.base)

    @property
    def root(self) -> Place:
        """The place that the stack knows: this one, or that of all experts if this is one."""
        return self

    def at(self, slice_index: int, slices: int, name: str) -> Place:
        """A new place for the same weight, with other slices and a name; in no stack yet."""
        place = type(self)(self.module, slice_index, slices, self.projection, self.layout, self.own)
        place.name = name
        return place

    @property
    def weight(self) -> Tensor:
        """The base weight ``[out_features, in_features]``; no copy if it is contiguous."""
        return matrix_of(self.base, self.layout)

    @property
    def base(self) -> Tensor:
        """The base weight in the layout of the parameter: the copy kept of it while merged."""
        backup = self.backup  # once: another thread may unmerge
        if backup is not None:
            return backup
        if self.projection is None:  # fast path for nearly every call
            module, name = self.module, self.own
            tensor = module._parameters.get(name)
            if type(tensor) is nn.Parameter and name not in module.__dict__:
                return tensor
        return self.stored

    def in_layout(self, matrix: Tensor) -> Tensor:
        """A matrix ``[out_features, in_features]`` in the layout of the parameter."""
        stored = self.stored
        made = stored_of(matrix, self.layout, stored.shape)
        return channels_as_in(stored, made) if self.layout == "convolution" else made

    def part_of(self, tensor: Tensor) -> Tensor:
        """The matrix of this place within a tensor of the shape of the parameter."""
        rows = tensor[self._rows] if self._is_block else tensor
        return matrix_of(rows, self.layout)

    @property
    def key(self) -> str | None:
        """What tells the places of one module apart; None for a weight that is called so."""
        return self.own if self.projection is None and self.own != "weight" else self.projection

    @property
    def stored(self) -> Tensor:
        """The weight as the module stores it now: the base weight, or W_eff if merged."""
        tensor = held(self.module, self.parameter)
        if tensor is None:
            raise RuntimeError(
                f"{self.parameter}: expected a parameter of {self.name or 'the layer'}, got none; "
                "parametrise layers before they are adapted, or merge first"
            )
        tensor = _frozen(tensor)
        return tensor[self._rows] if self._is_block else tensor

    def freeze(self) -> None:
        """Freezes the parameter if it is new since the last call.

        Code that moves or loads weights creates new parameters. If a parameter that the adapter
        froze requires grad again, the user set that; the user learns elsewhere that it gets no
        gradient.
        """
        tensor = held(self.module, self.parameter)
        if tensor is not None and not hasattr(tensor, _FROZEN):
            setattr(tensor, _FROZEN, True)
            if tensor.is_leaf and tensor.requires_grad:
                tensor.requires_grad_(False)

    def remember(self) -> None:
        """Marks the present parameter as the one that the adapter froze."""
        setattr(held(self.module, self.parameter), _FROZEN, True)

    def keep(self) -> None:
        """Keeps a copy of the base weight before W_eff overwrites it."""
        self.backup = self.stored.detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Writes the base weight back to the module, bit for bit."""
        if self.backup is not None:
            self.stored.copy_(self.backup)
        self.backup = None

    @property
    def bias(self) -> Tensor | None:
        """``[out_features]`` or None."""
        if self.projection is None and "bias" not in self.module.__dict__:
            return self.module._parameters.get("bias")
        tensor = held(self.module, self.bias_parameter)
        if tensor is None:
            return None
        bias = _frozen(tensor)
        return bias if self.projection is None else bias[self._rows]

    @property
    def parameter(self) -> str:
        """The name, within the module, of the parameter that holds the weight."""
        if self.projection is None:
            return self.own
        return "in_proj_weight" if self._is_block else f"{self.projection}_weight"

    @property
    def bias_parameter(self) -> str:
        """The name, within the module, of the parameter that would hold the bias."""
        return "bias" if self.projection is None else "in_proj_bias"

    @property
    def first_row(self) -> int:
        """The row of the parameter at which the weight begins."""
        return self._rows.start if self._is_block else 0

    @property
    def _is_block(self) -> bool:
        return self.projection is not None and held(self.module, "in_proj_weight") is not None

    @property
    def _rows(self) -> slice:
        assert self.projection is not None
        width: int = self.module.embed_dim  # type: ignore[assignment]
        first = PROJECTIONS.index(self.projection) * width
        return slice(first, first + width)
