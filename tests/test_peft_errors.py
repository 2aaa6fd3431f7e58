"""What the peft plug-in refuses, in which words, and that nothing is lost then."""

import contextlib
import copy
import json
import subprocess
import sys

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from hf_models import PEFT_SAYS, gpt2
from models import Tiny
from tcur_kernels.peft import TCURConfig, TCURLinear

pytestmark = [pytest.mark.filterwarnings(text) for text in PEFT_SAYS]

OLD_PEFT = tuple(map(int, peft.__version__.split(".")[:2])) < (0, 19)


@pytest.fixture
def base():
    return Tiny().eval().requires_grad_(False)


@pytest.fixture
def saved(base, tmp_path):
    """A directory with an adapter of the base."""
    model = get_peft_model(copy.deepcopy(base), TCURConfig(rank=2))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".core"):
                p.normal_()
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank: expected at least 1, got 0"),
        ({"rank": 2.0}, TypeError, "rank: expected an int, got float"),
        ({"alpha": "1"}, TypeError, "alpha: expected a number, got str"),
        ({"alpha": float("nan")}, ValueError, "alpha: expected a finite number, got nan"),
        ({"selection": ([0], [1])}, TypeError, "selection: expected a str, got tuple"),
        ({"stacks": "all"}, ValueError, "stacks: expected one of shape, layer, got 'all'"),
        ({"mode": "fast"}, ValueError, "mode: expected one of auto, .*, got 'fast'"),
        (
            {"precision": "fp8"},
            ValueError,
            "precision: expected one of ieee, tf32, bf16, got 'fp8'",
        ),
        ({"format_version": 3}, ValueError, "format_version: expected 2, got 3; the adapter was"),
        ({"rank": 2, "r": 3}, ValueError, "r: expected the same as rank, 2, or no rank, got 3"),
        ({"init_weights": "svd"}, TypeError, "init_weights: expected a bool, got str"),
        ({"layers_pattern": "h"}, ValueError, "`layers_to_transform` must also be specified"),
        (
            {"layers_to_transform": 1, "target_modules": "all-linear"},
            ValueError,
            "`layers_to_transform` cannot be used when `target_modules` is a str",
        ),
    ],
)
def test_bad_settings(arguments, error, message):
    with pytest.raises(error, match=message):
        TCURConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target_modules": ["nothing"]}, ValueError, "Target modules .*nothing.* not found"),
        (
            {"target_modules": ["norm"]},
            TypeError,
            r"target_modules: .* got blocks\.0\.norm: BatchNorm1d is neither nn.Linear nor Conv1D",
        ),
        (
            {"target_modules": ["head"], "rank": 6},
            ValueError,
            r"rank: expected 1 to min\(n1, n2\) = 5 for .*, got 6",
        ),
        ({"selection": "best"}, ValueError, r"stack 8x8: selection: expected .*norm.*, got 'best'"),
        (
            {"target_modules": None, "rank": 100},
            ValueError,
            "target_modules: expected a layer that can be adapted, got none .*rank 100 exceeds",
        ),
    ],
)
def test_bad_targets_leave_the_model_alone(base, arguments, error, message):
    model = copy.deepcopy(base)
    with pytest.raises(error, match=message):
        get_peft_model(model, TCURConfig(**{"rank": 2, **arguments}))
    assert_untouched(model, base)


def assert_untouched(model, base):
    assert not any(isinstance(m, TCURLinear) for m in model.modules())
    assert model.state_dict().keys() == base.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_target_with_a_tied_weight():
    with pytest.raises(ValueError, match=r"got lm_head: its weight is tied: transformer.wte.wei"):
        get_peft_model(gpt2(), TCURConfig(rank=2, target_modules=["lm_head"]))


def test_weights_that_cannot_be_read(base):
    config = TCURConfig(rank=2)
    broken = copy.deepcopy(base)
    broken.blocks[1].mlp[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"stack 32x8: .* expected finite numbers, got NaN"):
        get_peft_model(broken, config)
    with pytest.raises(ValueError, match=r"got none .*its weight is on the meta device"):
        get_peft_model(Tiny().to("meta"), config)


def test_attention_of_torch_is_named_as_left_out():
    """Its projections are used without the forward of the layer that holds them."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)})
    model["down"] = nn.Linear(8, 8)
    plan = get_peft_model(copy.deepcopy(model), TCURConfig(rank=2)).plans["default"]
    left_out = {item.module: item.reason for item in plan.left_out}
    assert left_out.keys() == {"attention", "attention.out_proj"}
    assert "projections are no layers that are called" in left_out["attention"]
    with pytest.raises(TypeError, match=r"got attention.out_proj: NonDynamicallyQuantizableLinear"):
        get_peft_model(model, TCURConfig(rank=2, target_modules=["out_proj"]))


def test_another_base(base, saved):
    other = copy.deepcopy(base)
    other.blocks[1].mlp[0].weight += 0.01
    with pytest.raises(ValueError, match=r"expected the base that .* other weights in stack 32x8"):
        PeftModel.from_pretrained(other, saved)
    config = TCURConfig.from_pretrained(saved)
    config.check_base = False
    assert PeftModel.from_pretrained(other, saved, config=config)


def test_a_base_in_half_precision_and_its_fp32_copy_are_one(base, tmp_path):
    half = copy.deepcopy(base).to(torch.bfloat16)
    get_peft_model(copy.deepcopy(half), TCURConfig(rank=2)).save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(copy.deepcopy(half).float(), tmp_path)
    with pytest.raises(ValueError, match=r"got other weights in stack 8x8 .*float32"):
        PeftModel.from_pretrained(base, tmp_path)


def test_another_architecture(base, saved):
    other = copy.deepcopy(base)
    other.blocks[1].mlp[0] = nn.Identity()
    with pytest.raises(ValueError, match=r"expected a linear layer blocks\.1\.mlp\.0 as in the ad"):
        PeftModel.from_pretrained(other, saved)
    other.blocks[1].mlp[0] = nn.Linear(8, 16)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.0 of shape \[32, 8\] .*, got \[16, 8\]"):
        PeftModel.from_pretrained(other, saved)


def forget_digest(folder):
    """Makes the config one of before there were digests."""
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    del settings["settings_sha256"], settings["tensors_sha256"]
    path.write_text(json.dumps(settings))


def test_digests_are_of_what_was_saved_together(base, saved, tmp_path):
    """A config that is saved alone says nothing about tensors, which may be those of another."""
    config = TCURConfig.from_pretrained(saved)
    held = json.loads((saved / "adapter_config.json").read_text())
    config.save_pretrained(saved)
    alone = json.loads((saved / "adapter_config.json").read_text())
    assert held.pop("tensors_sha256")
    assert "tensors_sha256" not in alone
    assert alone["settings_sha256"] == held["settings_sha256"]
    assert "settings_sha256" not in config.to_dict()
    for name, value, is_free in (("mode", "factored", True), ("alpha", 3.0, False)):
        (saved / "adapter_config.json").write_text(json.dumps({**alone, name: value}))
        if is_free:
            assert getattr(TCURConfig.from_pretrained(saved), name) == value
        else:
            with pytest.raises(ValueError, match="path: expected the plan and settings of sett"):
                TCURConfig.from_pretrained(saved)


def test_a_damaged_plan(base, saved):
    path = saved / "adapter_config.json"
    settings = json.loads(path.read_text())
    members = settings["plan"][0].pop("members")
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"path: .* settings of settings_sha256 .* got others"):
        PeftModel.from_pretrained(base, saved)
    del settings["settings_sha256"]
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="path: expected a value as members of stack 0, got none"):
        PeftModel.from_pretrained(base, saved)
    settings["plan"][0]["members"] = members[:1] * 2
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="path: expected layers, each once as members of stack 0"):
        PeftModel.from_pretrained(base, saved)
    plain = TCURConfig(rank=2, plan=[{"rows": [0]}])
    with pytest.raises(ValueError, match="plan: expected a value as name of stack 0, got none"):
        get_peft_model(base, plain)


def test_a_file_without_one_core_is_not_silent(base, saved):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    core = tensors.pop("base_model.tcur_8x8.core")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"path: expected the tensors of tensors_sha256 .* others"):
        PeftModel.from_pretrained(copy.deepcopy(base), saved)
    forget_digest(saved)
    with pytest.warns(UserWarning, match=r"Found missing adapter keys.*tcur_8x8"):
        PeftModel.from_pretrained(copy.deepcopy(base), saved)
    tensors["base_model.tcur_8x8.core"] = torch.zeros(1, 2, 2)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"path: expected base_model\.tcur_8x8\.core of shape"):
        PeftModel.from_pretrained(copy.deepcopy(base), saved)
    tensors["base_model.tcur_8x8.core"] = torch.full_like(core, torch.nan)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"path: expected finite numbers in .*tcur_8x8\.core"):
        PeftModel.from_pretrained(copy.deepcopy(base), saved)


def test_names_of_adapters(base):
    model = get_peft_model(copy.deepcopy(base), TCURConfig(rank=2))
    settings = model.peft_config["default"]
    with pytest.raises(ValueError, match=r"already exists|expected a name that is free"):
        model.add_adapter("default", TCURConfig(rank=3))
    assert model.peft_config["default"] is settings
    for name in ("a.b", "items", ""):
        with (
            pytest.raises(ValueError, match="adapter_name: expected a name without dots"),
            pytest.warns() if not name else contextlib.nullcontext(),
        ):
            model.add_adapter(name, TCURConfig(rank=2))
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("other", peft.LoraConfig(target_modules=["qkv"]))
    with pytest.raises(ValueError, match="adapter_names: expected some of default, got 'other'"):
        model.merge_adapter(["other"])
    with pytest.raises(ValueError, match="Adapter other does not exist"):
        model.delete_adapter("other")


def test_merged_models_neither_grow_nor_lose_adapters(base):
    model = get_peft_model(copy.deepcopy(base), TCURConfig(rank=2))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"expected unmerged layers, got .* with default merged"):
        model.add_adapter("second", TCURConfig(rank=2))
    with pytest.raises(ValueError, match=r"Cannot delete adapter.* while they are merged"):
        model.delete_adapter("default")
    assert list(model.peft_config) == ["default"]
    model.unmerge_adapter()
    model.add_adapter("second", TCURConfig(rank=2))
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("second")


def test_a_failed_second_adapter_leaves_the_first(base):
    model = get_peft_model(copy.deepcopy(base), TCURConfig(rank=2))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(TypeError):
        model.add_adapter("second", TCURConfig(rank=2, target_modules=["qkv", "norm"]))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert list(model.plans) == list(model.peft_config) == ["default"]


def test_direct_injection_is_refused(base):
    """It would return the model without the tuner, and the cores with it would train nothing."""
    with pytest.raises(ValueError, match=r"shared|get_peft_model"):
        peft.inject_adapter_in_model(TCURConfig(rank=2), copy.deepcopy(base))
    with pytest.raises(ValueError, match=r"shared|get_peft_model|PEFT you are using is not"):
        gpt2().add_adapter(TCURConfig(rank=2))
    with pytest.raises(ValueError, match=r"TCUR|not supported|compatible"):
        get_peft_model(copy.deepcopy(base), TCURConfig(rank=2), mixed=True)


def run(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    return result.returncode, result.stderr


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            "'0.17.1'",
            "expected peft >=0.18,<0.22, got peft 0.17.1; pip install 'tcur_kernels[peft]'",
        ),
        (
            "'0.22.0'",
            "expected peft >=0.18,<0.22, got peft 0.22.0; pip install 'tcur_kernels[peft]'",
        ),
        (None, "expected peft >=0.18,<0.22, got none; pip install 'tcur_kernels[peft]'"),
    ],
)
def test_a_peft_out_of_range(found, message):
    answer = f"return {found}" if found else "raise metadata.PackageNotFoundError"
    code = f"""
import sys
from importlib import metadata
def version(name):
    {answer}
metadata.version = version
sys.modules["peft"] = None
import tcur_kernels.peft
"""
    code, errors = run(code)
    assert code != 0
    assert errors.strip().splitlines()[-1].endswith(message)
