"""Model directories in the layout of Hugging Face, read tensor by tensor and merged shard by shard.

A directory holds ``config.json`` and ``*.safetensors``: one file, or shards with an index. Nothing
here builds a model of loaded weights; what is in memory is one shard, and C and R of the stacks.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..factors import CURFactors
from ..functional import slice_update
from .contents import Contents, StoredStack
from .fingerprint import update_digest

#: Wraps what is worked through, as ``tqdm`` does.
Progress = Callable[[Iterable[Path]], Iterable[Path]]


class ModelDirectory:
    """The tensors of a model directory by name.

    Args:
        path: directory with ``*.safetensors``.

    Attributes:
        shards: file -> names of its tensors, in order.

    Raises:
        FileNotFoundError: no such directory, or no safetensors in it.
        ValueError: a file that is torn, a tensor that two files hold, or one of the index that none
            holds.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"model_dir: expected a directory, got none at {self.path}")
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"model_dir: expected *.safetensors as Hugging Face writes them, got none in "
                f"{self.path}"
            )
        self.shards: dict[Path, list[str]] = {}
        self._file: dict[str, Path] = {}
        for file in files:
            with self._open(file) as shard:
                names = list(shard.keys())
            self.shards[file] = names
            for name in names:
                if name in self._file:
                    raise ValueError(
                        f"model_dir: expected each tensor once, got {name} in "
                        f"{self._file[name].name} and {file.name}"
                    )
                self._file[name] = file
        for index in self.path.glob("*.safetensors.index.json"):
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            lost = [name for name in listed if name not in self._file]
            if lost:
                raise ValueError(
                    f"model_dir: expected all shards of {index.name}, got none with {lost[0]} "
                    f"({len(lost)} tensors are missing)"
                )

    def resolve(self, name: str) -> str:
        """The stored name of a parameter; files of a bare model lack the prefix that heads add.

        Raises:
            ValueError: no tensor of that name, or several that could be meant.
        """
        if name in self._file:
            return name
        close = [key for key in self._file if key.endswith(f".{name}") or name.endswith(f".{key}")]
        if len(close) == 1:
            return close[0]
        got = "none" if not close else ", ".join(close[:3])
        raise ValueError(f"model_dir: expected a tensor {name} as in the adapter, got {got}")

    def read(self, name: str) -> Tensor:
        """One tensor, by its stored name; no other is read."""
        with self._open(self._file[name]) as shard:
            tensor: Tensor = shard.get_tensor(name)
            return tensor

    def read_shard(self, file: Path) -> dict[str, Tensor]:
        """All tensors of one file."""
        with self._open(file) as shard:
            return {name: shard.get_tensor(name) for name in self.shards[file]}

    def metadata(self, file: Path) -> dict[str, str] | None:
        """What a file says of itself."""
        with self._open(file) as shard:
            found: dict[str, str] | None = shard.metadata()
            return found

    def skeleton(self) -> nn.Module:
        """The model that ``config.json`` describes, on the meta device, by transformers.

        Raises:
            FileNotFoundError: no config.json.
            ModuleNotFoundError: transformers is not installed.
            ValueError: a model that transformers does not know.
        """
        config_file = self.path / "config.json"
        if not config_file.is_file():
            raise FileNotFoundError(f"model_dir: expected config.json, got none in {self.path}")
        try:
            import transformers
        except ImportError as error:
            raise ModuleNotFoundError(
                "transformers is needed to know a model's layers: pip install 'tcur_kernels[peft]'"
            ) from error
        try:
            config = transformers.AutoConfig.from_pretrained(self.path)
            kind = getattr(transformers, (config.architectures or [""])[0], None)
            with torch.device("meta"):
                model = transformers.AutoModel.from_config(config) if kind is None else kind(config)
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(
                f"model_dir: expected a model that transformers knows, got {error}"
            ) from error
        assert isinstance(model, nn.Module)
        return model

    @staticmethod
    def _open(file: Path) -> safe_open:
        try:
            return safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(
                f"model_dir: expected whole safetensors files, got a torn one at {file} ({error})"
            ) from error


def merge_directory(
    directory: ModelDirectory,
    contents: Contents,
    out: str | Path,
    progress: Progress = iter,
) -> None:
    """Writes the model directory with an adapter folded in; the input stays as it is.

    Updates are formed and added in fp32 (fp64 for an fp64 base) and rounded once. In memory are one
    shard and the factors. The output appears whole or not at all.

    Args:
        directory: the base.
        contents: the adapter, see `contents.read_contents`.
        out: directory to make; an empty one may be there.
        progress: wraps the files as they are worked through, ``tqdm`` for one.

    Raises:
        FileExistsError: something is at ``out`` already.
        ValueError: a base that is not the one the adapter was made for.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out: expected a directory that is new or empty, got {out}")
    changes: dict[str, list[tuple[CURFactors, StoredStack, int]]] = {}
    for stored in contents.stacks:
        factors = _factors(directory, stored)
        for index, (parameter, _, _) in enumerate(stored.stored):
            key = directory.resolve(parameter)
            changes.setdefault(key, []).append((factors, stored, index))
    learned = {directory.resolve(name): value for (_, name), value in contents.learned.items()}

    out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        place = tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent)
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        for file in sorted(directory.path.iterdir()):
            if file.is_file() and file not in directory.shards:
                shutil.copy2(file, place)
        for file in progress(list(directory.shards)):
            tensors = directory.read_shard(file)
            for name, parts in changes.items():
                if name in tensors:
                    tensors[name] = _merged(tensors[name], parts)
            for name, value in learned.items():
                if name in tensors:
                    if tensors[name].shape != value.shape:
                        raise ValueError(
                            f"model_dir: expected {name} of shape {list(value.shape)}, got "
                            f"{list(tensors[name].shape)}"
                        )
                    tensors[name] = value.to(tensors[name].dtype)
            save_file(tensors, Path(place) / file.name, metadata=directory.metadata(file))
        if out.exists():
            out.rmdir()
        Path(place).replace(out)


def _slices(directory: ModelDirectory, stored: StoredStack) -> Iterator[Tensor]:
    """The base slices of a stack, one after the other."""
    for member, (parameter, transposed, first) in zip(
        stored.plan.members, stored.stored, strict=True
    ):
        weight = directory.read(directory.resolve(parameter))
        rows = member.slices * stored.plan.n1
        logical = (weight.T if transposed else weight)[first : first + rows]
        if logical.shape != (rows, stored.plan.n2):
            raise ValueError(
                f"model_dir: expected {parameter} with {[rows, stored.plan.n2]} for "
                f"{member.module} (out, in), got {list(weight.shape)}"
            )
        yield from logical.split(stored.plan.n1)


def _factors(directory: ModelDirectory, stored: StoredStack) -> CURFactors:
    """C and R of a stack from the base, whose fingerprint is checked on the way."""
    state, columns, rows = hashlib.sha256(), [], []
    for block in _slices(directory, stored):
        update_digest(state, block)
        columns.append(block[:, stored.columns].clone())
        rows.append(block[stored.rows].clone())
    if state.hexdigest() != stored.base_sha256:
        raise ValueError(
            f"model_dir: expected the base that the adapter was made for, got other weights in "
            f"stack {stored.plan.name} ({columns[0].dtype}; the fingerprint covers the dtype too)"
        )
    return CURFactors(torch.stack(columns), torch.stack(rows))


def _merged(weight: Tensor, parts: Iterable[tuple[CURFactors, StoredStack, int]]) -> Tensor:
    """A stored weight plus the updates of its rows."""
    merged = weight.clone()
    for factors, stored, index in parts:
        member, (_, transposed, first) = stored.plan.members[index], stored.stored[index]
        slice_index = sum(m.slices for m in stored.plan.members[:index])
        update = slice_update(factors, stored.core, slice_index, member.slices, stored.alpha)
        logical = merged.T if transposed else merged
        target = logical[first : first + update.shape[0]]
        target.copy_(target.to(update.dtype) + update)
    return merged
