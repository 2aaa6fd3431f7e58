"""Stacks whose slices lie in safetensors files, larger than memory if need be."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .stack import MAX_WORKSPACE, Stack

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

#: Endings of weights in other formats, which nothing here reads.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


class Shards:
    """Names, shapes and dtypes of the tensors of a checkpoint; no tensor is read.

    Args:
        path: a ``.safetensors`` file, or a directory that holds some, see `model_files`. An index
            decides which file a tensor is in.

    Attributes:
        files: tensor name -> file.
        shapes: tensor name -> shape.

    Raises:
        FileNotFoundError: no such file, or a directory without any.
        ValueError: a file that is torn, or a name that is in two files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"weights: expected a file or directory, got {self.path}")
        files, indexed = [self.path], None
        if self.path.is_dir():
            files, indexed = model_files("weights", self.path)
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, list[int]] = {}
        self._dtypes: dict[str, str] = {}
        self._offsets: dict[tuple[Path, str], int] = {}
        for file in files:
            with ExitStack() as opened:
                handle = opened.enter_context(_open(file))
                for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                    if indexed is not None and indexed.get(name) != file.name:
                        continue
                    if name in self.files:
                        raise ValueError(
                            f"weights: expected each tensor once, got {name} in "
                            f"{self.files[name].name} and {file.name}"
                        )
                    piece = handle.get_slice(name)
                    self.files[name] = file
                    self.shapes[name] = list(piece.get_shape())
                    self._dtypes[name] = piece.get_dtype()
            self._offsets |= _offsets(file)

    def offset(self, name: str) -> int:
        """Where in its file the numbers of a tensor begin, in bytes."""
        return self._offsets[self.files[name], name]

    def dtype(self, name: str) -> torch.dtype:
        """dtype of a tensor.

        Raises:
            TypeError: not one of the floating dtypes that weights have.
        """
        if self._dtypes[name] not in _DTYPES:
            raise TypeError(
                f"weights: expected a floating dtype, got {self._dtypes[name]} in {name}"
            )
        return _DTYPES[self._dtypes[name]]

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        with ExitStack() as opened:
            tensor: Tensor = opened.enter_context(_open(self.files[name])).get_tensor(name)
        return tensor


@dataclass(frozen=True)
class FileMatrix:
    """A matrix in a checkpoint, or some of its rows.

    Attributes:
        name: of the tensor.
        transposed: the matrix is the transpose of what is stored (GPT-2's layers are).
        first, rows: which rows of it; ``rows`` None for all.
    """

    name: str
    transposed: bool = False
    first: int = 0
    rows: int | None = None


class FileStack(Stack):
    """A stack whose slices are rows of matrices in safetensors files.

    Args:
        shards: the checkpoint.
        matrices: names or `FileMatrix`, in the order of their slices; one of a multiple m of n1
            rows makes m slices.
        n1: rows of a slice, default those of the smallest matrix.
        max_workspace, progress: see `tensor_cur`.

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: a name that is not there, or matrices that disagree in shape or dtype.
    """

    def __init__(
        self,
        shards: Shards,
        matrices: Sequence[str | FileMatrix],
        n1: int | None = None,
        max_workspace: int = MAX_WORKSPACE,
        progress: bool = False,
    ) -> None:
        if len(matrices) == 0:
            raise ValueError("names: expected at least one tensor, got none")
        parts = [FileMatrix(m) if isinstance(m, str) else m for m in matrices]
        missing = [part.name for part in parts if part.name not in shards.files]
        if missing:
            raise ValueError(
                f"weights: expected {', '.join(missing[:5])} in {shards.path}, got "
                f"{len(shards.files)} other tensors"
            )
        for part in parts:
            stored = shards.shapes[part.name]
            if len(stored) != 2 or 0 in stored:
                raise ValueError(f"weights: expected {part.name} to be a matrix, got {stored}")
        shapes = [_shape(shards, part) for part in parts]
        if n1 is None:
            n1 = min(rows for rows, _ in shapes)
        first, n2, dtype = parts[0].name, shapes[0][1], shards.dtype(parts[0].name)
        for part, (rows, width) in zip(parts, shapes, strict=True):
            file = shards.files[part.name].name
            if width != n2 or rows % n1:
                raise ValueError(
                    f"weights: expected {part.name} to be made of {n1} x {n2} slices as {first}, "
                    f"got {rows} x {width} in {file}"
                )
            if shards.dtype(part.name) != dtype:
                raise ValueError(
                    f"weights: expected {part.name} to be {dtype} as {first}, got "
                    f"{shards.dtype(part.name)} in {file}"
                )
        self._shards = shards
        #: Matrix and first row of every slice.
        self._places = [
            (part, part.first + start)
            for part, (rows, _) in zip(parts, shapes, strict=True)
            for start in range(0, rows, n1)
        ]
        sizes = (len(self._places), n1, n2)
        super().__init__("weights", sizes, dtype, torch.device("cpu"), max_workspace, progress)

    def _read(self, start: int, stop: int) -> Tensor:
        block = torch.empty(self.n3, stop - start, self.n2, dtype=self.dtype)
        # Read, not mapped: pages of a mapping would count as memory of this process, the whole
        # stack in the end.
        with ExitStack() as opened:
            files = {
                file: opened.enter_context(open(file, "rb", buffering=0))
                for file in {self._shards.files[part.name] for part, _ in self._places}
            }
            for rows, (part, first) in zip(block, self._places, strict=True):
                file = files[self._shards.files[part.name]]
                begin = self._shards.offset(part.name)
                if not part.transposed:
                    _fill(rows, file, begin + (first + start) * self.n2 * self.dtype.itemsize)
                    continue
                stored = torch.empty(self.n2, stop - start, dtype=self.dtype)
                width = self._shards.shapes[part.name][1]
                for index, line in enumerate(stored):
                    place = index * width + first + start
                    _fill(line, file, begin + place * self.dtype.itemsize)
                rows.copy_(stored.T)
        return block

    def _slice_name(self, index: int) -> str:
        part, first = self._places[index]
        file = self._shards.files[part.name].name
        axis = "columns" if part.transposed else "rows"
        return f"weights: {part.name}, {axis} {first} to {first + self.n1 - 1}, in {file}"


def open_stack(
    path: str | Path,
    names: Iterable[str | FileMatrix],
    n1: int | None = None,
    max_workspace: int = MAX_WORKSPACE,
    progress: bool = False,
) -> FileStack:
    """The stack of matrices ``names`` in safetensors files, for `tensor_cur`; nothing is read yet.

    Arguments and errors: `Shards` and `FileStack`.
    """
    return FileStack(Shards(path), list(names), n1, max_workspace, progress)


def _shape(shards: Shards, part: FileMatrix) -> tuple[int, int]:
    """Rows and columns of a part, as the stack sees it."""
    rows, columns = shards.shapes[part.name]
    if part.transposed:
        rows, columns = columns, rows
    wanted = rows - part.first if part.rows is None else part.rows
    if not 0 <= part.first < part.first + wanted <= rows:
        raise ValueError(
            f"names: expected rows within the {rows} of {part.name}, got {wanted} from {part.first}"
        )
    return wanted, columns


def _fill(numbers: Tensor, file: FileIO, place: int) -> None:
    """Reads contiguous numbers from a place in a file, without a buffer in between."""
    buffer = numbers.view(torch.uint8).numpy().data
    file.seek(place)
    if file.readinto(buffer) != buffer.nbytes:
        raise ValueError(f"weights: expected {file.name} as it was, got a shorter file")


def model_files(argument: str, path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files that hold a directory's model, and its index if it is split by one.

    As transformers chooses: ``model.safetensors``, else the shards that an index lists,
    ``model.safetensors.index.json`` or another. Without any, all safetensors files.

    Raises:
        FileNotFoundError: none of them; or a shard of the index that is not there.
        ValueError: an index that is none, or several.
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
    try:
        listed: dict[str, str] = json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(listed.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{argument}: expected an index with a weight_map, got {indices[0]}"
        ) from error
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


def _offsets(file: Path) -> dict[tuple[Path, str], int]:
    """Offsets of all tensors of a file that the library has found whole.

    The format: the length of the header in 8 bytes, the header as JSON, and the numbers.
    """
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {
        (file, name): 8 + length + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"weights: expected the file {file}, got none") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"weights: expected a whole safetensors file, got {file}: {error}"
        ) from error
