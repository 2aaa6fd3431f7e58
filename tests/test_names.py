"""Tensors that transformers has on disk by other names, or cut otherwise, than in memory."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import tcur_kernels as tcur
from hf_models import IS_FOUR
from tcur_kernels import cli
from tcur_kernels.files.origins import Origins
from tolerance import same_mathematics

transformers = pytest.importorskip("transformers")

#: Models of transformers 4 have what their files have.
NOT_FOUR = pytest.mark.skipif(IS_FOUR, reason="transformers 4 regroups nothing")

VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def clip(kind="CLIPModel"):
    """Two towers of one architecture."""
    config = transformers.CLIPConfig(
        vision_config=VISION, text_config={k: v for k, v in TEXT.items() if "key_value" not in k}
    )
    return getattr(transformers, kind)(config)


def vit(kind="ViTForImageClassification"):
    return getattr(transformers, kind)(transformers.ViTConfig(**VISION))


def dinov2():
    """Its files have gate_proj and up_proj as one matrix."""
    config = transformers.Dinov2Config(use_swiglu_ffn=True, **VISION)
    return transformers.Dinov2ForImageClassification(config)


def mixtral():
    """Its files have experts one by one, and gate and up apart."""
    config = transformers.MixtralConfig(num_local_experts=3, **TEXT)
    return transformers.MixtralForCausalLM(config)


def llava(kind="LlavaForConditionalGeneration"):
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(projection_dim=32, **VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=39,
    )
    return getattr(transformers, kind)(config)


def bert(kind):
    config = transformers.BertConfig(**{k: v for k, v in TEXT.items() if "key_value" not in k})
    return getattr(transformers, kind)(config)


def pixels():
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def tokens():
    return {"input_ids": torch.randint(38, (2, 5))}


#: What is saved, the class that it is loaded as, an input, and what trains beside the cores.
CASES = {
    "ViT": (vit, "ViTForImageClassification", pixels, "classifier"),
    "Dinov2 without its head": (dinov2, "Dinov2Model", pixels, "layernorm"),
    "ViT with a new head": (lambda: vit("ViTModel"), "ViTForImageClassification", pixels, ()),
    "Dinov2": (dinov2, "Dinov2ForImageClassification", pixels, "*.layer.?.mlp.gate_proj.bias"),
    "Mixtral": (mixtral, "MixtralForCausalLM", tokens, "model.layers.1.mlp.experts"),
    "LLaVA": (llava, "LlavaForConditionalGeneration", tokens, "lm_head"),
    "LLaVA without its head": (llava, "LlavaModel", tokens, "language_model.norm"),
    "CLIP, one of two towers": (clip, "CLIPVisionModel", pixels, ()),
    "CLIP, what one tower has": (clip, "CLIPVisionModel", pixels, "post_layernorm"),
    "BERT": (lambda: bert("BertModel"), "BertForSequenceClassification", tokens, ()),
}

#: What transformers says when it makes a head anew, and of its own calls.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def output(model, inputs):
    y = model(**inputs)
    return getattr(y, "logits", y[0])


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """A directory of a small model in shards, the class to load it as, input, train_also."""
    build, kind, inputs, trained = CASES[request.param]
    if IS_FOUR and request.param in ("Dinov2", "Mixtral", "CLIP, what one tower has"):
        pytest.skip("trains what has another name in transformers 4")
    build().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    return getattr(transformers, kind), inputs(), trained


# LLaVA takes the features of a layer before its last one.
@pytest.mark.filterwarnings("ignore:.*never ran")
def test_directories_that_transformers_wrote(case, tmp_path, capsys):
    kind, inputs, trained = case
    base = tmp_path / "base"
    model = kind.from_pretrained(base).eval()
    new = [n for n, _ in model.named_parameters() if n.startswith(("classifier", "score"))]
    adapter = tcur.adapt(model, rank=2, train_also=trained)
    start = output(model, inputs).detach()
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
    for _ in range(2):
        optimizer.zero_grad()
        output(model, inputs).square().sum().backward()
        optimizer.step()
    adapter.save(tmp_path / "adapter")

    assert run("plan", base, "--rank", 2, "--curve", tmp_path / "c.png", "--ranks", 2) == 0
    assert run("merge", base, tmp_path / "adapter", "-o", tmp_path / "out") == 0
    assert "written: " in capsys.readouterr().out
    merged = kind.from_pretrained(tmp_path / "out").eval()
    for name in new:  # made anew, and in no file: unless it was trained, no file can have it
        if trained == ():
            merged.get_parameter(name).data.copy_(model.get_parameter(name))
    y, z = output(model, inputs), output(merged, inputs)
    assert not same_mathematics(start, y)
    assert same_mathematics(z, y)
    reference = adapter.merge(inplace=False).state_dict()
    for name, value in merged.state_dict().items():
        assert same_mathematics(value, reference[name])
    names = {n for file in base.glob("*.safetensors") for n in load_file(file)}
    assert {n for f in (tmp_path / "out").glob("*.safetensors") for n in load_file(f)} == names

    with torch.device("meta"):
        empty = kind(model.config)
    streamed = tcur.adapt(empty, rank=2, train_also=trained, weights=base)
    assert not hasattr(empty, "_weight_conversions")
    for name, stack in adapter.stacks.items():
        assert torch.equal(streamed.stacks[name].lateral, stack.lateral)
        assert torch.equal(streamed.stacks[name].horizontal, stack.horizontal)


def adapted(path, build, kind=None, **settings):
    """A saved base, and an adapter of it whose core is not zero."""
    build().save_pretrained(path / "base")
    model = (getattr(transformers, kind) if kind else type(build())).from_pretrained(path / "base")
    adapter = tcur.adapt(model, rank=2, **settings)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    adapter.save(path / "adapter")
    return adapter


def test_what_the_files_lack_is_named(tmp_path, capsys):
    """Heads and poolers that from_pretrained made anew are in no file."""
    adapted(tmp_path, lambda: bert("BertForMaskedLM"), "BertForSequenceClassification")
    assert run("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "model_dir: expected a tensor bert.pooler.dense.weight in" in err
    assert "made anew when a model is loaded" in err
    assert not (tmp_path / "out").exists()


@NOT_FOUR
def test_without_transformers_the_cause_is_named(tmp_path, capsys, monkeypatch):
    adapted(tmp_path, vit)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "expected a tensor vit.layers.0.attention.q_proj.weight in" in err
    assert "transformers renames while loading, and did not help: transformers is needed" in err


def test_transformers_without_rules(tmp_path, capsys, monkeypatch):
    """As version 4 is: names are those of the files."""
    adapted(tmp_path, lambda: bert("BertModel"), "BertForSequenceClassification")
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    assert run("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out") == 0


def test_names_that_transformers_4_changes(tmp_path, monkeypatch):
    """By patterns, the first of which counts, in models of the kinds that it names."""
    from transformers import modeling_utils

    model = llava()
    patterns = {"^language_model.model": "model.language_model", "^language_model": "other"}
    monkeypatch.setattr(type(model), "_checkpoint_conversion_mapping", patterns, raising=False)
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    stored = {"language_model.model.norm.weight": (32,), "language_model.lm_head.weight": (40, 32)}

    def origins(kinds):
        monkeypatch.setattr(modeling_utils, "VLMS", kinds, raising=False)
        return Origins("w", tmp_path, stored, model)

    found = origins(["gemma3", "llava"])
    assert found["model.language_model.norm.weight"].name == "language_model.model.norm.weight"
    assert found["other.lm_head.weight"].name == "language_model.lm_head.weight"
    with pytest.raises(ValueError, match=r"expected a tensor model.language_model.norm.weight in"):
        origins(["gemma3"])["model.language_model.norm.weight"]


@NOT_FOUR
def test_a_conversion_that_is_not_reverted_is_refused(tmp_path, capsys, monkeypatch):
    from transformers import core_model_loading

    adapted(tmp_path, dinov2)
    revert = core_model_loading.revert_weight_conversion

    def wrong(model, state):
        return {name: value + 1 for name, value in revert(model, state).items()}

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", wrong)
    assert run("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "mlp.weights_in.weight by Chunk, which it does not revert: merge in memory" in err
    assert not (tmp_path / "out").exists()


@NOT_FOUR
def test_tensors_that_transformers_cannot_put_together(tmp_path, capsys):
    """An expert of another shape: nobody minds unless it is asked for."""
    for trained, status in (((), 0), ("model.layers.0.mlp.experts", 2)):
        path = tmp_path / str(status)
        adapted(path, mixtral, train_also=trained)
        file = path / "base" / "model.safetensors"
        state = load_file(file)
        [name] = [n for n in state if n.endswith("layers.0.block_sparse_moe.experts.1.w2.weight")]
        state[name] = torch.ones(3, 3)
        save_file(state, file, metadata={"format": "pt"})
        assert run("merge", path / "base", path / "adapter", "-o", path / "out") == status
    err = capsys.readouterr().err
    assert "model_dir: expected a tensor model.layers.0.mlp.experts.down_proj" in err
    assert "transformers cannot make model.layers.0.mlp.experts.down_proj of" in err


@NOT_FOUR
def test_regrouped_weights_from_files(tmp_path):
    """They are put together in memory, as far as the workspace goes."""
    dinov2().save_pretrained(tmp_path)

    def empty(dtype=torch.float32, **changes):
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        for name, value in changes.items():
            setattr(config, name, value)
        with torch.device("meta"):
            return transformers.Dinov2ForImageClassification(config).to(dtype)

    targets = "mlp.up_proj"
    assert tcur.adapt(empty(), targets, rank=2, weights=tmp_path).plan.stacks[0].n3 == 2
    with pytest.raises(ValueError, match=r"max_workspace: expected at least .* puts together"):
        tcur.adapt(empty(), targets, rank=2, weights=tmp_path, max_workspace=9000)
    with pytest.raises(ValueError, match=r"up_proj.weight of torch.bfloat16 as in the model, got"):
        tcur.adapt(empty(torch.bfloat16), targets, rank=2, weights=tmp_path)
    with pytest.raises(ValueError, match=r"up_proj.weight of shape .* as in the model, got .* in"):
        tcur.adapt(empty(mlp_ratio=8), targets, rank=2, weights=tmp_path)


def test_tied_weights_are_found_by_the_name_that_files_have(tmp_path):
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=8, vocab_size=11)
    model = transformers.GPT2LMHeadModel(config)
    origins = Origins("w", tmp_path, {"transformer.wte.weight": (11, 8)}, model)
    assert origins["lm_head.weight"].name == "transformer.wte.weight"
