"""Where the cores of an adapted model are: parameters of its last child, or of the model itself.

A child that comes last is what torch expects: optimizers, sharding, moves and state dicts find it,
and the first parameter, whose dtype many models take for their own, stays the first. But a
container counts and calls its children. Cores of a container are parameters of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.cores import keep_numbers
from ..layers.stack import TProductStack
from ..operators.factors import CURFactors

#: Name of the child: cores are ``tcur.<stack>``. In a container they are ``tcur_<stack>``.
CHILD = "tcur"

#: What names in a model begin with that an adapter has put there.
PREFIXES = (f"{CHILD}.", f"{CHILD}_")

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

#: By which a forward may run through whatever children there are.
_LOOPS = {"children", "named_children", "_modules", "modules", "named_modules"}


def is_container(model: nn.Module) -> bool:
    """Whether a model counts or calls its children, so that it must not get another one."""
    kind = type(model)
    if isinstance(model, _CONTAINERS) or hasattr(kind, "__len__") or hasattr(kind, "__iter__"):
        return True
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and not _LOOPS.isdisjoint(code.co_names)


def is_reserved(stack: str) -> bool:
    """Whether a stack cannot go by that name: what holds stacks and cores has it for itself."""
    return hasattr(nn.ModuleDict(), stack) or hasattr(HeldCores(Caretaker(nn.Module(), {})), stack)


class HeldCores(nn.Module):
    """The child that holds the cores. Called with a name it returns the parameter.

    Hooks that bring parameters in for a call, as accelerate's do, then bring in the core.
    """

    def __init__(self, caretaker: Caretaker) -> None:
        super().__init__()
        self.caretaker = caretaker

    def forward(self, key: str) -> Tensor:
        """The core of that name."""
        core: Tensor = getattr(self, key)
        return core

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves with the model, in at least fp32."""
        with self.caretaker.moving():
            super()._apply(lambda tensor: keep_numbers(fn, tensor), recurse)
        self.caretaker.write_indices(self)
        return self


class Caretaker:
    """Keeps what stacks have in a model in order: cores in their precision, C and R up to date.

    Where the model itself holds the cores, this object is its ``_apply``: cores stay fp32 when it
    is cast. After a checkpoint was loaded, C and R are taken of what it brought, at once, for
    graphs that were compiled before.
    """

    def __init__(self, model: nn.Module, stacks: Mapping[str, TProductStack]) -> None:
        self.model, self.stacks = model, dict(stacks)
        self.is_direct = is_container(model)

    def key_of(self, stack: str) -> str:
        """Name of the active core of a stack in the module that holds it."""
        return f"{CHILD}_{stack}" if self.is_direct else stack

    def check_free(self) -> None:
        """Refuses a model that has attributes of the names that are needed.

        Raises:
            ValueError: naming it; or stacks of names that become one with what they hold.
        """
        for stack in self.stacks:
            for other in self.stacks:
                if stack.startswith(f"{other}__"):
                    raise ValueError(
                        f"targets: expected a stack name that does not begin with another and two "
                        f"underscores, got {stack!r} beside {other!r}"
                    )
        keys = [self.key_of(stack) for stack in self.stacks] if self.is_direct else [CHILD]
        for key in keys:
            if hasattr(self.model, key):
                raise ValueError(
                    f"model: expected no attribute {key!r}, which cores take, got "
                    f"{type(getattr(self.model, key)).__name__}"
                )

    def move_in(self) -> None:
        """Makes cores parameters of the model, and the indices of C and R buffers."""
        model = self.model
        holder = model if self.is_direct else HeldCores(self)
        for name, stack in self.stacks.items():
            key = self.key_of(name)
            stack.hand_over(holder, key)
            indices = torch.tensor([stack.rows, stack.columns], device=stack.core.device)
            holder.register_buffer(f"{key}__indices", indices)
            if not stack.base.is_own:
                holder.register_buffer(f"{key}__lateral", stack.lateral.clone())
                holder.register_buffer(f"{key}__horizontal", stack.horizontal.clone())
        if self.is_direct:
            model.__dict__["_apply"] = self
        else:
            model.add_module(CHILD, holder)
        model.register_load_state_dict_post_hook(self.loaded)

    def move_out(self) -> None:
        """Takes all of that out of the model."""
        model = self.model
        if self.is_direct:
            del model.__dict__["_apply"]
            for store in (model._parameters, model._buffers):
                for key in [key for key in store if self._is_own(key)]:
                    delattr(model, key)
        else:
            delattr(model, CHILD)
        hooks = model._load_state_dict_post_hooks
        ours = Caretaker.loaded
        for number in [n for n, hook in hooks.items() if getattr(hook, "__func__", None) is ours]:
            del hooks[number]

    def moving(self) -> _Moving:
        """Context in which cores may come to be in other memory, which their stacks are told."""
        return _Moving(self.stacks.values())

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """The model's ``_apply``: cores move with the model, but keep at least fp32."""
        model, apart = self.model, nn.Module()
        for store in ("_parameters", "_buffers"):
            every, own = model.__dict__[store], apart.__dict__[store]
            for key in [key for key in every if self._is_own(key)]:
                own[key] = every.pop(key)
        with self.moving():
            try:
                type(model)._apply(model, fn, recurse)
                apart._apply(lambda tensor: keep_numbers(fn, tensor))
            finally:
                for store in ("_parameters", "_buffers"):
                    model.__dict__[store].update(apart.__dict__[store])
        self.write_indices(model)
        return model

    @torch.no_grad()
    def write_indices(self, holder: nn.Module) -> None:
        """Writes the indices that are in use: `to_empty` leaves anything in their place."""
        for name, stack in self.stacks.items():
            indices = holder._buffers[f"{self.key_of(name)}__indices"]
            if indices is not None and not indices.is_meta:
                indices.copy_(torch.tensor([stack.rows, stack.columns]))

    def loaded(self, model: nn.Module, incompatible_keys: Any) -> None:
        """A checkpoint was loaded: C and R of the base that is there now, W_eff where merged."""
        for name, stack in self.stacks.items():
            key, buffers = self.key_of(name), stack.holder._buffers
            sides = [buffers.get(f"{key}__{side}") for side in ("lateral", "horizontal")]
            if sides[0] is not None and sides[1] is not None:
                stack.base.factors = CURFactors(sides[0], sides[1])
                stack.base.suspect()
            stack.settle()

    def _is_own(self, key: str) -> bool:
        keys = [self.key_of(name) for name in self.stacks]
        return any(key == own or key.startswith(f"{own}__") for own in keys)


class _Moving:
    def __init__(self, stacks: Any) -> None:
        self.stacks = list(stacks)

    def __enter__(self) -> None:
        self.before = [stack.storages() for stack in self.stacks]
        if torch.__future__.get_swap_module_params_on_conversion():
            for stack in self.stacks:  # torch swaps no parameter that is weakly referred to
                stack.moved()

    def __exit__(self, *error: object) -> None:
        for stack, before in zip(self.stacks, self.before, strict=True):
            if stack.storages() != before:  # else a captured graph may read what was made
                stack.moved()
