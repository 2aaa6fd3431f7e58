"""What peft expects of a config and of a model's names: heads, layer numbers, renamed modules."""

import copy
import dataclasses

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hf_models import PEFT_SAYS, llama
from models import Tiny
from tcur_kernels.peft import TCURConfig
from tolerance import same_mathematics

pytestmark = [pytest.mark.filterwarnings(text) for text in PEFT_SAYS]


def bert(kind):
    settings = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=32,
    )  # fmt: skip
    return getattr(transformers, f"BertFor{kind}")(settings)


@pytest.mark.parametrize("extra", [None, ["LayerNorm"]])
@pytest.mark.parametrize(
    ("task", "kind", "head"),
    [
        ("SEQ_CLS", "SequenceClassification", "classifier"),
        ("TOKEN_CLS", "TokenClassification", "classifier"),
        ("QUESTION_ANS", "QuestionAnswering", "qa_outputs"),
    ],
)
def test_heads_of_tasks_are_trained_and_saved(task, kind, head, extra, tmp_path):
    base = bert(kind).eval()
    settings = TCURConfig(
        task_type=task, rank=2, target_modules=["query", "value"], modules_to_save=extra
    )
    model = get_peft_model(copy.deepcopy(base), settings).eval()
    assert model.peft_config["default"] is settings
    assert head in settings.modules_to_save
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(f".{head}.modules_to_save.default" in name for name in trained)
    assert any("LayerNorm" in name for name in trained) == (extra is not None)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in trained:
                p.normal_()
        inputs = {"input_ids": torch.randint(32, (2, 5))}
        y = model(**inputs)[0]
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
        assert torch.equal(loaded(**inputs)[0], y)


@pytest.mark.parametrize("numbers", [0, [0], [1, 2], [0, 2]])
def test_layers_to_transform_with_default_targets(numbers, tmp_path):
    settings = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        vocab_size=32,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(settings)
    config = TCURConfig(rank=2, layers_to_transform=numbers, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    wanted = {numbers} if isinstance(numbers, int) else set(numbers)
    members = [m.module for s in model.plans["default"].stacks for m in s.members]
    assert {int(name.split(".")[2]) for name in members} == wanted
    assert len(members) == sum(s.n3 for s in model.plans["default"].stacks)
    assert set(members) == set(model.targeted_module_names)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert loaded.plans["default"].stacks == model.plans["default"].stacks


def test_r_is_the_rank():
    assert TCURConfig(r=3) == TCURConfig(rank=3)
    assert TCURConfig().rank == TCURConfig().r == 8
    settings = TCURConfig(r=4, rank=4)
    assert dataclasses.replace(settings, rank=2).r == 2
    settings.r = 5
    assert settings.rank == settings.to_dict()["rank"] == 5
    assert TCURConfig(**settings.to_dict()) == settings


@pytest.mark.parametrize(
    ("name", "value", "got"),
    [
        ("target_modules", ["q", 3], "a list of int and str"),
        ("target_modules", 3, "a int"),
        ("target_parameters", "experts", "a str"),
        ("exclude_modules", {None}, "a set of NoneType"),
        ("modules_to_save", "classifier", "a str"),
        ("modules_to_save", ["classifier", ["x"]], "a list of list and str"),
        ("layers_pattern", 1.0, "a float"),
        ("layers_to_transform", ["0"], "a list of str"),
        ("layers_to_transform", True, "a bool"),
    ],
)
def test_names_of_another_type_are_refused(name, value, got):
    given = {"layers_to_transform": 1, name: value} if name == "layers_pattern" else {name: value}
    with pytest.raises(TypeError, match=rf"{name}: expected .* or None, got {got}$"):
        TCURConfig(**given)


def test_cores_may_be_drawn():
    base, x = Tiny().eval(), torch.randn(2, 7, 6)
    model = get_peft_model(copy.deepcopy(base), TCURConfig(rank=2, init_weights=False))
    for entry in model.plans["default"].stacks:
        first = model.base_model.model.get_submodule(entry.members[0].module)
        rows = slice(None, entry.n1)
        update = first.get_delta_weight("default")[rows]
        ratio = update.norm() / first.get_base_layer().weight[rows].norm()
        assert same_mathematics(ratio, torch.tensor(0.5))
    assert not same_mathematics(model(x), base(x))
    none = get_peft_model(copy.deepcopy(base), TCURConfig(rank=2, init_weights=False, alpha=0.0))
    base.requires_grad_(False)  # as peft does, or torch computes otherwise
    assert torch.equal(none(x), base(x))


@pytest.mark.parametrize("kind", [TCURConfig, LoraConfig])
def test_a_second_wrap_is_refused(kind):
    """Its cores would have the names that the first wrap's have."""
    model = get_peft_model(Tiny(), kind(target_modules=["mlp.0"]))
    x = torch.randn(2, 7, 6)
    before = model(x)
    for wrapped in (model, model.base_model.model):
        if kind is LoraConfig and wrapped is not model:
            continue
        with (
            pytest.warns(UserWarning, match="second time|peft_config"),
            pytest.raises(ValueError, match="model: expected one without adapters of TCUR or a Pe"),
        ):
            get_peft_model(wrapped, TCURConfig(rank=2, target_modules=["mlp.2"]))
    assert torch.equal(model(x), before)
    if kind is TCURConfig:
        get_peft_model(model.unload(), TCURConfig(rank=2, target_modules=["mlp.2"]))


class Renamed(nn.Module):
    """The same model as another release of its library calls its parts."""

    def __init__(self, model, inner="language_model"):
        super().__init__()
        self.add_module(inner, model)
        self.forward = model.forward


@pytest.mark.parametrize("stacks", ["shape", "layer"])
def test_modules_that_were_renamed_are_known_by_their_weights(stacks, tmp_path):
    base, x = llama().eval(), {"input_ids": torch.randint(50, (2, 9))}
    settings = TCURConfig(
        rank=2, init_weights=False, stacks=stacks, target_modules=["q_proj", "v_proj", "up_proj"]
    )
    model = get_peft_model(Renamed(copy.deepcopy(base), "model"), settings).eval()
    with torch.no_grad():
        y = model(**x).logits
    model.save_pretrained(tmp_path)
    mapping = {r"^model\.": "language_model."}
    loaded = PeftModel.from_pretrained(
        Renamed(copy.deepcopy(base)), tmp_path, key_mapping=mapping
    ).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**x).logits, y)
    names = {m.module for s in loaded.plans["default"].stacks for m in s.members}
    assert all(name.startswith("language_model.") for name in names)
    other = llama()
    with pytest.raises(ValueError, match="expected the base that the adapter was made for"):
        PeftModel.from_pretrained(Renamed(other), tmp_path)
    unchecked = TCURConfig.from_pretrained(tmp_path)
    unchecked.check_base = False
    with pytest.raises(ValueError, match=r"expected a linear layer model\.model\.layers"):
        PeftModel.from_pretrained(Renamed(copy.deepcopy(base)), tmp_path, config=unchecked)
    shapes = TCURConfig.from_pretrained(tmp_path)
    shapes.target_modules = {"qkv"}
    with pytest.raises(ValueError, match=r"expected a linear layer model\.model\.layers"):
        PeftModel.from_pretrained(Renamed(Tiny()), tmp_path, config=shapes)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_all_that_holds_weights_is_planned_or_named():
    model = get_peft_model(llama(), TCURConfig(rank=2, modules_to_save=["lm_head"]))
    model.add_adapter("second", TCURConfig(rank=2))
    for plan in model.plans.values():
        left_out = {item.module: item.reason for item in plan.left_out}
        assert left_out == {"model.embed_tokens": "Embedding is not a linear layer"}
        assert sum(len(stack.members) for stack in plan.stacks) == 2 * 7
