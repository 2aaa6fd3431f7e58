"""The cores of a stack, one of which is active, and the module that holds them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..processes import tell_of_forks
from .exclusion import Gate
from .rows import rows_of
from .switching import LateGradient


class Cores(nn.Module):
    """Cores by name, as parameters of this module or of another one, the holder.

    An adapted model holds the cores itself (`hand_over`). The holder is not registered as a
    submodule, because it may be the model that contains this module.

    Attributes:
        activations: how often another core became the active one.
        gate: closed while another thread changes what all threads share.
    """

    _holder: nn.Module

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "_holder", self)
        self._key = "core"
        self.activations = 0
        self.renew_locks()

    def refuse_rows_of_merged(self) -> None:
        """Must be called where a layer computes with merged weights, which all rows share.

        Raises:
            ValueError: the call is in a batch, which was opened before the model was merged.
        """
        if rows_of(self) is not None:
            raise ValueError(
                "batch: expected an unmerged adapter until its end, got one that was merged "
                "meanwhile, in this thread or another"
            )

    def renew_locks(self) -> None:
        """Starts with locks that nobody holds."""
        self._lock = threading.RLock()
        self.gate = Gate()
        tell_of_forks(self)

    def was_forked(self, is_child: bool) -> None:
        """Another thread of the parent may have held the lock; none of it is in the child."""
        if is_child:
            self._lock = threading.RLock()

    def let_changes_end(self) -> None:
        """Waits while another thread changes what all threads share; called by every layer."""
        if not torch.compiler.is_compiling():
            self.gate.let_through()

    @property
    def core(self) -> nn.Parameter:
        """The active core, ``[n3, r, r]``."""
        core = self._holder._parameters.get(self._key)
        return self.core_of(None) if core is None or core.is_meta else core

    @core.setter
    def core(self, value: Tensor) -> None:
        # FSDP1 sets a plain tensor in place of the parameter.
        self.__dict__["core"] = value

    @core.deleter
    def core(self) -> None:
        del self.__dict__["core"]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "core" and self._holder is not self:  # set where it is held
            setattr(self._holder, self._key, value)
        else:
            super().__setattr__(name, value)

    def core_of(self, name: str | None) -> nn.Parameter:
        """The core that `add_core` added under that name; for None, the active one."""
        key, holder = self._key if name is None else self._key_of(name), self._holder
        core: Any = holder._parameters.get(key)
        if core is None:  # FSDP1 sets a plain tensor in place of a parameter
            core = holder.__dict__.get(key)
        if core is None:
            raise AttributeError(f"core: expected a parameter {key!r}, got none")
        if core.is_meta and "_hf_hook" in holder.__dict__ and holder is not self:
            core = holder(key)  # offloaded: accelerate loads it when its module is called
        return core

    @property
    def holder(self) -> nn.Module:
        """The module that has the cores as its parameters."""
        return self._holder

    def hand_over(self, holder: nn.Module, key: str) -> None:
        """Moves the cores to ``holder``, which keeps the active one as its parameter ``key``."""
        core = self._parameters.pop(self._key)
        holder.register_parameter(key, core)
        object.__setattr__(self, "_holder", holder)
        self._key = key

    def is_free(self, name: str) -> bool:
        """Whether a new core may have that name: the holder has no attribute of that name yet."""
        return not hasattr(self._holder, self._key_of(name))

    def add_core(self, name: str) -> None:
        """Adds a core of zeros beside the active one; it is frozen until it becomes active."""
        core = nn.Parameter(torch.zeros_like(self.core), requires_grad=False)
        self._holder.register_parameter(self._key_of(name), core)

    def remove_core(self, name: str) -> None:
        """Drops a core that is not active."""
        delattr(self._holder, self._key_of(name))

    def activate_core(self, name: str, former: str) -> None:
        """Activates the core of that name; the one active until now is kept as ``former``.

        The parameter objects swap names and keep their values. An optimizer therefore still holds
        the right parameters, and a compiled graph, which takes the core as an input, stays valid. A
        pending graph of the former core still delivers its gradient.
        """
        core, trained = self.core_of(name), self.core
        if trained.requires_grad:
            LateGradient.keep(trained)
        core.requires_grad_(trained.requires_grad)
        trained.requires_grad_(False)
        delattr(self._holder, self._key_of(name))
        self._holder.register_parameter(self._key, core)
        self._holder.register_parameter(self._key_of(former), trained)
        self.activations += 1

    def every_core(self) -> list[nn.Parameter]:
        """All cores: the active one, and those that `add_core` added."""
        held = self._holder._parameters.items()
        own = [p for key, p in held if key == self._key or key.startswith(self._key_of(""))]
        return [each for each in own if each is not None]

    def storages(self) -> list[int]:
        """Identifies the memory of each core."""
        return [each.untyped_storage()._cdata for each in self.every_core()]

    def moved(self) -> None:
        """Called when cores have moved to other memory."""

    def _key_of(self, name: str) -> str:
        return f"{self._key}__{name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the cores with the model, but keeps them in at least fp32 if the model is cast."""
        before = self.storages()
        super()._apply(lambda tensor: keep_numbers(fn, tensor), recurse)
        if self.storages() != before:
            self.moved()
        return self


def keep_numbers(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Applies ``fn`` of a module's ``_apply`` but keeps the numbers, in at least fp32.

    ``Module.to_empty``, which brings models off the meta device, would leave uninitialised memory
    in place of a core. Here the numbers are copied. They become zeros only if the core was on the
    meta device and so had no numbers.
    """
    moved = fn(tensor)
    if getattr(fn, "__qualname__", "").startswith("Module.to_empty."):
        return moved.zero_() if tensor.is_meta else moved.copy_(tensor.detach())
    if not tensor.is_floating_point():
        return moved
    wide = torch.promote_types(moved.dtype, torch.float32)
    return moved if moved.dtype == wide else tensor.to(device=moved.device, dtype=wide)
