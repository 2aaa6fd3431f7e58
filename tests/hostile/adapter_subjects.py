"""Files of adapters: with metadata, gradients, cores that wait in a store, and LoRA directories."""

import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

import damages
import tcur_kernels as tcur
from subject import (
    BASE,
    NAMES,
    Refused,
    Subject,
    X,
    bits,
    command,
    computed,
    fresh,
    listing,
    rewrite,
    seal,
    trained,
)
from tcur_kernels.adapters.gradients import read_gradients


class AdapterFile(Subject):
    name, is_sealed = "adapter", True
    #: Those of `average` and `merge`, which refuse a whole file that is not as another is.
    arguments = ("path", "weights", "model_dir")

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
        told = command("inspect", self.file).replace(str(folder), "")
        return re.sub(r"[\d,]+ bytes", "", told)  # a number may be written in other digits

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
