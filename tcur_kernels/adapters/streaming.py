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
        """The slices of one stack in the files; None if they are in memory and not quantised.

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
        places = [weight.place for weight in members]
        if not any(place.base.is_meta or place.quantiser is not None for place in places):
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
        dtype = self._shards.dtype(stored)
        self._check(weight, self._shards.shapes[stored], dtype, file, any_dtype)
        return FileMatrix(stored, layout, first, weight.place.out_features)

    def _made(self, plan: StackPlan, members: list[Weight], any_dtype: bool) -> HeldSlices:
        """A stack in memory, of matrices that the files store in another form than the model."""
        places = [weight.place for weight in members]
        size = sum(p.out_features * p.in_features * p.dtype.itemsize for p in places)
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
            self._check(weight, list(tensor.shape), tensor.dtype, "the files", any_dtype)
            logical = matrix_of(tensor, layout)
            matrices.append(logical[first : first + weight.place.out_features])
        return HeldSlices("weights", matrices, plan.n1, self._max_workspace, self._progress)

    def _check(
        self, weight: Weight, shape: list[int], dtype: torch.dtype, where: str, any_dtype: bool
    ) -> None:
        """Refuses a tensor whose shape or dtype differs from the model's."""
        name, _, _ = weight.stored()
        is_quantised = weight.place.quantiser is not None
        parameter = weight.place if is_quantised else self._model.get_parameter(name)
        held = list(parameter.shape)
        if shape != held:
            raise ValueError(
                f"weights: expected {name} of shape {held} as in the model, got {shape} in {where}"
            )
        if dtype != parameter.dtype and not (any_dtype or is_quantised):
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
