"""The handle of an adapted model: one adapter or several, saved, loaded, merged, switched."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.rows import Repeat
from ..layers.stack import TProductStack
from ..layers.switching import warn_of_unused
from ..processes import is_first_process, is_sharded, whole
from .batch import StackedCores, check_batch_first, check_finite
from .file import Contents, StoredStack, read_contents
from .fingerprint import Fingerprint, frozen_digest, persistent_buffers
from .holding import CHILD
from .install import stacks_of, take_out
from .linear_maps import find_weights
from .plan import Plan
from .record import StackRecord
from .streaming import on_meta
from .train_also import trained_names


class Adapter:
    """The handle of an adapted model; made by `adapt` and `load_adapter`.

    A model can have several adapters by name, which share C and R: each has its own cores, and its
    own values of what is trained beside them. One is active: the model computes with it, and
    ``parameters``, ``merge`` and ``save`` mean it.

    Attributes:
        model: the adapted model, trained and called as before.
        plan: ordered stacks, slices, shapes, and what was left out and why.
        stacks: stack name -> `TProductStack`; ``stacks[name].core`` is the trained core.
        train_also: patterns of what is trained beside the cores.
        active: name of the active adapter.
        skipped: what `load_adapter` with strict=False found in the file and not in the model.
        missing: what it found in the model and not in the file: trained, but as the base has it.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        stacks: Mapping[str, TProductStack],
        train_also: tuple[str, ...],
        base_buffers: Mapping[str, Tensor],
        name: str = "default",
    ) -> None:
        self.model = model
        self.plan = plan
        self.stacks = dict(stacks)
        self.train_also = train_also
        self.active = name
        self.skipped: tuple[str, ...] = ()
        self.missing: tuple[str, ...] = ()
        self._base_buffers = dict(base_buffers)
        # name -> what is trained beside the cores, of the adapters that are not active
        self._inactive: dict[str, dict[str, Tensor]] = {}
        self._order = [name]

    # -- parameters

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name in the model and parameter, for all that the active adapter trains: cores first."""
        for name, stack in self.stacks.items():
            is_direct = stack.holder is self.model
            yield f"{CHILD}{'_' if is_direct else '.'}{name}", stack.core
        parameters = dict(self.model.named_parameters())
        for name in trained_names(self.model, self.train_also):
            yield name, parameters[name]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything the active adapter trains: the cores, then what ``train_also`` names."""
        for _, parameter in self.named_parameters():
            yield parameter

    def count_parameters(self) -> int:
        """Number of trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    # -- several adapters

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order in which they came."""
        return tuple(self._order)

    def add(self, name: str) -> None:
        """Adds an adapter: cores of zeros, and what ``train_also`` names as it is now.

        Raises:
            ValueError: the name exists, is no identifier, or is one of what stacks hold: "indices".
        """
        self._check_new("name", name)
        for stack in self.stacks.values():
            stack.add_core(name)
        self._inactive[name] = self._learned()
        self._order.append(name)

    def activate(self, name: str) -> None:
        """Makes the model compute, train and save with that adapter. Nothing is compiled anew.

        Raises:
            ValueError: no such adapter, or the model is merged.
        """
        self._check_known("name", name)
        if name == self.active:
            return
        if self.is_merged:
            raise ValueError("activate: expected an unmerged adapter, got one that is merged")
        for stack in self.stacks.values():
            stack.activate_core(name, self.active)
        self._inactive[self.active] = self._learned()
        self._write(self._inactive.pop(name))
        self.active = name

    def delete(self, name: str) -> None:
        """Drops an adapter that is not active.

        Raises:
            ValueError: no such adapter, or it is active.
        """
        self._check_known("name", name)
        if name == self.active:
            raise ValueError(f"name: expected an adapter that is not active, got {name!r}")
        for stack in self.stacks.values():
            stack.remove_core(name)
        del self._inactive[name]
        self._order.remove(name)

    def combine(self, weights: Mapping[str, float], name: str) -> None:
        """Adds an adapter whose update is the weighted sum of those of others.

        C and R are shared, so the updates add exactly as the cores do.

        Raises:
            ValueError: a name that is unknown, one that exists for the new one, or adapters that
                train more than cores, which do not add.
        """
        self._check_new("name", name)
        for other in weights:
            self._check_known("weights", other)
        if not weights or not all(torch.isfinite(torch.tensor(w)) for w in weights.values()):
            raise ValueError(f"weights: expected finite numbers by name, got {dict(weights)}")
        if self.train_also:
            raise ValueError(
                "combine: expected adapters of cores alone, got train_also = "
                f"{', '.join(self.train_also)}"
            )
        self.add(name)
        with torch.no_grad():
            for stack in self.stacks.values():
                total = stack.core_of(name)
                for other, weight in weights.items():
                    total.add_(stack.core_of(self._key(other)), alpha=float(weight))

    def load(self, path: str | Path, name: str | None = None) -> None:
        """Loads the cores of a file, and what else it trained, for this model.

        Under the name of an adapter that exists its values are replaced (hot swap: nothing is
        compiled anew, optimizers keep their parameters), otherwise one is added.

        Args:
            path: file of `save`, made for the same base with the same stacks.
            name: default the active adapter.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a torn or foreign file, one for another base or with other stacks, or the
                active adapter while the model is merged. Everything is then as it was.
        """
        name = self.active if name is None else name
        if name not in self._order:
            self._check_new("name", name)
        elif name == self.active and self.is_merged:
            raise ValueError("load: expected an unmerged adapter, got one that is merged")
        contents = self._read(Path(path))
        # A file holds those buffers that training moved; the others are as the base has them.
        learned = {**self._base_buffers, **{k: v for (_, k), v in contents.learned.items()}}
        if name not in self._order:
            self.add(name)
        with torch.no_grad():
            for stored in contents.stacks:
                self.stacks[stored.plan.name].core_of(self._key(name)).copy_(stored.core)
        if name == self.active:
            self._write(learned)
        else:
            self._inactive[name].update(learned)

    # -- files

    def save(self, path: str | Path, name: str | None = None, factors: bool = False) -> None:
        """Writes cores, indices, plan, trained parameters and the base's fingerprint to ``path``.

        safetensors; atomic: a save that fails leaves the file that was there as it was. Where FSDP2
        shards the model, all processes call this, and rank 0 writes.

        Args:
            path: the file.
            name: default the active adapter.
            factors: whether to store C and R too. Without them the file is small and fits exactly
                one base; with them `load_adapter` can put it on a base in another dtype.

        Raises:
            ValueError: weights that are not loaded yet (on the meta device); or a model that other
                layers were put into, which the cores have no part in.
        """
        self._check_whole()
        name = self.active if name is None else name
        self._check_known("name", name)
        warn_of_unused("save", self.unused())
        contents = self._contents(name, factors)
        sharded = any(is_sharded(parameter) for parameter in self.model.parameters())
        tensors = {key: whole(tensor) for key, tensor in contents.tensors().items()}
        if is_first_process() or not sharded:
            contents.write(Path(path), tensors)

    def _check_whole(self) -> None:
        """Refuses to save a model that is not all there, or has other layers than were adapted."""
        here = {id(module) for module in self.model.modules()}
        for stack in self.stacks.values():
            for place in stack.places:
                if id(place.module) not in here:
                    raise ValueError(
                        f"save: expected the layers that were adapted, got a model without that of "
                        f"{place.name}, which was replaced or dropped; adapt it as it is to be"
                    )
        missing = on_meta(self.model)
        if missing is not None:
            raise ValueError(f"save: expected loaded weights, got {missing} on the meta device")

    def _contents(self, name: str, factors: bool) -> Contents:
        """What a file of one adapter holds."""
        values = self._learned() if name == self.active else self._inactive[name]
        trained = trained_names(self.model, self.train_also)
        learned = {("trained", key): values[key] for key in trained}
        # Statistics that training moved (of batch norms, say) belong to what was learned.
        for key, before in self._base_buffers.items():
            if not torch.equal(values[key], before.to(values[key])):
                learned["buffer", key] = values[key]
        weights, stacks = find_weights(self.model), []
        for plan in self.plan.stacks:
            stack = self.stacks[plan.name]
            stack.certify()
            stored = tuple(weights[member.module].stored() for member in plan.members)
            settings = (stack.rank, stack.alpha, stack.mode, stack.precision)
            core = stack.core_of(self._key(name))
            record, sides = StackRecord.of(plan, stack), stack.factors if factors else None
            stacks.append(StoredStack(record, stored, *settings, core, sides))
        frozen = frozen_digest(self.model, self.plan, trained)
        return Contents(tuple(stacks), self.train_also, frozen, learned)

    # -- many adapters in one batch

    def stack_cores(self, adapters: Sequence[str | Path | Mapping[str, Tensor]]) -> StackedCores:
        """Cores of many adapters side by side, for `batch`; they need not be added first.

        Args:
            adapters: names of adapters of this model, files (as ``Path``), or
                ``{stack name: core [n3, r, r]}``.

        Raises:
            FileNotFoundError, TypeError, ValueError: naming the entry and what is wrong with it;
                also adapters that train more than cores, which rows cannot have of their own.
        """
        if self.train_also:
            raise ValueError(
                "stack_cores: expected adapters of cores alone, got train_also = "
                f"{', '.join(self.train_also)}"
            )
        for index, entry in enumerate(adapters):
            if isinstance(entry, Mapping):
                check_finite(index, entry)
        return StackedCores.of(self.stacks, [self._cores(entry) for entry in adapters])

    @contextmanager
    def batch(
        self, cores: StackedCores, adapter_ids: Tensor, repeat: Repeat | None = None
    ) -> Iterator[None]:
        """Context in which each row of a batch goes by an adapter of its own.

        Between the two products that all rows share, row b takes core ``adapter_ids[b]``. That
        holds for calls of the model in this thread, or task, and for no others.

        Args:
            cores: of `stack_cores`.
            adapter_ids: int64 ``[B]``, on the device of the cores. The batch must be the first axis
                of what the adapted layers get.
            repeat: how rows repeat where layers get k times as many as there are ids: "each" k
                times in a row (beams, windows of an image, a decoder beside its encoder), or "all"
                of them, one batch after the other (classifier-free guidance). Default: they do
                not, and a layer that gets another number of rows refuses them.

        Raises:
            TypeError, ValueError: bad ids or ``repeat``; a model that is merged, or that has an
                attention whose batch is not the first axis.
        """
        if self.is_merged:
            raise ValueError("batch: expected an unmerged adapter, got one that is merged")
        check_batch_first(self.model)
        cores.check(self.stacks, adapter_ids)
        with cores.rows(self.stacks, adapter_ids, repeat):
            yield

    # -- layers that the model does without

    def unused(self) -> tuple[str, ...]:
        """Names of adapted layers that were neither called nor read while others were.

        Their slices of the core get no gradient, and merging changes a weight that was not looked
        at. Compiled calls leave no trace: layers that run in compiled code alone are named too.
        """
        names = [name for stack in self.stacks.values() for name in stack.unused()]
        every = sum(len(stack.places) for stack in self.stacks.values())
        return () if len(names) == every else tuple(names)

    # -- merge, unmerge, disable

    @property
    def is_merged(self) -> bool:
        """Whether the base weights hold W_eff now."""
        return any(stack.is_merged for stack in self.stacks.values())

    def merge(self, inplace: bool = True) -> nn.Module:
        """Folds the update into the weights, one rounding; `unmerge` takes it back bit for bit.

        Args:
            inplace: True writes into the model's own weights and keeps a copy of the base, which
                is what a state dict still holds, beside the cores. False returns a merged copy
                that needs this package no more, to be saved as any model: its layers are plain
                again, and this model stays as it is.

        Raises:
            ValueError: the model is merged already.
        """
        if self.is_merged:
            raise ValueError("merge: expected an unmerged adapter, got one that is merged already")
        warn_of_unused("merge", self.unused())
        if inplace:
            for stack in self.stacks.values():
                stack.merge()
            return self.model
        merged = copy.deepcopy(self.model)
        for twin in stacks_of(merged).values():
            twin.merge()
        take_out(merged)
        return merged

    def unmerge(self) -> None:
        """Restores the base weights bit for bit.

        Raises:
            ValueError: the model is not merged.
        """
        if not self.is_merged:
            raise ValueError("unmerge: expected a merged adapter, got one that is not merged")
        for stack in self.stacks.values():
            stack.unmerge()

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Context in which the model computes with its base weights (trained parts stay trained).

        Raises:
            ValueError: the model is merged; its weights are not the base's.
        """
        if self.is_merged:
            raise ValueError("disable: expected an unmerged adapter, got one that is merged")
        before = {name: stack.enabled for name, stack in self.stacks.items()}
        for stack in self.stacks.values():
            stack.enabled = False
        try:
            yield
        finally:
            for name, stack in self.stacks.items():
                stack.enabled = before[name]

    def invalidate(self) -> None:
        """Has W_eff of all stacks built before it is used again; `TProductStack.invalidate`."""
        for stack in self.stacks.values():
            stack.invalidate()

    def __repr__(self) -> str:
        others = len(self._order) - 1
        of = f" of {self.active!r}, {others} more" if others else ""
        return f"Adapter({self.count_parameters():,} parameters{of}, {self.plan!r})"

    # -- inside

    def _check_new(self, argument: str, name: Any) -> None:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"{argument}: expected an identifier, got {name!r}")
        if name in self._order or not all(stack.is_free(name) for stack in self.stacks.values()):
            raise ValueError(f"{argument}: expected a name that is free, got {name!r}")

    def _check_known(self, argument: str, name: Any) -> None:
        if name not in self._order:
            raise ValueError(f"{argument}: expected one of {', '.join(self._order)}, got {name!r}")

    def _key(self, name: str) -> str | None:
        """The name by which the stacks know a core: the active one has none there."""
        return None if name == self.active else name

    def _state(self) -> dict[str, Tensor]:
        """What is trained beside the cores, in the model: parameters, and all buffers."""
        parameters = dict(self.model.named_parameters())
        trained = {n: parameters[n] for n in trained_names(self.model, self.train_also)}
        return {**trained, **dict(persistent_buffers(self.model))}

    def _learned(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._state().items()}

    def _write(self, learned: Mapping[str, Tensor]) -> None:
        state = self._state()
        with torch.no_grad():
            for name, tensor in learned.items():
                state[name].copy_(tensor)

    def _read(self, path: Path) -> Contents:
        """A file for this very model."""
        contents = read_contents(path)
        contents.check_fits(self.stacks, self.plan, path)
        for stored in contents.stacks:
            if Fingerprint.of(self.stacks[stored.plan.name].factors) != stored.record.base:
                raise ValueError(
                    f"path: expected an adapter of this base, got one of other weights in stack "
                    f"{stored.plan.name} at {path}"
                )
        state = self._state()
        trained = set(trained_names(self.model, self.train_also))
        came = {name for kind, name in contents.learned if kind == "trained"}
        if came != trained:
            raise ValueError(
                f"path: expected {', '.join(sorted(trained)) or 'nothing'} beside the cores, got "
                f"{', '.join(sorted(came)) or 'nothing'} at {path}"
            )
        for (_, name), tensor in contents.learned.items():
            if name not in state or state[name].shape != tensor.shape:
                got = list(tensor.shape)
                own = list(state[name].shape) if name in state else "none"
                raise ValueError(f"path: expected {name} of shape {own}, got {got} at {path}")
        return contents

    def _cores(self, entry: str | Path | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Cores by stack name."""
        if isinstance(entry, Mapping):
            return entry
        if isinstance(entry, Path):
            contents = self._read(entry)
            return {stored.plan.name: stored.core for stored in contents.stacks}
        self._check_known("adapters", entry)
        key = self._key(entry)
        return {name: stack.core_of(key) for name, stack in self.stacks.items()}
