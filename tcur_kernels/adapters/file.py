"""The adapter file: safetensors with a JSON header, written completely or not at all.

Tensors are ``core.<stack>``, ``trained.<parameter>`` and ``buffer.<buffer>``. If C and R are stored
too, they are ``lateral.<stack>`` and ``horizontal.<stack>``. If not, the file only has 2 r indices
per stack, which say which slices of the base weights C and R are; it then fits exactly one base.
The header holds the record of every stack (`record.StackRecord`), its settings, the base's
fingerprint, and what the user wants to keep with the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files.whole import replacing
from ..layers.stack import TProductStack
from ..matrices import Layout, layout_in_file, layout_of_file
from ..operators.basis import Basis, check_basis, scale_of
from ..operators.factors import CURFactors
from ..values import HoldsTensors
from .metadata import checked_metadata
from .plan import Plan, StackPlan
from .record import StackRecord

FORMAT = "tcur_kernels.adapter"
FORMAT_VERSION = 2

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
    def of_json(cls, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StoredStack:
        """Builds the record of a stack from its header entry and the tensors of the file."""
        rank = entry["rank"]
        record = StackRecord.of_json(entry, rank)
        name, shape = record.plan.name, (record.plan.n3, rank, rank)
        core = tensors[f"core.{name}"]
        if core.shape != shape:
            raise ValueError(
                f"path: expected core.{name} of shape {list(shape)}, got {list(core.shape)}"
            )
        if not torch.isfinite(core).all():
            raise ValueError(f"path: expected finite numbers in core.{name}, got NaN or Inf")
        factors = None
        if f"lateral.{name}" in tensors:
            factors = CURFactors(tensors[f"lateral.{name}"], tensors[f"horizontal.{name}"])
        stored = tuple(
            (parameter, layout_of_file(how), int(row)) for parameter, how, row in entry["stored"]
        )
        # Files from before there was another basis do not name it.
        basis = check_basis(entry.get("basis", "slices"))
        settings = (rank, entry["alpha"], entry["mode"], entry["precision"], basis)
        return cls(record, stored, *settings, core, factors)


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
            ValueError: a tensor has no elements (a shard that was not gathered).
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
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "adapter": json.dumps(header),
        }
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
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
        ValueError: the file is truncated or not an adapter, has another format version, or has
            parts that do not fit.
    """
    with _opened(path) as (header, file):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        stacks = tuple(StoredStack.of_json(entry, tensors) for entry in header["stacks"])
        learned = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind in ("trained", "buffer"):
                learned[(kind, name)] = tensor
        return Contents(
            stacks,
            tuple(header["train_also"]),
            header["frozen_sha256"],
            learned,
            _metadata_of(header),
        )


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Reads what was kept with an adapter as `Adapter.metadata`; needs no model and no tensors.

    Args:
        path: a file that `Adapter.save` wrote.

    Returns:
        The dict; an empty one if nothing was kept.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or not an adapter, or has another format version.
    """
    with _opened(Path(path)) as (header, _):
        return _metadata_of(header)


def _metadata_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata in a header; files from before there was any have none."""
    return checked_metadata(header.get("metadata", {}))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """Context with the header of a file, and the file to read its tensors from.

    It refuses a truncated or foreign file, one of another version, and one in which the block
    misses something.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path: expected an adapter file, got none at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            yield _header_of(file.metadata() or {}, path), file
    except SafetensorError as error:
        raise ValueError(
            f"path: expected a whole safetensors file, got a truncated or foreign one at {path} "
            f"({error})"
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"path: expected a whole adapter file, got one with parts missing at {path} ({error!r})"
        ) from error


def _header_of(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The header that `Contents.write` wrote; refuses another format or version."""
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"path: expected an adapter of tcur_kernels, got a safetensors file of format "
            f"{metadata.get('format')!r} at {path}"
        )
    version = metadata.get("format_version")
    if version != str(FORMAT_VERSION):
        raise ValueError(
            f"path: expected format version {FORMAT_VERSION}, got {version!r} at {path}; another "
            "version of tcur_kernels wrote it"
        )
    header: dict[str, Any] = json.loads(metadata["adapter"])
    return header
