"""Weights of a model that is not in memory: a module tree on the meta device, numbers in files."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from ..decompose import FileMatrix, FileStack, Shards
from .plan import StackPlan
from .weights import Weight, find_weights


class BaseFiles:
    """The checkpoint of a model whose parameters are on the meta device.

    Args:
        path: a safetensors file or a directory of them, see `decompose.Shards`. Tensors go by the
            names of the model's parameters.
        max_workspace, progress: see `tensor_cur`.
    """

    def __init__(self, path: str | Path, max_workspace: int, progress: bool) -> None:
        self._shards = Shards(path)
        self._max_workspace, self._progress = max_workspace, progress

    def stack(self, model: nn.Module, plan: StackPlan) -> FileStack | None:
        """The slices of one stack in the files; None if they are in memory.

        Raises:
            TypeError, ValueError: naming a tensor that is missing, of another shape than the model
                says, or of another dtype than the rest of the stack.
        """
        weights = find_weights(model)
        members = [weights[member.module] for member in plan.members]
        if not any(weight.tensor.is_meta for weight in members):
            return None
        matrices = [self._matrix(model, weight) for weight in members]
        return FileStack(self._shards, matrices, plan.n1, self._max_workspace, self._progress)

    def read(self, name: str) -> Tensor:
        """A whole tensor.

        Raises:
            ValueError: it is not there.
        """
        if name not in self._shards.files:
            raise ValueError(f"weights: expected {name} in {self._shards.path}, got none")
        return self._shards.read(name)

    def _matrix(self, model: nn.Module, weight: Weight) -> FileMatrix:
        name, _ = weight.parameter_names()
        expected = list(model.get_parameter(name).shape)
        if self._shards.shapes.get(name, expected) != expected:
            raise ValueError(
                f"weights: expected {name} of shape {expected} as in the model, got "
                f"{self._shards.shapes[name]} in {self._shards.files[name].name}"
            )
        part = weight.tensor  # a view of the parameter: where it begins says which rows it has
        transposed = weight.place.transposed
        first = 0 if transposed else part.storage_offset() // part.shape[1]
        return FileMatrix(name, transposed, first, part.shape[0])


def on_meta(model: nn.Module) -> str | None:
    """Name of a parameter or buffer on the meta device, None if all are in memory."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            return name
    return None
