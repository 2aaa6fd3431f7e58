"""Adapters on quantised bases: plans, files, merged copies, other bases, and what is refused."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tcur_kernels as tcur
from adapted import randomise
from quantisers import QUANTISERS, WIDTH, Two, bnb4, dequantised, foreign, quantised, two
from tcur_kernels import cli
from tcur_kernels.adapters import linear_maps
from tcur_kernels.layers.quantised import quantiser_of
from tolerance import same_mathematics

EVERY = pytest.mark.parametrize("name", QUANTISERS)


@pytest.fixture
def x():
    return torch.randn(3, 5, WIDTH)


def adapted(name, dtype=torch.float32, std=0.3, **kwargs):
    """A model with an adapter whose core is not zero, and the adapter."""
    adapter = tcur.adapt(two(name, dtype), rank=4, **kwargs)
    randomise(adapter, std)
    return adapter.model, adapter


@EVERY
def test_copies_are_plain_and_nothing_is_merged_in_place(name, x):
    model, adapter = adapted(name)
    ran = []
    model.blocks[0].q.register_forward_hook(lambda *args: ran.append(1))
    y = model(x)
    for merge in (adapter.merge, adapter.stacks["64x64"].merge):
        with pytest.raises(
            ValueError, match=r"merge: expected weights that W_eff can .*merge.inplace=F"
        ):
            merge()
    assert torch.equal(model(x), y)
    ran.clear()
    merged = adapter.merge(inplace=False)
    layer = model.blocks[0].q
    assert {type(each) for each in merged.modules() if not list(each.children())} == {nn.Linear}
    assert torch.equal(merged.blocks[0].q.weight, layer.effective_weight())
    assert not any(p.requires_grad for p in merged.parameters())
    assert same_mathematics(merged(x), y)
    assert ran == [1]
    with adapter.disable():
        assert torch.equal(model(x), two(name)(x))
        assert torch.equal(layer.effective_weight(), dequantised(two(name).blocks[0].q))
    assert torch.equal(model(x), y)


def test_the_dtype_of_merged_layers():
    for name in QUANTISERS:
        _, adapter = adapted(name, torch.bfloat16)
        layer = adapter.merge(inplace=False).blocks[0].q
        assert (layer.weight.dtype, layer.bias.dtype) == (torch.bfloat16,) * 2, name
    linears = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)]
    model = nn.Sequential(nn.LayerNorm(WIDTH), *linears).to(torch.bfloat16)
    merged = tcur.adapt(quantised(model, "bitsandbytes int8")).merge(inplace=False)
    assert merged[1].weight.dtype == torch.bfloat16
    merged = tcur.adapt(quantised(nn.Sequential(*linears), "bitsandbytes int8"))
    assert merged.merge(inplace=False)[0].weight.dtype == torch.float32


@EVERY
def test_saved_and_loaded_onto_the_same_base(name, x, tmp_path):
    model, adapter = adapted(name)
    adapter.save(tmp_path / "a")
    assert not [key for key in load_file(tmp_path / "a") if key.startswith("lateral")]
    loaded = tcur.load_adapter(two(name), tmp_path / "a")
    assert torch.equal(loaded.model(x), model(x))
    for other in (two(name, seed=1), Two()):
        before = copy.deepcopy(other)(x)
        with pytest.raises(ValueError, match=r"expected the base that the adapter was made for"):
            tcur.load_adapter(other, tmp_path / "a")
        assert torch.equal(other(x), before)
    full = tcur.adapt(Two(), rank=4)
    full.save(tmp_path / "full", factors=True)
    loaded = tcur.load_adapter(two(name), tmp_path / "full", strict=False)
    assert torch.equal(loaded.stacks["64x64"].lateral, full.stacks["64x64"].lateral)


@EVERY
def test_slices_of_weights_in_full_precision(name, x, tmp_path, capsys):
    """Trained on the quantised model, merged into the one in full precision."""
    torch.manual_seed(0)
    full = Two()
    base = tmp_path / "base"
    base.mkdir()
    save_file(full.state_dict(), base / "model.safetensors")
    (base / "config.json").write_text("{}")
    model, adapter = adapted(name, weights=base)
    [stack] = adapter.stacks.values()
    assert "C and R are those of the given weights" in str(adapter.plan)
    columns, rows = list(stack.columns), list(stack.rows)
    lateral, horizontal = stack.factors.slices
    assert torch.equal(lateral[0], full.blocks[0].q.weight[:, columns])
    assert torch.equal(horizontal[-1], full.blocks[1].o.weight[rows])
    adapter.save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"strict=False loads it with the C and R it holds"):
        tcur.load_adapter(two(name), tmp_path / "a")
    loaded = tcur.load_adapter(two(name), tmp_path / "a", strict=False)
    assert torch.equal(loaded.model(x), model(x))

    assert cli.main(["merge", str(base), str(tmp_path / "a"), "-o", str(tmp_path / "out")]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    wanted = full.blocks[0].q.weight + stack.update(stack.places[0])
    assert torch.equal(merged["blocks.0.q.weight"], wanted)

    packed_state = {"blocks.0.q.weight": torch.zeros(WIDTH, WIDTH, dtype=torch.int8)}
    save_file({**full.state_dict(), **packed_state}, base / "model.safetensors")
    assert cli.main(["merge", str(base), str(tmp_path / "a"), "-o", str(tmp_path / "no")]) != 0
    assert "expected weights in full precision, got blocks.0.q.weight of" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    with pytest.raises(TypeError, match=r"expected a floating dtype, got I8 in blocks.0.q.weight"):
        tcur.adapt(two(name), rank=4, weights=base)


@EVERY
def test_another_base_is_noticed(name, x):
    model, other = two(name), two(name, seed=1)
    adapter = tcur.adapt(model, rank=4)
    randomise(adapter)
    [stack] = adapter.stacks.values()
    for (path, layer), twin in zip(model.named_modules(), other.modules(), strict=False):
        if path.count(".") == 2:
            if name == "bitsandbytes nf4":  # it loads no state dict of quantised weights
                layer.weight = twin.weight
                layer.bias.data.copy_(twin.bias)
            else:
                layer.load_state_dict(twin.state_dict())
    columns = list(stack.columns)
    y = model(x)
    expected = tcur.adapt(two(name, seed=1), rank=4, selection=(stack.rows, stack.columns))
    expected.stacks["64x64"].core.data.copy_(stack.core)
    assert torch.equal(y, expected.model(x))
    assert torch.equal(stack.factors.slices[0][0], dequantised(other.blocks[0].q)[:, columns])


@EVERY
def test_copied_and_pickled(name, x):
    model, _ = adapted(name)
    y = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), y)
    twin.tcur.get_parameter("64x64").data.zero_()
    assert torch.equal(model(x), y)
    if "torchao" not in name:  # its weights cannot be pickled where C functions are wrapped
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
        assert ", slice=0 of 8, rank=4" in repr(model.blocks[0].q)  # torchao sets its own


def test_kinds_are_apart_unless_targets_put_them_together(x):
    torch.manual_seed(0)
    model = quantised(Two(), "bitsandbytes nf4", keep=("blocks.1.q", "blocks.1.k"))
    adapter = tcur.adapt(copy.deepcopy(model), rank=4)
    quantised_stack, plain = adapter.plan.stacks
    assert (quantised_stack.n3, plain.n3) == (6, 2)
    assert quantised_stack.note.startswith("factored: the base is quantised (bitsandbytes nf4)")
    assert "quantised" not in plain.note
    together = tcur.adapt(model, {"all": ["blocks.*"]}, rank=4)
    [stack] = together.stacks.values()
    assert stack.n3 == 8
    randomise(together, 0.05)
    y = model(x)
    assert same_mathematics(together.merge(inplace=False)(x), y)
    found = stack.effective(torch.float32)
    assert same_mathematics(found[4], model.blocks[1].q.weight.detach())
    assert same_mathematics(found[0], model.blocks[0].q.effective_weight().detach())


def test_what_cannot_be_read_is_left_out_by_name():
    model = two("bitsandbytes nf4")
    model.gptq = foreign("gptqmodel", "TorchQuantLinear")
    model.fp8 = foreign("transformers.integrations.finegrained_fp8", "FP8Linear")
    model.late = type(bnb4(nn.Linear(WIDTH, WIDTH)))(WIDTH, WIDTH)
    eight = quantised(nn.Sequential(nn.Linear(WIDTH, WIDTH)), "bitsandbytes int8")[0]
    model.anew = type(eight)(WIDTH, WIDTH)
    model.cpu_only = bnb4(nn.Linear(WIDTH, WIDTH))
    model.cpu_only.weight.quant_state.packing_format_for_cpu = True
    reasons = {item.module: item.reason for item in tcur.adapt(model, rank=4).plan.left_out}
    assert "TorchQuantLinear of GPTQModel has a quantised weight" in reasons["gptq"]
    assert "FP8Linear of finegrained_fp8 has a quantised weight" in reasons["fp8"]
    assert "is not quantised yet" in reasons["late"]
    assert "has_fp16_weights=True" in reasons["anew"]
    assert "AVX512-BF16" in reasons["cpu_only"]
    other = two("bitsandbytes nf4")
    other.gptq = foreign("gptqmodel", "TorchQuantLinear")
    with pytest.raises(TypeError, match=r"'gptq' to match .*of GPTQModel has a quantised weight"):
        tcur.adapt(other, ["gptq"], rank=4)
    assert quantiser_of(other.blocks[0].q) is not None


def test_a_weight_that_torchao_cannot_dequantise(monkeypatch):
    model = two("torchao Int8Tensor")
    kind = type(model.blocks[0].q.weight)

    def dequantize(self, *args):
        raise NotImplementedError

    monkeypatch.setattr(kind, "dequantize", dequantize)
    monkeypatch.setattr(type(quantiser_of(model.blocks[0].q)), "_known", set())
    with pytest.raises(ValueError, match="Int8Tensor, which torchao cannot turn back into numbers"):
        tcur.adapt(model, rank=4)


def test_refused_arguments(x, tmp_path):
    model = two("HQQ 4 bits")
    with pytest.raises(
        ValueError, match=r"mode: expected 'auto' or 'factored' for quantised .*HQQ"
    ):
        tcur.adapt(model, rank=4, mode="materialized")
    with pytest.raises(ValueError, match=r"weights that take a gradient, got blocks.0.q, which is"):
        tcur.collect_gradients(model, [x], lambda model, x: model(x).sum())
    save_file(Two().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"weights: expected a model on the meta device, got one"):
        tcur.adapt(Two(), rank=4, weights=tmp_path / "w.safetensors")
    assert not any("tcur" in name for name in model.state_dict())
    tcur.adapt(model, rank=4)
    place, nested = (
        model.blocks[0].q.tcur_place,
        torch.nested.nested_tensor(list(x), layout=torch.jagged),
    )
    with pytest.raises(ValueError, match=r"x: expected an ordinary tensor for a quantised layer"):
        place.stack.add_update(nested, nested, place)
    for name, kind in (("torchao Int8Tensor", "Int8Tensor"), ("bitsandbytes nf4", "Params4bit")):
        layers = [each for each in two(name).modules() if isinstance(each, nn.Linear)]
        with pytest.raises(TypeError, match=f"linears: expected plain weights, got a {kind}; adap"):
            tcur.TProductStack(layers, rank=4)


def test_a_sharded_weight_is_left_out(monkeypatch):
    monkeypatch.setattr(linear_maps, "is_sharded", lambda tensor: tensor.dtype == torch.uint8)
    with pytest.raises(
        ValueError, match=r"got none \(blocks.0.q: its weight is sharded: adapt fir"
    ):
        tcur.adapt(two("bitsandbytes nf4"), rank=4)


@EVERY
def test_layers_that_are_left_out_are_part_of_the_base(name, tmp_path):
    def adapt(model):
        return tcur.adapt(model, ["q", "k", "v"], rank=4)

    adapt(two(name)).save(tmp_path / "a")
    assert tcur.load_adapter(two(name), tmp_path / "a").plan.stacks[0].n3 == 6
    other = two(name)
    other.blocks[1].o = two(name, seed=1).blocks[1].o
    with pytest.raises(ValueError, match=r"frozen parameters outside of the stacks differ"):
        tcur.load_adapter(other, tmp_path / "a")
