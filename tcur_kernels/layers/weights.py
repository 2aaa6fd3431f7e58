"""Where modules keep the weights of linear maps, and such a weight as slices of a stack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: The linear maps in front of an ``nn.MultiheadAttention``: three weights, or the three blocks of
#: rows of ``in_proj_weight``, which have no names of their own.
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module is an ``nn.Linear`` and no subclass of it."""
    # By exact type: subclasses (the output projection of nn.MultiheadAttention, quantised layers)
    # often do something else than their name says.
    return type(module) is nn.Linear


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is GPT-2's ``Conv1D`` of transformers: a linear layer stored (in, out)."""
    # By the name of its type, which needs no import; never by shape, which tells nothing if square.
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_attention(module: nn.Module) -> bool:
    """Whether the module is an ``nn.MultiheadAttention`` and no subclass of it."""
    return type(module) is nn.MultiheadAttention


_PLAIN = (nn.Parameter, Tensor, type(None))


def held(module: nn.Module, name: str) -> Any:
    """The parameter of that name, or the plain tensor that stands in for it; None if there is none.

    Not by attribute, which is W_eff on an adapted layer. FSDP1 and pruning set a plain tensor where
    the parameter was, which is where other attributes are too.
    """
    store = module._parameters if module.__dict__.get(name) is None else module.__dict__
    tensor: Any = store.get(name)
    if type(tensor) not in _PLAIN and hasattr(tensor, "tcur_stored"):
        # Somebody took what reading the weight gives, moved it, and put it back.
        tensor = store[name] = nn.Parameter(tensor.tcur_stored, requires_grad=False)
    return tensor


#: Marks parameters that were frozen. By an attribute: torch swaps no tensor that is weakly referred
#: to, and a reference of the other kind would keep its memory.
_FROZEN = "tcur_frozen"


def _frozen(tensor: Tensor) -> Tensor:
    """Without the graph that FSDP1 gives to what lies in one flat parameter with trained ones."""
    return tensor if tensor.grad_fn is None else tensor.detach()


class Place:
    """A weight as one or more consecutive slices of a stack.

    The weight is looked up whenever it is asked for: it may be moved, sharded or loaded anew.

    Args:
        module: ``nn.Linear``, ``Conv1D``, or with ``projection`` an ``nn.MultiheadAttention``;
            adapted or not.
        slice_index: the first slice.
        slices: how many.
        projection: one of `PROJECTIONS`.
        transposed: the weight is stored (in, out); default: whether the module is a ``Conv1D``.

    Attributes:
        stack: the `TProductStack` that the slices belong to, set by it.
        backup: the base weight as it is stored, while the module holds W_eff.
        was_trained: whether the weight asked for gradients before it was adapted. torch's products
            go by that, even where no gradient is recorded.
        name: of the weight in its model, for messages.
        ran: whether the layer has been called, or its weight read, since it was adapted.
    """

    def __init__(
        self,
        module: nn.Module,
        slice_index: int = 0,
        slices: int = 1,
        projection: str | None = None,
        transposed: bool | None = None,
    ) -> None:
        self.module, self.projection = module, projection
        self.slice_index, self.slices = slice_index, slices
        self.transposed = is_conv1d(module) if transposed is None else transposed
        self.stack: Any = None
        self.backup: Tensor | None = None
        self.was_trained = False
        self.name = ""
        self.ran = False
        self.out_features, self.in_features = self.weight.shape

    def at(self, slice_index: int, slices: int, name: str) -> Place:
        """The same weight as other slices, under a name; of no stack yet."""
        place = Place(self.module, slice_index, slices, self.projection, self.transposed)
        place.name = name
        return place

    @property
    def weight(self) -> Tensor:
        """The base weight ``[out_features, in_features]``, no copy."""
        if self.backup is None and self.projection is None:  # in every call of nearly every layer
            module = self.module
            tensor = module._parameters.get("weight")
            if type(tensor) is nn.Parameter and "weight" not in module.__dict__:
                return tensor.T if self.transposed else tensor
        weight = self.stored if self.backup is None else self.backup
        return weight.T if self.transposed else weight

    @property
    def stored(self) -> Tensor:
        """What the module holds now, as it is stored: the base weight, or W_eff if merged."""
        tensor = held(self.module, self.parameter)
        if tensor is None:
            raise RuntimeError(
                f"{self.parameter}: expected a parameter of {self.name or 'the layer'}, got none; "
                "parametrise layers before they are adapted, or merge first"
            )
        tensor = _frozen(tensor)
        return tensor[self._rows] if self._is_block else tensor

    def freeze(self) -> None:
        """Freezes a parameter that is another one than when this was asked last.

        Those who move and load weights make new parameters. One that was frozen before and asks for
        gradients now was made to by the user, who is told elsewhere that it gets none.
        """
        tensor = held(self.module, self.parameter)
        if tensor is not None and not hasattr(tensor, _FROZEN):
            setattr(tensor, _FROZEN, True)
            if tensor.is_leaf and tensor.requires_grad:
                tensor.requires_grad_(False)

    def remember(self) -> None:
        """From now on, the parameter that is there now is the one that the adapter froze."""
        setattr(held(self.module, self.parameter), _FROZEN, True)

    def keep(self) -> None:
        """Keeps a copy of the base weight, in whose place W_eff is to come."""
        self.backup = self.stored.detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the base weight back to the module, bit for bit."""
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
        """Name within the module of the parameter that holds the weight."""
        if self.projection is None:
            return "weight"
        return "in_proj_weight" if self._is_block else f"{self.projection}_weight"

    @property
    def bias_parameter(self) -> str:
        """Name within the module of the parameter that holds the bias, if there is one."""
        return "bias" if self.projection is None else "in_proj_bias"

    @property
    def first_row(self) -> int:
        """Row of the parameter with which the weight begins."""
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
