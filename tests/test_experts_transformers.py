"""Experts of transformers models, with each implementation of their forward, and through peft."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file

import tcur_kernels as tcur
from adapted import randomise
from hf_models import IS_FOUR, PEFT_SAYS
from plain import Plain
from tcur_kernels import cli
from tcur_kernels.layers import expert_weights
from tolerance import assert_composition_close, same_mathematics

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tcur_kernels.peft import TCURConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", *PEFT_SAYS
)

TARGETS = ["*.experts.gate_up_proj", "*.experts.down_proj"]
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.1,
}
IDS = torch.arange(14).reshape(2, 7)


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=4, **TEXT))


def qwen3():
    more = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**TEXT, **more))


def gpt_oss():
    """Its experts are stored (in, out)."""
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**TEXT, **more))


def llama4():
    """Each of its experts gets all tokens, scaled."""
    more = {"num_local_experts": 4, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 48}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**TEXT, **more))


def model_of(build=mixtral, implementation=None):
    if IS_FOUR and build in (mixtral, qwen3):
        pytest.skip("in transformers 4 its experts are modules of their own")
    if IS_FOUR and implementation not in (None, "eager"):
        pytest.skip("transformers 4 has one implementation of experts")
    torch.manual_seed(0)
    model = build().eval()
    if implementation is not None and not IS_FOUR:
        model.set_experts_implementation(implementation)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


def loss(y):
    return y.square().sum()


CASES = {
    **{f"Mixtral, {how}": (mixtral, how) for how in ("eager", "grouped_mm", "batched_mm")},
    **{f"Qwen3, {how}": (qwen3, how) for how in ("eager", "grouped_mm", "batched_mm")},
    **{f"GPT-OSS, {how}": (gpt_oss, how) for how in ("eager", "grouped_mm", "batched_mm")},
    "Llama4": (llama4, None),
}


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        *((case, "factored") for case in CASES),
        *((case, "materialized") for case in CASES if case[:3] in ("Mix", "Lla")),
    ],
)
def test_models_compute_with_w_eff(case, mode, monkeypatch):
    build, implementation = CASES[case]
    model = model_of(build, implementation)
    start = logits(model)
    adapter = tcur.adapt(model, TARGETS, rank=3, mode=mode)
    assert torch.equal(logits(model), start)
    assert [stack.n3 for stack in adapter.stacks.values()] == [8, 8]
    randomise(adapter, 0.1)
    # Using the numbers of a weight fails. Under torch 2.10, transformers asks a weight that
    # grouped_mm takes for its address, which needs the numbers.
    if mode == "factored" and (implementation != "grouped_mm" or torch.__version__ >= "2.11"):
        monkeypatch.setattr(expert_weights.EffectiveWeight, "numbers", None)
    y = logits(model)
    loss(y).backward()
    monkeypatch.undo()
    plain = Plain(adapter, torch.float64)
    if implementation == "grouped_mm":  # which torch does not have in float64
        plain._model.set_experts_implementation("eager")
    exact = plain(input_ids=IDS, use_cache=False).logits
    grads = torch.autograd.grad(loss(exact), [*plain.cores.values()])
    assert same_mathematics(y, exact.float())
    for stack, grad in zip(adapter.stacks.values(), grads, strict=True):
        assert same_mathematics(stack.core.grad, grad.float())
    assert not same_mathematics(y, start)
    merged = adapter.merge(inplace=False)
    assert same_mathematics(logits(merged), y)
    if case == "Mixtral, batched_mm":
        assert torch.equal(
            model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0),
            merged.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0),
        )


def test_rounding_of_a_model():
    model = model_of(implementation="eager")
    adapter = tcur.adapt(model, [*TARGETS, "*.q_proj", "*.o_proj"], rank=2, mode="factored")
    randomise(adapter, 0.1)
    plain, exact = Plain(adapter, torch.float32), Plain(adapter, torch.float64)
    assert_composition_close(logits(model), lambda: logits(plain), logits(exact))


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        ("eager", torch.bfloat16),
        ("grouped_mm", torch.bfloat16),
        ("batched_mm", torch.bfloat16),
        ("grouped_mm", torch.float16),
    ],
)
def test_sixteen_bits_and_autocast(implementation, dtype):
    base = model_of(implementation=implementation)
    model = copy.deepcopy(base).to(dtype)
    start = logits(model)
    adapter = tcur.adapt(model, TARGETS, rank=3)
    assert torch.equal(logits(model), start)
    randomise(adapter, 0.1)
    loss(logits(model).float()).backward()
    assert all(stack.core.grad.abs().sum() > 0 for stack in adapter.stacks.values())
    with torch.autocast("cpu", dtype):
        start = logits(base)
        adapter = tcur.adapt(base, TARGETS, rank=3)
        assert torch.equal(logits(base), start)
        randomise(adapter, 0.1)
        y = logits(base)
    assert not torch.equal(y, start)
    loss(y.float()).backward()
    assert all(stack.core.grad.abs().sum() > 0 for stack in adapter.stacks.values())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    model = model_of()
    adapter = tcur.adapt(model, TARGETS, rank=3)
    randomise(adapter, 0.1)
    loss(logits(model)).backward()
    wanted = [stack.core.grad.clone() for stack in adapter.stacks.values()]
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    for stack in adapter.stacks.values():
        stack.core.grad = None
    loss(logits(model)).backward()
    for stack, grad in zip(adapter.stacks.values(), wanted, strict=True):
        assert same_mathematics(stack.core.grad, grad)


# dynamo looks at the gradient of the input, which is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("stacks", ["shape", "layer"])
def test_compiled(stacks):
    """One graph, in which W_eff is computed by operators."""
    model = model_of(implementation="batched_mm")
    adapter = tcur.adapt(model, TARGETS, rank=3, stacks=stacks)
    randomise(adapter, 0.1)
    y = logits(model)
    loss(y).backward()
    wanted = [stack.core.grad.clone() for stack in adapter.stacks.values()]
    for stack in adapter.stacks.values():
        stack.core.grad = None
    model.model.layers[1].mlp.compile(backend="aot_eager", fullgraph=True)
    z = logits(model)
    loss(z).backward()
    assert same_mathematics(z, y)
    for stack, grad in zip(adapter.stacks.values(), wanted, strict=True):
        assert same_mathematics(stack.core.grad, grad)


def test_files_that_hold_experts_one_by_one(tmp_path, capsys):
    """Mixtral's: transformers regroups them when it loads and saves."""
    model_of().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    kind = transformers.MixtralForCausalLM
    model = kind.from_pretrained(tmp_path / "base").eval()
    adapter = tcur.adapt(model, TARGETS, rank=3)
    randomise(adapter, 0.1)
    y = logits(model)
    adapter.save(tmp_path / "adapter")
    again = kind.from_pretrained(tmp_path / "base").eval()
    tcur.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), y)
    arguments = ["merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out"]
    assert cli.main([str(each) for each in arguments]) == 0
    assert "written: " in capsys.readouterr().out
    merged = kind.from_pretrained(tmp_path / "out").eval()
    assert same_mathematics(logits(merged), y)
    reference = adapter.merge(inplace=False).state_dict()
    for name, value in merged.state_dict().items():
        assert same_mathematics(value, reference[name])
    files = [*(tmp_path / "out").glob("*.safetensors")]
    assert any("experts.1.w2.weight" in name for file in files for name in load_file(file))
    with torch.device("meta"):
        empty = kind(model.config)
    streamed = tcur.adapt(empty, TARGETS, rank=3, weights=tmp_path / "base")
    for name, stack in adapter.stacks.items():
        assert torch.equal(streamed.stacks[name].lateral, stack.lateral)
        assert torch.equal(streamed.stacks[name].horizontal, stack.horizontal)


# -- peft


def peft_model(build=mixtral, implementation=None, **settings):
    settings = {"rank": 3, "target_parameters": PARAMETERS, **settings}
    model = peft.get_peft_model(model_of(build, implementation), TCURConfig(**settings)).eval()
    draw(model)
    return model


def draw(model, adapter="default"):
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if f".{adapter}.core" in name:
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("case", ["Mixtral, eager", "Qwen3, grouped_mm", "GPT-OSS, batched_mm"])
def test_peft(case, tmp_path):
    build, implementation = CASES[case]
    start = logits(model_of(build, implementation))
    config = TCURConfig(rank=3, target_parameters=PARAMETERS)
    model = peft.get_peft_model(model_of(build, implementation), config).eval()
    assert torch.equal(logits(model), start)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2
    assert all(name.endswith(".default.core") for name in trained)
    draw(model)
    y = logits(model)
    loss(y).backward()
    own = tcur.adapt(model_of(build, implementation), TARGETS, rank=3)
    for stack, name in zip(own.stacks.values(), trained, strict=True):
        stack.core.data.copy_(model.get_parameter(name))
    z = logits(own.model)
    loss(z).backward()
    assert torch.equal(z, y)
    for stack, name in zip(own.stacks.values(), trained, strict=True):
        assert same_mathematics(model.get_parameter(name).grad, stack.core.grad)
    with model.disable_adapter():
        assert torch.equal(logits(model), start)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model_of(build, implementation), tmp_path).eval()
    assert again.peft_config["default"].target_parameters == PARAMETERS
    assert again.peft_config["default"].target_modules is None
    assert torch.equal(logits(again), y)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert all(torch.equal(logits(twin), y) for twin in twins)
    plain = model.merge_and_unload()
    assert same_mathematics(logits(plain), y)
    assert type(plain.model.layers[0].mlp.experts) is type(
        model_of(build).model.layers[0].mlp.experts
    )
    assert plain.state_dict().keys() == model_of(build).state_dict().keys()


def test_peft_with_several_adapters():
    model = peft_model()
    y = logits(model)
    model.add_adapter(
        "b", TCURConfig(rank=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    )
    draw(model, "b")
    assert torch.equal(logits(model), y)
    model.set_adapter("b")
    other = logits(model)
    assert not same_mathematics(other, y)
    experts = model.base_model.model.model.layers[0].mlp.experts
    assert experts.num_experts == 4  # of the module that is wrapped
    assert [*experts.get_delta_weight("b")] == ["down_proj"]
    assert not experts.supports_lora_conversion()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(experts.base_gate_up_proj, model_of().get_parameter(name))
    assert not hasattr(experts, "weight")
    assert not hasattr(type(experts).__new__(type(experts)), "weight")
    experts.merge(adapter_names=["nothing"])
    assert not experts.merged
    model.base_model.set_adapter(["default", "b"])
    both = logits(model)
    loss(both).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith(".core"))
    before = experts.gate_up_proj.detach().clone()
    model.merge_adapter(safe_merge=True)
    assert same_mathematics(logits(model), both)
    assert same_mathematics(experts.gate_up_proj.detach(), before)
    state = model.state_dict()
    name = next(n for n in state if n.endswith("experts.base_layer.gate_up_proj"))
    assert not same_mathematics(state[name], before)
    with pytest.raises(ValueError, match=r"expected unmerged (layers|experts), got model.layers.0"):
        model.add_adapter("third", TCURConfig(rank=2, target_parameters=PARAMETERS))
    model.load_state_dict(state)
    assert same_mathematics(logits(model), both)
    model.double()
    model.float()
    assert same_mathematics(logits(model), both)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(model_of()))
    assert torch.equal(logits(model), both)
    model.delete_adapter("b")
    model.set_adapter("default")
    assert torch.equal(logits(model), y)
    model.get_parameter("base_model.tcur_96x32.default.core").data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"safe_merge: expected finite merged weights, got NaN"):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match=r"safe_merge: expected finite merged weights, got NaN"):
        experts.merge(safe_merge=True)
    assert torch.equal(logits(model.unload()), logits(model_of()))


def test_peft_refuses_a_batch_of_many_adapters():
    model = peft_model()
    model.add_adapter("b", TCURConfig(rank=2, target_modules=["q_proj"]))
    draw(model, "b")
    message = r"adapter_names: expected one adapter for all rows where experts are adapted"
    with pytest.raises(ValueError, match=message):
        model(IDS, adapter_names=["default", "b"])
    with pytest.raises(ValueError, match=message):
        model(IDS, adapter_names=["__base__", "default"])
    y = model(IDS, adapter_names=["b", "__base__"]).logits  # neither adapts experts
    model.set_adapter("b")
    assert same_mathematics(y[:1], logits(model, IDS[:1]))
    assert same_mathematics(y[1:], logits(model_of(), IDS[1:]))


def test_peft_with_layers_and_what_is_refused():
    model = peft_model(target_modules="all-linear", target_parameters=["experts.gate_up_proj"])
    plan = model.base_model.plans["default"]
    assert [stack.name for stack in plan.stacks] == ["32x32", "16x32", "96x32"]
    left = {item.module: item.reason for item in plan.left_out}
    assert "MixtralExperts holds down_proj" in left["model.layers.0.mlp.experts"]
    both = peft_model(target_modules="all-linear")
    assert "model.layers.0.mlp.experts" not in [
        item.module for item in both.base_model.plans["default"].left_out
    ]
    one = peft_model(stacks="layer").base_model.plans["default"]
    assert [stack.n3 for stack in one.stacks] == [4] * 4
    for targets, message in (
        (["mlp.gate.weight"], r"got model.layers.0.mlp.gate.weight \[4, 32\] of MixtralTopKRouter"),
        (["norm.weight"], r"got model.norm.weight \[32\] of MixtralRMSNorm"),
    ):
        with pytest.raises(TypeError, match=rf"target_parameters: expected .*{message}"):
            peft_model(target_parameters=targets)
    with pytest.raises(TypeError, match=r"target_parameters: expected a list of names or None"):
        TCURConfig(target_parameters="experts")
    with pytest.raises(ValueError, match=r"No `target_modules` passed but also no `target_param"):
        peft_model(target_parameters=["nothing"])
    tied = model_of()
    tied.model.layers[1].mlp.experts.down_proj = tied.model.layers[0].mlp.experts.down_proj
    with pytest.raises(ValueError, match=r"got model.layers.0.mlp.experts.down_proj: .* is tied"):
        peft.get_peft_model(tied, TCURConfig(rank=3, target_parameters=["down_proj"]))
    assert type(tied.model.layers[0].mlp.experts).__name__ == "MixtralExperts"


def test_peft_refuses_to_recompute_with_another_adapter():
    model = peft_model()
    model.add_adapter("b", TCURConfig(rank=3, target_parameters=PARAMETERS))
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    y = logits(model)
    model.set_adapter("b")
    with pytest.raises(RuntimeError, match=r"core: expected the adapter of the forward"):
        loss(y).backward()
