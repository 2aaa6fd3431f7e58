"""Adapter files: what they hold, that they fit one base only, and that no save loses anything."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tcur_kernels as tcur
from models import Tiny
from rewriting import rewritten
from tcur_kernels.adapters import file
from tcur_kernels.adapters.file import FORMAT, FORMAT_VERSION
from tcur_kernels.files import whole


def base_model(seed=0):
    torch.manual_seed(seed)
    return Tiny()


def trained_adapter(seed=0, train_also=("head", "blocks.?.norm")):
    """An adapter after a few steps in training mode, batch-norm statistics moved."""
    model = base_model(seed)
    adapter = tcur.adapt(model, rank=2, alpha=0.5, train_also=train_also)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 7, 6)).square().sum().backward()
        optimizer.step()
    model.eval()
    return adapter


@pytest.fixture
def adapter():
    return trained_adapter()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


def test_round_trip(adapter, path):
    adapter.save(path)
    x = torch.randn(4, 7, 6)
    model = base_model().eval()
    loaded = tcur.load_adapter(model, path)
    assert torch.equal(model(x), adapter.model(x))
    assert loaded.plan.stacks == adapter.plan.stacks
    assert loaded.count_parameters() == adapter.count_parameters()
    for name, stack in adapter.stacks.items():
        twin = loaded.stacks[name]
        assert (twin.rows, twin.columns, twin.alpha) == (stack.rows, stack.columns, stack.alpha)
        assert torch.equal(twin.core, stack.core)
    state = model.state_dict()
    for name, value in adapter.model.state_dict().items():
        assert torch.equal(state[name], value), name
    again = path.with_name("again.safetensors")
    loaded.save(again)
    assert set(load_file(again)) == set(load_file(path))


def test_what_a_file_holds(adapter, path):
    adapter.save(str(path))
    tensors = load_file(path)
    kinds = {name.partition(".")[0] for name in tensors}
    assert kinds == {"core", "trained", "buffer"}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == FORMAT
    assert metadata["format_version"] == str(FORMAT_VERSION)
    header = json.loads(metadata["adapter"])
    assert header["stacks"][0]["members"][:2] == [
        ["blocks.0.attn.out_proj", 1],
        ["blocks.0.attn.qkv", 3],
    ]
    assert header["stacks"][0]["rows"] == list(adapter.stacks["8x8"].rows)
    assert header["stacks"][0]["dtype"] == "torch.float32"
    assert len(header["stacks"][0]["sha256"]) == 64


def test_saving_while_merged_saves_the_adapter(adapter, path):
    adapter.merge()
    adapter.save(path)
    adapter.unmerge()
    x = torch.randn(4, 7, 6)
    model = base_model().eval()
    tcur.load_adapter(model, path)
    assert torch.equal(model(x), adapter.model(x))


def refuses(path, message, model=None, error=ValueError, **kwargs):
    """Loading raises ``message`` and leaves the model as it was."""
    model = base_model() if model is None else model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        tcur.load_adapter(model, path, **kwargs)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not hasattr(model, "tcur")


def test_another_base_is_refused(adapter, path):
    adapter.save(path)
    refuses(path, "expected the base that the adapter was made for.*stack 8x8", base_model(1))
    touched = base_model()
    touched.blocks[1].mlp[2].weight.data[3, 5] += 1e-7
    refuses(path, "got other weights in stack 8x32", touched)
    refuses(path, r"torch.bfloat16; the fingerprint covers the dtype", base_model().bfloat16())


def test_strictness(adapter, path):
    adapter.save(path)
    model = base_model().eval()
    model.embed.weight.data[0, 0] += 1
    refuses(path, "frozen parameters outside of the stacks differ", model)
    loaded = tcur.load_adapter(model, path, strict=False)
    assert torch.equal(loaded.stacks["8x8"].core, adapter.stacks["8x8"].core)
    assert loaded.skipped == ()
    assert torch.equal(model.head.weight, adapter.model.head.weight)

    other_head = base_model().eval()
    other_head.head = torch.nn.Linear(8, 3)
    refuses(path, r"model: expected head.bias of shape \[5\], got \[3\]", other_head)
    loaded = tcur.load_adapter(other_head, path, strict=False)
    assert loaded.train_also == ("head", "blocks.?.norm")
    assert loaded.skipped == ("head.bias", "head.weight")
    headless = base_model().eval()
    headless.head = torch.nn.Identity()
    refuses(path, r"model: expected head.bias of shape \[5\], got none", headless)
    loaded = tcur.load_adapter(headless, path, strict=False)
    assert loaded.train_also == ("blocks.?.norm",)


def test_other_architectures_are_refused(adapter, path):
    adapter.save(path)
    refuses(path, r"linear layer blocks.2.attn.out_proj .* got no such module", Tiny(blocks=2))
    refuses(
        path,
        r"out_proj of shape \[8, 8\] \(out, in\) as in the adapter, got \[4, 4\]",
        Tiny(width=4),
    )
    model = base_model()
    model.blocks[0].mlp[0] = torch.nn.Identity()
    refuses(path, "expected a linear layer blocks.0.mlp.0 .* got Identity", model)


def test_torn_foreign_and_newer_files_are_refused(adapter, path, tmp_path):
    refuses(path, "path: expected an adapter file, got none", error=FileNotFoundError)
    adapter.save(path)
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        torn = tmp_path / "torn.safetensors"
        torn.write_bytes(whole[:size])
        refuses(torn, "path: expected a whole safetensors file, got a truncated or foreign one")
    text = tmp_path / "text.safetensors"
    text.write_text("not a tensor in sight, but quite long enough for a header")
    refuses(text, "path: expected a whole safetensors file")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.ones(2)}, foreign)
    refuses(foreign, "path: expected an adapter of tcur_kernels, got .* format None")
    rewritten(path, metadata=lambda metadata: metadata.update(format_version="4"))
    refuses(path, "path: expected format version 3 or 2, got '4'")


def test_wrong_models_are_refused(adapter, path):
    adapter.save(path)
    with pytest.raises(ValueError, match="model: expected a base model, got one that is adapted"):
        tcur.load_adapter(adapter.model, path)
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got str"):
        tcur.load_adapter("model", path)


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_failed_save_leaves_the_old_file(adapter, path, monkeypatch, moment):
    adapter.save(path)
    old = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    if moment == "write":
        monkeypatch.setattr(file, "save_file", fail)
    else:
        monkeypatch.setattr(whole.os, "rename", fail)
    with pytest.raises(OSError, match="no space left"):
        adapter.save(path)
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_save_over_a_file_keeps_its_permissions_and_follows_links(adapter, path):
    adapter.save(path)
    path.chmod(0o640)
    link = path.with_name("link")
    link.symlink_to(path)
    before = path.read_bytes()
    torch.nn.init.ones_(adapter.stacks["8x8"].core)
    adapter.save(link)
    assert link.is_symlink()
    assert path.read_bytes() != before
    assert path.stat().st_mode & 0o777 == 0o640
    assert len(list(path.parent.iterdir())) == 2


def test_empty_tensors_are_refused(adapter, path):
    adapter.stacks["8x8"].core.data = torch.empty(0)
    with pytest.raises(
        ValueError, match=r"save: expected tensors with elements, got empty core.8x8"
    ):
        adapter.save(path)
    assert not path.exists()
