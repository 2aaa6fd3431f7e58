"""Finds the tensors of a model in its files, since transformers renames and regroups on loading.

Tensors on disk often have other names than in memory, and may be divided differently. For example,
the model may have three layers for a fused projection in the files, or one tensor for experts that
the files store one by one. transformers has the rules; this module applies them to the names in
the files.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: Reads a tensor from the files, by its name there.
Read = Callable[[str], Tensor]


class Regrouped:
    """Tensors of files that transformers converts together into tensors of the model.

    Attributes:
        stored: their names in the files.
        held: their names in the model.

    Raises:
        ValueError: transformers cannot convert the tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Sequence[Any],
        converter: Any,
        target: str,
        parts: Sequence[tuple[str, str]],
        shapes: Mapping[str, Sequence[int]],
    ) -> None:
        self._model, self._rules, self._converter = model, rules, converter
        self._target, self._parts = target, parts
        self.stored = tuple(name for name, _ in parts)
        empty = {n: torch.empty(list(shapes[n]), device="meta") for n in self.stored}
        self.held = list(self.load(empty.__getitem__))

    def __str__(self) -> str:
        operations = ", ".join(type(step).__name__ for step in self._converter.operations)
        return f"{', '.join(self.stored[:3])} by {operations}"

    def load(self, read: Read) -> dict[str, Tensor]:
        """The tensors of the model, as transformers makes them."""
        converter = deepcopy(self._converter)
        for name, pattern in self._parts:
            converter.add_tensor(self._target, name, pattern, read(name))
        try:
            made = converter.convert(self._target, model=self._model, config=self._model.config)
        except Exception as error:  # may be any kind, since this runs the rules of any model
            raise ValueError(
                f"transformers cannot make {self._target} of {self}: {error}"
            ) from error
        return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}

    def store(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the files, as transformers writes them; sets an attribute of the model."""
        from transformers.core_model_loading import revert_weight_conversion

        # from_pretrained leaves the rules by which it read the files in this attribute.
        used = [rule for rule in self._rules if rule.was_used()]
        self._model._weight_conversions = used  # type: ignore[assignment]
        made = revert_weight_conversion(self._model, dict(held))
        # Loading may add or remove the prefix of the base model, and the revert does not undo it.
        stored = {}
        for name in self.stored:
            close = [own for own in made if _same_but_for_prefix(own, name)]
            if len(close) == 1:
                stored[name] = made[close[0]]
        return stored

    def change(self, read: Read, edit: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        """The tensors of the files, after ``edit(name in the model, tensor)`` changed each.

        Raises:
            ValueError: transformers cannot revert its conversion bit for bit.
        """
        before = self.load(read)
        again = self.store(before)
        for name in self.stored:
            was = read(name)
            if name not in again or again[name].dtype != was.dtype or not _same(again[name], was):
                raise ValueError(
                    f"model_dir: expected tensors that transformers can write as it read them, got "
                    f"{self}, which it does not revert: merge in memory, and save_pretrained"
                )
        return self.store({name: edit(name, tensor) for name, tensor in before.items()})


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the model comes from.

    Attributes:
        name: the name of the tensor in the files, or, if it is regrouped, in the model.
        regrouped: the tensors from which it is made; None if the files contain it unchanged.
    """

    name: str
    regrouped: Regrouped | None = None

    @property
    def stored(self) -> tuple[str, ...]:
        """Names in the files."""
        return (self.name,) if self.regrouped is None else self.regrouped.stored

    def load(self, read: Read) -> Tensor:
        """The tensor as the model has it."""
        return read(self.name) if self.regrouped is None else self.regrouped.load(read)[self.name]


class Origins:
    """Origins of the tensors of a model in its files, by their names in the model.

    Args:
        argument, path: what errors call the files, and where they are.
        shapes: name in the files -> shape.
        model: a transformers model, on any device. If None, the names must be those in the files,
            except for a prefix.
        hint: added to errors about missing names.
    """

    def __init__(
        self,
        argument: str,
        path: Path,
        shapes: Mapping[str, Sequence[int]],
        model: nn.Module | None,
        hint: str = "",
    ) -> None:
        self._argument, self._path, self._hint = argument, path, hint
        self._below = ""
        self._found: dict[str, list[Origin]] = {name: [Origin(name)] for name in shapes}
        self._prefix = ""
        if model is not None:
            self._prefix = str(getattr(model, "base_model_prefix", ""))
            self._found, failed = _by_transformers(model, shapes)
            self._hint = failed or self._hint
            for names in _tied(model):
                there = [name for name in names if name in self._found]
                self._found |= {n: self._found[there[0]] for n in names if there and n not in there}

    def __getitem__(self, name: str) -> Origin:
        """The origin of a tensor.

        Raises:
            ValueError: no tensor has that name, or several may be meant.
        """
        if self._below:
            return self._found[f"{self._below}.{name}"][0]
        found = self._found.get(name, [])
        if not found and self._prefix:
            # The adapter may be for a model with a head, and the files for one without; or the
            # other way round.
            head = f"{self._prefix}."
            other = name.removeprefix(head) if name.startswith(head) else f"{head}{name}"
            found = self._found.get(other, [])
        if not found:
            close = [own for own in self._found if _same_but_for_prefix(own, name)]
            found = [origin for own in close for origin in self._found[own]]
        if len(found) == 1:
            return found[0]
        got = ", ".join(sorted({n for origin in found for n in origin.stored})[:3]) or "none"
        lacking = "" if found else "; what files lack is made anew when a model is loaded from them"
        raise ValueError(
            f"{self._argument}: expected a tensor {name} in {self._path}, got {got}"
            + (f" ({self._hint})" if self._hint else lacking)
        )

    def parts_with(self, names: Sequence[str]) -> list[str]:
        """Names of the parts of the model that have all these tensors, such as one of two towers.

        Empty if the model itself has them.
        """
        if all(name in self._found for name in names):
            return []
        first = f".{names[0]}"
        parts = [own.removesuffix(first) for own in self._found if own.endswith(first)]
        wanted = [[f"{part}.{name}" for name in names] for part in parts]
        return [
            part
            for part, own in zip(parts, wanted, strict=True)
            if all(len(self._found.get(name, ())) == 1 for name in own)
        ]

    def below(self, part: str) -> Origins:
        """The origins of the tensors of a part, by their names within it."""
        within = copy(self)
        within._below = part
        return within


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model is a transformers model; imports nothing."""
    module = sys.modules.get("transformers")
    return module is not None and isinstance(model, module.PreTrainedModel)


def _by_transformers(
    model: Any, shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, list[Origin]], str]:
    """Maps names in the model to their origins, found by the rules of transformers.

    Also returns an error message if transformers cannot convert some tensors.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:  # transformers 4 has no such rules
        return _by_transformers_4(model, shapes), ""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    held, prefix = model.state_dict(), model.base_model_prefix
    origins: dict[str, list[Origin]] = defaultdict(list)
    regrouped: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    failed = ""
    for stored in sorted(shapes, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, held)
        if name not in held and stored in held:
            name, pattern = rename_source_key(stored, [], [], prefix, held)
        if pattern is None:
            origins[name].append(Origin(stored))
        else:
            regrouped.setdefault(name, (by_pattern[pattern], []))[1].append((stored, pattern))
    for target, (converter, parts) in regrouped.items():
        try:
            group = Regrouped(model, rules, converter, target, parts, shapes)
        except ValueError as error:  # no error yet, since the caller may not need this one
            failed = str(error)
            continue
        for name in group.held:
            origins[name].append(Origin(name, group))
    return dict(origins), failed


def _by_transformers_4(model: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[Origin]]:
    """The same for transformers 4, which has names changed by patterns in some kinds of models."""
    modeling = sys.modules["transformers.modeling_utils"]
    kinds = [kind.__name__.lower() for kind in type(model).__mro__]
    is_renamed = any(part in kind for part in getattr(modeling, "VLMS", ()) for kind in kinds)
    patterns = getattr(model, "_checkpoint_conversion_mapping", {}) if is_renamed else {}
    origins: dict[str, list[Origin]] = defaultdict(list)
    for stored in shapes:
        name = stored
        for pattern, replacement in patterns.items():
            name, count = re.subn(pattern, replacement, stored)
            if count:  # the first that matches is the one that counts
                break
        origins[name].append(Origin(stored))
    return dict(origins)


def _tied(model: nn.Module) -> list[list[str]]:
    """All names of each parameter that has several; the files use only one of them."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [own for own in names.values() if len(own) > 1]


def _same_but_for_prefix(one: str, other: str) -> bool:
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype are equal bit for bit, including NaN."""
    bits = (tensor.contiguous().view(torch.uint8) for tensor in (one, other))
    return one.shape == other.shape and torch.equal(*bits)
