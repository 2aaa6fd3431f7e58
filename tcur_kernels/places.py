"""Where modules keep the weights of linear maps, and such a weight as slices of a stack."""

from __future__ import annotations

from torch import Tensor, nn

#: The linear maps in front of an ``nn.MultiheadAttention``: three weights, or the three blocks of
#: rows of ``in_proj_weight``, which have no names of their own.
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module is an ``nn.Linear`` and no subclass of it."""
    # By exact type: subclasses (the output projection of nn.MultiheadAttention, quantised layers)
    # are often used without their forward.
    return type(module) is nn.Linear


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is GPT-2's ``Conv1D`` of transformers: a linear layer stored (in, out)."""
    # By the name of its type, which needs no import; never by shape, which tells nothing if square.
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_attention(module: nn.Module) -> bool:
    """Whether the module is an ``nn.MultiheadAttention`` and no subclass of it."""
    return type(module) is nn.MultiheadAttention


class Place:
    """A weight as one or more consecutive slices of a stack; what `TProductStack` asks of a layer.

    The weight is looked up whenever it is asked for: it may be moved, sharded or loaded anew.

    Args:
        module: ``nn.Linear``, ``Conv1D``, or with ``projection`` an ``nn.MultiheadAttention``.
        slice_index: the first slice.
        slices: how many.
        projection: one of `PROJECTIONS`.
        transposed: the weight is stored (in, out); default: whether the module is a ``Conv1D``.
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
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:
        """``[out_features, in_features]``, no copy."""
        if self.projection is None:
            weight = self.module.get_parameter("weight")
            return weight.T if self.transposed else weight
        weight = self.module.get_parameter(self.parameter)
        return weight[self._rows] if self._is_block else weight

    @property
    def bias(self) -> Tensor | None:
        """``[out_features]`` or None."""
        if self.projection is None:
            bias: Tensor | None = self.module.bias  # type: ignore[assignment]
            return bias
        bias = self.module.in_proj_bias  # type: ignore[assignment]
        return None if bias is None else bias[self._rows]

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
        return self.projection is not None and self.module.in_proj_weight is not None

    @property
    def _rows(self) -> slice:
        assert self.projection is not None
        width: int = self.module.embed_dim  # type: ignore[assignment]
        first = PROJECTIONS.index(self.projection) * width
        return slice(first, first + width)
