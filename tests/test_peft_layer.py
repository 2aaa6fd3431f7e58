"""What peft and models do with an adapted layer beside calling it; several adapters at once."""

import copy
import pickle

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hf_models import PEFT_SAYS, gpt2
from models import Tiny
from plain import with_updates
from tcur_kernels.peft import TCURConfig, TCURLinear
from tcur_kernels.peft.hosted import AdapterStack
from tolerance import assert_composition_close, assert_equal_in_float64, same_mathematics

pytestmark = [pytest.mark.filterwarnings(text) for text in PEFT_SAYS]

OLD_PEFT = tuple(map(int, peft.__version__.split(".")[:2])) < (0, 19)
TARGETS = ["qkv", "out_proj", "mlp.0", "mlp.2"]


def config(**kwargs):
    return TCURConfig(**{"rank": 2, "target_modules": list(TARGETS), **kwargs})


def drawn(base, **kwargs):
    """An adapter that changes something, in evaluation."""
    return get_peft_model(copy.deepcopy(base), config(**kwargs, init_weights=False)).eval()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, TCURLinear)]


def cores(model):
    return {name: p for name, p in model.named_parameters() if name.endswith(".core")}


@pytest.fixture
def base():
    return Tiny().eval().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(4, 7, 6)


def test_hooks_of_the_base_layer_run_and_may_change_what_passes(base, x):
    model = drawn(base)
    y = model(x)
    layer = layers_of(model)[0]
    seen = []
    handles = [
        layer.base_layer.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
        layer.base_layer.register_forward_hook(lambda _, __, out: seen.append(out) or 3 * out),
    ]
    inputs = torch.randn(2, 8)
    once = layer(inputs)
    handles[0].remove()
    assert torch.equal(layer(2 * inputs), once)
    handles[1].remove()
    assert len(seen) == 2
    assert torch.equal(once, 3 * layer(2 * inputs))
    assert torch.equal(model(x), y)


def test_a_base_layer_called_alone_is_the_base(base):
    model = drawn(base)
    layer = model.base_model.model.blocks[0].mlp[0]
    inputs = torch.randn(2, 8)
    assert torch.equal(layer.get_base_layer()(inputs), base.blocks[0].mlp[0](inputs))


@pytest.mark.parametrize("make", [Tiny, gpt2], ids=["linear", "conv1d"])
def test_unloaded_layers_have_their_types_back(make):
    base = make()
    kinds = [type(module) for module in base.modules()]
    model = get_peft_model(base, TCURConfig(rank=2))
    twin = pickle.loads(pickle.dumps(model))
    for one in (model, twin):
        assert all(isinstance(m.base_layer, nn.Linear | Conv1D) for m in layers_of(one))
    for plain in (model.unload(), twin.merge_and_unload()):
        assert [type(module) for module in plain.modules()] == kinds


def test_offloaded_weights_are_brought_in_layer_by_layer(base, x):
    model = drawn(base)
    with torch.no_grad():
        y = model(x)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(layer.base_layer.weight.is_meta for layer in layers_of(model))
        assert torch.equal(model(x), y)
        # So many tokens that W_eff of all layers would be built, if their weights were there.
        many = torch.randn(4, 5000, 6)
        assert torch.isfinite(model(many)).all()


@pytest.mark.parametrize("removed", [None, "before", "after"])
def test_a_hook_of_accelerate_from_before_the_adapter(base, x, removed):
    hooked = copy.deepcopy(base)
    linears = [module for module in hooked.modules() if type(module) is nn.Linear]
    for module in linears:
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
        if removed == "before":
            remove_hook_from_module(module)
    model = get_peft_model(hooked, config(init_weights=False)).eval()
    plain = drawn(base)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))
    if removed == "after":
        for module in linears:
            remove_hook_from_module(module)
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model.unload()(x), base(x))


@pytest.mark.parametrize("hooked", [False, True])
def test_a_layer_with_a_forward_of_its_own_is_named(base, hooked):
    """It would be called in place of the adapted one."""
    layer = base.blocks[1].mlp[0]
    layer.forward = lambda x: nn.Linear.forward(layer, x)
    if hooked:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    plan = get_peft_model(copy.deepcopy(base), TCURConfig(rank=2)).plans["default"]
    reasons = {item.module: item.reason for item in plan.left_out}
    assert "its forward was replaced" in reasons["blocks.1.mlp.0"]
    with pytest.raises(ValueError, match=r"got blocks\.1\.mlp\.0: its forward was replaced"):
        get_peft_model(base, config())


class Reader(nn.Module):
    """Computes with the weights of its layers and calls none, as Swin and WavLM do."""

    def __init__(self, kind=lambda: nn.Linear(8, 8)):
        super().__init__()
        self.first, self.second = kind(), kind()
        self.is_transposed = isinstance(self.first, Conv1D)

    def forward(self, x):
        for layer in (self.first, self.second):
            weight = layer.weight.t() if self.is_transposed else layer.weight
            x = torch.tanh(nn.functional.linear(x, weight, layer.bias))
        return x


@pytest.mark.parametrize("kind", [lambda: nn.Linear(8, 8), lambda: Conv1D(8, 8)])
def test_a_weight_that_is_read_has_the_update_and_its_gradient(kind):
    base, x = Reader(kind).requires_grad_(False), torch.randn(3, 8)
    model = drawn(base, target_modules=["first", "second"])
    y = model(x)
    y.square().sum().backward()
    for core in cores(model).values():
        assert (core.grad != 0).any()
    with torch.no_grad():
        exact = with_updates(copy.deepcopy(base).double(), model)(x.double())
        twin = with_updates(base, model)
        expected = lambda: twin(x), exact
        assert_composition_close(y, *expected)
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))
        model.merge_adapter()
        assert_composition_close(model(x), *expected)
        model.unmerge_adapter()
        assert_composition_close(model.merge_and_unload()(x), *expected)


def test_the_weight_tells_of_itself_without_being_computed(base, monkeypatch):
    model = drawn(base)
    layer = layers_of(model)[0]
    for name in ("update", "effective_value"):  # to be called by nobody
        monkeypatch.setattr(AdapterStack, name, None)
    weight, held = layer.weight, layer.get_base_layer().weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device, weight.shape) == (held.dtype, held.device, held.shape)
    assert (weight.ndim, weight.size(0), len(weight)) == (2, 8, 8)
    assert weight.is_floating_point()
    monkeypatch.undo()
    own = next(n for n, m in model.base_model.model.named_modules() if m is layer)

    def plain(dtype):
        return with_updates(copy.deepcopy(base).to(dtype), model).get_submodule(own).weight

    assert_composition_close(weight.clone(), lambda: plain(torch.float32), plain(torch.float64))


@pytest.mark.parametrize("kind", [lambda: nn.Linear(8, 8), lambda: Conv1D(8, 8)])
def test_a_weight_that_is_read_has_the_updates_of_all_active_adapters(kind):
    base, x = Reader(kind).double().requires_grad_(False), torch.randn(3, 8, dtype=torch.double)
    model = drawn(base, target_modules=["first", "second"])
    model.add_adapter("third", config(rank=3, target_modules=["first"], init_weights=False))
    model.base_model.set_adapter(["default", "third"])
    model(x)  # all layers are read, so that none is named as unused
    layer = layers_of(model)[0]
    weight = layer.weight.t() if layer.tcur_base.layout == "transposed" else layer.weight
    results = []
    for y in (layer(x), nn.functional.linear(x, weight, layer.base_layer.bias)):
        used = [core for name, core in cores(model).items()]
        results.append((y, *torch.autograd.grad(y.square().sum(), used)))
    assert_equal_in_float64(*results)
    with torch.no_grad():
        assert_equal_in_float64(model(x), with_updates(base, model)(x))
        model.merge_adapter()
        assert_equal_in_float64(model(x), with_updates(base, model)(x))


def test_a_weight_of_two_adapters_on_a_16_bit_base_rounds_once():
    base = Reader().bfloat16().requires_grad_(False)
    model = drawn(base, target_modules=["first", "second"])
    model.add_adapter("third", config(target_modules=["first"], init_weights=False))
    model.base_model.set_adapter(["default", "third"])
    layer = layers_of(model)[0]
    with torch.no_grad():
        update = sum(layer.get_delta_weight(name) for name in model.peft_config)
        once = (base.first.weight.float() + update).bfloat16()
        assert torch.equal(layer.weight.clone(), once)
        assert torch.equal(layer.merged_weight(["default", "third"]), once)


def test_a_weight_that_is_not_merged_is_read_with_its_update_though_others_are(base):
    model = drawn(base)
    first, second = layers_of(model)[:2]
    with torch.no_grad():
        wanted = second.weight.clone()
        first.merge()
        assert torch.equal(second.weight.clone(), wanted)
        assert torch.equal(first.weight, first.base_layer.weight)


def test_wavlm():
    """Its attention hands the weights of q, k, v and out to a function."""
    settings = transformers.WavLMConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, conv_dim=(8, 8), conv_kernel=(4, 4), conv_stride=(4, 4),
        num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0, layerdrop=0.0,
    )  # fmt: skip
    base = transformers.WavLMModel(settings).eval().requires_grad_(False)
    model = drawn(base, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    x = torch.randn(2, 160)
    y = model(x).last_hidden_state
    y.sum().backward()
    assert all((core.grad != 0).any() for core in cores(model).values())
    with torch.no_grad():
        exact = with_updates(copy.deepcopy(base).double(), model)(x.double()).last_hidden_state
        twin = with_updates(base, model)
        expected = lambda: twin(x).last_hidden_state, exact
        assert_composition_close(y, *expected)
        assert_composition_close(model.merge_and_unload()(x).last_hidden_state, *expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_two_adapters_on_a_16_bit_base_round_once(dtype, bias):
    """Updates below the last bit of the product survive in the mean, those of both adapters."""
    base = nn.ModuleList([nn.Linear(8, 8, bias, dtype=dtype), nn.Linear(8, 8, bias, dtype=dtype)])
    with torch.no_grad():
        for layer in base:
            layer.weight.fill_(1.0)
            if bias:
                layer.bias.fill_(3.0)
    own = {"rank": 1, "target_modules": ["0", "1"]}
    model = get_peft_model(base, TCURConfig(**own)).eval()
    model.add_adapter("second", TCURConfig(**own))
    step = torch.finfo(dtype).eps * 32  # the distance of numbers from 32 to 64
    with torch.no_grad():
        # C and R are 1 / √8 at frequency 0 and nothing else, and the scale is 8 / 2: each update
        # is a quarter of its core everywhere, and adds 0.1 of a step to a sum of 8 inputs of 1.
        for core in cores(model).values():
            core[0] = 0.05 * step
    model.base_model.set_adapter(["default", "second"])
    layer = model.base_model.model[0]
    x = 4 + torch.rand(20000, 8).to(dtype) / 4
    with torch.no_grad():
        y = layer(x).double()
        plain = layer.get_base_layer()(x).double()
        exact = x.double() @ layer.get_base_layer().weight.double().T + (3.0 if bias else 0)
        update = x.double() @ sum(layer.get_delta_weight(n).double() for n in model.peft_config).T
    gained = (y - exact).mean() / update.mean()
    assert abs((plain - exact).mean()) < 0.02 * step
    assert 0.9 < gained < 1.1


def test_two_adapters_under_autocast_and_without_a_core(base, x):
    model = drawn(base)
    model.add_adapter("second", config(rank=3))
    model.base_model.set_adapter(["default", "second"])
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - model(x)).norm() < 0.05 * model(x).norm()
    with torch.no_grad():
        for core in cores(model).values():
            core.zero_()
        assert torch.equal(model(x), base(x))


def test_a_graph_keeps_its_gradient_when_another_adapter_is_activated(base, x):
    model = drawn(base)
    model.add_adapter("second", config(init_weights=False))
    own = {name: [c for n, c in cores(model).items() if name in n] for name in model.peft_config}

    def losses(switch):
        model.zero_grad()
        outputs = []
        for name in ("default", "second"):
            switch(name)
            outputs.append(model(x))
        (outputs[0] * outputs[1].roll(1, 0)).sum().backward()
        return [core.grad.clone() for name in own for core in own[name]]

    model.base_model.set_adapter(["default", "second"])  # both are trained all the time

    def alone(name):
        for layer in layers_of(model):
            layer._active_adapter = [name]

    expected = losses(alone)
    for _ in range(2):  # accumulated once each, however often adapters were exchanged
        for got, grad in zip(losses(model.set_adapter), expected, strict=True):
            assert torch.equal(got, grad)
    assert not any(core.requires_grad for core in own["default"])
    model.set_adapter("default")
    twice = [core.grad.clone() for core in own["second"]]
    model(x).sum().backward()
    assert all(torch.equal(c.grad, g) for c, g in zip(own["second"], twice, strict=True))


@pytest.mark.parametrize("others", ["second", ["second", "default"], None])
def test_checkpoints_are_not_computed_again_by_other_adapters(base, x, others):
    model = drawn(base)
    model.add_adapter("second", config(init_weights=False))
    x.requires_grad_()

    def graph():
        return checkpoint(model, x, use_reentrant=False).square().sum()

    graph().backward()
    wanted = [core.grad.clone() for n, core in cores(model).items() if "default" in n]
    loss = graph()
    if others is None:
        with (
            model.disable_adapter(),
            pytest.raises(RuntimeError, match="core: expected the adapter of the forward"),
        ):
            loss.backward()
        return
    model.base_model.set_adapter(others)
    says = "core: expected the adapter of the forward"
    if others != "second":  # torch itself finds out, since other tensors are saved
        says = "have different metadata than during the forward pass"
    with pytest.raises(RuntimeError, match=says):
        loss.backward()
    del loss
    with torch.no_grad():  # a reference that another adapter computes meanwhile
        model.set_adapter("default")
        model.zero_grad()
        loss = graph()
        model.set_adapter("second")
        model(x)
    model.set_adapter("default")
    loss = graph()
    with torch.no_grad(), model.disable_adapter():
        model(x)
    model.set_adapter("second")
    with torch.no_grad():
        model(x)
    model.set_adapter("default")
    loss.backward()
    got = [core.grad for n, core in cores(model).items() if "default" in n]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cores_in_the_dtype_of_the_base_if_they_are_asked_for(base, x, dtype, tmp_path):
    half, x = copy.deepcopy(base).to(dtype), x.to(dtype)
    model = get_peft_model(
        copy.deepcopy(half), config(init_weights=False), autocast_adapter_dtype=False
    ).eval()
    if OLD_PEFT:  # has no such choice for further adapters
        model.add_adapter("second", config())
    else:
        model.add_adapter("second", config(), autocast_adapter_dtype=False)
        assert {core.dtype for core in cores(model).values()} == {dtype}
    y = model(x)
    assert_composition_close(
        y, lambda: with_updates(half, model, ["default"])(x),
        with_updates(copy.deepcopy(half).double(), model, ["default"])(x.double()),
    )  # fmt: skip
    y.sum().backward()
    assert {c.grad.dtype for n, c in cores(model).items() if "default" in n} == {dtype}
    with torch.no_grad():
        rows = model(x, adapter_names=["default", "second", "__base__", "default"])
    assert rows.dtype == dtype
    model.save_pretrained(tmp_path)
    for cast in (False, True):
        loaded = PeftModel.from_pretrained(
            copy.deepcopy(half), tmp_path, autocast_adapter_dtype=cast
        ).eval()
        assert {c.dtype for c in cores(loaded).values()} == {torch.float32 if cast else dtype}
        assert {c.dtype for c in cores(loaded.to("cpu", dtype)).values()} == {
            torch.float32 if cast else dtype
        }
    assert {c.dtype for c in cores(model.float()).values()} == {torch.float32}
    fp32 = get_peft_model(copy.deepcopy(base), config(), autocast_adapter_dtype=False)
    assert {core.dtype for core in cores(fp32).values()} == {torch.float32}


def test_w_eff_of_a_16_bit_core_is_refused(base):
    half = copy.deepcopy(base).bfloat16()
    kinds = [type(module) for module in half.modules()]
    own = config(mode="materialized")
    with pytest.raises(ValueError, match="autocast_adapter_dtype: expected True with mode 'mat"):
        get_peft_model(half, own, autocast_adapter_dtype=False)
    assert [type(module) for module in half.modules()] == kinds
    model = get_peft_model(half, config())
    if OLD_PEFT:
        return
    with pytest.raises(ValueError, match="autocast_adapter_dtype: expected True with mode 'mat"):
        model.add_adapter("second", own, autocast_adapter_dtype=False)
    assert list(model.peft_config) == list(model.plans) == ["default"]


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*FullyShardedDataParallel.*:FutureWarning")
def test_fsdp1_with_original_parameters(base, x):
    model = drawn(base)
    model.zero_grad()
    expected = model(x)
    expected.square().sum().backward()
    grads = {name: core.grad for name, core in cores(model).items()}
    other = drawn(base)
    other.load_state_dict(model.state_dict())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = FullyShardedDataParallel(
            other, use_orig_params=True, device_id=torch.device("cpu")
        )
        y = wrapped(x)
        y.square().sum().backward()
        assert torch.equal(y, expected)
        found = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in cores(wrapped).items()}
        for name, grad in grads.items():
            assert same_mathematics(found[name].grad, grad)
        assert all(p.grad is None for p in wrapped.parameters() if not p.requires_grad)
    finally:
        dist.destroy_process_group()
