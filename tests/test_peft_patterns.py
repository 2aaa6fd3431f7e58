"""Words of LoRA in `TCURConfig`: patterns of ranks and alphas, and words that it does not have.

And the ways around `get_peft_model`, which would lose the cores.
"""

import copy
import json
import re

import peft
import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME

from hf_models import PEFT_SAYS, llama
from models import Tiny
from tcur_kernels.peft import TCURConfig, TCURLinear
from tcur_kernels.peft.digests import SETTINGS
from tcur_kernels.peft.rows import _share_factors
from tcur_kernels.peft.words import WORDS
from tolerance import same_mathematics

pytestmark = [pytest.mark.filterwarnings(text) for text in PEFT_SAYS]

OLD_PEFT = tuple(map(int, peft.__version__.split(".")[:2])) < (0, 19)
#: Sorted, as a file has them, the second key of either would come first.
RANKS = {"out_proj": 3, r"blocks\.[01]\..*(proj|2)": 4, "mlp.0": 1}
ALPHAS = {"mlp.0": 2.0, r"blocks\.2\..*": 0.5}


def settings(**kwargs):
    return TCURConfig(**{"rank": 2, "init_weights": False, **kwargs})


def stacks_of(model, adapter="default"):
    """For each stack its name, rank, alpha and layers."""
    return {
        stack.name: (stack.rank, stack.alpha, [member.module for member in entry.members])
        for entry, stack in zip(
            model.plans[adapter].stacks, model.base_model.owner.stacks[adapter], strict=True
        )
    }


def edited(folder, **changes):
    """A saved config with other entries, and so without its digest; None removes one."""
    path = folder / CONFIG_NAME
    held = {**json.loads(path.read_text()), SETTINGS: None, **changes}
    path.write_text(json.dumps({k: v for k, v in held.items() if v is not None}, sort_keys=True))


@torch.no_grad()
def test_layers_may_have_a_rank_and_an_alpha_of_their_own(tmp_path):
    base, x = Tiny().eval(), torch.randn(2, 7, 6)
    config = settings(rank_pattern=RANKS, alpha_pattern=ALPHAS)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    assert stacks_of(model) == {
        "8x8": (3, 1.0, ["blocks.0.attn.out_proj", "blocks.1.attn.out_proj"]),
        "8x8_2": (2, 1.0, ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]),
        "32x8": (1, 2.0, ["blocks.0.mlp.0", "blocks.1.mlp.0", "blocks.2.mlp.0"]),
        "8x32": (4, 1.0, ["blocks.0.mlp.2", "blocks.1.mlp.2"]),
        "8x8_3": (3, 0.5, ["blocks.2.attn.out_proj"]),
        "8x8_4": (2, 0.5, ["blocks.2.attn.qkv"]),
        "8x32_2": (2, 0.5, ["blocks.2.mlp.2"]),
    }
    left_out = {item.module: item.reason for item in model.plans["default"].left_out}
    assert left_out["embed"] == "the only slice of its shape"
    y = model(x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert stacks_of(loaded) == stacks_of(model)
    assert torch.equal(loaded(x), y)
    for keys in ("rank_pattern", "alpha_pattern"):
        assert list(getattr(loaded.peft_config["default"], keys)) == sorted(getattr(config, keys))
    merged = loaded.merge_and_unload()
    assert same_mathematics(merged(x), y)

    layer = model.base_model.model.blocks[1].mlp[0]
    update = layer.get_delta_weight("default")
    plain = get_peft_model(copy.deepcopy(base), settings(rank_pattern={"mlp.0": 1}))
    other = plain.base_model.model.blocks[1].mlp[0]
    other.tcur_stacks["default"].core.copy_(layer.tcur_stacks["default"].core)
    assert same_mathematics(update, 2 * other.get_delta_weight("default"))


def test_a_stack_per_layer_takes_patterns_too():
    model = get_peft_model(Tiny(), settings(stacks="layer", rank_pattern={"out_proj": 3}))
    for name, (rank, _, _) in stacks_of(model).items():
        assert rank == (3 if "out_proj" in name else 2)


@torch.no_grad()
def test_files_of_before_there_were_patterns(tmp_path):
    base, x = Tiny().eval(), torch.randn(2, 7, 6)
    model = get_peft_model(copy.deepcopy(base), settings(alpha=3.0)).eval()
    model.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / CONFIG_NAME).read_text())["plan"]
    assert not any("alpha" in entry or "rank" in entry for entry in entries)
    edited(tmp_path, rank_pattern=None, alpha_pattern=None)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert stacks_of(loaded) == stacks_of(model)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not:RuntimeWarning")
def test_a_key_that_decides_nothing_is_named(tmp_path):
    base = Tiny()
    for argument, pattern, key in (
        ("rank_pattern", {"qkv": 3, "q_proj": 4}, "q_proj"),
        ("alpha_pattern", {"mlp": 3.0}, "mlp"),
        ("alpha_pattern", {".*proj": 3.0, "out_proj": 2.0}, "out_proj"),
    ):
        wanted = f"{argument}: expected keys that match a targeted layer .*, got '{key}'"
        with pytest.raises(ValueError, match=wanted):
            get_peft_model(base, settings(**{argument: pattern}))
        assert not any(isinstance(module, TCURLinear) for module in base.modules())
    model = get_peft_model(copy.deepcopy(base), settings(rank_pattern={"qkv": 3}))
    model.save_pretrained(tmp_path)
    edited(tmp_path, rank_pattern={"qkv": 3, "q_proj": 4})
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert stacks_of(loaded) == stacks_of(model)


def test_an_edited_config_is_no_other_adapter(tmp_path):
    base = Tiny()
    patterns = {"rank_pattern": {"qkv": 3}, "alpha_pattern": {"out_proj": 0.5}}
    get_peft_model(copy.deepcopy(base), settings(**patterns)).save_pretrained(tmp_path)
    for changes, message in (
        ({"rank": 4}, "rank: expected 2, the rank of stack 8x8 in the plan, got 4, 3"),
        ({"rank_pattern": {}}, "rank: expected 3, the rank of stack 8x8_2 in the plan, got 2"),
        (
            {"alpha_pattern": {}},
            "alpha_pattern: expected 0.5, the alpha of stack 8x8 in the plan, among its values, "
            "got none",
        ),
    ):
        config = TCURConfig.from_pretrained(tmp_path)
        for name, value in changes.items():
            setattr(config, name, value)
        with pytest.raises(ValueError, match=re.escape(message)):
            PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=config)
    config = TCURConfig.from_pretrained(tmp_path)
    config.alpha = 3.0
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=config)
    alphas = {name: alpha for name, (_, alpha, _) in stacks_of(loaded).items()}
    assert alphas == {"8x8": 0.5, "8x8_2": 3.0, "32x8": 3.0, "8x32": 3.0}


def test_a_config_with_a_changed_pattern_is_planned_anew():
    config, model = settings(), Tiny()
    first = get_peft_model(copy.deepcopy(model), config)
    config.alpha_pattern = {"mlp.0": 2.0}
    first.add_adapter("second", config)
    assert stacks_of(first)["32x8"][1] == 1.0
    assert stacks_of(first, "second")["32x8"][1] == 2.0
    assert [entry.get("alpha") for entry in first.peft_config["default"].plan] == [None] * 3
    alphas = {e["name"]: e.get("alpha") for e in first.peft_config["second"].plan}
    assert alphas == {"8x8": None, "32x8": 2.0, "8x32": None}
    config.alpha_pattern = {}
    config.rank_pattern = {"mlp.0": 3}
    first.add_adapter("third", config)
    assert stacks_of(first, "third")["32x8"][0] == 3


@torch.no_grad()
def test_rows_of_adapters_with_patterns():
    model, x = get_peft_model(Tiny(), settings(rank_pattern=RANKS)).eval(), torch.randn(2, 7, 6)
    same = settings(rank_pattern=RANKS)
    for name, config in (
        ("same", same),
        ("rank", settings(rank_pattern={"out_proj": 3})),
        ("alpha", settings(rank_pattern=RANKS, alpha_pattern={"mlp.0": 2.0})),
        ("all_alphas", settings(rank_pattern=RANKS, alpha=2.0)),
    ):
        model.add_adapter(name, config)
        assert _share_factors(model.base_model, ["default", name]) == (name == "same")
        y = model(x, adapter_names=["default", name])
        for row, adapter in zip(y, ("default", name), strict=True):
            model.set_adapter(adapter)
            assert same_mathematics(row, model(x)[0 if adapter == "default" else 1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank_pattern": ["qkv"]}, TypeError, "rank_pattern: expected a dict .*rank}, got list"),
        ({"rank_pattern": {"qkv": 0}}, ValueError, r"rank_pattern\['qkv'\]: .* least 1, got 0"),
        ({"rank_pattern": {"qkv": True}}, TypeError, r"rank_pattern\['qkv'\]: .* int, got bool"),
        ({"rank_pattern": {"qkv": 2.0}}, TypeError, r"rank_pattern\['qkv'\]: .* int, got float"),
        ({"rank_pattern": {3: 2}}, TypeError, "rank_pattern: expected keys of type str, got 3"),
        (
            {"alpha_pattern": {"(": 2.0}},
            ValueError,
            r"alpha_pattern: expected names or regular expressions, got '\(' \(missing",
        ),
        (
            {"alpha_pattern": {"qkv": float("inf")}},
            ValueError,
            r"alpha_pattern\['qkv'\]: expected a finite number, got inf",
        ),
        (
            {"alpha_pattern": {"qkv": "1"}},
            TypeError,
            r"alpha_pattern\['qkv'\]: expected a number, got str",
        ),
    ],
)
def test_bad_patterns(arguments, error, message):
    with pytest.raises(error, match=message):
        TCURConfig(**arguments)
    assert TCURConfig(rank_pattern=None, alpha_pattern=None) == TCURConfig()


@pytest.mark.parametrize("word", WORDS)
def test_words_that_only_lora_has(word, tmp_path):
    with pytest.raises(TypeError, match=f"^{word}: expected .* unexpected keyword argument"):
        TCURConfig(**{word: 1})
    TCURConfig(rank=3).save_pretrained(tmp_path)
    edited(tmp_path, **{word: 1})
    with pytest.warns(UserWarning, match=word):
        assert PeftConfig.from_pretrained(tmp_path).rank == 3
    assert hasattr(peft.LoraConfig(), word)


@pytest.mark.skipif(OLD_PEFT, reason="transformers refuses this peft before it calls the plug-in")
def test_direct_injection_changes_nothing(tmp_path):
    """transformers would return a model without the tuner, which has the cores."""
    base = llama().eval()
    base.save_pretrained(tmp_path / "base")
    x = {"input_ids": torch.randint(50, (2, 9))}
    config = TCURConfig(r=2, init_weights=False, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(copy.deepcopy(base), config).eval()
    y = model(**x).logits
    model.save_pretrained(tmp_path / "adapter")
    edited(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for wrong in (
        lambda: base.add_adapter(TCURConfig(r=2)),
        lambda: base.load_adapter(tmp_path / "adapter"),
        lambda: peft.inject_adapter_in_model(TCURConfig(r=2), base),
        lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    ):
        with pytest.raises(ValueError, match=r"get_peft_model\(.*PeftModel.from_pretrained\("):
            wrong()
        assert not base._hf_peft_config_loaded
        assert not any(isinstance(module, TCURLinear) for module in base.modules())
        assert base.state_dict().keys() == before.keys()
        assert all(torch.equal(base.state_dict()[name], before[name]) for name in before)
    base.add_adapter(peft.LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="TCUR keeps shared cores on the tuner"):
        base.add_adapter(TCURConfig(r=2), "second")
    assert base._hf_peft_config_loaded
    assert list(base.peft_config) == ["default"]
    for loaded in (
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        PeftModel.from_pretrained(llama_of(before), tmp_path / "adapter"),
    ):
        assert torch.equal(loaded.eval()(**x).logits, y)


def llama_of(state):
    model = llama()
    model.load_state_dict(state)
    return model
