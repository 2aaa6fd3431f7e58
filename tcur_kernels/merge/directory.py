"""Model directories in the layout of Hugging Face, read tensor by tensor and merged shard by shard.

A directory holds ``config.json`` and ``*.safetensors``: one file, or shards with an index. Nothing
here builds a model of loaded weights; what is in memory is one shard, and C and R of the stacks.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapters.file import Contents, StoredStack
from ..adapters.fingerprint import digest, update_digest
from ..decompose import model_files
from ..files.origins import Origin, Origins, Read
from ..operators.factors import CURFactors
from ..operators.functional import slice_update
from .copying import copy_rest, new_directory

#: Wraps what is worked through, as ``tqdm`` does.
Progress = Callable[[Iterable[Path]], Iterable[Path]]


class ModelDirectory:
    """A directory with ``config.json``, ``*.safetensors``, or both; files are read when asked for.

    Args:
        path: the directory.

    Raises:
        FileNotFoundError: no such directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"model_dir: expected a directory, got none at {self.path}")

    @cached_property
    def shards(self) -> dict[Path, list[str]]:
        """File -> names of its tensors, in order; see `decompose.model_files`.

        Raises:
            FileNotFoundError: no safetensors, or not all shards that an index lists.
            ValueError: a file that is torn, a tensor that two files hold, or one of the index that
                none holds.
        """
        files, indexed = model_files("model_dir", self.path)
        shards: dict[Path, list[str]] = {}
        owner: dict[str, Path] = {}
        for file in files:
            with self._open(file) as shard:
                shards[file] = list(shard.keys())
            for name in shards[file]:
                if name in owner:
                    raise ValueError(
                        f"model_dir: expected each tensor once, got {name} in "
                        f"{owner[name].name} and {file.name}"
                    )
                owner[name] = file
        lost = [name for name in indexed or () if name not in owner]
        if lost and indexed is not None:
            raise ValueError(
                f"model_dir: expected all tensors of the index in {self.path}, got no {lost[0]} in "
                f"{indexed[lost[0]]} ({len(lost)} are missing)"
            )
        return shards

    @cached_property
    def _file(self) -> dict[str, Path]:
        return {name: file for file, names in self.shards.items() for name in names}

    def origins(self, names: Iterable[str], is_checked: bool) -> Origins:
        """Where the files have the tensors of an adapter's model.

        transformers is asked where names are not those of the files, or where nothing else would
        tell of another tensor under the same name.

        Args:
            names: those that the adapter has.
            is_checked: whether a fingerprint tells of another tensor.
        """
        if is_checked and all(name in self._file for name in names):
            return Origins("model_dir", self.path, dict.fromkeys(self._file, ()), None)
        try:
            model, hint = self.skeleton(), ""
        except (ValueError, OSError, ModuleNotFoundError) as error:
            model, hint = None, f"transformers renames while loading, and did not help: {error}"
        shapes: dict[str, list[int]] = {}
        for file in self.shards:
            with self._open(file) as shard:
                shapes |= {n: list(shard.get_slice(n).get_shape()) for n in self.shards[file]}
        return Origins("model_dir", self.path, shapes, model, hint)

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
            config = transformers.AutoConfig.from_pretrained(self.path, trust_remote_code=False)
            kind = getattr(transformers, (config.architectures or [""])[0], None)
            with torch.device("meta"):
                model = transformers.AutoModel.from_config(config) if kind is None else kind(config)
        except Exception as error:  # of any kind: the code is that of every model there is
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
) -> list[str]:
    """Writes the model directory with an adapter folded in; the input stays as it is.

    Updates are formed and added in fp32 (fp64 for an fp64 base) and rounded once. In memory are one
    shard and the factors. The output appears whole or not at all. What else is in the directory is
    copied, folders too, links as what they lead to.

    Args:
        directory: the base.
        contents: the adapter, see `contents.read_contents`.
        out: directory to make; an empty one may be there.
        progress: wraps the files as they are worked through, ``tqdm`` for one.

    Returns:
        What is not copied: weights in other formats or further files, which would be those without
        the adapter, and version control. Relative paths.

    Raises:
        FileExistsError: something is at ``out`` already.
        ValueError: a base that is not the one the adapter was made for.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out: expected a directory that is new or empty, got {out}")
    waiting = _edits(directory, contents)
    with new_directory(Path(os.path.realpath(out))) as place:
        left_out = copy_rest(directory.path, directory.shards, place, out)
        done: dict[str, Tensor] = {}
        for file in progress(list(directory.shards)):
            tensors = directory.read_shard(file)

            def read(name: str, here: dict[str, Tensor] = tensors) -> Tensor:
                return here[name] if name in here else directory.read(name)

            for edit in [edit for edit in waiting if edit.stored & tensors.keys()]:
                done |= edit(read)
                waiting.remove(edit)
            for name in tensors.keys() & done.keys():
                tensors[name] = done.pop(name).contiguous()
            written = place / file.name
            with open(written, "xb") as opened:
                mode = stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
            save_file(tensors, written, metadata=directory.metadata(file))
            written.chmod(mode)  # which the library does not take from the umask
    return left_out


class _Edit:
    """A change of a tensor of the files, or of those that transformers regroups together."""

    def __init__(self, origin: Origin) -> None:
        self.stored = frozenset(origin.stored)
        self._regrouped = origin.regrouped
        self._steps: dict[str, list[Callable[[Tensor], Tensor]]] = {}

    def add(self, name: str, step: Callable[[Tensor], Tensor]) -> None:
        """A step on the tensor that has this name: in the files, or in the model if regrouped."""
        self._steps.setdefault(name, []).append(step)

    def __call__(self, read: Read) -> dict[str, Tensor]:
        """The changed tensors of the files."""
        if self._regrouped is not None:
            return self._regrouped.change(read, self._change)
        [name] = self.stored
        return {name: self._change(name, read(name))}

    def _change(self, name: str, tensor: Tensor) -> Tensor:
        for step in self._steps.get(name, ()):
            tensor = step(tensor)
        return tensor


def _edits(directory: ModelDirectory, contents: Contents) -> list[_Edit]:
    """What an adapter changes in the files of its base."""
    names = [parameter for stored in contents.stacks for parameter, _, _ in stored.stored]
    learned = {name: value for (_, name), value in contents.learned.items()}
    origins = directory.origins([*names, *learned], is_checked=not learned)
    parts = origins.parts_with([*names, *learned])
    if len(parts) > 1:  # the adapter is of one of several parts: its fingerprint says of which
        parts = [part for part in parts if _fits(directory, origins.below(part), contents)]
    if len(parts) == 1:
        origins = origins.below(parts[0])
    edits: dict[str, _Edit] = {}

    def add(name: str, step: Callable[[Tensor], Tensor]) -> None:
        origin = origins[name]
        edits.setdefault(origin.stored[0], _Edit(origin)).add(origin.name, step)

    for stored in contents.stacks:
        factors = _factors(directory, origins, stored)
        for index, (parameter, _, _) in enumerate(stored.stored):
            add(parameter, partial(_merged, factors=factors, stored=stored, index=index))
    for name, value in learned.items():
        add(name, partial(_learned, name=name, value=value))
    return list(edits.values())


def _fits(directory: ModelDirectory, origins: Origins, contents: Contents) -> bool:
    """Whether the first stack of an adapter was made of these weights."""
    stored = contents.stacks[0]
    try:
        return digest(_slices(directory, origins, stored)) == stored.base_sha256
    except ValueError:  # of other sizes
        return False


def _learned(tensor: Tensor, name: str, value: Tensor) -> Tensor:
    """A value of its own in the place of a stored tensor."""
    if tensor.shape != value.shape:
        raise ValueError(
            f"model_dir: expected {name} of shape {list(value.shape)}, got {list(tensor.shape)}"
        )
    return value.to(tensor.dtype)


def _slices(directory: ModelDirectory, origins: Origins, stored: StoredStack) -> Iterator[Tensor]:
    """The base slices of a stack, one after the other."""
    for member, (parameter, transposed, first) in zip(
        stored.plan.members, stored.stored, strict=True
    ):
        weight = origins[parameter].load(directory.read)
        rows = member.slices * stored.plan.n1
        logical = (weight.T if transposed else weight)[first : first + rows]
        if logical.shape != (rows, stored.plan.n2):
            raise ValueError(
                f"model_dir: expected {parameter} with {[rows, stored.plan.n2]} for "
                f"{member.module} (out, in), got {list(weight.shape)}"
            )
        yield from logical.split(stored.plan.n1)


def _factors(directory: ModelDirectory, origins: Origins, stored: StoredStack) -> CURFactors:
    """C and R of a stack from the base, whose fingerprint is checked on the way."""
    state, columns, rows = hashlib.sha256(), [], []
    for block in _slices(directory, origins, stored):
        update_digest(state, block)
        columns.append(block[:, stored.columns].clone())
        rows.append(block[stored.rows].clone())
    if state.hexdigest() == stored.base_sha256:
        return CURFactors(torch.stack(columns), torch.stack(rows))
    kinds = sorted({str(block.dtype) for block in _slices(directory, origins, stored)})
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        if digest(b.to(dtype) for b in _slices(directory, origins, stored)) == stored.base_sha256:
            raise ValueError(
                f"model_dir: expected the base in {dtype}, in which the adapter was made, got its "
                f"weights in {', '.join(kinds)}: save the base in {dtype} first, or adapt it in "
                "the dtype of its files"
            )
    raise ValueError(
        f"model_dir: expected the base that the adapter was made for, got other weights in "
        f"stack {stored.plan.name} ({', '.join(kinds)})"
    )


def _merged(weight: Tensor, factors: CURFactors, stored: StoredStack, index: int) -> Tensor:
    """A stored weight plus the update of the rows that one member of a stack has."""
    merged = weight.clone()
    member, (_, transposed, first) = stored.plan.members[index], stored.stored[index]
    slice_index = sum(m.slices for m in stored.plan.members[:index])
    update = slice_update(factors, stored.core, slice_index, member.slices, stored.alpha)
    logical = merged.T if transposed else merged
    target = logical[first : first + update.shape[0]]
    target.copy_(target.to(update.dtype) + update)
    return merged
