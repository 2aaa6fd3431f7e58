"""The command line, on model directories as Hugging Face writes them."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tcur_kernels as tcur
from models import Tiny
from plain import Plain, by_plain_torch
from tcur_kernels import cli
from tolerance import assert_close, assert_composition_close, bound


@pytest.fixture
def run(capsys):
    """Runs a command in this process: exit status, output, errors."""

    def call(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def write_directory(path, model, shards=2):
    """Shards of neighbouring tensors, an index, and what else such a directory holds."""
    path.mkdir()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names = list(state)
    index = {}
    for i in range(shards):
        own = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({n: state[n] for n in own}, path / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(own, file))
    content = {"metadata": {}, "weight_map": index}
    (path / "model.safetensors.index.json").write_text(json.dumps(content))
    (path / "config.json").write_text('{"model_type": "none of transformers\'"}')
    return path


def tiny():
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture
def adapter():
    """A trained adapter of the tiny model, batch-norm statistics moved."""
    adapter = tcur.adapt(tiny(), rank=2, alpha=0.5, train_also=("head", "blocks.?.norm"))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    adapter.model.train()(torch.randn(4, 7, 6))
    adapter.model.eval()
    return adapter


def plain_weights(adapter, dtype):
    """All W_eff by the names of their parameters, as plain torch computes them."""
    parameters = Plain(adapter, dtype).parameters()
    return {n: p.detach() for n, p in parameters.items() if not isinstance(p, torch.nn.Parameter)}


def assert_merged(state, adapter):
    """W_eff where there is one; all else as the adapted model has it."""
    wanted = adapter.merge(inplace=False).state_dict()
    same, exact = (plain_weights(adapter, dtype) for dtype in (torch.float32, torch.float64))
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        if name in same:
            assert_close(state[name], same[name], exact[name])
            assert_close(value, same[name], exact[name])
        else:
            assert torch.equal(state[name], value), name


def directory_state(path):
    return {
        name: value
        for file in path.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def test_info(run):
    status, out, _ = run("info")
    assert status == 0
    assert f"version: {tcur.__version__}" in out
    assert "backends: reference, cpu" in out
    assert "isa_chosen" in out


def test_as_a_module():
    command = [sys.executable, "-W", "error", "-m", "tcur_kernels", "inspect", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: path: expected an adapter file, got none at nowhere\n"


def test_inspect(run, adapter, tmp_path):
    adapter.save(tmp_path / "a")
    status, out, _ = run("inspect", tmp_path / "a")
    assert status == 0
    assert "stack 8x8: 12 slices of 8 x 8, rank 2, basis orthonormal, alpha 0.5, mode auto" in out
    assert "layers: blocks.0.attn.out_proj … blocks.2.attn.qkv (6)" in out
    assert "C and R: slices of the base" in out
    assert "trained beside the cores: 8 tensors" in out
    assert "  head.weight [5, 8]" in out
    assert "buffers: 9 tensors" in out
    adapter.save(tmp_path / "b", factors=True)
    assert "C and R: in the file" in run("inspect", tmp_path / "b")[1]


def test_merge(run, adapter, tmp_path):
    base = write_directory(tmp_path / "base", tiny())
    adapter.save(tmp_path / "a")
    before = directory_state(base)
    status, out, err = run("merge", base, tmp_path / "a", "-o", tmp_path / "out")
    assert status == 0
    assert "written: " in out
    assert "merging: 100%" in err
    merged = directory_state(tmp_path / "out")
    assert_merged(merged, adapter)
    x = torch.randn(4, 7, 6)
    plain = tiny()
    plain.load_state_dict(merged)
    expected = by_plain_torch(adapter, x)
    assert_composition_close(plain(x), *expected)
    assert_composition_close(adapter.model(x), *expected)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {f.name for f in base.iterdir()}
    with safe_open(next((tmp_path / "out").glob("*1-of*")), "pt") as file:
        assert file.metadata() == {"format": "pt"}
    after = directory_state(base)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_merge_rounds_once(run, tmp_path):
    """A bf16 base: the sum in fp32, then one rounding."""
    base = tiny().bfloat16()
    write_directory(tmp_path / "base", base)
    adapter = tcur.adapt(base, rank=2)
    with torch.no_grad():
        for stack in adapter.stacks.values():
            stack.core.normal_()
    adapter.save(tmp_path / "a")
    assert run("merge", tmp_path / "base", tmp_path / "a", "-o", tmp_path / "out")[0] == 0
    merged = directory_state(tmp_path / "out")
    same, exact = (plain_weights(adapter, dtype) for dtype in (torch.float32, torch.float64))
    assert len(exact) == 12
    for name, w_eff in exact.items():
        rounded, error = merged[name], bound(same[name], w_eff) * w_eff.norm()
        assert rounded.dtype == torch.bfloat16
        # The fp32 sum may lie on the other side of a rounding edge; else there is no choice.
        assert (rounded >= (w_eff - error).bfloat16()).all()
        assert (rounded <= (w_eff + error).bfloat16()).all()


@pytest.fixture(scope="module")
def transformers():
    try:
        import transformers
    except Exception as error:
        pytest.skip(f"transformers: {error}")
    return transformers


def gpt2_directory(transformers, path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=16, vocab_size=11)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(path, max_shard_size="6KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return model


def test_plan_and_merge_of_gpt2(run, transformers, tmp_path):
    model = gpt2_directory(transformers, tmp_path / "base")
    status, out, _ = run("plan", tmp_path / "base", "--rank", "2")
    assert status == 0
    assert "stack 8x8: 8 matrices of 8 x 8 share one core of 8 x 2 x 2 numbers: transformer." in out
    assert "transformer.h.0-1.attn.c_attn (3 matrices each: fused q, k, v)" in out
    assert "(every layer: --verbose)" in out
    assert "rank 2: 48 trained numbers" in out
    assert "lm_head: its weight is tied" in out
    status, out, _ = run("plan", tmp_path / "base", "--targets", "mlp.c_fc", "--stacks", "layer")
    assert status == 0
    assert "stack transformer_h_0_mlp_c_fc: 1 matrix of 32 x 8 has a core of 1 x 8 x 8 num" in out
    status, out, _ = run("plan", tmp_path / "base", "--rank", "2", "--verbose")
    assert status == 0
    assert "stack 8x8: 8 slices of 8 x 8, rank 2\n      0-2  transformer.h.0.attn.c_attn\n" in out
    assert "transformer.wpe: Embedding is not a linear layer" in out
    assert "--verbose" not in out
    assert "quantised" not in out

    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "quantised").mkdir()
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    status, out, _ = run("plan", tmp_path / "quantised", "--rank", "2")
    assert (status, "config.json: its weights are quantised (bitsandbytes)" in out) == (0, True)

    adapter = tcur.adapt(model, rank=2)
    with torch.no_grad():
        for stack in adapter.stacks.values():
            stack.core.normal_(std=0.3)
    adapter.save(tmp_path / "a")
    assert run("merge", tmp_path / "base", tmp_path / "a", "-o", tmp_path / "out")[0] == 0
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(11, (2, 6))
    plain, exact = Plain(adapter), Plain(adapter, torch.float64)(ids).logits
    for logits in (merged(ids).logits, adapter.model(ids).logits):
        assert_composition_close(logits, lambda: plain(ids).logits, exact)

    # Files of the bare model go without the prefix that its head adds.
    model.transformer.save_pretrained(tmp_path / "bare")
    bare = tmp_path / "bare"
    stored = {
        k.removeprefix("transformer."): v for k, v in directory_state(tmp_path / "base").items()
    }
    for file in bare.glob("*.safetensors"):
        file.unlink()
    save_file(stored, bare / "model.safetensors", metadata={"format": "pt"})
    assert run("merge", bare, tmp_path / "a", "-o", tmp_path / "out2")[0] == 0
    with_prefix = directory_state(tmp_path / "out")
    for name, value in directory_state(tmp_path / "out2").items():
        assert torch.equal(value, with_prefix[f"transformer.{name}"])


def test_merge_of_an_attention(run, tmp_path):
    """Blocks of in_proj_weight are found by their rows."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2), torch.nn.Linear(8, 8))
    write_directory(tmp_path / "base", model)
    adapter = tcur.adapt(model, ["q_proj", "v_proj", "1"], rank=2)
    with torch.no_grad():
        adapter.stacks["8x8"].core.normal_()
    adapter.save(tmp_path / "a")
    assert run("merge", tmp_path / "base", tmp_path / "a", "-o", tmp_path / "out")[0] == 0
    merged = directory_state(tmp_path / "out")
    assert_merged(merged, adapter)
    k_proj = slice(8, 16)  # has no adapter
    assert torch.equal(merged["0.in_proj_weight"][k_proj], model[0].in_proj_weight[k_proj])


def test_bench(run):
    status, out, _ = run(
        "bench", "--n3", 4, "--n1", 16, "--n2", 24, "--rank", 2, "--tokens", 5, "--rounds", 2
    )
    assert status == 0
    assert "relative error of the update" in out
    assert "cur_linear, one slice" in out


def test_bad_input_is_named_and_nothing_is_written(run, adapter, tmp_path, monkeypatch):
    base = write_directory(tmp_path / "base", tiny())
    good = tmp_path / "a"
    adapter.save(good)
    out = tmp_path / "out"

    def refused(message, model=base, file=good, to=out):
        before = sorted(tmp_path.rglob("*"))
        status, printed, err = run("merge", model, file, "-o", to)
        assert status == 2
        assert not printed
        assert message in err
        assert sorted(tmp_path.rglob("*")) == before

    refused("model_dir: expected a directory, got none", tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("model_dir: expected *.safetensors", empty)
    refused("path: expected an adapter file, got none", file=tmp_path / "nowhere")
    refused("out: expected a directory that is new or empty", to=base)
    refused("out: expected a directory that is new or empty", to=good)

    torch.manual_seed(1)
    other = write_directory(tmp_path / "other", Tiny())
    refused("expected the base that the adapter was made for, got other weights in stack", other)
    wide = write_directory(tmp_path / "wide", Tiny(width=16))
    refused("model_dir: expected blocks.0.attn.out_proj.weight with [8, 8]", wide)
    short = write_directory(tmp_path / "short", Tiny(blocks=2))
    refused("model_dir: expected a tensor blocks.2.attn", short)
    torch.manual_seed(0)
    headless = tiny()
    headless.head = torch.nn.Linear(8, 3)
    refused("model_dir: expected head.", write_directory(tmp_path / "headless", headless))

    lost = write_directory(tmp_path / "lost", tiny())
    next(lost.glob("*2-of*")).unlink()
    refused("model_dir: expected all shards of model.safetensors.index.json", lost)
    torn = write_directory(tmp_path / "torn", tiny())
    file = next(torn.glob("*1-of*"))
    file.write_bytes(file.read_bytes()[:-4])
    refused("model_dir: expected a whole safetensors file, got ", torn)
    twice = write_directory(tmp_path / "twice", tiny())
    save_file({"head.bias": torch.ones(5)}, twice / "more.safetensors")
    (twice / "model.safetensors.index.json").unlink()  # or the index would say which it is
    refused("model_dir: expected each tensor once, got head.bias in", twice)

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("tcur_kernels.merge.directory.save_file", full)
    refused("no space left on device")


def test_what_a_plan_needs_is_said(run, tmp_path, monkeypatch):
    base = write_directory(tmp_path / "base", tiny())
    pytest.importorskip("transformers")
    status, _, err = run("plan", base)
    assert status == 2
    assert "model_dir: expected a model that transformers knows" in err
    (base / "config.json").unlink()
    assert "model_dir: expected config.json, got none" in run("plan", base)[2]
    (base / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'tcur_kernels[peft]'" in run("plan", base)[2]


def test_a_tensor_that_could_be_two_is_not_guessed(run, adapter, tmp_path):
    model = torch.nn.ModuleDict({"a": tiny(), "b": tiny()})
    base = write_directory(tmp_path / "base", model)
    adapter.save(tmp_path / "f")
    status, _, err = run("merge", base, tmp_path / "f", "-o", tmp_path / "out")
    assert status == 2
    assert "got a.blocks.0.attn.out_proj.weight, b.blocks.0.attn.out_proj.weight" in err
