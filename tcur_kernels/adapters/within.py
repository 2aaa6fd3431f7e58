"""Cores of files for a model whose C and R have the files' slices, and perhaps more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..layers.stack import TProductStack
from ..operators.basis import embedded
from .file import Contents, StoredStack, read_contents
from .fingerprint import Fingerprint
from .plan import Plan


def read_cores(path: Path, stacks: Mapping[str, TProductStack], plan: Plan) -> dict[str, Tensor]:
    """The cores of a file by stack name, ``[n3, r, r]``, as these stacks compute with them.

    The rows and columns of the file may be some of those of a stack (a smaller rank), and its alpha
    may be another. The core is then written in the slices of the stack, in fp64, and rounded once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an adapter, trains more than cores, or is for other layers, another
            base, other slices or another basis; the message says what.
    """
    contents = read_cores_alone(path, plan)
    return {
        stored.plan.name: core_within(stored, stacks[stored.plan.name], path)
        for stored in contents.stacks
    }


def read_cores_alone(path: Path, plan: Plan) -> Contents:
    """Reads a file that has nothing but cores, for the layers of a plan.

    Raises:
        FileNotFoundError, ValueError: as for `read_cores`.
    """
    contents = read_contents(path)
    contents.check_layers(plan, path)
    if contents.learned:
        names = ", ".join(sorted(name for _, name in contents.learned))
        raise ValueError(
            f"path: expected nothing beside the cores, since rows of a batch differ in nothing "
            f"else, got {names} at {path}"
        )
    return contents


def has_slices_of(stack: TProductStack, stored: StoredStack) -> bool:
    """Whether the slices of a stored stack are among those of a stack, in the same basis."""
    rows, columns = set(stored.record.rows), set(stored.record.columns)
    return stored.basis == stack.basis and rows <= {*stack.rows} and columns <= {*stack.columns}


def core_within(stored: StoredStack, stack: TProductStack, path: Path) -> Tensor:
    """The core of a stored stack in the slices of a stack; see `read_cores`.

    Raises:
        ValueError: as for `read_cores`.
    """
    name, record = stored.plan.name, stored.record
    if stored.basis != stack.basis:
        raise ValueError(
            f"path: expected basis {stack.basis} in stack {name}, which cores side by side share, "
            f"got {stored.basis} at {path}; adapters in several bases go together with stack_groups"
        )
    for what, own, came in (
        ("rows", stack.rows, record.rows),
        ("columns", stack.columns, record.columns),
    ):
        if not set(came) <= set(own):
            raise ValueError(
                f"path: expected {what} among {list(own)} in stack {name}, got {list(came)} at "
                f"{path}; adapters of other slices go together with stack_groups"
            )
    rows = [stack.rows.index(row) for row in record.rows]
    columns = [stack.columns.index(column) for column in record.columns]
    lateral, horizontal = stack.factors.slices
    of_all = (record.rows, record.columns) == (stack.rows, stack.columns)
    if of_all:
        base = Fingerprint.of(stack.factors)
    else:
        base = Fingerprint.of_slices(lateral[:, :, columns], horizontal[:, rows])
    check_base(base, stored, path)
    if of_all and stored.scale == stack.scale:
        return stored.core
    if stack.scale == 0:
        raise ValueError(
            f"alpha: expected a scale other than 0 in stack {name}, so that adapters of another "
            f"alpha or rank can be written in its slices, got alpha {stack.alpha}"
        )
    core, factor = stored.core.to(lateral.device), stored.scale / stack.scale
    try:
        whole = embedded(core, stack.factors.slices, rows, columns, stack.basis, factor)
    except ValueError as error:
        raise ValueError(f"path: stack {name} at {path}: {error}") from error
    written = whole.to(stack.factors.dtype)
    if not torch.isfinite(written).all():
        raise ValueError(
            f"path: expected a core that {written.dtype} can hold in stack {name}, whose alpha is "
            f"{stack.alpha}, got one of alpha {stored.alpha} that it cannot at {path}"
        )
    return written


def check_base(base: Fingerprint, stored: StoredStack, path: Path) -> None:
    """Refuses a stored stack whose C and R are slices of another base than this one.

    Raises:
        ValueError: they are.
    """
    if base != stored.record.base:
        raise ValueError(
            f"path: expected an adapter of this base, got one of other weights in stack "
            f"{stored.plan.name} at {path}"
        )
