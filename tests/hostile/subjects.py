"""What is damaged: files of every kind, with ways to read them and what reading must give.

A subject has a folder of whole files. Its ``effect`` reads a folder through the package, and tells
all that comes out of it, so that two effects are equal only if the files mean the same.
"""

import contextlib
import copy
import io
import json
import os
import shutil
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import damages
import tcur_kernels as tcur
from tcur_kernels import cli
from tcur_kernels.adapters.file import read_contents
from tcur_kernels.adapters.gradients import read_gradients
from tcur_kernels.adapters.sealing import sealed
from tcur_kernels.decompose import open_stack
from tcur_kernels.files.shards import Shards
from tcur_kernels.merge.directory import ModelDirectory, merge_directory


class Net(nn.Module):
    """Two stacks, a head, a bias and statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.down = nn.ModuleList([nn.Linear(8, 4, bias=False) for _ in range(2)])
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(self.norm(self.down[0](x) + self.down[1](x)))


def base():
    torch.manual_seed(0)
    return Net().eval()


BASE = base()
NAMES = {*(f"layers.{i}" for i in range(3)), "down.0", "down.1"}
X = torch.linspace(-1, 1, 40).view(5, 8)


def fresh():
    return copy.deepcopy(BASE)


def trained(train_also=(), seed=1):
    model = fresh()
    adapter = tcur.adapt(model, rank=2, targets=["layers.*", "down.*"], train_also=train_also)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        if train_also:
            model.norm.running_mean.add_(0.1)
    adapter.metadata = {"spacing": [1.5, 1.5, 2.0], "of": {"classes": 3, "name": "naïve"}}
    return adapter


def bits(tensor):
    numbers = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype), tuple(tensor.shape), numbers


@torch.no_grad()
def computed(model):
    """All that a model is: its output, and every number of its state."""
    state = {name: bits(tensor) for name, tensor in model.state_dict().items() if tensor.numel()}
    return bits(model(X)), state


class Refused(Exception):
    """The command line said so."""


def command(*arguments):
    """The output of a command; raises what it said if it refused."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    if code:
        raise Refused(err.getvalue().rpartition("error: ")[2].strip())
    return out.getvalue()


def listing(folder):
    """Every file below a folder with its bytes."""
    if not folder.is_dir():
        return None
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def seal(fields):
    """The metadata of a file with digests that are right again; as they are without digests."""
    return sealed({name: text for name, text in fields.items() if isinstance(text, str)})


class Subject:
    """Files, and their damage. ``argument`` is what errors call them."""

    name = ""
    arguments = ("path",)
    #: Whether the numbers in the files are protected by a digest.
    is_sealed = False

    def make(self, folder):
        raise NotImplementedError

    def damage(self, folder, rng, outside):
        """Damages the files; returns what was done, and whether any result is right."""
        raise NotImplementedError

    def readers(self):
        """Name -> a function of the folder."""
        raise NotImplementedError


def rewrite(path, data):
    path.write_bytes(data)


class AdapterFile(Subject):
    name, is_sealed = "adapter", True

    def make(self, folder):
        trained(("head",)).save(folder / "a.safetensors", factors=True)
        trained().save(folder / "b.safetensors")
        trained(seed=2).save(folder / "whole.safetensors")
        save_file(dict(BASE.state_dict()), folder / "model.safetensors")

    def damage(self, folder, rng, outside):
        one = rng.random() < 0.5
        self.file = folder / ("a.safetensors" if one else "b.safetensors")
        self.is_plain = not one
        data = self.file.read_bytes()
        way = rng.random()
        if way < 0.55:
            what, data = damages.scrambled(data, rng)
        elif way < 0.75:
            what, data = damages.lying(data, rng)
        elif way < 0.85:
            what, data = damages.metadata_edited(data, rng, "adapter")
        elif way < 0.97:
            what, data = damages.metadata_edited(data, rng, "adapter", seal)
        else:
            return damages.odd_file(self.file, rng, outside), False
        rewrite(self.file, data)
        return what, what.startswith("sealed")

    def readers(self):
        ways = {"load": self.load, "swap": self.swap, "inspect": self.inspect}
        ways["metadata"] = self.metadata
        if self.is_plain:
            ways |= {"store": self.store, "average": self.average, "groups": self.groups}
            ways |= {"merge": self.merge, "to-lora": self.to_lora, "loose": self.loose}
        return ways

    def load(self, folder):
        model = fresh()
        adapter = tcur.load_adapter(model, self.file)
        return computed(model), adapter.metadata, adapter.train_also, str(adapter.plan)

    def loose(self, folder):
        model = fresh()
        adapter = tcur.load_adapter(model, self.file, strict=False)
        return computed(model), adapter.metadata

    def swap(self, folder):
        adapter = trained(() if self.is_plain else ("head",), seed=3)
        adapter.load(self.file)
        return computed(adapter.model), adapter.metadata

    def inspect(self, folder):
        return command("inspect", self.file).replace(str(folder), "")

    def metadata(self, folder):
        return tcur.read_metadata(self.file)

    def store(self, folder):
        adapter = trained(seed=3)
        store = adapter.store(slots=1, directory=folder)
        store.add("one", self.file)
        with store.batch(["one"] * 5), torch.no_grad():
            return bits(adapter.model(X))

    def groups(self, folder):
        adapter = trained(seed=3)
        cores = adapter.stack_groups([self.file])
        with adapter.batch(cores, torch.zeros(5, dtype=torch.int64)), torch.no_grad():
            return bits(adapter.model(X))

    def average(self, folder):
        tcur.Adapter.average({self.file: 1, folder / "whole.safetensors": 2}, folder / "out")
        model = fresh()
        tcur.load_adapter(model, folder / "out")
        return computed(model)

    def merge(self, folder):
        base = folder / "base"
        base.mkdir()
        shutil.copy(folder / "model.safetensors", base)
        command("merge", base, self.file, "-o", folder / "merged")
        return listing(folder / "merged")

    def to_lora(self, folder):
        base = folder / "base"
        base.mkdir()
        shutil.copy(folder / "model.safetensors", base)
        command("to-lora", base, self.file, folder / "lora", "--base-model", "base")
        return listing(folder / "lora")


class Metadata(AdapterFile):
    """The header of an adapter file, of which only the metadata are read."""

    name = "metadata"

    def damage(self, folder, rng, outside):
        self.file = folder / "a.safetensors"
        data = self.file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        way = rng.random()
        if way < 0.5:
            what, data = damages.scrambled(data, rng, last=8 + length)
        elif way < 0.7:
            what, data = damages.metadata_edited(data, rng, "adapter")
        elif way < 0.9:
            what, data = damages.metadata_edited(data, rng, "adapter", seal)
        else:
            what, data = damages.lying(data, rng)
        rewrite(self.file, data)
        return what, what.startswith("sealed")

    def readers(self):
        return {"metadata": self.metadata}


class Gradients(Subject):
    name, arguments = "gradients", ("gradients", "model")

    def make(self, folder):
        torch.manual_seed(4)
        weights = {
            name: torch.randn_like(BASE.get_submodule(name).weight) for name in sorted(NAMES)
        }
        save_file(weights, folder / "g.safetensors")

    def damage(self, folder, rng, outside):
        self.file = folder / "g.safetensors"
        data = self.file.read_bytes()
        way = rng.random()
        if way < 0.6:
            what, data = damages.scrambled(data, rng)
        elif way < 0.95:
            what, data = damages.lying(data, rng)
        else:
            return damages.odd_file(self.file, rng, outside), False
        rewrite(self.file, data)
        return what, what == "lie dtype"  # such a file says so, and nothing else is known

    def readers(self):
        return {"read": self.read, "budget": self.budget}

    def read(self, folder):
        found = {name: bits(tensor) for name, tensor in read_gradients(self.file).items()}
        if found.keys() != NAMES:  # so says the file; `adapt` looks for the layers by their names
            raise Refused(f"gradients: expected those of the layers, got others in {self.file}")
        return found

    def budget(self, folder):
        model = fresh()
        adapter = tcur.adapt(
            model, rank=tcur.Budget(60), targets=["layers.*", "down.*"], gradients=self.file
        )
        return str(adapter.plan)


class Directory(Subject):
    """Shards of a model and their index, with an adapter file that is whole."""

    name, arguments = "shards", ("model_dir", "weights")

    def make(self, folder):
        trained().save(folder / "adapter.safetensors")
        base = folder / "base"
        base.mkdir()
        state = dict(BASE.state_dict())
        names = sorted(state)
        parts = names[::2], names[1::2]
        listed = {}
        for number, part in enumerate(parts, 1):
            file = f"model-{number:05}-of-00002.safetensors"
            save_file({name: state[name] for name in part}, base / file, {"format": "pt"})
            listed |= dict.fromkeys(part, file)
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": listed})
        (base / "model.safetensors.index.json").write_text(text)
        (base / "config.json").write_text("{}")

    def damage(self, folder, rng, outside):
        file = folder / "base" / f"model-0000{rng.randrange(1, 3)}-of-00002.safetensors"
        data = file.read_bytes()
        way = rng.random()
        if way < 0.6:
            what, data = damages.scrambled(data, rng)
        elif way < 0.95:
            what, data = damages.lying(data, rng)
        else:
            return damages.odd_file(file, rng, outside), False
        rewrite(file, data)
        return what, what == "lie dtype"  # such a file says so, and nothing else is known

    def readers(self):
        return {
            "read": self.read,
            "stack": self.stack,
            "merge": self.merge,
            "to-lora": self.to_lora,
        }

    def read(self, folder):
        shards = Shards(folder / "base", "model_dir")
        return {
            name: bits(shards.read(name))
            for file in shards.names
            for name in shards.read_all(file)
            if name in shards.files
        }

    def stack(self, folder):
        stack = open_stack(folder / "base", [f"layers.{i}.weight" for i in range(3)])
        cur = tcur.tensor_cur(stack, rank=2)
        return {"lateral": bits(cur.lateral), "rows": [*map(int, cur.rows)]}

    def merge(self, folder):
        command("merge", folder / "base", folder / "adapter.safetensors", "-o", folder / "merged")
        merged = Shards(folder / "merged", "model_dir")
        return {name: bits(merged.read(name)) for name in merged.files}

    def to_lora(self, folder):
        adapter = folder / "adapter.safetensors"
        command("to-lora", folder / "base", adapter, folder / "lora", "--base-model", "base")
        return listing(folder / "lora")


class Index(Directory):
    name = "index"

    def read(self, folder):
        found = super().read(folder)
        if found.keys() != BASE.state_dict().keys():  # so says the index
            raise Refused(f"model_dir: expected all tensors, got some in {folder}")
        return found

    def damage(self, folder, rng, outside):
        file = folder / "base" / "model.safetensors.index.json"
        data = file.read_bytes()
        way = rng.random()
        if way < 0.4:
            what, data = damages.scrambled(data, rng)
        elif way < 0.9:
            what, text = damages.edited(data.decode(), rng)
            data = text.encode("utf-8", "surrogatepass")
        elif way < 0.95:
            depth = rng.choice((1000, 200_000))
            what, data = "json bomb", b'{"weight_map":' + b"[" * depth
        else:
            return damages.odd_file(file, rng, outside), False
        rewrite(file, data)
        return what, False


class Changing(Directory):
    """Files that change after their names were listed, while they are read."""

    name = "changing"

    def damage(self, folder, rng, outside):
        way = rng.choice(("cut", "replaced", "gone", "written", "index", "folder"))
        number, other = rng.randrange(1, 3), rng.randbytes(8)

        def change():
            file = folder / "base" / f"model-0000{number}-of-00002.safetensors"
            if way == "cut":
                os.truncate(file, file.stat().st_size // 2)
            elif way == "replaced":
                fresh = file.with_suffix(".new")
                shutil.copy(file, fresh)
                fresh.replace(file)
            elif way == "written":
                with file.open("r+b") as opened:
                    opened.seek(-8, os.SEEK_END)
                    opened.write(other)
                os.utime(file, ns=(1, 1))
            elif way == "index":
                (folder / "base" / "model.safetensors.index.json").write_text("{}")
            else:
                file.unlink()
                if way == "folder":
                    file.mkdir()

        self.change = change
        return way, False

    def readers(self):
        return {"read": self.read, "stack": self.stack, "merge": self.merge_in_parts}

    def changed(self):
        """Changes the files once; whole ones stay as they are."""
        change, self.change = getattr(self, "change", None), None
        if change is not None:
            change()

    def read(self, folder):
        shards = Shards(folder / "base", "model_dir")
        self.changed()
        return {name: bits(shards.read(name)) for name in shards.files}

    def stack(self, folder):
        stack = open_stack(folder / "base", [f"layers.{i}.weight" for i in range(3)])
        self.changed()
        cur = tcur.tensor_cur(stack, rank=2)
        return {"lateral": bits(cur.lateral), "rows": [*map(int, cur.rows)]}

    def merge_in_parts(self, folder):
        directory = ModelDirectory(folder / "base")
        contents = read_contents(folder / "adapter.safetensors")
        files = list(directory.shards.names)

        def between(shards):
            for file in shards:
                yield file
                self.changed()

        assert files
        merge_directory(directory, contents, folder / "merged", between)
        return listing(folder / "merged")


class Waits(Subject):
    """The file in which the cores of a store wait; it has no name, but its disk may lose it."""

    name, arguments = "store", ("directory",)

    def make(self, folder):
        trained().save(folder / "a.safetensors")
        trained(seed=2).save(folder / "b.safetensors")

    def damage(self, folder, rng, outside):
        self.left = rng.randrange(0, 400)
        return "cut", False

    def readers(self):
        return {"serve": self.serve}

    def serve(self, folder):
        adapter = trained(seed=3)
        store = adapter.store(slots=1, directory=folder)
        for name in "ab":
            store.add(name, folder / f"{name}.safetensors")
        left = self.__dict__.pop("left", None)
        if left is not None:
            os.ftruncate(store._waiting._file, left)
        found = []
        for name in "ab":
            with store.batch([name] * 5), torch.no_grad():
                found.append(bits(adapter.model(X)))
        return found


class LoraFolder(Subject):
    """A folder that a LoRA is written to, and that somebody has prepared with links."""

    name, arguments = "lora", ("path", "out")

    def make(self, folder):
        (folder / "lora").mkdir()
        (folder / "lora" / "README.md").write_text("mine")

    def damage(self, folder, rng, outside):
        file = folder / "lora" / rng.choice(("adapter_config.json", "adapter_model.safetensors"))
        what = rng.choice(("link", "dangling", "folder", "link of the folder"))
        if what == "link":
            file.symlink_to(Path(outside) / "secret")
        elif what == "dangling":
            file.symlink_to(Path(outside) / "new")
        elif what == "folder":
            file.mkdir()
        else:
            file.symlink_to(outside)
        return what, what == "folder"  # the system says so

    def readers(self):
        return {"write": self.write}

    def write(self, folder):
        adapter = trained()
        try:
            adapter.to_lora(folder / "lora", base_model="base")
        except OSError as error:
            raise Refused(f"path: expected files, got {error}") from None
        return listing(folder / "lora")


class Config(Subject):
    """``config.json`` of a model directory: transformers reads it, and what it builds counts."""

    name, arguments = "config", ("model_dir",)

    def make(self, folder):
        import transformers

        config = transformers.BertConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            vocab_size=16,
            max_position_embeddings=8,
            architectures=["BertModel"],
        )
        config.save_pretrained(folder)

    def damage(self, folder, rng, outside):
        file = folder / "config.json"
        if rng.random() < 0.6:
            what, data = damages.scrambled(file.read_bytes(), rng)
        else:
            what, text = damages.edited(file.read_text(), rng)
            data = text.encode("utf-8", "surrogatepass")
        rewrite(file, data)
        return what, True  # what another config means is for transformers to say

    def readers(self):
        return {"skeleton": self.skeleton}

    def skeleton(self, folder):
        model = ModelDirectory(folder).skeleton()
        return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


class Peft(Subject):
    name, is_sealed = "peft", True
    arguments = ("path", "plan", "model", "rank", "adapter_config.json", "config")

    def make(self, folder):
        from peft import get_peft_model

        from tcur_kernels.peft import TCURConfig

        config = TCURConfig(
            rank=2, target_modules=[*(f"layers.{i}" for i in range(3)), "down.0", "down.1"]
        )
        model = get_peft_model(fresh(), config)
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(folder)

    def damage(self, folder, rng, outside):
        way = rng.random()
        config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        if way < 0.3:
            what, data = damages.scrambled(config.read_bytes(), rng)
            rewrite(config, data)
        elif way < 0.55:
            what, text = damages.edited(config.read_text(), rng)
            rewrite(config, text.encode("utf-8", "surrogatepass"))
        elif way < 0.85:
            what, data = damages.scrambled(tensors.read_bytes(), rng)
            rewrite(tensors, data)
            what = f"tensors {what}"
        else:
            what, data = damages.lying(tensors.read_bytes(), rng)
            rewrite(tensors, data)
            what = f"tensors {what}"
        return what, False

    def readers(self):
        return {"load": self.load}

    def load(self, folder):
        from peft import PeftModel

        from tcur_kernels.peft import TCURConfig

        config = TCURConfig.from_pretrained(str(folder))
        model = PeftModel.from_pretrained(fresh(), str(folder), config=config)
        state = {n: bits(p) for n, p in model.named_parameters()}
        with torch.no_grad():
            return bits(model(X)), state


SUBJECTS = {
    kind.name: kind
    for kind in (
        AdapterFile,
        Metadata,
        Gradients,
        Directory,
        Index,
        Config,
        Peft,
        Changing,
        Waits,
        LoraFolder,
    )
}

#: How many of a hundred files are of each kind.
SHARES = {
    "adapter": 40,
    "changing": 3,
    "store": 1,
    "lora": 1,
    "metadata": 12,
    "gradients": 9,
    "shards": 13,
    "index": 8,
    "config": 2,
    "peft": 11,
}


def kind_of(index):
    """The kind of the file with that number: the same for every seed."""
    place = index * 37 % 100
    for name, share in SHARES.items():
        if place < share:
            return name
        place -= share
    raise AssertionError("the shares are of a hundred")


def copied(folder, to):
    shutil.copytree(folder, to, symlinks=True)
    return Path(to)
