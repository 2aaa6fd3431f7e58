"""Everything in the project that writes files, on small things, for `faults`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import tcur_kernels as tcur
from benchmarks import appending, documents
from models import Tiny
from tcur_kernels.adapters.curves import model_curves, plot_curves
from tcur_kernels.adapters.file import read_contents
from tcur_kernels.adapters.waiting import InFile
from tcur_kernels.merge.directory import ModelDirectory, merge_directory

EXAMPLES = Path(__file__).parents[2] / "examples"


def nothing(folder: Path) -> None:
    """Makes, or looks at, nothing."""


@dataclass(frozen=True)
class Writer:
    """A writer of one or several files.

    Attributes:
        name: what it is.
        write: writes below a folder.
        before: makes what is there before.
        look: loads what was written, or what was there before; raises if it is not whole.
        target: what it writes, below the folder; "" for the folder.
        apart: whether each file is whole for itself.
        appends: whether a second call adds to what the first has written.
        slow: whether a quick run leaves most trials out.
    """

    name: str
    write: Callable[[Path], object]
    before: Callable[[Path], object] = nothing
    look: Callable[[Path], object] = nothing
    target: str = ""
    apart: bool = False
    appends: bool = False
    slow: bool = False


def adapter_of(seed: int, rank: int = 2) -> tcur.Adapter:
    """A trained adapter of the same small model."""
    torch.manual_seed(0)
    adapter = tcur.adapt(Tiny().eval(), rank=rank)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return adapter


def model_directory(folder: Path) -> Path:
    """A model directory of two shards, with what else may lie there."""
    from test_cli import write_directory

    torch.manual_seed(0)
    path = write_directory(folder / "model", Tiny().eval())
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "words.txt").write_text("words\n" * 2000)
    return path


def lora_writers(kept: Path) -> list[Writer]:
    """A LoRA in a directory that is new, has other files, the same config, or another one."""
    first, second, third = adapter_of(1), adapter_of(2), adapter_of(3, rank=1)

    def look(folder: Path) -> None:
        path = folder / "deep" / "lora"
        if (path / "adapter_config.json").exists():
            rank = json.loads((path / "adapter_config.json").read_text())["r"]
            tensors = load_file(path / "adapter_model.safetensors")
            assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {rank}

    def others(folder: Path) -> None:
        path = folder / "deep" / "lora"
        (path / "runs").mkdir(parents=True)
        (path / "runs" / "log.txt").write_text("mine")
        (path / "README.md").write_text("mine, too")

    def same(folder: Path) -> None:
        others(folder)
        second.to_lora(folder / "deep" / "lora")

    def another(folder: Path) -> None:
        others(folder)
        third.to_lora(folder / "deep" / "lora")

    def write(folder: Path) -> None:
        first.to_lora(folder / "deep" / "lora")

    return [
        Writer("to_lora, a new directory", write, nothing, look, "deep/lora"),
        Writer("to_lora beside other files", write, others, look, "deep/lora", apart=True),
        Writer("to_lora over the same config", write, same, look, "deep/lora"),
        Writer("to_lora over another config", write, another, look, "deep/lora"),
    ]


def merge_writers(kept: Path) -> list[Writer]:
    """A merged directory, new or in place of an empty one."""
    base = model_directory(kept)
    adapter_of(1).save(kept / "merged.safetensors")
    contents = read_contents(kept / "merged.safetensors")

    def write(folder: Path) -> None:
        out = folder / "out"
        was_there = out.is_dir() and any(out.iterdir())
        try:
            merge_directory(ModelDirectory(base), contents, out)
        except FileExistsError:
            if not was_there:
                raise

    def look(folder: Path) -> None:
        if (folder / "out").exists() and any((folder / "out").iterdir()):
            assert ModelDirectory(folder / "out").shards.shapes

    def empty(folder: Path) -> None:
        (folder / "out").mkdir(mode=0o711)

    return [
        Writer("merge", write, nothing, look, "out"),
        Writer("merge into an empty directory", write, empty, look, "out"),
    ]


def adapter_writers(kept: Path) -> list[Writer]:
    """Adapter files, pictures of curves, and stores."""
    first, second = adapter_of(1), adapter_of(2)
    for number, adapter in enumerate((first, second)):
        adapter.save(kept / f"{number}.safetensors")
    files = {kept / "0.safetensors": 1.0, kept / "1.safetensors": 2.0}
    model = Tiny().eval()
    curves = model_curves(model, adapter_of(1).plan, ranks=(1, 2), selections=("norm",))
    cores = {name: stack.core.detach() for name, stack in first.stacks.items()}

    def look(folder: Path) -> None:
        if (folder / "a").exists():
            read_contents(folder / "a")

    def see(folder: Path) -> None:
        from PIL import Image

        if (folder / "a").exists():
            Image.open(folder / "a").load()

    def old(folder: Path) -> None:
        second.save(folder / "a")

    def store(folder: Path) -> None:
        waiting = InFile(folder, cores)
        numbers = []
        for _ in range(3):
            try:
                numbers.append(waiting.put(cores))
            except OSError:
                numbers.append(waiting.put(cores))  # the store goes on
                found = [waiting.get(number) for number in numbers]
                assert all(torch.equal(one[name], cores[name]) for one in found for name in cores)
                raise

    return [
        Writer("save", lambda folder: first.save(folder / "a"), nothing, look, "a"),
        Writer("save over another", lambda folder: first.save(folder / "a"), old, look, "a"),
        Writer("average", lambda f: tcur.Adapter.average(files, f / "a"), old, look, "a"),
        Writer(
            "curves", lambda folder: plot_curves(curves, folder / "a"), nothing, see, "a", slow=True
        ),
        Writer("store in a file", store),
    ]


def row_writers(kept: Path) -> list[Writer]:
    """Rows of the benchmarks, and tables in their pages."""
    columns, mark = ("a", "b"), documents.BEGIN.format(name="x") + "{}" + "<!-- end x -->\n"

    def append(folder: Path) -> None:
        appending.append(folder / "rows.csv", columns, [{"a": 1, "b": "x, y"}, {"a": 2}])

    def look(folder: Path) -> None:
        if (folder / "rows.csv").exists():
            appending.read(folder / "rows.csv")

    def pages(folder: Path) -> None:
        for name in ("one.md", "two.md"):
            (folder / name).write_text(mark.format("old\n"))

    def fill(folder: Path) -> None:
        documents.fill({"x": "new\n"}, [folder / "one.md", folder / "two.md"])

    return [
        Writer("rows, a new file", append, nothing, look, "rows.csv", appends=True),
        Writer("rows", append, append, look, "rows.csv", appends=True),
        Writer("pages", fill, pages, apart=True),
    ]


def example_writers(kept: Path) -> list[Writer]:
    """Files of the segmentation job."""
    sys.path.append(str(EXAMPLES))
    from segmentation.files import save_state, whole_file, write_json

    state = {"a": torch.ones(3000), "b": [1, 2]}

    def checkpoint(folder: Path) -> None:
        with whole_file(folder / "a.pt") as fresh:
            save_state(state, fresh)

    def look(folder: Path) -> None:
        if (folder / "a.pt").exists():
            torch.load(folder / "a.pt", weights_only=True)

    def old(folder: Path) -> None:
        torch.save({}, folder / "a.pt")

    return [
        Writer("checkpoint", checkpoint, old, look, "a.pt"),
        Writer(
            "json", lambda f: write_json(f / "x" / "a.json", {"a": [1] * 99}), target="x/a.json"
        ),
    ]


def kept_writers(kept: Path) -> list[Writer]:
    """The demo's pretrained network with its report, and the adapted one as a bundle of MONAI."""
    from segmentation import kept_pretraining
    from segmentation.training import Report

    def keep(folder: Path) -> None:
        def pretrain(place: Path) -> tuple[Path, Report]:
            save_file({"a": torch.ones(99)}, place / "weights.safetensors")
            return place / "weights.safetensors", Report(parameters=99)

        kept_pretraining.keep(folder, "a", pretrain)

    def look(folder: Path) -> None:
        found = kept_pretraining.find(folder, "a")
        if found is not None:
            load_file(found[0])

    return [Writer("kept pretraining", keep, nothing, look, apart=True)]


def every(kept: Path, is_heavy: bool) -> list[Writer]:
    """All writers; what they read lies in ``kept``. The heavy ones import much."""
    made = [adapter_writers, lora_writers, merge_writers, row_writers, example_writers]
    made += [kept_writers] if is_heavy else []
    return [writer for make in made for writer in make(kept)]
