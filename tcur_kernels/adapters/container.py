"""Adapter files: safetensors with a JSON header, written whole or not at all.

Tensors are ``core.<stack>``, ``rows.<stack>``, ``columns.<stack>``, ``trained.<parameter>`` and
``buffer.<buffer>``. C and R are slices of the base weights, so 2 r indices per stack stand for
them, and a file fits exactly one base; the header holds the ordered plan and the base's
fingerprints.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "tcur_kernels.adapter"
FORMAT_VERSION = 1


def write_adapter_file(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes a file atomically: one that was there stays as it was until the new one is whole.

    Raises:
        ValueError: a tensor without elements (a shard that was not gathered).
    """
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty:
        raise ValueError(f"save: expected tensors with elements, got empty {', '.join(empty)}")
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "adapter": json.dumps(header),
    }
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _replacing(path) as temporary:
        save_file(contiguous, temporary, metadata=metadata)


def read_adapter_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file, refused unless it is whole and ours.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a torn or foreign file, or another format version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path: expected an adapter file, got none at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"path: expected a whole safetensors file, got a truncated or foreign one at {path} "
            f"({error})"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"path: expected an adapter of tcur_kernels, got a safetensors file of format "
            f"{metadata.get('format')!r} at {path}"
        )
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(
            f"path: expected format version {FORMAT_VERSION}, got "
            f"{metadata.get('format_version')!r} at {path}; a newer tcur_kernels wrote it"
        )
    header: dict[str, Any] = json.loads(metadata["adapter"])
    return header, tensors


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends well.

    Links are followed, and the permissions are those that plain ``open`` would give or leave.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    mode = path.stat().st_mode if path.is_file() else None
    try:
        with open(temporary, "xb") as file:
            opened = os.fstat(file.fileno()).st_mode
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, stat.S_IMODE(opened if mode is None else mode))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
