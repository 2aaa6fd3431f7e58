"""Finds and reads tensors in safetensors files and in directories of them.

A directory may hold one file, or shards and an index that says which tensor is in which shard. No
other code in the package reads weight files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

#: Endings of weight files in other formats, which are not supported.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


class Shards:
    """Names, shapes and dtypes of the tensors of a checkpoint; each tensor is read when needed.

    Args:
        path: a ``.safetensors`` file, or a directory with such files, see `model_files`. If there
            is an index, it decides which file a tensor is in.
        argument: the name of the path in errors.

    Attributes:
        files: tensor name -> file.
        shapes: tensor name -> shape.
        names: file -> names of all its tensors, in their order. This includes tensors that an
            index places in another file.

    Raises:
        FileNotFoundError: there is no such file, or none in the directory.
        ValueError: a file is truncated, a name is in two files, or a name of the index is in none.
    """

    def __init__(self, path: str | Path, argument: str = "weights") -> None:
        self.path, self._argument = Path(path), argument
        if not self.path.exists():
            raise FileNotFoundError(f"{argument}: expected a file or directory, got {self.path}")
        files, indexed = [self.path], None
        if self.path.is_dir():
            files, indexed = model_files(argument, self.path)
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, list[int]] = {}
        self.names: dict[Path, list[str]] = {}
        self._dtypes: dict[str, str] = {}
        self._offsets: dict[tuple[Path, str], int] = {}
        for file in files:
            self._list(file, indexed)
        lost = [name for name in indexed or () if name not in self.files]
        if lost and indexed is not None:
            raise ValueError(
                f"{argument}: expected all tensors of the index in {self.path}, got no {lost[0]} "
                f"in {indexed[lost[0]]} ({len(lost)} are missing)"
            )

    def _list(self, file: Path, indexed: Mapping[str, str] | None) -> None:
        """Lists the tensors of one file; with an index, only those that it places there."""
        with self._open(file) as opened:
            self.names[file] = list(opened.keys())
            for name in self.names[file]:
                if indexed is not None and indexed.get(name) != file.name:
                    continue
                if name in self.files:
                    raise ValueError(
                        f"{self._argument}: expected each tensor once, got {name} in "
                        f"{self.files[name].name} and {file.name}"
                    )
                piece = opened.get_slice(name)
                self.files[name] = file
                self.shapes[name] = list(piece.get_shape())
                self._dtypes[name] = piece.get_dtype()
        self._offsets |= _offsets(file)

    def offset(self, name: str) -> int:
        """The offset in bytes at which the numbers of a tensor begin in its file."""
        return self._offsets[self.files[name], name]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor.

        Raises:
            TypeError: it is none of the supported floating dtypes.
        """
        if self._dtypes[name] not in _DTYPES:
            raise TypeError(
                f"{self._argument}: expected a floating dtype, got {self._dtypes[name]} in {name}"
            )
        return _DTYPES[self._dtypes[name]]

    def read(self, name: str) -> Tensor:
        """Reads a whole tensor."""
        with self._open(self.files[name]) as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def read_all(self, file: Path) -> dict[str, Tensor]:
        """Reads all tensors of one file."""
        with self._open(file) as opened:
            return {name: opened.get_tensor(name) for name in self.names[file]}

    def metadata(self, file: Path) -> dict[str, str] | None:
        """The metadata in the header of a file, if any."""
        with self._open(file) as opened:
            found: dict[str, str] | None = opened.metadata()
        return found

    def _open(self, file: Path) -> safe_open:
        try:
            return safe_open(file, framework="pt")
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self._argument}: expected the file {file}, got none"
            ) from error
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self._argument}: expected a whole safetensors file, got {file}: {error}"
            ) from error


def model_files(argument: str, path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files that hold a directory's model, and the index if there is one.

    The choice is that of transformers: ``model.safetensors``, or else the shards that an index
    lists (``model.safetensors.index.json`` or another). If neither exists, all safetensors files.

    Raises:
        FileNotFoundError: there are no such files, or a shard of the index is missing.
        ValueError: the index is invalid, or there are several.
    """
    whole = path / "model.safetensors"
    if whole.is_file():
        return [whole], None
    usual = path / "model.safetensors.index.json"
    indices = [usual] if usual.is_file() else sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        several = " and ".join(index.name for index in indices)
        raise ValueError(f"{argument}: expected one index in {path}, got {several}")
    if not indices:
        files = sorted(path.glob("*.safetensors"))
        if not files:
            found = sorted(file.name for kind in _OTHER_WEIGHTS for file in path.glob(f"*{kind}"))
            hint = (
                f" but {', '.join(found[:3])}; save_pretrained of transformers writes safetensors"
            )
            raise FileNotFoundError(
                f"{argument}: expected *.safetensors with the weights, got none in {path}"
                + (hint if found else "")
            )
        return files, None
    listed = read_index(indices[0])
    if listed is None:
        raise ValueError(f"{argument}: expected an index with a weight_map, got {indices[0]}")
    names = sorted(set(listed.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{argument}: expected names of files in {indices[0]}, got {name}")
    lost = [name for name in names if not (path / name).is_file()]
    if lost:
        tensors = [tensor for tensor, name in listed.items() if name in lost]
        raise FileNotFoundError(
            f"{argument}: expected all shards of {indices[0].name}, got none at {path / lost[0]} "
            f"({len(lost)} of {len(names)} are missing, {tensors[0]} is in them)"
        )
    return [path / name for name in names], listed


def read_index(path: Path) -> dict[str, str] | None:
    """What an index says: name of a tensor -> name of its file. None if it says nothing."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _offsets(file: Path) -> dict[tuple[Path, str], int]:
    """Offsets of all tensors of a file, which the safetensors library has checked before.

    The format is: the length of the header in 8 bytes, the header as JSON, and then the numbers.
    """
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {
        (file, name): 8 + length + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }
