"""Where an adapted model holds its cores: in an additional last child, or in the model itself.

Optimizers, sharding, moves and state dicts all find a child module. It comes last so that the first
parameter of the model stays the first; many models take its dtype for their own. A container,
however, counts or calls its children. The cores of a container are therefore its own parameters.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.cores import keep_numbers
from ..layers.stack import TProductStack
from ..operators.basis import BASES
from ..operators.factors import CURFactors

#: Name of the child, so cores are named ``tcur.<stack>``; in a container ``tcur_<stack>``.
CHILD = "tcur"

#: Prefixes of the names that an adapter adds to a model.
PREFIXES = (f"{CHILD}.", f"{CHILD}_")

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

_SIDES = ("lateral", "horizontal")

#: Names in the code of a forward that suggest a loop over all children.
_LOOPS = {"children", "named_children", "_modules", "modules", "named_modules"}


def is_container(model: nn.Module) -> bool:
    """Whether a model counts or calls all its children, so that it must not get another one."""
    kind = type(model)
    if isinstance(model, _CONTAINERS) or hasattr(kind, "__len__") or hasattr(kind, "__iter__"):
        return True
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and not _LOOPS.isdisjoint(code.co_names)


def is_reserved(stack: str) -> bool:
    """Whether a stack cannot have that name, because the modules that hold it use the name."""
    return hasattr(nn.ModuleDict(), stack) or hasattr(HeldCores(Caretaker(nn.Module(), {})), stack)


class HeldCores(nn.Module):
    """The child that holds the cores; a call with a name returns that core.

    accelerate's hooks load offloaded parameters when a module is called, so the call loads the
    core.
    """

    def __init__(self, caretaker: Caretaker) -> None:
        super().__init__()
        self.caretaker = caretaker

    def forward(self, key: str) -> Tensor:
        """The core of that name."""
        core: Tensor = getattr(self, key)
        return core

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the cores with the model, but keeps them in at least fp32."""
        with self.caretaker.moving():
            super()._apply(lambda tensor: keep_numbers(fn, tensor), recurse)
        self.caretaker.write_indices(self)
        return self


class Caretaker:
    """Looks after the tensors of stacks in a model: keeps cores in fp32, and C and R up to date.

    If the model itself holds the cores, this object replaces its ``_apply``, so that the cores stay
    fp32 when the model is cast. After a checkpoint is loaded, C and R are taken at once from the
    new weights, because graphs that were compiled before do not check them.
    """

    def __init__(self, model: nn.Module, stacks: Mapping[str, TProductStack]) -> None:
        self.model, self.stacks = model, dict(stacks)
        self.is_direct = is_container(model)
        self._merges_told = 0

    def key_of(self, stack: str) -> str:
        """The name that the active core of a stack has in the module that holds it."""
        return f"{CHILD}_{stack}" if self.is_direct else stack

    def check_free(self) -> None:
        """Refuses a model whose attributes clash with the names that cores need.

        Raises:
            ValueError: an attribute clashes; or the name of one stack begins with that of another
                and two underscores, as the names of the other's inactive cores do.
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
        """Makes the cores parameters of the model, and the indices of C and R buffers."""
        model = self.model
        holder = model if self.is_direct else HeldCores(self)
        for name, stack in self.stacks.items():
            key = self.key_of(name)
            stack.hand_over(holder, key)
            indices = torch.tensor([stack.rows, stack.columns], device=stack.core.device)
            holder.register_buffer(stack.indices_key, indices)
            if not stack.base.is_own:
                for side, taken in zip(_SIDES, stack.factors.slices, strict=True):
                    holder.register_buffer(f"{key}__{side}", taken.clone())
        if self.is_direct:
            model.__dict__["_apply"] = self
        else:
            model.add_module(CHILD, holder)
        model.register_load_state_dict_pre_hook(self.loading)
        model.register_load_state_dict_post_hook(self.loaded)
        model.register_state_dict_pre_hook(self.saving)

    def move_out(self) -> None:
        """Removes everything from the model that `move_in` added."""
        model = self.model
        if self.is_direct:
            del model.__dict__["_apply"]
            for store in (model._parameters, model._buffers):
                for key in [key for key in store if self._is_own(key)]:
                    delattr(model, key)
        else:
            delattr(model, CHILD)
        for hooks, ours in (
            (model._load_state_dict_pre_hooks, Caretaker.loading),
            (model._load_state_dict_post_hooks, Caretaker.loaded),
            (model._state_dict_pre_hooks, Caretaker.saving),
        ):
            for number in [n for n, h in hooks.items() if _function_of(h) is ours]:
                del hooks[number]

    def moving(self) -> _Moving:
        """Context in which cores may move to other memory; their stacks are then notified."""
        return _Moving(self.stacks.values())

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """The model's ``_apply``: moves the cores with the model, but keeps at least fp32."""
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
        """Writes the indices in use again, because `to_empty` leaves them uninitialised."""
        for stack in self.stacks.values():
            indices = holder._buffers[stack.indices_key]
            if indices is not None and not indices.is_meta:
                indices.copy_(torch.tensor([stack.rows, stack.columns], device="cpu"))

    def loading(
        self, model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *others: Any
    ) -> None:
        """Before a checkpoint is loaded: refuses one whose cores are written in another basis.

        Raises:
            ValueError: it has such cores; nothing of this model is loaded then.
        """
        self._let_changes_end()
        start = prefix if self.is_direct else f"{prefix}{CHILD}."
        for name, stack in self.stacks.items():
            for basis in BASES:
                is_other = basis != stack.basis
                if is_other and f"{start}{stack.indices_key_in(basis)}" in state_dict:
                    raise ValueError(
                        f"state_dict: expected cores in basis {stack.basis!r} in stack {name}, got "
                        f"them in {basis!r}; adapt the model with basis={basis!r} to load it"
                    )

    def loaded(self, model: nn.Module, incompatible_keys: Any) -> None:
        """After a checkpoint was loaded: updates C and R and, if merged, W_eff."""
        for name, stack in self.stacks.items():
            key, buffers = self.key_of(name), stack.holder._buffers
            sides = [buffers.get(f"{key}__{side}") for side in _SIDES]
            if sides[0] is not None and sides[1] is not None:
                stack.base.factors = CURFactors(sides[0], sides[1], stack.basis)
                stack.base.suspect()
            stack.settle()

    def _let_changes_end(self) -> None:
        """Waits while another thread changes the adapter, so that no checkpoint has half of it."""
        for stack in self.stacks.values():
            stack.let_changes_end()

    def saving(self, model: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Before a state dict is made: warns, once for each merge, that it is that of the base."""
        self._let_changes_end()
        merges = sum(stack.merges for stack in self.stacks.values())
        if merges > self._merges_told and any(stack.is_merged for stack in self.stacks.values()):
            self._merges_told = merges
            warnings.warn(
                "state_dict: the model is merged in place, and this is for a model that is adapted "
                "alike: it holds the base weights, without the update, and the cores "
                f"({CHILD}{'_' if self.is_direct else '.'}*). "
                "adapter.merge(inplace=False).state_dict() has the names of the plain model and "
                "the update in the weights",
                stacklevel=3,
            )

    def _is_own(self, key: str) -> bool:
        keys = [self.key_of(name) for name in self.stacks]
        return any(key == own or key.startswith(f"{own}__") for own in keys)


def _function_of(hook: Any) -> Any:
    """The function of a hook that is a bound method; torch wraps some hooks."""
    return getattr(getattr(hook, "hook", hook), "__func__", None)


class _Moving:
    def __init__(self, stacks: Any) -> None:
        self.stacks = list(stacks)

    def __enter__(self) -> None:
        self.before = [stack.storages() for stack in self.stacks]
        if torch.__future__.get_swap_module_params_on_conversion():
            for stack in self.stacks:  # torch cannot swap a parameter with weak references
                stack.moved()

    def __exit__(self, *error: object) -> None:
        for stack, before in zip(self.stacks, self.before, strict=True):
            if stack.storages() != before:  # if not moved, captured graphs may still read W_eff
                stack.moved()
