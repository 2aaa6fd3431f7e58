"""The handle of an adapted model: saves, loads, merges and switches its adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.exclusion import Gate
from ..layers.quantised import REFUSED
from ..layers.stack import TProductStack
from ..layers.switching import warn_of_unused
from ..operators.basis import Basis, check_basis
from ..operators.checks import check_finite
from ..processes import is_first_process, is_sharded, whole
from .average import average
from .file import Contents, StoredStack, read_contents
from .fingerprint import Fingerprint, frozen_digest, persistent_buffers
from .holding import CHILD
from .install import stacks_of, take_out
from .linear_maps import find_weights
from .lora_file import LoraExport, layers_of, refuse_learned, updates_of, write_lora
from .metadata import checked_metadata
from .plan import Plan
from .quantised import bias_copies, forget_quantiser, put_plain_layers
from .record import StackRecord
from .serving import Serving
from .streaming import on_meta
from .train_also import check_learned, trained_names
from .within import read_cores


class Adapter(Serving):
    """The handle of an adapted model; made by `adapt` and `load_adapter`.

    A model can have several named adapters, which share C and R. Each has its own cores and its own
    values of whatever else is trained. One adapter is active: the model computes with it, and
    ``parameters``, ``merge`` and ``save`` refer to it.

    Attributes:
        model: the adapted model; train and call it as before.
        plan: ordered stacks, slices, shapes, and what was left out and why.
        stacks: stack name -> `TProductStack`; ``stacks[name].core`` is the trained core.
        train_also: patterns of what is trained beside the cores.
        active: name of the active adapter.
        skipped: what `load_adapter` with strict=False found only in the file.
        missing: what it found only in the model: trained parameters that keep the base's values.
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
        # name of an inactive adapter -> its values of what is trained beside the cores
        self._inactive: dict[str, dict[str, Tensor]] = {}
        self._metadata: dict[str, dict[str, Any]] = {name: {}}
        self._order = [name]
        self._disabled = 0  # how many `disable` are open, of all threads

    # -- parameters

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names in the model and parameters of all that the active adapter trains, cores first."""
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
        """The number of trained scalars."""
        return sum(parameter.numel() for parameter in self.parameters())

    # -- several adapters

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order in which they were added."""
        return tuple(self._order)

    @property
    def metadata(self) -> dict[str, Any]:
        """What you want to keep with the active adapter: a dict of what JSON can hold.

        `save` writes it, and whoever loads the file finds it here again; `read_metadata` reads it
        without a model. How a training prepared its data is an example. Each adapter has its own,
        at first an empty one. What you set is copied, and tuples become lists.

        Raises:
            TypeError: what is set is no dict, or holds something that JSON cannot hold, such as
                NaN, a tensor, or a key that is no string; the message says where.
        """
        return self._metadata[self.active]

    @metadata.setter
    def metadata(self, value: dict[str, Any]) -> None:
        self._metadata[self.active] = checked_metadata(value)

    def add(self, name: str) -> None:
        """Adds an adapter with cores of zeros and the present values of what ``train_also`` names.

        Raises:
            ValueError: the name exists, is not an identifier, or is reserved, such as "indices".
        """
        with self._gate().held():
            self._check_new("name", name)
            for stack in self.stacks.values():
                stack.add_core(name)
            self._inactive[name] = self._learned()
            self._metadata[name] = {}
            self._order.append(name)

    def activate(self, name: str) -> None:
        """Makes the model compute, train and save with that adapter. Nothing is recompiled.

        All threads compute with it from their next call on.

        Raises:
            RuntimeError: another thread is inside a call of the model. Nothing has changed then.
            ValueError: there is no such adapter, or the model is merged.
        """
        with self._gate().held():
            self._check_known("name", name)
            if name == self.active:
                return
            self._check_unmerged("activate")
            with self._changing("activate"):
                for stack in self.stacks.values():
                    stack.activate_core(name, self.active)
                self._inactive[self.active] = self._learned()
                self._write(self._inactive.pop(name))
                self.active = name

    def delete(self, name: str) -> None:
        """Drops an adapter that is not active.

        Raises:
            ValueError: there is no such adapter, or it is active.
        """
        with self._gate().held():
            self._check_known("name", name)
            if name == self.active:
                raise ValueError(f"name: expected an adapter that is not active, got {name!r}")
            for stack in self.stacks.values():
                stack.remove_core(name)
            del self._inactive[name], self._metadata[name]
            self._order.remove(name)

    def combine(self, weights: Mapping[str, float], name: str) -> None:
        """Adds an adapter whose update is a weighted sum of the updates of other adapters.

        All adapters share C and R, so adding the cores adds the updates.

        Raises:
            TypeError: a weight is no number.
            ValueError: a name in ``weights`` is unknown; a weight is not finite; ``name`` exists
                already; or the adapters train more than cores, which cannot be added like this.
        """
        self._check_new("name", name)
        for other in weights:
            self._check_known("weights", other)
        if not weights:
            raise ValueError("weights: expected finite numbers by name, got none")
        for number in weights.values():
            check_finite("weights", number)
        if self.train_also:
            raise ValueError(
                "combine: expected adapters of cores alone, got train_also = "
                f"{', '.join(self.train_also)}"
            )
        with self._gate().held():
            self.add(name)
            with torch.no_grad():
                for stack in self.stacks.values():
                    total = stack.core_of(name)
                    for other, weight in weights.items():
                        total.add_(stack.core_of(self._key(other)), alpha=float(weight))

    def load(self, path: str | Path, name: str | None = None) -> None:
        """Loads the cores of a file, whatever else it trained, and its metadata into this model.

        If an adapter of that name exists, its values are replaced (hot swap): nothing is
        recompiled, and optimizers keep their parameters. Otherwise a new adapter is added.

        Args:
            path: a file that `save` wrote, for the same base with the same stacks.
            name: by default the active adapter.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated or not an adapter, or is for another base or other
                stacks; or the adapter is active while the model is merged. Nothing has changed
                then.
            RuntimeError: the adapter is active, and another thread is inside a call of the model.
                Nothing has changed then.
        """
        name = self.active if name is None else name
        if name not in self._order:
            self._check_new("name", name)
        contents = self._read(Path(path))
        # A file holds only the buffers that training changed; the others are those of the base.
        learned = {**self._base_buffers, **{k: v for (_, k), v in contents.learned.items()}}
        with self._gate().held(), ExitStack() as change:
            if name == self.active:
                self._check_unmerged("load")
                change.enter_context(self._changing("load"))
            elif name not in self._order:
                self.add(name)
            with torch.no_grad():
                for stored in contents.stacks:
                    self.stacks[stored.plan.name].core_of(self._key(name)).copy_(stored.core)
            if name == self.active:
                self._write(learned)
            else:
                self._inactive[name].update(learned)
            self._metadata[name] = contents.metadata

    def change_basis(self, basis: Basis) -> None:
        """Writes the cores of all adapters in another basis; the model computes the same.

        W_eff stays the same but for the rounding of the cores. The state of an optimizer belongs to
        the former basis, so make a new one.

        Args:
            basis: "orthonormal" or "slices", see `adapt`.

        Raises:
            ValueError: there is no such basis; the model is merged, or its cores are sharded; or
                the slices are so nearly dependent that a core in them would change the update.
                Nothing has changed then.
        """
        check_basis(basis)
        values = {}
        with self._changing("change_basis"):
            self._check_unmerged("change_basis")
            for name, stack in self.stacks.items():
                if any(is_sharded(core) or core.is_meta for core in stack.every_core()):
                    raise ValueError(
                        f"change_basis: expected whole cores, got a sharded or offloaded one in "
                        f"stack {name}; convert the adapter on one process"
                    )
            for name, stack in self.stacks.items():
                try:
                    values[name] = stack.converted(basis)
                except ValueError as error:
                    raise ValueError(f"stack {name}: {error}") from error
            for name, stack in self.stacks.items():
                stack.adopt(basis, values[name])

    # -- files

    def save(self, path: str | Path, name: str | None = None, factors: bool = False) -> None:
        """Writes cores, indices, plan, what else is trained, metadata and the base's fingerprint.

        The format is safetensors. Writing is atomic: if it fails, an existing file stays as it was.
        If FSDP2 shards the model, all processes must call this, and rank 0 writes.

        Args:
            path: the file.
            name: by default the active adapter.
            factors: whether to store C and R too. Without them the file is small and fits exactly
                one base. With them `load_adapter` can also use a base in another dtype. They are
                always stored where they are not slices of a quantised base.

        Raises:
            TypeError: the metadata was given something that JSON cannot hold.
            ValueError: some weights are not loaded yet (on the meta device); or some adapted layers
                of the model were replaced or removed.
        """
        self._check_whole("save")
        name = self.active if name is None else name
        self._check_known("name", name)
        warn_of_unused("save", self.unused())
        with self._gate().held():
            contents = self._contents(name, factors)
        sharded = any(is_sharded(parameter) for parameter in self.model.parameters())
        tensors = {key: whole(tensor) for key, tensor in contents.tensors().items()}
        if is_first_process() or not sharded:
            contents.write(Path(path), tensors)

    def to_lora(
        self,
        path: str | Path,
        rank: int | None = None,
        dtype: torch.dtype = torch.float32,
        base_model: str | None = None,
        task_type: str | None = None,
        name: str | None = None,
    ) -> LoraExport:
        """Writes a LoRA adapter that Hugging Face peft, and servers such as vLLM, can load.

        No weight is decomposed for it: an update is a product of thin matrices already. The files
        are ``adapter_config.json`` and ``adapter_model.safetensors``; others stay. Both are written
        beside their places before they replace what was there.

        Args:
            path: the directory; made if it does not exist.
            rank: of the LoRA. None: the exact one, n3 * r, or less where layers are smaller. A
                number is rounded up to the next rank that vLLM takes (1, 8, 16, 32, 64, 128, 256,
                320 or 512), but not beyond the exact one. An update of higher rank is approximated
                as well as that rank can. All layers have the same rank; zeros fill it up.
            dtype: of A and B.
            base_model: what the config names as the base; by default what that of the model names.
            task_type: of peft, such as "CAUSAL_LM". Only its ``AutoPeftModel`` classes need it.
            name: of the adapter; by default the active one.

        Returns:
            What was written, with the error of every layer; print it.

        Raises:
            TypeError, ValueError: an argument is wrong; LoRA cannot hold what was trained
                (``train_also``, buffers) or the layers (projections of ``nn.MultiheadAttention``,
                layers with several names); ``dtype`` does not hold the numbers; or the model is
                sharded or not fully loaded. Nothing is written then.
            FileExistsError: ``path`` is a file.
        """
        self._check_whole("to_lora")
        name = self.active if name is None else name
        self._check_known("name", name)
        warn_of_unused("to_lora", self.unused())
        with self._gate().held():
            refuse_learned([key for _, key in self._learned_beside(name)])
            updates = updates_of(self.plan.stacks, self.stacks, self._key(name))
        known = getattr(getattr(self.model, "config", None), "_name_or_path", None)
        return write_lora(
            path,
            updates,
            layers_of(self.model, self.plan.stacks),
            rank,
            dtype,
            base_model or known or None,
            task_type,
        )

    average = staticmethod(average)

    def _check_whole(self, caller: str) -> None:
        """Refuses to write a model that is not fully loaded, or that lost some adapted layers."""
        here = {id(module) for module in self.model.modules()}
        for stack in self.stacks.values():
            for place in stack.places:
                if id(place.module) not in here:
                    raise ValueError(
                        f"{caller}: expected the layers that were adapted, got a model without "
                        f"that of {place.name}, which was replaced or dropped; adapt it as it is "
                        "to be"
                    )
        missing = on_meta(self.model)
        if missing is not None:
            raise ValueError(f"{caller}: expected loaded weights, got {missing} on the meta device")

    def _learned_beside(self, name: str) -> dict[tuple[str, str], Tensor]:
        """What one adapter learned beside its core, as `Contents.learned` has it."""
        values = self._learned() if name == self.active else self._inactive[name]
        learned = {("trained", k): values[k] for k in trained_names(self.model, self.train_also)}
        # Statistics that training changed, for example of batch norms, were learned, too.
        for key, before in self._base_buffers.items():
            if not torch.equal(values[key], before.to(values[key])):
                learned["buffer", key] = values[key]
        return learned

    def _contents(self, name: str, factors: bool) -> Contents:
        """The contents of the file of one adapter."""
        learned = self._learned_beside(name)
        weights, stacks = find_weights(self.model), []
        for plan in self.plan.stacks:
            stack = self.stacks[plan.name]
            stack.certify()
            stored = tuple(weights[member.module].stored() for member in plan.members)
            settings = (stack.rank, stack.alpha, stack.mode, stack.precision, stack.basis)
            core = stack.core_of(self._key(name))
            # C and R of a quantised base that are not slices of it are nowhere else.
            are_stored = factors or bool(stack.quantised and not stack.base.is_own)
            record, sides = StackRecord.of(plan, stack), stack.factors if are_stored else None
            stacks.append(StoredStack(record, stored, *settings, core, sides))
        trained = trained_names(self.model, self.train_also)
        frozen = frozen_digest(self.model, self.plan, trained)
        metadata = checked_metadata(self._metadata[name])  # it may have been written to since
        return Contents(tuple(stacks), self.train_also, frozen, learned, metadata)

    def _save_cores(
        self, cores: Mapping[str, Tensor], path: str | Path, metadata: dict[str, Any]
    ) -> None:
        """Like `save`, for cores that belong to no adapter of this model."""
        self._check_whole("save")
        contents = self._contents(self.active, factors=False)
        stacks = tuple(replace(one, core=cores[one.plan.name]) for one in contents.stacks)
        contents = replace(contents, stacks=stacks, metadata=checked_metadata(metadata))
        contents.write(Path(path), contents.tensors())

    # -- layers that the model does not use

    def unused(self) -> tuple[str, ...]:
        """Names of adapted layers that were neither called nor read while others were.

        Their slices of the core get no gradient, yet merging changes their weights. Compiled calls
        leave no trace, so layers that run only in compiled code are named, too.
        """
        names = [name for stack in self.stacks.values() for name in stack.unused()]
        every = sum(len(stack.places) for stack in self.stacks.values())
        return () if len(names) == every else tuple(names)

    # -- merge, unmerge, disable

    @property
    def is_merged(self) -> bool:
        """Whether the layers' weights hold W_eff at present."""
        return any(stack.is_merged for stack in self.stacks.values())

    def merge(self, inplace: bool = True) -> nn.Module:
        """Adds the update to the weights with one rounding; `unmerge` restores them bit for bit.

        Args:
            inplace: True writes into the model's own weights and keeps a copy of the base. State
                dicts then still hold the base and the cores, and the first one warns of that. False
                leaves this model alone, merged or not, and returns a merged copy. Its layers are
                plain, so it no longer needs this package, and its state dict is that of a plain
                model. Quantised layers of the stacks become ``nn.Linear`` with the dequantised
                weight plus the update.

        Raises:
            ValueError: the model is to be merged in place and is merged already, or some of the
                adapted layers are quantised.
            RuntimeError: the model is to be merged in place, and another thread is inside a call of
                it.
        """
        if inplace and any(stack.quantised for stack in self.stacks.values()):
            raise ValueError(REFUSED)
        warn_of_unused("merge", self.unused())
        if inplace:
            with self._changing("merge"):
                self._check_unmerged("merge")
                for stack in self.stacks.values():
                    stack.merge()
            return self.model
        with self._gate().held():
            merged = copy.deepcopy(self.model, bias_copies(self.model))
        twins = stacks_of(merged)
        for twin in twins.values():
            if twin.is_merged:
                twin.settle()
            elif twin.quantised:
                put_plain_layers(merged, twin)
            else:
                twin.merge()
        take_out(merged, twins)
        forget_quantiser(merged)
        return merged

    def unmerge(self) -> None:
        """Restores the base weights bit for bit.

        Raises:
            ValueError: the model is not merged.
            RuntimeError: another thread is inside a call of the model.
        """
        with self._changing("unmerge"):
            if not self.is_merged:
                raise ValueError("unmerge: expected a merged adapter, got one that is not merged")
            for stack in self.stacks.values():
                stack.unmerge()

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Context in which the model computes with its base weights (trained parts stay trained).

        It does so in all threads.

        Raises:
            ValueError: the model is merged, so its weights are not those of the base.
            RuntimeError: another thread is inside a call of the model, at the beginning of the
                context or at its end; what that call computes is then part with, part without.
        """
        with self._changing("disable"):
            self._check_unmerged("disable")
            self._disabled += 1
            for stack in self.stacks.values():
                stack.enabled = False
        try:
            yield
        finally:
            with self._changing("disable", is_undone=True):
                self._disabled -= 1
                for stack in self.stacks.values():
                    stack.enabled = not self._disabled

    def invalidate(self) -> None:
        """Has all stacks rebuild W_eff before its next use; see `TProductStack.invalidate`."""
        for stack in self.stacks.values():
            stack.invalidate()

    def __repr__(self) -> str:
        others = len(self._order) - 1
        of = f" of {self.active!r}, {others} more" if others else ""
        return f"Adapter({self.count_parameters():,} parameters{of}, {self.plan!r})"

    # -- inside

    def _gate(self) -> Gate:
        """What no two changes pass at the same time; all stacks share it."""
        gate, *others = [stack.gate for stack in self.stacks.values()]
        if any(other is not gate for other in others):  # at first, and in a copy
            for stack in self.stacks.values():
                gate.differentiated_in |= stack.gate.differentiated_in
                stack.gate = gate
        return gate

    def _changing(self, caller: str, is_undone: bool = False) -> AbstractContextManager[None]:
        """Context of a change to what all threads share; see `Gate.closed`."""
        adapted = [place.module for stack in self.stacks.values() for place in stack.places]
        return self._gate().closed(caller, self.model, adapted, is_undone)

    def _check_unmerged(self, caller: str) -> None:
        if self.is_merged:
            raise ValueError(f"{caller}: expected an unmerged adapter, got one that is merged")

    def _check_new(self, argument: str, name: Any) -> None:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"{argument}: expected an identifier, got {name!r}")
        if name in self._order or not all(stack.is_free(name) for stack in self.stacks.values()):
            raise ValueError(f"{argument}: expected a name that is free, got {name!r}")

    def _check_known(self, argument: str, name: Any) -> None:
        if name not in self._order:
            raise ValueError(f"{argument}: expected one of {', '.join(self._order)}, got {name!r}")

    def _key(self, name: str) -> str | None:
        """The name of a core in the stacks, which is None for the active one."""
        return None if name == self.active else name

    def _state(self) -> dict[str, Tensor]:
        """The model's tensors that training changes beside the cores: parameters, all buffers."""
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
        """Reads a file and checks that it is for this model."""
        contents = read_contents(path)
        contents.check_fits(self.stacks, self.plan, path)
        for stored in contents.stacks:
            if Fingerprint.of(self.stacks[stored.plan.name].factors) != stored.record.base:
                raise ValueError(
                    f"path: expected an adapter of this base, got one of other weights in stack "
                    f"{stored.plan.name} at {path}"
                )
        trained = trained_names(self.model, self.train_also)
        check_learned(self._state(), trained, contents.learned, path)
        return contents

    def _cores(self, entry: str | Path | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The cores of an entry of `stack_cores`, by stack name."""
        if isinstance(entry, Mapping):
            return entry
        if isinstance(entry, Path):
            return read_cores(entry, self.stacks, self.plan)
        self._check_known("adapters", entry)
        with self._gate().held():
            key = self._key(entry)
            return {name: stack.core_of(key) for name, stack in self.stacks.items()}
