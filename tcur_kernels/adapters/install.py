"""Puts stacks into a model, whose parameters their cores become, and takes them out of a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..cores import keep_precision
from ..factors import CURFactors
from ..layers import adapt_in_place, put_back
from ..linear import Adapted
from ..nn import TProductStack
from .fingerprint import PREFIX


def is_adapted(model: nn.Module) -> bool:
    """Whether a model, or a part of it, is adapted."""
    return any(isinstance(module, Adapted) for module in model.modules())


def put_in_place(model: nn.Module, stacks: Mapping[str, TProductStack]) -> None:
    """Adapts the layers of stacks in place, and makes the cores parameters of the model.

    Raises:
        ValueError: the model has attributes of the names that cores take. It is then as it was.
    """
    for name in stacks:
        if hasattr(model, key_of(name)):
            raise ValueError(
                f"model: expected no attribute {key_of(name)!r}, which the core of stack {name} "
                f"takes, got {type(getattr(model, key_of(name))).__name__}"
            )
    for stack in stacks.values():
        adapt_in_place(stack.places)
    Caretaker(model, stacks).move_in()


def key_of(stack: str) -> str:
    """Name of the parameter of the model that is the active core of a stack."""
    return f"{PREFIX}{stack}"


def stacks_of(model: nn.Module) -> dict[str, TProductStack]:
    """The stacks that a model is adapted by."""
    caretaker = model.__dict__.get("_apply")
    assert isinstance(caretaker, Caretaker)
    return dict(caretaker.stacks)


def take_out(model: nn.Module) -> None:
    """Makes a model plain again, with the weights that its layers hold now."""
    caretaker = model.__dict__.get("_apply")
    assert isinstance(caretaker, Caretaker)
    caretaker.move_out()
    for module in model.modules():
        if isinstance(module, Adapted):
            put_back(module)


class Caretaker:
    """Keeps what stacks have in a model in order: cores in their precision, C and R up to date.

    Cores are parameters of the model itself. A child would show up in containers, which count and
    call their children; and sharding, offloading and moves take a model's own parameters as whole
    for as long as the model runs, which is when layers need the core.

    Two things happen to a model that parameters cannot answer to. It is cast: cores stay fp32, so
    this object is the model's own ``_apply``. And a checkpoint is loaded: then C and R are taken
    of what it brought, at once, for graphs that were compiled before.
    """

    def __init__(self, model: nn.Module, stacks: Mapping[str, TProductStack]) -> None:
        self.model, self.stacks = model, dict(stacks)
        self._hook: Any = None

    def move_in(self) -> None:
        """Makes cores and indices parameters and buffers of the model."""
        model = self.model
        for name, stack in self.stacks.items():
            key = key_of(name)
            stack.hand_over(model, key)
            indices = torch.tensor([stack.rows, stack.columns], device=stack.core.device)
            model.register_buffer(f"{key}__indices", indices)
            if not stack.base.is_own:
                model.register_buffer(f"{key}__lateral", stack.lateral.clone())
                model.register_buffer(f"{key}__horizontal", stack.horizontal.clone())
        model.__dict__["_apply"] = self
        model.__dict__["named_parameters"] = CoresLast(model, tuple(map(key_of, self.stacks)))
        self._hook = model.register_load_state_dict_post_hook(self.loaded)

    def move_out(self) -> None:
        """Takes all of that out of the model."""
        model = self.model
        del model.__dict__["_apply"], model.__dict__["named_parameters"]
        for store in (model._parameters, model._buffers):
            for key in [key for key in store if self._is_own(key)]:
                delattr(model, key)
        hooks = model._load_state_dict_post_hooks
        for number in [number for number, hook in hooks.items() if hook == self.loaded]:
            del hooks[number]

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """The model's ``_apply``: cores move with the model, but keep at least fp32."""
        model, apart = self.model, nn.Module()
        before = {name: stack.storages() for name, stack in self.stacks.items()}
        for store in ("_parameters", "_buffers"):
            every, own = model.__dict__[store], apart.__dict__[store]
            for key in [key for key in every if self._is_own(key)]:
                own[key] = every.pop(key)
        try:
            type(model)._apply(model, fn, recurse)
            apart._apply(lambda tensor: keep_precision(fn, tensor))
        finally:
            for store in ("_parameters", "_buffers"):
                model.__dict__[store].update(apart.__dict__[store])
        for name, stack in self.stacks.items():
            if stack.storages() != before[name]:  # else a captured graph may read what was made
                stack.moved()
        return model

    def loaded(self, model: nn.Module, incompatible_keys: Any) -> None:
        """A checkpoint was loaded: C and R of the base that is there now, W_eff where merged."""
        for name, stack in self.stacks.items():
            key = key_of(name)
            buffers = model._buffers
            indices = buffers[f"{key}__indices"]
            if indices is not None and not indices.is_meta:
                rows, columns = indices.tolist()
                stack.base.choose(rows, columns)
            lateral, horizontal = (
                buffers.get(f"{key}__{side}") for side in ("lateral", "horizontal")
            )
            if lateral is not None and horizontal is not None:
                stack.base.factors = CURFactors(lateral, horizontal)
                stack.base.suspect()
            stack.settle()

    def _is_own(self, key: str) -> bool:
        return any(
            key == key_of(name) or key.startswith(f"{key_of(name)}__") for name in self.stacks
        )


class CoresLast:
    """The model's own ``named_parameters``, and so its ``parameters``, with the cores at the end.

    A model's own parameters come first, and many take the dtype of the first one for that of the
    model. Cores are fp32 in a model of half precision.
    """

    def __init__(self, model: nn.Module, keys: tuple[str, ...]) -> None:
        self.model, self.keys = model, keys

    @property
    def __func__(self) -> Any:
        """As of a method: torch's compiler asks which one it is."""
        return type(self).__call__

    def __call__(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module."""
        model, cores = self.model, []
        start = f"{prefix}." if prefix else ""
        keys = tuple(start + key for key in self.keys)
        for name, parameter in type(model).named_parameters(
            model, prefix, recurse, remove_duplicate
        ):
            if name.startswith(keys):
                cores.append((name, parameter))
            else:
                yield name, parameter
        yield from cores
