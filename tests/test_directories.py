"""What merging does with the files of a directory: what is copied, what is not, and permissions."""

import json
import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

import tcur_kernels as tcur
from models import Tiny
from tcur_kernels import cli
from tcur_kernels.merge import copying, directory


def tiny():
    torch.manual_seed(0)
    return Tiny()


@pytest.fixture
def base(tmp_path):
    """One file of weights."""
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(dict(tiny().state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def adapter(tmp_path):
    adapter = tcur.adapt(tiny(), "mlp.0", rank=2)
    torch.nn.init.ones_(adapter.stacks["32x8"].core)
    adapter.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def merge(base, adapter, out):
    return cli.main(["merge", str(base), str(adapter), "-o", str(out)])


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def fill(base, *names):
    for name in names:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)


def test_folders_are_copied_and_weights_without_the_adapter_are_not(base, adapter, capsys):
    kept = ("1_Pooling/config.json", "a/b/c.txt", "tokenizer.model", "vae/model.safetensors")
    fill(base, *kept)
    left = (
        "pytorch_model.bin",
        "tf_model.h5",
        "pytorch_model.bin.index.json",
        "consolidated.safetensors",
        "old.safetensors.index.json",
        "onnx/model.onnx",
        "original/consolidated.00.pth",
    )
    fill(base, *left)
    (base / "old.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    fill(base, ".git/config", ".cache/x")
    out = base.parent / "new" / "out"
    assert merge(base, adapter, out) == 0
    assert files(out) == {*kept, "model.safetensors", "config.json"}
    assert (out / "a/b/c.txt").read_text() == "a/b/c.txt"
    said = capsys.readouterr().out
    prefix = "not copied, as it is without the adapter: "
    [line] = [line for line in said.splitlines() if line.startswith(prefix)]
    assert set(line.removeprefix(prefix).split(", ")) == {*left, ".git", ".cache"}
    changed, before = load_file(out / "model.safetensors"), tiny().state_dict()
    differ = {name for name, value in changed.items() if not torch.equal(value, before[name])}
    assert differ == {f"blocks.{i}.mlp.0.weight" for i in range(3)}


def test_layers_in_folders_of_a_sentence_transformer_are_copied(base, adapter, capsys):
    fill(base, "2_Dense/pytorch_model.bin", "3_Other/pytorch_model.bin", "pytorch_model.bin")
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "2_Dense"}]
    (base / "modules.json").write_text(json.dumps(modules))
    assert merge(base, adapter, base.parent / "out") == 0
    assert "2_Dense/pytorch_model.bin" in files(base.parent / "out")
    assert ": 3_Other/pytorch_model.bin, pytorch_model.bin\n" in capsys.readouterr().out
    fill(base, "modules.json", "a.safetensors.index.json")  # of another kind, or none
    assert merge(base, adapter, base.parent / "out2") == 0
    assert "modules.json" in files(base.parent / "out2")
    out = capsys.readouterr().out
    assert ": 2_Dense/pytorch_model.bin, 3_Other/pytorch_model.bin, a.safetensors.index" in out


def test_links_are_followed(base, adapter, tmp_path):
    """As in the cache of the Hugging Face hub: files are links to blobs without endings."""
    blobs, cached = tmp_path / "blobs", tmp_path / "snapshots"
    (blobs / "folder").mkdir(parents=True)
    cached.mkdir()
    fill(blobs, "folder/x.txt")
    for number, name in enumerate(("model.safetensors", "config.json")):
        shutil.move(base / name, blobs / str(number))
        (cached / name).symlink_to(blobs / str(number))
    (cached / "folder").symlink_to(blobs / "folder")
    assert merge(cached, adapter, tmp_path / "out") == 0
    assert files(tmp_path / "out") == {"model.safetensors", "config.json", "folder/x.txt"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize(
    ("target", "message"),
    [(".", "expected folders that end, got"), ("nowhere", "expected files and folders, got")],
)
def test_links_that_lead_nowhere_are_refused(base, adapter, target, message, capsys):
    (base / "link").symlink_to(base / target)
    assert merge(base, adapter, base.parent / "deep" / "er" / "out") == 2
    assert f"model_dir: {message}" in capsys.readouterr().err
    assert not (base.parent / "deep").exists()


def test_an_output_below_the_input(base, adapter):
    (base / "empty").mkdir()
    for name in ("merged", "empty"):
        assert merge(base, adapter, base / name) == 0
    assert files(base / "merged") == {"model.safetensors", "config.json"}
    wanted = {"model.safetensors", "config.json", "merged/model.safetensors", "merged/config.json"}
    assert files(base / "empty") == wanted


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], indirect=True, ids=oct)
def test_permissions_are_those_of_plain_files(umask, base, adapter, tmp_path):
    fill(base, "a/b.txt")
    (base / "config.json").chmod(0o400)
    out = tmp_path / "out"
    assert merge(base, adapter, out) == 0
    for path in (out, *out.rglob("*")):
        assert mode(path) == (0o777 if path.is_dir() else 0o666) & ~umask, path
    fresh = tcur.load_adapter(tiny(), adapter)
    fresh.save(tmp_path / "new")
    assert mode(tmp_path / "new") == 0o666 & ~umask

    given = tmp_path / "given"
    given.mkdir()
    given.chmod(0o711)
    assert merge(base, adapter, given) == 0
    assert mode(given) == 0o711


@pytest.mark.parametrize("moment", ["save_file", "shutil"])
def test_an_interrupted_merge_leaves_nothing(base, adapter, tmp_path, moment, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    if moment == "save_file":
        monkeypatch.setattr(directory, "save_file", interrupt)
    else:
        monkeypatch.setattr(copying.shutil, "copyfile", interrupt)
    before = sorted(tmp_path.rglob("*"))
    for out in (tmp_path / "out", tmp_path / "x" / "y"):
        with pytest.raises(KeyboardInterrupt):
            merge(base, adapter, out)
        assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_is_a_link_to_an_empty_folder(base, adapter, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert merge(base, adapter, tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink()
    assert "model.safetensors" in files(tmp_path / "real")


def test_the_index_says_which_files_are_the_model(base, adapter, tmp_path, capsys):
    state = load_file(base / "model.safetensors")
    shutil.move(base / "model.safetensors", base / "model.fp16.safetensors")
    save_file(state, base / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(state, "model-1.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert merge(base, adapter, tmp_path / "out") == 0
    wanted = {"model-1.safetensors", "model.safetensors.index.json", "config.json"}
    assert files(tmp_path / "out") == wanted
    assert "model.fp16.safetensors" in capsys.readouterr().out

    del state["head.bias"]
    save_file(state, base / "model-1.safetensors")
    assert merge(base, adapter, tmp_path / "out2") == 2
    message = "expected all tensors of the index in .*got no head.bias in model-1.safetensors"
    assert message.split(".*")[1] in capsys.readouterr().err
    (base / "model.safetensors.index.json").rename(base / "one.safetensors.index.json")
    index = {"weight_map": {"a": "../model-1.safetensors"}}
    (base / "one.safetensors.index.json").write_text(json.dumps(index))
    assert merge(base, adapter, tmp_path / "out2") == 2
    assert "expected names of files in" in capsys.readouterr().err
    fill(base, "two.safetensors.index.json")
    assert merge(base, adapter, tmp_path / "out2") == 2
    assert "expected one index in" in capsys.readouterr().err


def test_the_dtype_is_named_if_the_base_was_loaded_in_another(base, adapter, tmp_path, capsys):
    half = tiny().half()
    save_file(dict(half.state_dict()), base / "model.safetensors")
    model = half.float()  # as from_pretrained(dtype=torch.float32) has it
    tcur.adapt(model, "mlp.0", rank=2).save(tmp_path / "of_fp32")
    assert merge(base, tmp_path / "of_fp32", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "expected the base in torch.float32, in which the adapter was made, got" in err
    assert "in torch.float16: save the base in torch.float32 first" in err


def test_what_needs_weights_says_so(base, adapter, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    for file in base.iterdir():
        file.unlink()
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        architectures=["BertModel"],
    )
    config.save_pretrained(base)
    for more in ((), ("pytorch_model.bin",)):
        fill(base, *more)
        assert cli.main(["plan", str(base)]) == 0
        assert "stack 32x32: 9 matrices of 32 x 32" in capsys.readouterr().out
        assert cli.main(["plan", str(base), "--curve", str(tmp_path / "c.png")]) == 2
        printed = capsys.readouterr()
        assert "expected *.safetensors with the weights, got none in" in printed.err
        assert not printed.out
        assert merge(base, adapter, tmp_path / "out") == 2
        err = capsys.readouterr().err
        assert "model_dir: expected *.safetensors with the weights, got none in" in err
        assert ("but pytorch_model.bin; save_pretrained of" in err) == bool(more)


@pytest.mark.parametrize("error", [ImportError, RuntimeError, TypeError])
def test_a_model_that_needs_a_package(error, base, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")

    def missing(*args, **kwargs):
        raise error("BertModel requires timm")

    transformers.BertConfig(architectures=["BertModel"]).save_pretrained(base)
    monkeypatch.setattr(transformers.BertModel, "__init__", missing)
    assert cli.main(["plan", str(base)]) == 2
    message = f"model_dir: expected a model that transformers knows in {base}, got BertModel "
    message += "requires timm"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["set_seed", "TrainingArguments", "AutoModel"])
def test_a_config_names_models_and_nothing_else(name, base, tmp_path, capsys, monkeypatch):
    """Whatever else transformers has under that name is not called."""
    transformers = pytest.importorskip("transformers")
    called = []
    if name == "set_seed":
        monkeypatch.setattr(transformers, name, called.append)
    else:
        monkeypatch.setattr(getattr(transformers, name), "__init__", lambda *args: called.append(1))
    transformers.BertConfig(architectures=[name]).save_pretrained(base)
    assert cli.main(["plan", str(base)]) == 2
    assert f"knows in {base}, got {name}, which is no model of it" in capsys.readouterr().err
    assert not called
