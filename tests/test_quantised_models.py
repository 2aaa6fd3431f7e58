"""Quantised bases as users have them: a Llama, adapted, trained and saved, here and with peft."""

import copy

import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training

import tcur_kernels as tcur
from hf_models import PEFT_SAYS
from quantisers import QUANTISERS, foreign, library, packed, quantised
from tcur_kernels.peft import TCURConfig
from tcur_kernels.peft.quantised import TCURQuantisedLinear
from tolerance import same_mathematics

pytestmark = [pytest.mark.filterwarnings(text) for text in PEFT_SAYS]

EVERY = pytest.mark.parametrize("name", [n for n in QUANTISERS if "Intx" not in n])
SOME = pytest.mark.parametrize("name", ["bitsandbytes nf4", "torchao Int8Tensor"])

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def plain(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def llama(name, seed=0):
    """Always the same for a seed; its head is not quantised, as in transformers."""
    model = quantised(plain(seed), name, keep=("lm_head",))
    return model.train()  # bitsandbytes rounds inputs to 8 bits in an evaluation


@pytest.fixture
def ids():
    return torch.randint(50, (3, 9))


def config(**kwargs):
    return TCURConfig(rank=4, target_modules=TARGETS, **kwargs)


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def train(model, parameters, ids, steps=4):
    """Trains; returns the losses."""
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same(one, other):
    """Whether all parts of all weights have the same bits."""
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True)
    )


@EVERY
def test_the_life_of_an_adapter(name, ids, tmp_path):
    model = llama(name)
    before, fresh = packed(model), logits(model, ids)
    adapter = tcur.adapt(model, rank=4, targets=TARGETS)
    assert torch.equal(logits(model, ids), fresh)
    assert all(name.partition(" ")[0] in stack.note for stack in adapter.plan.stacks)
    others = {n: p.clone() for n, p in model.named_parameters() if n.endswith("norm.weight")}
    losses = train(model, adapter.parameters(), ids)
    assert losses == sorted(losses, reverse=True)
    assert same(packed(model), before)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in others.items())
    y = logits(model, ids)
    assert not same_mathematics(y, fresh)
    adapter.save(tmp_path / "a")
    loaded = tcur.load_adapter(llama(name), tmp_path / "a")
    assert torch.equal(logits(loaded.model, ids), y)
    merged = adapter.merge(inplace=False)
    assert same_mathematics(logits(merged, ids), y)


@EVERY
def test_the_life_of_an_adapter_in_peft(name, ids, tmp_path):
    base = llama(name)
    before, fresh = packed(base), logits(base, ids)
    model = get_peft_model(base, config())
    assert torch.equal(logits(model, ids), fresh)
    cores = [p for p in model.parameters() if p.requires_grad]
    assert len(cores) == len(model.base_model.plans["default"].stacks)
    losses = train(model, cores, ids)
    assert losses == sorted(losses, reverse=True)
    y = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(name), tmp_path).train()
    assert torch.equal(logits(loaded, ids), y)
    with pytest.raises(ValueError, match=r"expected the base that the adapter was made for, got"):
        PeftModel.from_pretrained(llama(name, seed=1), tmp_path)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), fresh)
    assert torch.equal(logits(model, ids), y)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, TCURQuantisedLinear)
    assert layer.get_delta_weight("default").shape == (128, 64)
    for merge in (model.merge_adapter, layer.merge):
        with pytest.raises(
            ValueError, match=r"merge_adapter: expected weights that W_eff can be w"
        ):
            merge()
    unloaded = copy.deepcopy(model).unload() if "HQQ" not in name else llama(name)
    assert same({n: before[n] for n in before}, packed(unloaded))
    assert torch.equal(logits(unloaded, ids), fresh)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert same_mathematics(logits(merged, ids), y)


@SOME
def test_the_same_numbers_as_the_native_adapter(name, ids):
    model = get_peft_model(llama(name), config(init_weights=False))
    adapter = tcur.adapt(llama(name), rank=4, targets=TARGETS)
    for key, stack in adapter.stacks.items():
        stack.core.data.copy_(model.base_model.stacks_named(key)["default"].core)
    assert torch.equal(logits(model, ids), logits(adapter.model, ids))


@SOME
def test_rows_of_several_adapters_and_several_at_once(name, ids):
    model = get_peft_model(llama(name), config(init_weights=False))
    model.add_adapter("b", config(init_weights=False))
    model.add_adapter("third", TCURConfig(rank=2, target_modules=["q_proj"], init_weights=False))
    model.eval()
    for names in (["default", "__base__", "b"], ["b", "third", "__base__"]):
        mixed = logits(model, ids, adapter_names=names)
        for row, each in enumerate(names):
            if each == "__base__":
                with model.disable_adapter():
                    alone = logits(model, ids)
            else:
                model.set_adapter(each)
                alone = logits(model, ids)
            assert same_mathematics(mixed[row], alone[row]), each
    with pytest.raises(ValueError, match=r"Length of `adapter_names` should be the same"):
        logits(model, ids, adapter_names=["b", "third"])
    model.train()
    model.base_model.set_adapter(["default", "b", "third"])
    y = logits(model, ids)
    merged = model.merge_and_unload()
    assert same_mathematics(logits(merged, ids), y)


def test_in_16_bits_several_updates_are_rounded_once(ids):
    """Also where a layer has two adapters, the update is far below the last bit and stays."""
    model = get_peft_model(llama("torchao Int8Tensor").to(torch.bfloat16), config())
    model.add_adapter("b", config())
    for stack in (s for stacks in model.base_model.owner.stacks.values() for s in stacks):
        stack.core.data.normal_(std=3e-5)
    model.base_model.set_adapter(["default", "b"])
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(4000, 64, dtype=layer.tcur_base.dtype)
    update = (layer.get_delta_weight("default") + layer.get_delta_weight("b")).detach().double()
    with torch.no_grad():
        found = layer(x).double() - layer.base_layer(x).double()
    wanted = (x.double() @ update.T).flatten()
    part = (found.flatten() @ wanted) / wanted.square().sum()
    assert part.item() == pytest.approx(1.0, abs=0.15)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_a_model_that_transformers_quantised(ids, tmp_path):
    """Prepared as peft's users do; the merged copy is saved and loaded as a plain one."""
    library("bitsandbytes")
    # Another test of this process may have asked before it was there.
    transformers.utils.import_utils.is_bitsandbytes_available.cache_clear()
    plain().save_pretrained(tmp_path / "base")
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=how, device_map="cpu"
    )
    assert base.is_quantized
    model = get_peft_model(prepare_model_for_kbit_training(base), config())
    cores = [p for p in model.parameters() if p.requires_grad]
    losses = train(model, cores, ids)
    assert losses == sorted(losses, reverse=True)
    y = logits(model, ids)
    merged = model.merge_and_unload()
    assert not merged.is_quantized
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(again.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert same_mathematics(logits(again, ids), y)


def test_what_peft_leaves_out_and_refuses():
    model = llama("bitsandbytes nf4")
    model.gptq = foreign("gptqmodel", "TorchQuantLinear")
    with pytest.raises(TypeError, match=r"got gptq: TorchQuantLinear of GPTQModel has a quantised"):
        get_peft_model(model, TCURConfig(rank=4, target_modules=["gptq"]))
    everything = get_peft_model(model, TCURConfig(rank=4))
    left_out = {e.module: e.reason for e in everything.base_model.plans["default"].left_out}
    assert "GPTQModel" in left_out["gptq"]
    with pytest.raises(ValueError, match=r"mode: expected 'auto' or 'factored' for quantised"):
        get_peft_model(llama("bitsandbytes nf4"), config(mode="materialized"))
    assert peft.__version__
