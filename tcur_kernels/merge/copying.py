"""Copies the files around the weights of a model directory into a new one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..files.parsing import Source, parse, read_text
from ..files.shards import read_index
from ..files.whole import is_temporary

#: Endings of weight files in formats that are not merged.
_WEIGHTS = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".ot",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".tflite",
)

#: Folders for version control and caches; they may also hold copies of the weights.
_NOT_COPIED = (".git", ".cache")


def copy_rest(source: Path, shards: Iterable[Path], place: Path, out: Path) -> list[str]:
    """Copies everything in a model directory but its shards; follows links.

    Args:
        source: the directory.
        shards: its files that hold the model.
        place: the directory to copy to.
        out: the final path of that directory. If it is below the source, it is not copied; nor are
            the temporary files of any writer.

    Returns:
        The relative paths that were left out: other weight files, caches, and version control.

    Raises:
        ValueError: a link leads nowhere, or to a folder above it.
    """
    shards = set(shards)
    left_out: list[str] = []
    own = _folders_of_modules(source / "modules.json")
    below = os.path.realpath(out)  # perhaps below the source

    def copy(folder: Path, above: tuple[str, ...]) -> None:
        here = os.path.realpath(source / folder)
        if here in above:
            raise ValueError(
                f"model_dir: expected folders that end, got {source / folder}, which leads "
                "to one above it"
            )
        (place / folder).mkdir(exist_ok=True)
        for entry in sorted((source / folder).iterdir()):
            relative = folder / entry.name
            if entry in shards or os.path.realpath(entry) == below or is_temporary(entry.name):
                continue
            if entry.name in _NOT_COPIED or (
                entry.is_file()
                and (str(folder) not in own or folder == Path())
                and _is_weights(source, shards, relative)
            ):
                left_out.append(str(relative))
            elif entry.is_dir():
                copy(relative, (*above, here))
            elif entry.is_file():
                shutil.copyfile(entry, place / relative)
            else:
                raise ValueError(f"model_dir: expected files and folders, got {entry}")

    copy(Path(), ())
    return left_out


def _folders_of_modules(path: Path) -> set[str]:
    """Folders of the further layers of a sentence-transformers model; none without such a list."""
    try:
        source = Source("model_dir", path)
        return {entry["path"] for entry in parse(read_text(source), source, "the list")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _is_weights(source: Path, shards: set[Path], path: Path) -> bool:
    """Whether a file that is not a shard holds weights of the model, or lists such files."""
    if path.name.endswith(".safetensors.index.json") and path.parent == Path():
        listed = read_index(source / path)
        return listed is None or not set(listed.values()) <= {file.name for file in shards}
    if path.name.endswith(".safetensors"):  # in a subfolder they belong to another model
        return path.parent == Path()
    return path.name.removesuffix(".index.json").endswith(_WEIGHTS)
