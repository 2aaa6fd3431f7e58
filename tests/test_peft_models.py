"""The peft plug-in on the models people have: GPT-2, Llama, ViT, UNETR, from configs."""

import copy

import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import nn

import tcur_kernels as tcur
from hf_models import HF_MODELS, IS_FOUR, PEFT_SAYS, gpt2, llama, output, unetr, vit
from plain import Plain, with_updates
from tcur_kernels.peft import TCURConfig, TCURLinear
from tolerance import assert_composition_close

pytestmark = [pytest.mark.filterwarnings(text) for text in PEFT_SAYS]

#: The queries of a ViT, and the first layers of its perceptrons.
VIT_LAYERS = ["query", "intermediate.dense"] if IS_FOUR else ["q_proj", "fc1"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@torch.no_grad()
def randomise(model):
    for name, p in model.named_parameters():
        if name.endswith(".core"):
            p.normal_(std=0.3)


def in_double(inputs):
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("name", HF_MODELS)
def test_the_life_of_an_adapter(name, tmp_path):
    make, inputs, task = HF_MODELS[name]
    base, inputs = make().eval().requires_grad_(False), inputs()
    heads = {"vit": ["classifier"], "unetr": ["decoder5", "decoder4", "decoder3", "out"]}.get(name)
    config = TCURConfig(rank=2, task_type=task, modules_to_save=heads)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        assert torch.equal(output(model, inputs), output(base, inputs))
    output(model, inputs).square().sum().backward()
    for key, p in model.named_parameters():
        if p.requires_grad and "norm" not in key and "bias" not in key:
            assert p.grad.abs().max() > 0, key
    randomise(model)
    with torch.no_grad():
        y = output(model, inputs)
        assert not torch.equal(y, output(base, inputs))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.equal(output(loaded, inputs), y)
        exact = output(with_updates(copy.deepcopy(base).double(), loaded), in_double(inputs))
        expected = lambda: output(with_updates(base, loaded), inputs), exact
        assert_composition_close(y, *expected)
        model.merge_adapter()
        assert_composition_close(output(model, inputs), *expected)
        model.unmerge_adapter()
        assert torch.equal(output(model, inputs), y)
        merged = model.merge_and_unload(safe_merge=True)
        assert_composition_close(output(merged, inputs), *expected)
    assert type(merged) is type(base)
    assert set(merged.state_dict()) == set(base.state_dict())


def test_conv1d_computes_as_linear_does():
    """The same weights stored the other way round: the same indices, outputs and gradients."""
    base = gpt2().eval()
    twin, native = copy.deepcopy(base), copy.deepcopy(base)
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "Conv1D":
                linear = nn.Linear(*child.weight.shape)
                linear.weight = nn.Parameter(child.weight.detach().t().contiguous())
                linear.bias = child.bias
                setattr(module, name, linear)
    inputs = HF_MODELS["gpt2"][1]()
    models = [get_peft_model(m, TCURConfig(rank=3)) for m in (base, twin)]
    first, second = (m.peft_config["default"].plan for m in models)
    assert first == second
    torch.manual_seed(1)
    randomise(models[0])
    state = {k: v for k, v in models[0].state_dict().items() if k.endswith(".core")}
    models[1].load_state_dict(state, strict=False)
    adapter = tcur.adapt(native, rank=3)  # the same, for `Plain`
    names = [f"base_model.tcur_{name}.default.core" for name in adapter.stacks]
    with torch.no_grad():
        for name, stack in zip(names, adapter.stacks.values(), strict=True):
            stack.core.copy_(state[name])

    def run(model, parameters):
        y = output(model, inputs)
        return y, *torch.autograd.grad(y.square().sum(), parameters)

    plain, double = Plain(adapter), Plain(adapter, torch.float64)
    expected = lambda: run(plain, plain.trained), run(double, double.trained)
    for model in models:
        cores = [model.get_parameter(name) for name in names]
        assert_composition_close(run(model, cores), *expected)
    for conv, linear in zip(models[0].modules(), models[1].modules(), strict=True):
        if isinstance(conv, TCURLinear):
            assert conv.get_delta_weight("default").shape == conv.weight.shape
            assert torch.equal(
                conv.get_delta_weight("default").t(), linear.get_delta_weight("default")
            )


def test_grouped_query_attention_makes_two_attention_stacks():
    plan = get_peft_model(llama(), TCURConfig(rank=2)).plans["default"]
    kinds = {
        stack.name: {member.module.rpartition(".")[2] for member in stack.members}
        for stack in plan.stacks
    }
    assert kinds == {
        "32x32": {"q_proj", "o_proj"},
        "16x32": {"k_proj", "v_proj"},
        "48x32": {"gate_proj", "up_proj"},
        "32x48": {"down_proj"},
    }


def test_the_papers_stacks_of_a_unetr():
    """As `tcur.adapt` makes them: q, k, v and the output projection in one stack."""
    model = unetr()
    adapter = tcur.adapt(copy.deepcopy(model), rank=4)
    config = TCURConfig(rank=4, target_modules=["qkv", "out_proj", "linear1", "linear2"])
    plan = get_peft_model(model, config).plans["default"]
    assert [s.members for s in plan.stacks] == [s.members for s in adapter.plan.stacks]


@pytest.mark.parametrize(
    ("make", "auto", "task"),
    [(gpt2, AutoPeftModelForCausalLM, "CAUSAL_LM"), (vit, AutoPeftModel, None)],
    ids=["gpt2", "vit"],
)
def test_auto_classes(make, auto, task, tmp_path):
    make().save_pretrained(tmp_path / "base")
    kind = type(make())
    base = kind.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, TCURConfig(rank=2, task_type=task)).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto.from_pretrained(tmp_path / "adapter").eval()
    name = "gpt2" if make is gpt2 else "vit"
    inputs = HF_MODELS[name][1]()
    with torch.no_grad():
        assert torch.equal(output(loaded, inputs), output(model, inputs))
    if task:
        ids = loaded.generate(
            input_ids=inputs["input_ids"],
            attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
        )
        assert ids.shape == (2, 12)


@pytest.mark.parametrize(
    ("make", "choice"),
    [
        (vit, {"layers_to_transform": 1, "target_modules": VIT_LAYERS}),
        (gpt2, {"layers_to_transform": [1], "layers_pattern": "h", "target_modules": ["c_attn"]}),
    ],
    ids=["vit", "gpt2"],
)
def test_layers_to_transform(make, choice):
    plan = get_peft_model(make(), TCURConfig(rank=2, **choice)).plans["default"]
    modules = [member.module for stack in plan.stacks for member in stack.members]
    assert {part for name in modules for part in name.split(".") if part.isdigit()} == {"1"}
