"""Directories of models and of peft's adapters, also those that change while they are read."""

import json
import os
import shutil
import warnings

import torch
from safetensors.torch import save_file

import damages
import tcur_kernels as tcur
from subject import BASE, Refused, Subject, X, bits, command, fresh, listing, rewrite, trained
from tcur_kernels.adapters.file import read_contents
from tcur_kernels.decompose import open_stack
from tcur_kernels.files.shards import Shards
from tcur_kernels.merge.directory import ModelDirectory, merge_directory


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
