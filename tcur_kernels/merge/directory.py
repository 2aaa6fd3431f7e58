"""Merges model directories in the layout of Hugging Face, shard by shard.

A directory holds ``config.json`` and ``*.safetensors``: one file, or shards with an index. The
model is never loaded as a whole. Only one shard and C and R of the stacks are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapters.file import Contents, StoredStack
from ..adapters.fingerprint import Fingerprint
from ..files.origins import Origin, Origins, Read
from ..files.shards import Shards
from ..files.whole import clear, new_directory
from ..matrices import Layout, matrix_of, shape_of
from ..operators.factors import CURFactors
from ..operators.functional import slice_update
from .copying import copy_rest

#: Wraps the files while they are processed, to show progress, like ``tqdm``.
Progress = Callable[[Iterable[Path]], Iterable[Path]]


class ModelDirectory:
    """A directory with ``config.json``, ``*.safetensors``, or both; files are read when needed.

    Args:
        path: the directory.

    Raises:
        FileNotFoundError: there is no such directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"model_dir: expected a directory, got none at {self.path}")

    @cached_property
    def shards(self) -> Shards:
        """The safetensors files of the directory.

        Raises:
            FileNotFoundError, ValueError: see `files.shards.Shards`.
        """
        return Shards(self.path, "model_dir")

    def origins(self, names: Iterable[str], is_checked: bool) -> Origins:
        """Finds the tensors of an adapter's model in the files.

        This asks transformers if some names are not in the files. It also asks if no fingerprint
        would reveal a different tensor with the same name.

        Args:
            names: the names that the adapter uses.
            is_checked: whether a fingerprint covers all these tensors.
        """
        shapes = self.shards.shapes
        if is_checked and all(name in shapes for name in names):
            return Origins("model_dir", self.path, shapes, None)
        try:
            model, hint = self.skeleton(), ""
        except (ValueError, OSError, ModuleNotFoundError) as error:
            model, hint = None, f"transformers renames while loading, and did not help: {error}"
        return Origins("model_dir", self.path, shapes, model, hint)

    def skeleton(self) -> nn.Module:
        """The model that ``config.json`` describes, built by transformers on the meta device.

        Raises:
            FileNotFoundError: there is no config.json.
            ModuleNotFoundError: transformers is not installed.
            ValueError: transformers does not know the model.
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
            name = (config.architectures or [""])[0]
            kind = getattr(transformers, name, None)
            if kind is not None and not _is_model(kind):
                raise ValueError(f"{name}, which is no model of it")
            with torch.device("meta"):
                model = transformers.AutoModel.from_config(config) if kind is None else kind(config)
        except Exception as error:  # may be any kind, since this runs the code of any model
            raise ValueError(
                f"model_dir: expected a model that transformers knows in {self.path}, got "
                f"{str(error)[:2000]}"
            ) from error
        assert isinstance(model, nn.Module)
        return model


def _is_model(kind: object) -> bool:
    """Whether this is a class of models, or what transformers has in place of one.

    A config may come from anybody, and names what is called. In place of a class that needs a
    package which is not installed, transformers has one that says so when it is called.
    """
    import transformers

    is_place = type(kind).__name__ == "DummyObject"
    return isinstance(kind, type) and (is_place or issubclass(kind, transformers.PreTrainedModel))


def merge_directory(
    directory: ModelDirectory,
    contents: Contents,
    out: str | Path,
    progress: Progress = iter,
) -> list[str]:
    """Writes a copy of the model directory with the adapter merged; the input is unchanged.

    Updates are computed and added in fp32 (fp64 for an fp64 base) and rounded once. Only one shard
    and the factors are in memory. The output appears completely or not at all. Other files and
    folders are copied; links are followed.

    Args:
        directory: the base.
        contents: the adapter, see `adapters.file.read_contents`.
        out: the directory to make; an empty one may exist.
        progress: wraps the files while they are processed, for example ``tqdm``.

    Returns:
        The relative paths that were not copied: other weight files, which do not contain the
        adapter, caches, and version control.

    Raises:
        FileExistsError: ``out`` exists and is not an empty directory.
        OSError: it cannot be written; see `files.whole.new_directory`.
        ValueError: the base is not the one that the adapter was made for.
    """
    out = Path(out)
    clear(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out: expected a directory that is new or empty, got {out}")
    waiting = _edits(directory, contents)
    with new_directory(out) as place:
        shards = directory.shards
        left_out = copy_rest(directory.path, shards.names, place, out)
        done: dict[str, Tensor] = {}
        for file in progress(list(shards.names)):
            tensors = shards.read_all(file)
            own = {name for name in tensors if shards.files.get(name) == file}

            def read(name: str, here: dict[str, Tensor] = tensors, own: set[str] = own) -> Tensor:
                return here[name] if name in own else shards.read(name)

            for edit in [edit for edit in waiting if edit.stored & own]:
                done |= edit(read)
                waiting.remove(edit)
            for name in own & done.keys():
                tensors[name] = done.pop(name).contiguous()
            save_file(tensors, place / file.name, metadata=shards.metadata(file))
    return left_out


class _Edit:
    """A change of one tensor of the files, or of several that transformers regroups together."""

    def __init__(self, origin: Origin) -> None:
        self.stored = frozenset(origin.stored)
        self._regrouped = origin.regrouped
        self._steps: dict[str, list[Callable[[Tensor], Tensor]]] = {}

    def add(self, name: str, step: Callable[[Tensor], Tensor]) -> None:
        """Adds a step for the tensor of this name in the files, or, if regrouped, in the model."""
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


def origins_of(directory: ModelDirectory, contents: Contents) -> Origins:
    """Finds all that an adapter changes in the files of its base."""
    learned = [name for _, name in contents.learned]
    names = [*parameters_of(contents), *learned]
    origins = directory.origins(names, is_checked=not learned)
    parts = origins.parts_with(names)
    if len(parts) > 1:  # the fingerprint tells for which of the parts the adapter was made
        parts = [part for part in parts if _fits(directory, origins.below(part), contents)]
    return origins.below(parts[0]) if len(parts) == 1 else origins


def parameters_of(contents: Contents) -> list[str]:
    """Names of the parameters that hold the weights of an adapter's layers."""
    return [parameter for stored in contents.stacks for parameter, _, _ in stored.stored]


def _edits(directory: ModelDirectory, contents: Contents) -> list[_Edit]:
    """The changes that an adapter makes to the files of its base."""
    learned = {name: value for (_, name), value in contents.learned.items()}
    origins = origins_of(directory, contents)
    edits: dict[str, _Edit] = {}

    def add(name: str, step: Callable[[Tensor], Tensor]) -> None:
        origin = origins[name]
        edits.setdefault(origin.stored[0], _Edit(origin)).add(origin.name, step)

    for stored in contents.stacks:
        factors = factors_of(directory, origins, stored)
        for index, (parameter, _, _) in enumerate(stored.stored):
            add(parameter, partial(_merged, factors=factors, stored=stored, index=index))
    for name, value in learned.items():
        add(name, partial(_learned, name=name, value=value))
    return list(edits.values())


def _fits(directory: ModelDirectory, origins: Origins, contents: Contents) -> bool:
    """Whether the first stack of an adapter was made from these weights."""
    stored = contents.stacks[0]
    try:
        found = _factors_here(directory, origins, stored)
    except ValueError:  # the sizes differ
        return False
    return Fingerprint.of(found) == stored.record.base


def _learned(tensor: Tensor, name: str, value: Tensor) -> Tensor:
    """The learned value that replaces a stored tensor, in the dtype of that tensor."""
    if tensor.shape != value.shape:
        raise ValueError(
            f"model_dir: expected {name} of shape {list(value.shape)}, got {list(tensor.shape)}"
        )
    return value.to(tensor.dtype)


def _slices(directory: ModelDirectory, origins: Origins, stored: StoredStack) -> Iterator[Tensor]:
    """The base slices of a stack, one after the other."""
    for member, (parameter, layout, first) in zip(stored.plan.members, stored.stored, strict=True):
        weight = origins[parameter].load(directory.shards.read)
        if not weight.dtype.is_floating_point:
            raise ValueError(
                f"model_dir: expected weights in full precision, got {parameter} of "
                f"{weight.dtype} in {directory.shards.path}; load the quantised model and its "
                "adapter, and save what adapter.merge(inplace=False) returns"
            )
        rows = member.slices * stored.plan.n1
        logical = _matrix(parameter, weight, layout)[first : first + rows]
        if logical.shape != (rows, stored.plan.n2):
            raise ValueError(
                f"model_dir: expected {parameter} with {[rows, stored.plan.n2]} for "
                f"{member.module} (out, in), got {list(weight.shape)}"
            )
        yield from logical.split(stored.plan.n1)


def _matrix(parameter: str, weight: Tensor, layout: Layout) -> Tensor:
    """The matrix that a tensor of the files holds."""
    if shape_of(weight.shape, layout) is None:
        raise ValueError(
            f"model_dir: expected {parameter} to hold a matrix ({layout}), got {list(weight.shape)}"
        )
    return matrix_of(weight, layout)


def _factors_here(directory: ModelDirectory, origins: Origins, stored: StoredStack) -> CURFactors:
    """C and R of a stack as slices of the weights in the files."""
    columns, rows = [], []
    for block in _slices(directory, origins, stored):
        columns.append(block[:, list(stored.record.columns)].clone())
        rows.append(block[list(stored.record.rows)].clone())
    try:
        return CURFactors(torch.stack(columns), torch.stack(rows), stored.basis)
    except ValueError as error:  # numbers that are not finite
        raise ValueError(
            f"model_dir: expected weights to take C and R from in stack {stored.plan.name} of "
            f"{directory.path}, got others ({error})"
        ) from error


def factors_of(directory: ModelDirectory, origins: Origins, stored: StoredStack) -> CURFactors:
    """C and R of a stack; refuses them unless the adapter was made with the same ones."""
    found, wanted = _factors_here(directory, origins, stored), stored.record.base
    if Fingerprint.of(found) == wanted:
        return found
    kind = found.slices[0].dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        lateral, horizontal = (side.to(dtype) for side in found.slices)  # perhaps not finite
        if Fingerprint.of_slices(lateral, horizontal) == wanted:
            raise ValueError(
                f"model_dir: expected the base in {dtype}, in which the adapter was made, got its "
                f"weights in {kind}: save the base in {dtype} first, or adapt it in the dtype of "
                "its files"
            )
    raise ValueError(
        f"model_dir: expected the base that the adapter was made for, got other weights in "
        f"stack {stored.plan.name} ({kind}) in {directory.path}"
    )


def _merged(weight: Tensor, factors: CURFactors, stored: StoredStack, index: int) -> Tensor:
    """A stored weight with the update of one member of a stack added to the member's rows."""
    merged = weight.clone(memory_format=torch.contiguous_format)  # its matrix is then a view
    member, (parameter, layout, first) = stored.plan.members[index], stored.stored[index]
    slice_index = sum(m.slices for m in stored.plan.members[:index])
    logical = _matrix(parameter, merged, layout)
    # One expert at a time, since `slice_update` needs memory for the square of all rows.
    count = 1 if layout == "experts" else member.slices
    for index in range(slice_index, slice_index + member.slices, count):
        update = slice_update(factors, stored.core, index, count, stored.scale)
        target = logical[first : first + update.shape[0]]
        target.copy_(target.to(update.dtype) + update)
        first += update.shape[0]
    return merged
