"""Finds and reads tensors in safetensors files and in directories of them.

A directory may hold one file, or shards and an index that says which tensor is in which shard. No
other code in the package reads weight files.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from .parsing import Fields, Source, parse, read_text, shown
from .tensor_file import DTYPES, TensorFile

#: The dtypes of weights that can be adapted.
_FLOATING = ("F64", "F32", "F16", "BF16")

#: Endings of weight files in other formats, which are not supported.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")

#: The longest name of a file in an index; file systems take no longer one.
_MAX_FILE_NAME = 255


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
        ValueError: a file is truncated or damaged, a name is in two files, a name of the index is
            in none, or a tensor is not in the index. Reading refuses a file that changed since
            then.
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
        self._opened: dict[Path, TensorFile] = {}
        for file in files:
            self._list(file, indexed)
        lost = [name for name in indexed or () if name not in self.files]
        if lost and indexed is not None:
            raise ValueError(
                f"{argument}: expected all tensors of the index in {self.path}, got no {lost[0]} "
                f"in {indexed[lost[0]]} ({len(lost)} are missing)"
            )
        for file, names in self.names.items():
            # transformers would load it with its file, and others would not.
            left = [name for name in names if indexed is not None and name not in indexed]
            if left:
                raise ValueError(
                    f"{argument}: expected all tensors in the index of {self.path}, got {left[0]} "
                    f"in {file.name} alone ({len(left)} are left out)"
                )

    def _list(self, file: Path, indexed: Mapping[str, str] | None) -> None:
        """Lists the tensors of one file; with an index, only those that it places there."""
        with TensorFile(file, self._argument) as opened:
            self._opened[file] = opened
        self.names[file] = list(opened.entries)
        for name, entry in opened.entries.items():
            if indexed is not None and indexed.get(name) != file.name:
                continue
            if name in self.files:
                raise ValueError(
                    f"{self._argument}: expected each tensor once, got {name} in "
                    f"{self.files[name].name} and {file.name}"
                )
            self.files[name] = file
            self.shapes[name] = list(entry.shape)

    def offset(self, name: str) -> int:
        """The offset in bytes at which the numbers of a tensor begin in its file."""
        return self._opened[self.files[name]].entries[name].begin

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor.

        Raises:
            TypeError: it is none of the supported floating dtypes.
        """
        found = self._opened[self.files[name]].entries[name].dtype
        if found not in _FLOATING:
            raise TypeError(
                f"{self._argument}: expected a floating dtype, got {found} in {name} at "
                f"{self.files[name]}"
            )
        return DTYPES[found]

    def read(self, name: str) -> Tensor:
        """Reads a whole tensor."""
        with self.open(self.files[name]) as opened:
            return opened.read(name)

    def read_all(self, file: Path) -> dict[str, Tensor]:
        """Reads all tensors of one file."""
        with self.open(file) as opened:
            return {name: opened.read(name) for name in self.names[file]}

    def metadata(self, file: Path) -> dict[str, str] | None:
        """The metadata in the header of a file, if any."""
        return self._opened[file].metadata or None

    def open(self, file: Path) -> AbstractContextManager[TensorFile]:
        """Opens one of the files once more.

        Raises:
            FileNotFoundError, ValueError: it is gone, or changed since its names were listed.
        """
        return self._opened[file].again()


def model_files(argument: str, path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files that hold a directory's model, and the index if there is one.

    The choice is that of transformers: ``model.safetensors``, or else the shards that an index
    lists (``model.safetensors.index.json`` or another). If neither exists, all safetensors files.

    Names in an index never leave the directory. Files in it may be links, as in Hugging Face's
    cache.

    Raises:
        FileNotFoundError: there are no such files, or a shard of the index is missing.
        ValueError: the index is damaged, or there are several.
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
    listed = _index(Source(argument, indices[0]))
    names = sorted(set(listed.values()))
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
        return _index(Source("index", path))
    except (OSError, ValueError):
        return None


def _index(source: Source) -> dict[str, str]:
    """What an index says; names of files that would lead out of its folder are refused.

    Raises:
        FileNotFoundError, ValueError: it is no index, or damaged; the message says what.
    """
    found = Fields(parse(read_text(source), source, "the index"), source, "the index")
    listed = found.any("weight_map") if "weight_map" in found else None
    if not isinstance(listed, dict):
        raise source.error("an index with a weight_map", shown(listed))
    for name, file in listed.items():
        is_name = isinstance(file, str) and Path(file).name == file and file not in ("", "..")
        if not is_name or not file.isprintable() or len(file.encode()) > _MAX_FILE_NAME:
            raise source.error("names of files in the folder", f"{shown(file)} for {shown(name)}")
    return listed
