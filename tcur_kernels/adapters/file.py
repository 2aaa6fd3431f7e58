"""The adapter file: safetensors with a JSON header, written completely or not at all.

Tensors are ``core.<stack>``, ``trained.<parameter>`` and ``buffer.<buffer>``. If C and R are stored
too, they are ``lateral.<stack>`` and ``horizontal.<stack>``. If not, the file only has 2 r indices
per stack, which say which slices of the base weights C and R are; it then fits exactly one base.
The header holds the record of every stack (`record.StackRecord`), its settings, the base's
fingerprint, and what the user wants to keep with the adapter. Digests over the header and over the
tensors (`sealing`) are verified whenever a file is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files.parsing import Fields, Source, check_name, parse, shown
from ..files.tensor_file import TensorFile
from ..files.whole import replacing
from ..layers.stack import TProductStack
from ..matrices import Layout, layout_in_file, layout_of_file
from ..operators.basis import BASES, Basis, check_basis, scale_of
from ..operators.cost import MODES
from ..operators.factors import PRECISIONS, CURFactors
from ..values import HoldsTensors
from .metadata import checked_metadata
from .plan import Plan, StackPlan
from .record import StackRecord
from .sealing import TENSORS, check_header, check_tensors, digest_of, sealed

FORMAT = "tcur_kernels.adapter"

#: Version 2 is the same without digests; such files are read, too.
FORMAT_VERSION, UNSEALED_VERSION = 3, 2

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: The settings of a stack in the header.
_SETTINGS = ("rank", "alpha", "mode", "precision", "basis")


@dataclass(frozen=True, eq=False, repr=False)
class StoredStack(HoldsTensors):
    """One stack of a file.

    Attributes:
        record: its plan, the indices of C and R, and the base they were taken from.
        stored: for each member, the parameter that holds its weight, its layout, and the row of
            the matrix at which the weight begins.
        rank, alpha, mode, precision, basis: settings, as `TProductStack` takes them.
        core: ``[n3, r, r]``.
        factors: those of the slices, if the file has these.
    """

    record: StackRecord
    stored: tuple[tuple[str, Layout, int], ...]
    rank: int
    alpha: float
    mode: str
    precision: str
    basis: Basis
    core: Tensor
    factors: CURFactors | None

    @property
    def plan(self) -> StackPlan:
        """Its layers, in the order of their slices."""
        return self.record.plan

    @property
    def scale(self) -> float:
        """What C * U * R is multiplied by."""
        return scale_of(self.basis, self.alpha, self.plan.n1, self.plan.n2, self.rank)

    def as_json(self) -> dict[str, Any]:
        """The entry of the stack in the header of a file."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        stored = [[parameter, layout_in_file(how), row] for parameter, how, row in self.stored]
        return {**self.record.as_json(), **settings, "stored": stored}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the stack, by their names in the file."""
        name = self.plan.name
        named = {f"core.{name}": self.core}
        if self.factors is not None:
            named[f"lateral.{name}"], named[f"horizontal.{name}"] = self.factors.slices
        return named

    @classmethod
    def of_json(
        cls, entry: Any, tensors: Mapping[str, Tensor], source: Source, index: int
    ) -> StoredStack:
        """Builds the record of a stack from its header entry and the tensors of the file.

        Raises:
            ValueError: something is missing or wrong, or does not fit; the message names it.
        """
        fields = Fields(entry, source, f"stacks[{index}]")
        rank = fields.whole("rank", 1, 2**40)
        record = StackRecord.of_json(fields, rank)
        plan, name = record.plan, record.plan.name
        core = _tensor(tensors, f"core.{name}", (plan.n3, rank, rank), source)
        factors = None
        if f"lateral.{name}" in tensors or f"horizontal.{name}" in tensors:
            sides = (plan.n3, plan.n1, rank), (plan.n3, rank, plan.n2)
            lateral = _tensor(tensors, f"lateral.{name}", sides[0], source)
            factors = CURFactors(lateral, _tensor(tensors, f"horizontal.{name}", sides[1], source))
        stored = []
        for own in fields.list("stored"):
            if not isinstance(own, list) or len(own) != 3:
                raise fields.error("stored", "lists of parameter, layout and row", shown(own))
            try:
                layout = layout_of_file(own[1])
            except ValueError:
                raise fields.error("stored", "a layout that there is", shown(own[1])) from None
            parameter = check_name(own[0], source, "that of a parameter")
            stored.append((parameter, layout, fields.is_whole("stored", own[2], 0, 2**40)))
        if len(stored) != len(plan.members):
            raise fields.error("stored", f"{len(plan.members)} places of weights", len(stored))
        # Files from before there was another basis do not name it.
        basis: Basis = "slices"
        if "basis" in fields:
            basis = fields.one_of("basis", BASES, check_basis)
        mode, precision = fields.one_of("mode", MODES), fields.one_of("precision", PRECISIONS)
        settings = (rank, fields.number("alpha"), mode, precision, basis)
        return cls(record, tuple(stored), *settings, core, factors)


def _tensor(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], source: Source
) -> Tensor:
    """A tensor of the file; refuses one of another shape, or with numbers that are not finite."""
    found = tensors.get(name)
    if found is None:
        raise source.error(f"a tensor {name}", "none")
    if found.shape != shape:
        raise source.error(f"{name} of shape {list(shape)}", list(found.shape))
    if found.dtype not in _FLOATING:
        raise source.error(f"floating numbers in {name}", found.dtype)
    if not torch.isfinite(found).all():
        raise source.error(f"finite numbers in {name}", "NaN or Inf")
    return found


@dataclass(frozen=True, eq=False, repr=False)
class Contents(HoldsTensors):
    """The contents of a file.

    Attributes:
        stacks: in the order of the plan.
        train_also: patterns of what was trained beside the cores.
        frozen_sha256: digest of every parameter that is neither trained nor in a stack.
        learned: ("trained" or "buffer", name in the model) -> values.
        metadata: what the user keeps with the adapter; see `Adapter.metadata`.
    """

    stacks: tuple[StoredStack, ...]
    train_also: tuple[str, ...]
    frozen_sha256: str
    learned: Mapping[tuple[str, str], Tensor]
    metadata: dict[str, Any]

    @property
    def plan(self) -> Plan:
        """The ordered stacks."""
        return Plan(tuple(stored.plan for stored in self.stacks))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by their names in the file."""
        named = {f"{kind}.{name}": tensor for (kind, name), tensor in self.learned.items()}
        for stored in self.stacks:
            named |= stored.tensors()
        return named

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Writes a file atomically: an existing file stays until the new one is complete.

        Args:
            path: the file.
            tensors: the result of `tensors`, gathered if they were sharded.

        Raises:
            ValueError: a tensor has no elements (a shard that was not gathered), or the metadata
                are more than a reader accepts.
        """
        empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
        if empty:
            raise ValueError(f"save: expected tensors with elements, got empty {', '.join(empty)}")
        header = {
            "stacks": [stored.as_json() for stored in self.stacks],
            "train_also": list(self.train_also),
            "frozen_sha256": self.frozen_sha256,
            "metadata": self.metadata,
        }
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(header)
        parse(text, Source("save", path), "the header")  # else nobody could read it
        metadata = sealed(
            {
                "format": FORMAT,
                "format_version": str(FORMAT_VERSION),
                "adapter": text,
                TENSORS: digest_of(contiguous),
            }
        )
        with replacing(path) as temporary:
            save_file(contiguous, temporary, metadata=metadata)

    def check_fits(self, stacks: Mapping[str, TProductStack], plan: Plan, path: Path) -> None:
        """Refuses stacks with other layers, sizes, alpha, or indices of C and R.

        Raises:
            ValueError: something differs; the message names it.
        """
        self.check_layers(plan, path)
        for stored in self.stacks:
            name = stored.plan.name
            stack, record = stacks[name], stored.record
            for what, wanted, came in (
                ("rank", stack.rank, stored.rank),
                ("alpha", stack.alpha, stored.alpha),
                ("basis", stack.basis, stored.basis),
                ("rows", list(stack.rows), list(record.rows)),
                ("columns", list(stack.columns), list(record.columns)),
            ):
                if wanted != came:
                    raise ValueError(
                        f"path: expected {what} {wanted} in stack {name}, which adapters of one "
                        f"model share, got {came} at {path}"
                    )

    def check_layers(self, plan: Plan, path: Path) -> None:
        """Refuses stacks of other layers than those of a plan.

        Raises:
            ValueError: some differ, or are missing; the message names one.
        """
        own_plans = {entry.name: entry for entry in plan.stacks}
        for stored in self.stacks:
            name = stored.plan.name
            own = own_plans.get(name)
            if own is None or own.members != stored.plan.members:
                raise ValueError(
                    f"path: expected an adapter with the stacks of this model, got other layers in "
                    f"stack {name} at {path}"
                )
        missing = own_plans.keys() - {stored.plan.name for stored in self.stacks}
        if missing:
            raise ValueError(
                f"path: expected an adapter with the stacks of this model, got one without "
                f"{', '.join(sorted(missing))} at {path}"
            )


def read_contents(path: Path) -> Contents:
    """Reads and checks a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged or not an adapter, has another format version, or
            has parts that do not fit.
    """
    with _opened(path) as (header, file):
        source = header.source
        tensors = {name: file.read(name) for name in file.entries}
        check_tensors(file.metadata, tensors, source)
        entries = enumerate(header.list("stacks"))
        stacks = tuple(StoredStack.of_json(own, tensors, source, i) for i, own in entries)
        members = [member.module for stored in stacks for member in stored.plan.members]
        if len({s.plan.name for s in stacks}) != len(stacks) or len({*members}) != len(members):
            raise source.error("stacks and layers of different names", "some twice")
        train_also = [check_name(p, source, "a pattern") for p in header.list("train_also")]
        frozen, metadata = header.sha256("frozen_sha256"), _metadata_of(header)
    learned = {}
    for name, tensor in tensors.items():
        kind, _, own = name.partition(".")
        if kind in ("trained", "buffer"):
            learned[(kind, own)] = tensor
    contents = Contents(stacks, tuple(train_also), frozen, learned, metadata)
    others = sorted(tensors.keys() - contents.tensors().keys())
    if others:
        raise source.error("the tensors of an adapter alone", shown(others[0]))
    return contents


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Reads what was kept with an adapter as `Adapter.metadata`; needs no model and no tensors.

    Args:
        path: a file that `Adapter.save` wrote.

    Returns:
        The dict; an empty one if nothing was kept.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, or its header is damaged; it is not an adapter, or has
            another format version.
    """
    with _opened(Path(path)) as (header, _):
        return _metadata_of(header)


def _metadata_of(header: Fields) -> dict[str, Any]:
    """The metadata in a header; files from before there was any have none."""
    found = header.any("metadata") if "metadata" in header else {}
    try:
        return checked_metadata(found)
    except TypeError as error:
        raise header.source.error(
            "metadata that `Adapter.save` wrote", f"others ({error})"
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Fields, TensorFile]]:
    """Context with the header of a file, and the file to read its tensors from.

    It refuses a truncated, damaged or foreign file, one of another version, and one that changes.
    """
    if not path.exists():
        raise FileNotFoundError(f"path: expected an adapter file, got none at {path}")
    with TensorFile(path, "path") as file:
        yield _header_of(file.metadata, Source("path", path)), file
        file.check_unchanged()


def _header_of(metadata: Mapping[str, str], source: Source) -> Fields:
    """The header that `Contents.write` wrote; refuses another format or version, and damage."""
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"path: expected an adapter of tcur_kernels, got a safetensors file of format "
            f"{shown(metadata.get('format'))} at {source.path}"
        )
    version = metadata.get("format_version")
    if version not in (str(FORMAT_VERSION), str(UNSEALED_VERSION)):
        raise ValueError(
            f"path: expected format version {FORMAT_VERSION} or {UNSEALED_VERSION}, got "
            f"{shown(version)} at {source.path}; another version of tcur_kernels wrote it"
        )
    check_header(metadata, source, is_sealed=version != str(UNSEALED_VERSION))
    if "adapter" not in metadata:
        raise source.error("a whole adapter file", "one with parts missing (no header)")
    return Fields(parse(metadata["adapter"], source, "the header"), source, "the header")
