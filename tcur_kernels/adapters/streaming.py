"""Weights of a model that is not in memory: modules on the meta device, numbers in files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..decompose import FileMatrix, FileSlices, HeldSlices, Shards, Slices
from ..files.origins import Origins, is_of_transformers
from ..matrices import matrix_of
from .linear_maps import Weight, find_weights
from .plan import StackPlan


class BaseFiles:
    """The checkpoint of a model whose parameters are on the meta device.

    Args:
        model: the model. The files name tensors like its parameters. For a transformers model they
            may also use the names from which transformers would load it.
        path: a safetensors file or a directory of them, see `decompose.Shards`.
        max_workspace, progress: see `tensor_cur`.
    """

    def __init__(
        self, model: nn.Module, path: str | Path, max_workspace: int, progress: bool
    ) -> None:
        self._model = model
        self._shards = Shards(path)
        known = model if is_of_transformers(model) else None
        self._origins = Origins("weights", self._shards.path, self._shards.shapes, known)
        self._max_workspace, self._progress = max_workspace, progress

    def slices_of(self, plan: StackPlan, any_dtype: bool = False) -> Slices | None:
        """The slices of one stack in the files; None if they are in memory.

        Some matrices transformers assembles from several tensors while loading. These are assembled
        here in the same way, and the whole stack is then held in memory, within ``max_workspace``.

        Args:
            plan: the stack.
            any_dtype: accept another dtype than that of the model.

        Raises:
            TypeError, ValueError: a tensor is missing, has another shape or dtype than in the
                model, or another dtype than the rest of the stack; the message names it.
        """
        weights = find_weights(self._model)
        members = [weights[member.module] for member in plan.members]
        if not any(weight.tensor.is_meta for weight in members):
            return None
        regrouped = [self._origins[w.stored()[0]].regrouped is not None for w in members]
        if any(regrouped):
            return self._made(plan, members, any_dtype)
        matrices = [self._matrix(weight, any_dtype) for weight in members]
        return FileSlices(self._shards, matrices, plan.n1, self._max_workspace, self._progress)

    def read(self, name: str) -> Tensor:
        """Reads a whole tensor, by its name in the model.

        Raises:
            ValueError: the files do not contain it.
        """
        return self._origins[name].load(self._shards.read)

    def _matrix(self, weight: Weight, any_dtype: bool) -> FileMatrix:
        name, layout, first = weight.stored()
        stored = self._origins[name].name
        file = self._shards.files[stored].name
        self._check(name, self._shards.shapes[stored], self._shards.dtype(stored), file, any_dtype)
        return FileMatrix(stored, layout, first, weight.tensor.shape[0])

    def _made(self, plan: StackPlan, members: list[Weight], any_dtype: bool) -> HeldSlices:
        """A stack in memory, of matrices that the files store in another form than the model."""
        size = sum(w.tensor.numel() * w.tensor.element_size() for w in members)
        if size > self._max_workspace:
            raise ValueError(
                f"max_workspace: expected at least {size:,} bytes for stack {plan.name}, which "
                f"transformers puts together while loading ({members[0].name}), got "
                f"{self._max_workspace:,}"
            )
        matrices = []
        for weight in members:
            name, layout, first = weight.stored()
            tensor = self.read(name)
            self._check(name, list(tensor.shape), tensor.dtype, "the files", any_dtype)
            logical = matrix_of(tensor, layout)
            matrices.append(logical[first : first + weight.tensor.shape[0]])
        return HeldSlices("weights", matrices, plan.n1, self._max_workspace, self._progress)

    def _check(
        self, name: str, shape: list[int], dtype: torch.dtype, where: str, any_dtype: bool
    ) -> None:
        """Refuses a tensor whose shape or dtype differs from the model's."""
        parameter = self._model.get_parameter(name)
        if shape != list(parameter.shape):
            raise ValueError(
                f"weights: expected {name} of shape {list(parameter.shape)} as in the model, got "
                f"{shape} in {where}"
            )
        if dtype != parameter.dtype and not any_dtype:
            raise ValueError(
                f"weights: expected {name} of {parameter.dtype} as in the model, got {dtype} in "
                f"{where}: make the model in the dtype of its files, model.to({dtype})"
            )


def on_meta(model: nn.Module) -> str | None:
    """The name of a parameter or buffer on the meta device; None if all are in memory."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            return name
    return None
