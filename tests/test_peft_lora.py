"""LoRA directories in the hands of peft: it loads them, and computes what the adapter computes."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import MixtralConfig
from transformers.pytorch_utils import Conv1D

import tcur_kernels as tcur
from adapted import randomise
from expert_models import Model
from hf_models import HF_MODELS, IS_FOUR, PEFT_SAYS, output
from plain import Plain, with_updates
from tcur_kernels import cli
from tcur_kernels.adapters.file import read_contents
from tcur_kernels.merge.directory import ModelDirectory
from tcur_kernels.merge.lora import tensors_of
from tcur_kernels.peft import TCURConfig, save_as_lora
from tolerance import assert_composition_close, assert_equal_in_float64, relative_error

pytestmark = [pytest.mark.filterwarnings(text) for text in PEFT_SAYS]


def loaded(base, path):
    """A copy of a plain model with the LoRA of a directory, loaded by peft."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), path).eval()


def layers_with_lora(model):
    """Names of the layers that peft gave a LoRA."""
    start = "base_model.model."
    return {
        name.removeprefix(start)
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def members(plan):
    return {member.module for stack in plan.stacks for member in stack.members}


def double(inputs):
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_computes_what_the_adapter_computes(tmp_path, name):
    make, inputs, _ = HF_MODELS[name]
    base, inputs = make().eval(), inputs()
    adapter = tcur.adapt(copy.deepcopy(base), rank=2)
    randomise(adapter, 0.1)
    written = adapter.to_lora(tmp_path)
    assert written.rank == written.exact_rank
    lora = loaded(base, tmp_path)
    assert layers_with_lora(lora) == members(adapter.plan)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] == (
        name == "gpt2"
    )
    plain, wide = Plain(adapter, torch.float32, base), Plain(adapter, torch.float64, base)
    exact = wide(**double(inputs)).logits
    wanted = (lambda: plain(**inputs).logits, exact)
    with torch.no_grad():
        assert_composition_close(output(lora, inputs), *wanted)
        assert_composition_close(output(adapter.model, inputs), *wanted)
        change = relative_error(output(base, inputs), exact)
    assert change > 0.01


def test_an_approximation_has_the_printed_error(tmp_path):
    make, _, _ = HF_MODELS["gpt2"]
    base = make().eval()
    adapter = tcur.adapt(copy.deepcopy(base), rank=2)
    randomise(adapter, 0.1)
    exact = Plain(adapter, torch.float64, base).parameters()
    weights = dict(base.named_parameters())
    written = adapter.to_lora(tmp_path, rank=1)
    lora = loaded(base, tmp_path)
    for name, error in written.errors.items():
        assert error > 0.1
        update = exact[f"{name}.weight"].detach() - weights[f"{name}.weight"].detach().double()
        layer = lora.base_model.model.get_submodule(name)
        found = relative_error(layer.get_delta_weight("default"), update)
        assert abs(found - error) < 1e-5 * error


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
def test_linear_beside_conv1d_and_a_name_that_others_end_with(tmp_path):
    """peft looks at each layer, whatever the config says of (in, out)."""
    torch.manual_seed(0)
    base = nn.Sequential()
    for name, layer in (("a", Conv1D(8, 8)), ("fc", nn.Linear(8, 8)), ("b", nn.Linear(8, 8))):
        base.add_module(name, layer)
    base.add_module("last", nn.Sequential())
    base.last.add_module("fc", nn.Linear(8, 8))
    base.double()
    adapter = tcur.adapt(copy.deepcopy(base), lambda name, _: name in ("a", "fc", "b"), rank=2)
    randomise(adapter)
    adapter.to_lora(tmp_path, dtype=torch.float64)
    lora = loaded(base, tmp_path)
    assert layers_with_lora(lora) == {"a", "fc", "b"}
    x = torch.randn(3, 8, dtype=torch.float64)
    assert_equal_in_float64(lora(x), adapter.model(x))


@pytest.fixture
def model():
    """A peft model of a Llama with two adapters, and its base."""
    make, _, task = HF_MODELS["llama"]
    base = make().eval()
    model = peft.get_peft_model(copy.deepcopy(base), TCURConfig(rank=2, task_type=task)).eval()
    model.add_adapter("other", TCURConfig(rank=1, target_modules=["q_proj", "o_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tcur_" in name:
                parameter.normal_(std=0.1)
    return base, model


@pytest.mark.parametrize("adapter", ["default", "other"])
def test_an_adapter_of_a_peft_model(tmp_path, model, adapter):
    base, model = model
    _, inputs, _ = HF_MODELS["llama"]
    inputs = inputs()
    before = save_as_lora(model, tmp_path, adapter_name=adapter)
    merged = copy.deepcopy(model)
    merged.merge_adapter([adapter])
    assert save_as_lora(merged, tmp_path / "merged", adapter_name=adapter).errors == before.errors
    lora = loaded(base, tmp_path)
    assert layers_with_lora(lora) == members(model.plans[adapter])
    assert lora.peft_config["default"].task_type == {"default": "CAUSAL_LM", "other": None}[adapter]
    exact = output(with_updates(copy.deepcopy(base).double(), model, [adapter]), inputs)
    with torch.no_grad():
        y = output(lora, inputs)
        assert_composition_close(
            y, lambda: output(with_updates(base, model, [adapter]), inputs), exact
        )


def test_conv1d_in_a_peft_model(tmp_path):
    make, _, task = HF_MODELS["gpt2"]
    model = peft.get_peft_model(make(), TCURConfig(rank=1, task_type=task, init_weights=False))
    written = save_as_lora(model, tmp_path, rank=8)
    lora = loaded(make(), tmp_path)
    for name in written.errors:
        wanted = model.base_model.model.get_submodule(name).get_delta_weight("default")
        found = lora.base_model.model.get_submodule(name).get_delta_weight("default")
        assert abs(relative_error(found, wanted) - written.errors[name]) < 1e-6


def test_it_agrees_with_the_conversion_of_peft(tmp_path, model):
    lora = pytest.importorskip("peft.tuners.lora.conversion", reason="came with peft 0.19")
    _, model = model
    written = save_as_lora(model, tmp_path / "ours", rank=1)
    lora.save_as_lora(tmp_path / "theirs", model, rank=1)
    ours, theirs = (
        load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    for name in written.errors:
        b, a = (f"base_model.model.{name}.lora_{part}.weight" for part in "BA")
        assert relative_error(ours[b] @ ours[a], theirs[b].double() @ theirs[a].double()) < 1e-4


# peft 0.18 says this of any saved head.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_what_it_refuses(tmp_path, model):
    base, model = model
    path = tmp_path / "lora"
    with pytest.raises(TypeError, match=r"a PeftModel with .*, got LlamaForCausalLM"):
        save_as_lora(base, path)
    with pytest.raises(ValueError, match="adapter_name: expected one of default, other, got 'x'"):
        save_as_lora(model, path, adapter_name="x")
    config = TCURConfig(rank=1, target_modules=["q_proj"], modules_to_save=["lm_head"])
    saves = peft.get_peft_model(copy.deepcopy(base), config)
    with pytest.raises(ValueError, match=r"expected one of cores alone, .* got values of lm_head"):
        save_as_lora(saves, path)
    config = TCURConfig(rank=1, target_parameters=["rows"])
    experts = peft.get_peft_model(Model("linear"), config)
    with pytest.raises(ValueError, match=r"got convolutions or experts, .* as LoRA: experts.rows"):
        save_as_lora(experts, path)
    stack = model.base_model.owner.stacks["other"][0]
    stack._parameters["core"] = nn.Parameter(stack.core.detach().to("meta"))
    with pytest.raises(ValueError, match="got a sharded or offloaded one in stack 32x32"):
        save_as_lora(model, path, adapter_name="other")
    assert not path.exists()


def test_files_whose_names_transformers_changes(tmp_path, capsys):
    """An adapter of a model with a head, and the files of the model without one."""
    make, inputs, _ = HF_MODELS["gpt2"]
    base, inputs = make().eval(), inputs()
    base.transformer.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    adapter = tcur.adapt(copy.deepcopy(base), rank=1)
    randomise(adapter, 0.1)
    adapter.save(tmp_path / "a")
    wanted = adapter.to_lora(tmp_path / "x")
    names = tensors_of(ModelDirectory(tmp_path / "base"), read_contents(tmp_path / "a"))
    assert set(base.state_dict()) == set(names)
    arguments = ["to-lora", tmp_path / "base", tmp_path / "a", tmp_path / "y"]
    assert cli.main([*map(str, arguments), "--task-type", "CAUSAL_LM"]) == 0
    capsys.readouterr()
    tensors = [load_file(tmp_path / d / "adapter_model.safetensors") for d in "xy"]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[1][name], value) for name, value in tensors[0].items())
    assert layers_with_lora(loaded(base, tmp_path / "y")) == set(wanted.errors)


def test_a_plan_says_which_ranks_can_be_served(tmp_path, capsys):
    make, _, _ = HF_MODELS["llama"]
    make().config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["plan", str(tmp_path), "--rank", "3", "--max-lora-rank", "8"]) == 0
    out = capsys.readouterr().out
    assert "as LoRA, served with --max-lora-rank 8:" in out
    assert "  stack 32x32: rank 3 takes LoRA rank 12; exact within 8: at most rank 2\n" in out
    assert "  stack 32x48: rank 3 takes LoRA rank 6; exact within 8: at most rank 4\n" in out
    assert cli.main(["plan", str(tmp_path), "--max-lora-rank", "1"]) == 0
    assert "exact within 1: none, 4 matrices are too many" in capsys.readouterr().out
    assert cli.main(["plan", str(tmp_path), "--max-lora-rank", "7"]) == 2
    assert "--max-lora-rank: expected one of 1, 8, 16, 32" in capsys.readouterr().err


@pytest.mark.skipif(IS_FOUR, reason="in transformers 4 experts are modules, which LoRA knows")
def test_a_plan_says_what_is_not_written_as_lora(tmp_path, capsys):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    MixtralConfig(
        vocab_size=11,
        num_local_experts=2,
        architectures=["MixtralForCausalLM"],
        **sizes,
        **heads,
    ).save_pretrained(tmp_path)
    command = ["plan", str(tmp_path), "--rank", "2", "--max-lora-rank", "32"]
    assert cli.main([*command, "--targets", "down_proj", "q_proj"]) == 0
    out = capsys.readouterr().out
    assert "  stack 16x24: convolutions and experts are not written as LoRA\n" in out
    assert "  stack 16x16: rank 2 takes LoRA rank 4; exact within 32: at most rank 16\n" in out
