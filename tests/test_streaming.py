"""Adapting a model whose weights stay in files, and what adapt takes as a rule."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tcur_kernels as tcur
from models import Tiny
from tcur_kernels import decompose
from tcur_kernels.adapters.file import read_contents


@pytest.fixture
def base():
    torch.manual_seed(1)
    model = Tiny().eval()
    model.blocks[0].norm.running_mean += 0.5
    return model


@pytest.fixture
def folder(base, tmp_path):
    """The base in three shards and an index."""
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    weight_map = {name: f"model-{index % 3}.safetensors" for index, name in enumerate(state)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in state.items() if weight_map[n] == file}, tmp_path / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def on_meta():
    with torch.device("meta"):
        return Tiny().eval()


@pytest.mark.parametrize("selection", list(decompose.RULES))
def test_files_give_the_adapter_that_memory_gives(selection, base, folder, tmp_path):
    model = on_meta()
    torch.manual_seed(0)
    adapter = tcur.adapt(model, rank=2, selection=selection, weights=folder, max_workspace=60_000)
    assert all(p.is_meta for name, p in model.named_parameters() if not name.startswith("tcur."))
    with pytest.raises(ValueError, match=r"save: expected loaded weights, got embed.weight on the"):
        adapter.save(tmp_path / "adapter.safetensors")
    assert not (tmp_path / "adapter.safetensors").exists()

    x = torch.randn(4, 7, 6)
    y = base(x)
    torch.manual_seed(0)
    expected = tcur.adapt(base, rank=2, selection=selection)
    for name, stack in expected.stacks.items():
        assert adapter.stacks[name].rows == stack.rows
        assert adapter.stacks[name].columns == stack.columns
        assert torch.equal(adapter.stacks[name].lateral, stack.lateral)

    for number in range(3):
        shard = decompose.Shards(folder / f"model-{number}.safetensors")
        state = {tensor: shard.read(tensor) for tensor in shard.files}
        model.load_state_dict(state, strict=False, assign=True)
    assert torch.equal(model(x), y)
    for parameter in adapter.parameters():
        nn.init.ones_(parameter)
    for parameter in expected.parameters():
        nn.init.ones_(parameter)
    assert torch.equal(model(x), base(x))
    adapter.save(tmp_path / "adapter.safetensors")
    expected.save(tmp_path / "expected.safetensors")
    own, other = (read_contents(tmp_path / f"{n}.safetensors") for n in ("adapter", "expected"))
    assert [s.as_json() for s in own.stacks] == [s.as_json() for s in other.stacks]
    assert own.frozen_sha256 == other.frozen_sha256
    tensors = own.tensors()
    assert tensors.keys() == other.tensors().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in other.tensors().items())


class Mixed(nn.Module):
    """Weights without a layer of their own, and one that stays in memory."""

    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleList(nn.MultiheadAttention(8, 2) for _ in range(2))
        self.last = nn.ModuleList(nn.Linear(8, 12) for _ in range(2))


def test_every_kind_of_weight_is_found_in_files(tmp_path):
    base = Mixed()
    save_file(dict(base.state_dict()), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Mixed()
    model.last = copy.deepcopy(base.last)
    adapter = tcur.adapt(model, rank=3, weights=tmp_path / "model.safetensors")
    expected = tcur.adapt(base, rank=3)
    assert set(adapter.stacks) == {"8x8", "12x8"}
    for name, stack in expected.stacks.items():
        assert torch.equal(adapter.stacks[name].lateral, stack.lateral)
        assert torch.equal(adapter.stacks[name].horizontal, stack.horizontal)


def test_parameters_that_are_views_are_read_from_their_first_row(tmp_path):
    """A flat buffer of a whole model, cut into its parameters, is on the meta device, too."""
    base = Mixed()
    save_file(dict(base.state_dict()), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Mixed()
    flat = torch.empty(sum(p.numel() for p in model.parameters()) + 8, device="meta")
    place = 8
    for full, parameter in list(model.named_parameters()):
        owner, _, name = full.rpartition(".")
        view = flat[place : place + parameter.numel()].view_as(parameter)
        model.get_submodule(owner)._parameters[name] = nn.Parameter(view)
        place += parameter.numel()
    assert model.last[1].weight.storage_offset() > 0
    adapter = tcur.adapt(model, rank=3, weights=tmp_path)
    expected = tcur.adapt(base, rank=3)
    for name, stack in expected.stacks.items():
        assert torch.equal(adapter.stacks[name].lateral, stack.lateral)
        assert torch.equal(adapter.stacks[name].horizontal, stack.horizontal)


def test_drawn_slices_and_rules_of_ones_own():
    def indices(**kwargs):
        torch.manual_seed(0)
        adapter = tcur.adapt(Tiny(), rank=2, **kwargs)
        return {name: (stack.rows, stack.columns) for name, stack in adapter.stacks.items()}

    for selection in ("norm", "norm2", "leverage", "inverse", "uniform"):
        drawn = [
            indices(selection=selection, generator=torch.Generator().manual_seed(seed))
            for seed in (1, 1, 2)
        ]
        assert drawn[0] == drawn[1] != drawn[2]
    assert set(indices(selection=lambda *_: ([0, 3], [5, 1])).values()) == {((0, 3), (1, 5))}
    rule = decompose.Leverage("exact")
    assert indices(selection=rule) == indices(selection="leverage")


def test_an_interrupted_choice_leaves_the_model_as_it_was(base):
    """Two stacks are chosen when the user gives up at the third."""
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    kinds = {name: type(module) for name, module in base.named_modules()}
    calls = []

    def slow(stack, rank, generator):
        calls.append(stack.n3)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decompose.Norm()(stack, rank, generator)

    with pytest.raises(KeyboardInterrupt):
        tcur.adapt(base, rank=2, selection=slow)
    assert {name: type(module) for name, module in base.named_modules()} == kinds
    assert all(parameter.requires_grad for parameter in base.parameters())
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_streaming_refuses(base, folder):
    with pytest.raises(ValueError, match="its weight is on the meta device: C and R are"):
        tcur.adapt(on_meta(), rank=2)
    with pytest.raises(ValueError, match="weights: expected a model on the meta device, got one"):
        tcur.adapt(base, rank=2, weights=folder)
    with pytest.raises(FileNotFoundError, match="weights: expected a file or directory"):
        tcur.adapt(on_meta(), rank=2, weights=folder / "nowhere")
    with pytest.raises(ValueError, match="stack 8x8: max_workspace: expected at least"):
        tcur.adapt(on_meta(), rank=2, weights=folder, max_workspace=1000)

    file = next(folder.glob("model-*.safetensors"))
    shards = decompose.Shards(folder)
    state = {name: shards.read(name) for name in shards.files}

    def with_state(change):
        for path in folder.iterdir():
            path.unlink()
        save_file({**state, **change}, folder / file.name)

    with_state({"blocks.1.mlp.0.weight": torch.randn(32, 9)})
    with pytest.raises(ValueError, match=r"blocks.1.mlp.0.weight of shape \[32, 8\] as in the mo"):
        tcur.adapt(on_meta(), rank=2, weights=folder)
    with_state({"blocks.1.mlp.0.weight": torch.randn(32, 8).bfloat16()})
    with pytest.raises(
        ValueError, match=r"blocks.1.mlp.0.weight of torch.float32 as in the model, "
    ):
        tcur.adapt(on_meta(), rank=2, weights=folder)
    with_state({"blocks.2.attn.qkv.weight": torch.full((24, 8), torch.nan)})
    message = r"stack 8x8: weights: blocks.2.attn.qkv.weight, rows 0 to 7, in .*: expected finite"
    with pytest.raises(ValueError, match=message):
        tcur.adapt(on_meta(), rank=2, weights=folder)
    missing = "blocks.0.norm.running_mean"
    del state[missing]
    with_state({})
    with pytest.raises(ValueError, match=rf"weights: expected a tensor {missing} in .*, got none"):
        tcur.adapt(on_meta(), rank=2, weights=folder)
    del state["blocks.0.mlp.2.weight"]
    with_state({})
    model = on_meta()
    with pytest.raises(
        ValueError, match=r"weights: expected a tensor blocks.0.mlp.2.weight in .*, got"
    ):
        tcur.adapt(model, rank=2, weights=folder)
    assert not hasattr(model, "tcur")
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
