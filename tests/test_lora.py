"""Adapters as LoRA: the numbers, what is refused, and that nothing is half-written."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tcur_kernels as tcur
from adapted import WIDTH, layers, randomise
from models import Tiny
from oracle import cur_product
from plain import product as plain_product
from plain import scale_of
from tcur_kernels import cli
from tcur_kernels.adapters import lora_file
from tcur_kernels.adapters.lora import SERVED_RANKS, exact_rank, largest_exact
from tcur_kernels.adapters.plan import Member, StackPlan
from tolerance import FLOAT64, assert_equal_in_float64, bound, relative_error

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tiny(dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    adapter = tcur.adapt(Tiny(width=12).eval().to(dtype), **{"rank": 1, **kwargs})
    randomise(adapter)
    return adapter


def updates(adapter, product=cur_product):
    """Name of a layer -> its update; by default in float64, by the definition of the t-product."""
    found = {}
    for plan in adapter.plan.stacks:
        stack = adapter.stacks[plan.name]
        sides = (stack.lateral, stack.core.detach(), stack.horizontal)
        whole, first = (scale_of(stack) * product(*sides)).cpu(), 0
        for member in plan.members:
            found[member.module] = whole[first : first + member.slices].flatten(0, 1)
            first += member.slices
    return found


def pairs(path):
    """Name of a layer -> B and A, as they were written."""
    tensors = load_file(path / TENSORS)
    start, end = "base_model.model.", ".lora_A.weight"
    names = [n.removeprefix(start).removesuffix(end) for n in tensors if n.endswith(end)]
    assert len(tensors) == 2 * len(names)
    return {n: [tensors[f"{start}{n}.lora_{part}.weight"] for part in ("B", "A")] for n in names}


def config_of(path):
    return json.loads((path / CONFIG).read_text())


def multiplied(pair):
    return pair[0].double() @ pair[1].double()


def best_error(update, rank):
    """The relative error of the best approximation of a rank, by an SVD in full size."""
    values = torch.linalg.svdvals(update)
    return float(values[rank:].norm() / values.norm())


@pytest.mark.parametrize("basis", ["orthonormal", "slices"])
@pytest.mark.parametrize("width", [12, 7])  # stacks of an even and of an odd number of slices
def test_it_is_exact_at_rank_n3_r(tmp_path, basis, width):
    torch.manual_seed(0)
    model = nn.Sequential(*layers(2), *(nn.Linear(WIDTH, width) for _ in range(width - 4)))
    adapter = tcur.adapt(model.double(), rank=3, basis=basis, alpha=0.5)
    randomise(adapter)
    written = adapter.to_lora(tmp_path / "lora", dtype=torch.float64)
    expected = max(min(3 * s.n3, s.n1, s.n2) for s in adapter.stacks.values())
    assert written.rank == written.exact_rank == expected
    wanted = updates(adapter)
    assert pairs(tmp_path / "lora").keys() == wanted.keys()
    for name, pair in pairs(tmp_path / "lora").items():
        assert_equal_in_float64(multiplied(pair), wanted[name])
        assert written.errors[name] <= FLOAT64


@pytest.mark.parametrize("rank", [None, 8, 1])
def test_the_best_of_its_rank_and_the_printed_error_is_the_measured_one(tmp_path, rank):
    """Layers of one and of three slices, and of three shapes."""
    adapter = tiny(rank={"12x12": 1, "48x12": 2, "*": 4})
    written = adapter.to_lora(tmp_path, rank, dtype=torch.float64)
    assert (written.rank, written.exact_rank) == (rank or 12, 12)
    truncated = 0
    for name, pair in pairs(tmp_path).items():
        update = updates(adapter)[name]
        assert [list(part.shape) for part in pair] == [
            [update.shape[0], written.rank],
            [written.rank, update.shape[1]],
        ]
        measured = relative_error(multiplied(pair), update)
        assert abs(measured - written.errors[name]) <= FLOAT64
        assert abs(measured - best_error(update, written.rank)) <= FLOAT64
        truncated += measured > 1e-3
    assert truncated == {None: 0, 8: 9, 1: 12}[rank]


@pytest.mark.parametrize("dtype", DTYPES)
def test_roundings_are_in_the_error(tmp_path, dtype):
    adapter = tiny()
    for rank in (None, 1):
        written = adapter.to_lora(tmp_path, rank, dtype)
        for name, pair in pairs(tmp_path).items():
            assert {part.dtype for part in pair} == {dtype}
            measured = relative_error(multiplied(pair), updates(adapter)[name])
            small = max(FLOAT64, 1e-3 * measured)  # products of two roundings are left out
            assert abs(measured - written.errors[name]) <= small
            if rank is None:  # A is isometric but for the size of its rows
                assert measured <= 2 * torch.finfo(dtype).eps + FLOAT64


def test_small_updates_survive_in_fp16(tmp_path):
    """fp16 has few numbers below 6e-5, so A and B share the size of the update."""
    adapter = tiny()
    with torch.no_grad():
        for stack in adapter.stacks.values():
            stack.core *= 1e-6
    for rank in (None, 1):
        adapter.to_lora(tmp_path, rank, torch.float16)
        for name, pair in pairs(tmp_path).items():
            error = relative_error(multiplied(pair), updates(adapter)[name])
            lost = 0 if rank is None else best_error(updates(adapter)[name], rank)
            assert error <= lost + 2 * torch.finfo(torch.float16).eps


def test_an_fp32_adapter(tmp_path):
    """As exact as plain torch in fp32."""
    adapter = tiny(torch.float32)
    adapter.to_lora(tmp_path)
    exact, plain = updates(adapter), updates(adapter, plain_product)
    for name, pair in pairs(tmp_path).items():
        assert relative_error(multiplied(pair), exact[name]) <= bound(plain[name], exact[name])


def test_a_fresh_adapter_is_a_lora_of_zeros(tmp_path):
    torch.manual_seed(0)
    adapter = tcur.adapt(Tiny(), rank=1)
    written = adapter.to_lora(tmp_path, rank=1)
    assert set(written.errors.values()) == {0.0}
    assert all(a.any() and not b.any() for b, a in pairs(tmp_path).values())


def test_the_config(tmp_path):
    adapter = tiny()
    adapter.model.config = type("Config", (), {"_name_or_path": "org/base"})()
    adapter.to_lora(tmp_path, rank=8)
    config = config_of(tmp_path)
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 8
    assert config["target_modules"] == sorted(updates(adapter))
    assert (config["base_model_name_or_path"], config["task_type"]) == ("org/base", None)
    assert config["fan_in_fan_out"] is False
    adapter.to_lora(tmp_path, 8, base_model="other", task_type="CAUSAL_LM")
    config = config_of(tmp_path)
    assert (config["base_model_name_or_path"], config["task_type"]) == ("other", "CAUSAL_LM")
    with pytest.raises(ValueError, match=r"task_type: expected one of CAUSAL_LM, .*, got 'chat'"):
        adapter.to_lora(tmp_path, task_type="chat")


def test_ranks_are_those_of_servers(tmp_path):
    adapter = tiny(rank=2)  # exact at rank 12, as the layers are no larger
    for asked, written in ((1, 1), (2, 8), (8, 8), (9, 12), (13, 12), (512, 12), (None, 12)):
        record = adapter.to_lora(tmp_path, asked)
        assert record.rank == config_of(tmp_path)["r"] == written
        assert record.max_lora_rank == {1: 1, 8: 8, 12: 16}[written]
    for wrong in (0, -1, 513):
        with pytest.raises(ValueError, match=rf"1, 8, 16, .*, 512\), or None, got {wrong}"):
            adapter.to_lora(tmp_path, wrong)
    for wrong in (8.0, True, "8"):
        with pytest.raises(TypeError, match="rank: expected an int or None"):
            adapter.to_lora(tmp_path, wrong)
    with pytest.raises(TypeError, match=r"dtype: expected a floating dtype, got torch.int8"):
        adapter.to_lora(tmp_path, dtype=torch.int8)


def test_what_is_printed(tmp_path):
    adapter = tiny()
    written = adapter.to_lora(tmp_path / "a", 8, torch.bfloat16)
    head, server, title, *lines = str(written).splitlines()
    assert head == f"{tmp_path / 'a'}: LoRA of rank 8 (exact at rank 12), torch.bfloat16"
    assert server == "vLLM: --max-lora-rank 8"
    assert title == "relative error of the update of each layer:"
    errors = [written.errors[f"blocks.{i}.attn.qkv"] for i in range(3)]
    assert f"  blocks.0-2.attn.qkv: {min(errors):.1e} to {max(errors):.1e}" in lines
    assert len(lines) == 3
    each = written.describe().splitlines()
    assert each[:3] == [head, server, title]
    assert each[3:] == [f"  {name}: {error:.1e}" for name, error in written.errors.items()]


def test_a_rank_that_no_server_takes(tmp_path):
    """Exact at rank 514: it is written, and the record says which rank a server would take."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(514, 514), nn.Linear(514, 514)).double()
    adapter = tcur.adapt(model, rank=257, selection="uniform", basis="slices")
    randomise(adapter, 1e-3)
    written = adapter.to_lora(tmp_path, dtype=torch.float64)
    assert (written.rank, written.max_lora_rank) == (514, None)
    assert "vLLM: takes no rank above 512; export with that rank for it" in str(written)
    served = adapter.to_lora(tmp_path, 512, dtype=torch.float64)
    assert (served.rank, served.max_lora_rank) == (512, 512)


def test_the_exact_rank_of_a_plan():
    members = (Member("a", 1), Member("qkv", 3))
    plan = StackPlan("s", 10, 25, members, rank=2)
    assert exact_rank(plan) == 8
    assert [exact_rank(plan, r) for r in (5, 6, 7, 10)] == [20, 24, 25, 25]
    assert [largest_exact(plan, n) for n in (1, 8, 16, 32)] == [0, 2, 4, 10]


def test_the_names_match_these_layers_alone(tmp_path):
    """peft takes the ends of names, too: 'fc' would also be 'block.fc'."""
    model = nn.Module()
    model.fc, model.other = layers(2)
    model.block = nn.Module()
    model.block.fc = nn.Linear(WIDTH, WIDTH)
    adapter = tcur.adapt(model, lambda name, _: name in ("other", "fc"), rank=2)
    assert [m.module for m in adapter.plan.stacks[0].members] == ["fc", "other"]
    adapter.to_lora(tmp_path)
    assert config_of(tmp_path)["target_modules"] == "fc|other"


def test_merged_and_inactive_adapters(tmp_path):
    adapter = tiny()
    adapter.add("b")
    adapter.to_lora(tmp_path / "plain")
    adapter.to_lora(tmp_path / "b", name="b")
    assert not any(b.any() for b, _ in pairs(tmp_path / "b").values())
    adapter.merge()
    adapter.to_lora(tmp_path / "merged")
    for file in (CONFIG, TENSORS):
        wanted = (tmp_path / "plain" / file).read_bytes()
        assert (tmp_path / "merged" / file).read_bytes() == wanted
    with pytest.raises(ValueError, match="name: expected one of default, b, got 'c'"):
        adapter.to_lora(tmp_path / "c", name="c")


def test_what_lora_cannot_hold_is_refused(tmp_path):
    path = tmp_path / "lora"
    with pytest.raises(ValueError, match=r"cores alone, .* got values of head.weight, head.bias"):
        tiny(train_also="head").to_lora(path)
    adapter = tiny()
    adapter.model.train()(torch.randn(4, 7, 6).double())
    with pytest.raises(ValueError, match=r"got values of blocks.0.norm.*, .* and 4 more"):
        adapter.to_lora(path)

    attention = nn.Sequential(nn.MultiheadAttention(WIDTH, 2), nn.Linear(WIDTH, WIDTH))
    own = r"modules of their own, .*: 0.q_proj, 0.k_proj, 0.v_proj, 0.out_proj"
    with pytest.raises(ValueError, match=own):
        tcur.adapt(attention, rank=2).to_lora(path)
    shared = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH), "c": nn.Linear(WIDTH, WIDTH)})
    shared["b"] = shared["a"]
    with pytest.raises(ValueError, match=r"one name each, .* got a = b"):
        tcur.adapt(shared, rank=2).to_lora(path)

    adapter = tiny()
    adapter.stacks["12x12"].core.data *= 1e12
    with pytest.raises(ValueError, match=r"dtype: .* update of blocks.0.attn.out_proj, .*float16"):
        adapter.to_lora(path, dtype=torch.float16)
    adapter.stacks["12x12"].core.data[0] = torch.nan
    with pytest.raises(ValueError, match="core: expected finite numbers in stack 12x12, got NaN"):
        adapter.to_lora(path, 1)
    adapter.model.blocks[0].attn.qkv = nn.Linear(12, 36)
    with pytest.raises(ValueError, match="to_lora: expected the layers that were adapted"):
        adapter.to_lora(path)
    adapter = tiny()
    adapter.model.head.to("meta")
    with pytest.raises(ValueError, match=r"to_lora: expected loaded weights, got head.weight"):
        adapter.to_lora(path)
    assert not path.exists()


def test_layers_that_never_ran_are_named(tmp_path):
    model = nn.ModuleDict({"used": nn.Linear(WIDTH, WIDTH), "idle": nn.Linear(WIDTH, WIDTH)})
    adapter = tcur.adapt(model, rank=1)
    model["used"](torch.randn(2, WIDTH))
    with pytest.warns(UserWarning, match="to_lora: idle never ran"):
        adapter.to_lora(tmp_path)
    assert pairs(tmp_path).keys() == {"used", "idle"}


def test_a_sharded_core_is_refused(tmp_path):
    adapter = tiny()
    adapter.stacks["12x12"].core.full_tensor = None  # as far as `is_sharded` sees, a DTensor
    with pytest.raises(ValueError, match="expected whole cores, got a sharded or offloaded one in"):
        adapter.to_lora(tmp_path / "lora")


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    adapter = tiny()
    path = tmp_path / "deep" / "lora"
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="path: expected a directory, got a file"):
        adapter.to_lora(tmp_path / "file")

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(lora_file, "save_file", fail)
        with pytest.raises(OSError, match="no space left"):
            adapter.to_lora(path)
        assert not (tmp_path / "deep").exists()
    adapter.to_lora(path, rank=1)
    (path / "README.md").write_text("mine")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    monkeypatch.setattr(lora_file, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        adapter.to_lora(path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    monkeypatch.undo()
    adapter.to_lora(path)
    assert config_of(path)["r"] == 12
    assert (path / "README.md").read_text() == "mine"


# -- the command line


@pytest.fixture
def directory(tmp_path):
    """A model directory, the adapter of its model, and the file of the adapter."""
    from test_cli import write_directory

    adapter = tiny(torch.float32)
    write_directory(tmp_path / "base", adapter.merge(inplace=False))  # not the base
    torch.manual_seed(0)
    write_directory(tmp_path / "model", Tiny(width=12).eval())
    adapter.save(tmp_path / "a")
    return tmp_path / "model", adapter, tmp_path / "a"


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_writes_what_the_method_writes(directory, tmp_path, capsys):
    model, adapter, file = directory
    written = adapter.to_lora(tmp_path / "out", base_model=str(model))
    wanted = {name: (tmp_path / "out" / name).read_bytes() for name in (CONFIG, TENSORS)}
    (tmp_path / "out" / CONFIG).unlink()
    status, out, err = run(capsys, "to-lora", model, file, tmp_path / "out")
    assert (status, out) == (0, f"{written}\n")
    assert "exporting: 100%" in err
    assert {n: (tmp_path / "out" / n).read_bytes() for n in wanted} == wanted

    options = ("--rank", 5, "--dtype", "bfloat16", "--base-model", "b", "--task-type", "CAUSAL_LM")
    written = adapter.to_lora(tmp_path / "x", 8, torch.bfloat16, "b", "CAUSAL_LM")
    status, out, _ = run(capsys, "to-lora", model, file, tmp_path / "y", *options, "--verbose")
    assert out == f"{written.describe()}\n".replace(str(tmp_path / "x"), str(tmp_path / "y"))
    for name in wanted:
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


def test_the_command_refuses(directory, tmp_path, capsys):
    model, adapter, file = directory
    out = tmp_path / "out"
    assert "other weights in stack 12x12" in run(capsys, "to-lora", tmp_path / "base", file, out)[2]
    assert "got 513" in run(capsys, "to-lora", model, file, out, "--rank", 513)[2]
    adapter.model.train()(torch.randn(4, 7, 6))
    adapter.save(file)
    assert "got values of blocks.0.norm" in run(capsys, "to-lora", model, file, out)[2]

    attention = nn.Sequential(nn.MultiheadAttention(WIDTH, 2), nn.Linear(WIDTH, WIDTH))
    from test_cli import write_directory

    write_directory(tmp_path / "attention", attention)
    tcur.adapt(attention, "0.out_proj", rank=2, stacks="layer").save(file)
    status, _, err = run(capsys, "to-lora", tmp_path / "attention", file, out)
    assert (status, "peft adapts as a whole: 0.out_proj" in err) == (2, True)
    assert not out.exists()


class Experts(nn.Module):
    """A parameter with two matrices."""

    def __init__(self):
        super().__init__()
        self.both = nn.Parameter(torch.randn(2, WIDTH, WIDTH))


@pytest.mark.parametrize("kind", ["conv", "experts.both"])
def test_convolutions_and_experts_are_refused(kind, tmp_path, capsys):
    from test_cli import write_directory

    parts = {"conv": nn.Conv1d(WIDTH, WIDTH, 3), "experts": Experts(), "fc": nn.Linear(5, WIDTH)}
    model = nn.ModuleDict(parts)
    write_directory(tmp_path / "model", model)
    adapter = tcur.adapt(model, [kind, "fc"], rank=2, stacks="layer")
    message = f"expected linear layers, got convolutions or experts, .* as LoRA: {kind}"
    with pytest.raises(ValueError, match=message):
        adapter.to_lora(tmp_path / "out")
    adapter.save(tmp_path / "a")
    _, _, err = run(capsys, "to-lora", tmp_path / "model", tmp_path / "a", tmp_path / "out")
    assert f"which are not written as LoRA: {kind}" in err
    assert not (tmp_path / "out").exists()


def test_served_ranks_are_in_order():
    assert list(SERVED_RANKS) == sorted(SERVED_RANKS)
