"""Stacks that are read block by block: the same answers, from files too, in a bounded workspace."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import tcur_kernels as tcur
from tcur_kernels import decompose
from tcur_kernels.decompose import FileMatrix, HeldSlices, Leverage, Shards, open_stack
from tcur_kernels.decompose.slices import BYTES_PER_ELEMENT
from tcur_kernels.decompose.tensor import as_slices
from tolerance import relative_error

RULES = [*decompose.RULES, Leverage("randomized", 4, 1)]


@pytest.fixture
def a():
    left, right = torch.randn(5, 33, 6).double(), torch.randn(5, 6, 20).double()
    return (tcur.t_product(left, right) + 1e-2 * torch.randn(5, 33, 20).double()).float()


@pytest.fixture
def folder(a, tmp_path):
    """Two shards, as Hugging Face writes them: one fused matrix of three slices, two plain ones."""
    fused = a[:3].reshape(99, 20)
    save_file({"qkv": fused, "bias": torch.ones(7)}, tmp_path / "model-1.safetensors")
    save_file({"out": a[3].clone(), "last": a[4].clone()}, tmp_path / "model-2.safetensors")
    weight_map = {"qkv": 1, "bias": 1, "out": 2, "last": 2}
    index = {"weight_map": {k: f"model-{v}.safetensors" for k, v in weight_map.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_any_workspace_gives_the_same(rule, a, folder):
    """One row at a time, whole, and from files: indices equal, cores to rounding."""
    row = 5 * 20 * BYTES_PER_ELEMENT
    tight = row + {"leverage": 75_000, "deim": 75_000, "uniform": 16_000}.get(rule, 16_000)
    if isinstance(rule, Leverage):
        tight = row + 78_000
    results = []
    for stack in (
        HeldSlices("a", list(a)),
        HeldSlices("a", list(a), max_workspace=tight),
        open_stack(folder, ["qkv", "out", "last"], max_workspace=tight),
    ):
        torch.manual_seed(0)
        d = tcur.tensor_cur(stack, 3, rule, "projection")
        results.append((d, d.relative_error(stack), d.relative_error(a)))
    first, *others = results
    for d, *errors in others:
        assert torch.equal(d.rows, first[0].rows)
        assert torch.equal(d.columns, first[0].columns)
        assert torch.equal(d.lateral, a[:, :, d.columns])
        assert torch.equal(d.horizontal, a[:, d.rows])
        # A core is rounded once, from float64.
        unit = torch.finfo(torch.float32).eps / 2
        assert relative_error(d.core, first[0].core) <= 2 * unit
        for error in errors:
            assert abs(error - first[1]) <= unit


@pytest.mark.parametrize("workspace", [20_000, 60_000, 1 << 30])
def test_exact_leverage_takes_as_many_passes_as_it_needs(workspace, a, monkeypatch):
    passes = []
    plain = HeldSlices.blocks
    monkeypatch.setattr(
        HeldSlices, "blocks", lambda *args: (passes.append(args[1]), plain(*args))[1]
    )
    stack = HeldSlices("a", list(a[:, :12, :10]), max_workspace=workspace)
    d = tcur.tensor_cur(stack, 2, Leverage("exact"))
    expected = {20_000: 2, 60_000: 1, 1 << 30: 1}[workspace]
    assert passes.count("spectrum") == expected
    assert torch.equal(d.columns, tcur.tensor_cur(a[:, :12, :10], 2, Leverage("exact")).columns)


def test_passes_per_rule(a, monkeypatch):
    """What the docs say of every rule; columns and rows of slices in memory are no passes."""
    passes = []
    plain = HeldSlices.blocks
    monkeypatch.setattr(
        HeldSlices, "blocks", lambda *args: (passes.append(args[1]), plain(*args))[1]
    )
    counts = {}
    for rule in RULES:
        passes.clear()
        tcur.tensor_cur(a, 3, rule, "intersection")
        counts[str(rule)] = len(passes)
    expected = {"norm": 1, "norm2": 1, "leverage": 1, "deim": 1, "inverse": 1, "uniform": 1}
    assert counts == {**expected, str(RULES[-1]): 4}
    passes.clear()
    tcur.tensor_cur(a, 3, "norm2", "projection")
    assert passes == ["squared norms", "core"]


def test_a_workspace_too_small_says_how_much_is_needed(a):
    row = 5 * 20 * BYTES_PER_ELEMENT
    with pytest.raises(
        ValueError, match=rf"max_workspace: expected at least {row:,} bytes for one"
    ):
        tcur.tensor_cur(a, 2, max_workspace=row - 1)
    for rule, what in ((Leverage("exact"), "the exact SVD"), (Leverage("randomized"), "a range")):
        with pytest.raises(ValueError, match=rf"max_workspace: expected at least .* for {what}"):
            tcur.tensor_cur(a, 2, rule, max_workspace=row)
    with pytest.raises(ValueError, match=r"max_workspace: .* for core of 5 slices"):
        tcur.tensor_cur(a, 20, "norm2", "projection", max_workspace=row)


def test_lists_of_slices(a):
    d = tcur.tensor_cur(as_slices("w", [a[:3].reshape(99, 20), a[3], a[4]]), 3)
    assert torch.equal(d.lateral, tcur.tensor_cur(a, 3).lateral)
    for wrong, error, message in (
        ([], ValueError, "w: expected at least one slice, got none"),
        ([a[0], 3], TypeError, "w: expected torch.Tensors, got int"),
        ([a[0], a[1].int()], TypeError, "w: expected a floating dtype, got torch.int32"),
        ([a[0], a[1, :, 1:]], ValueError, r"w: expected matrices made of 33 x 20 .* number 1"),
        ([a[0], a[1, 1:]], ValueError, r"w: expected matrices made of 32 x 20 .* number 0"),
        ([a[0], a[1].half()], ValueError, r"w: expected torch.float32 on cpu .* torch.float16"),
        ([a[0], a[1].to("meta")], ValueError, r"w: expected torch.float32 on cpu .* meta"),
        ([a[0], a[1, 0]], ValueError, r"w: expected matrices with no empty axis, got \[20\]"),
    ):
        with pytest.raises(error, match=message):
            as_slices("w", wrong)


def test_progress_shows_a_bar(a, capsys):
    tcur.tensor_cur(a, 2, "norm2", "projection", progress=True)
    bars = capsys.readouterr().err
    assert "squared norms" in bars
    assert "core" in bars
    tcur.tensor_cur(a, 2, "norm2")
    assert capsys.readouterr().err == ""


def test_checkpoints(folder):
    shards = Shards(folder)
    assert shards.shapes == {"qkv": [99, 20], "bias": [7], "out": [33, 20], "last": [33, 20]}
    assert shards.dtype("out") == torch.float32
    assert torch.equal(shards.read("bias"), torch.ones(7))
    single = Shards(folder / "model-2.safetensors")
    assert set(single.files) == {"out", "last"}
    (folder / "model.safetensors.index.json").unlink()
    assert set(Shards(str(folder)).files) == set(shards.files)


def test_parts_and_transposes_of_stored_matrices(a, tmp_path):
    """A block of rows of a larger matrix, and a matrix that is stored the other way round."""
    save_file(
        {"in_proj": a[:3].reshape(99, 20), "conv": a[3:].reshape(66, 20).T.contiguous()},
        tmp_path / "model.safetensors",
    )
    parts = [
        FileMatrix("in_proj", first=33, rows=33),
        FileMatrix("conv", "transposed"),
        FileMatrix("in_proj", first=66),
    ]
    stack = open_stack(tmp_path, parts, max_workspace=30_000)
    expected = a[[1, 3, 4, 2]]
    d = tcur.tensor_cur(stack, 3, "norm2", "projection")
    assert torch.equal(d.lateral, expected[:, :, d.columns])
    assert torch.equal(d.horizontal, expected[:, d.rows])
    assert d.relative_error(stack) == pytest.approx(d.relative_error(expected), rel=1e-12)
    for first, rows in ((33, 67), (-1, 2), (99, None), (0, 0)):
        with pytest.raises(ValueError, match="names: expected rows within the 99 of in_proj"):
            open_stack(tmp_path, [FileMatrix("in_proj", first=first, rows=rows)])


@pytest.mark.parametrize("place", [(0, 5), (4, 32)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rule", ["norm", "norm2", "leverage", "uniform", ([0, 1], [0, 1])])
def test_not_finite_anywhere_in_a_shard(place, value, rule, folder, a):
    index, row = place
    name, first, file = ("qkv", 0, 1) if index == 0 else ("last", 0, 2)
    tensors = (
        {"qkv": a[:3].reshape(99, 20), "bias": a[0, 0]}
        if file == 1
        else {"out": a[3], "last": a[4]}
    )
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    tensors[name][row, 7] = value
    save_file(tensors, folder / f"model-{file}.safetensors")
    stack = open_stack(folder, ["qkv", "out", "last"])
    message = rf"weights: {name}, rows {first} to 32, in model-{file}.safetensors: expected finite"
    with pytest.raises(ValueError, match=message):
        tcur.tensor_cur(stack, 2, rule)


def test_checkpoints_refuse(folder, a, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(FileNotFoundError, match=r"weights: expected \*\.safetensors with .* none"):
        Shards(empty)
    with pytest.raises(FileNotFoundError, match="weights: expected a file or directory"):
        Shards(empty / "nothing")
    names = ["qkv", "out"]
    with pytest.raises(ValueError, match=r"weights: expected gone in .* got 4 other tensors"):
        open_stack(folder, [*names, "gone"])
    with pytest.raises(ValueError, match="names: expected at least one tensor"):
        open_stack(folder, [])
    message = r"weights: expected bias to be a matrix \(matrix\), got \[7\]"
    with pytest.raises(ValueError, match=message):
        open_stack(folder, [*names, "bias"])
    with pytest.raises(ValueError, match=r"made of 50 x 20 slices as qkv, got 99 x 20 in model-1"):
        open_stack(folder, names, n1=50)

    other = {"last": a[4].half()}
    save_file({"out": a[3].clone(), **other}, folder / "model-2.safetensors")
    with pytest.raises(ValueError, match=r"expected last to be torch.float32 as qkv, got"):
        open_stack(folder, [*names, "last"])
    save_file({"out": a[3].clone(), "last": a[4, :, :9].clone()}, folder / "model-2.safetensors")
    with pytest.raises(ValueError, match=r"expected last to be made of 33 x 20 .* got 33 x 9"):
        open_stack(folder, [*names, "last"])
    save_file(
        {"out": a[3].clone(), "last": torch.ones(33, 20).int()}, folder / "model-2.safetensors"
    )
    with pytest.raises(TypeError, match="weights: expected a floating dtype, got I32 in last"):
        open_stack(folder, [*names, "last"])

    stack = open_stack(folder, names)
    torn = (folder / "model-1.safetensors").read_bytes()[:-3000]
    (folder / "model-1.safetensors").write_bytes(torn)
    with pytest.raises(
        ValueError,
        match=r"expected the file as it was .*got a shorter one at .*model-1.safetensors",
    ):
        tcur.tensor_cur(stack, 2)
    save_file({"qkv": a[:3].reshape(99, 20), "bias": torch.ones(7)}, folder / "model-1.safetensors")

    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(ValueError, match="weights: expected an index with a weight_map"):
        Shards(folder)
    index.unlink()
    save_file({"out": a[3].clone()}, folder / "model-3.safetensors")
    with pytest.raises(ValueError, match="expected each tensor once, got out in model-2"):
        Shards(folder)
    (folder / "model-3.safetensors").write_bytes(
        (folder / "model-1.safetensors").read_bytes()[:-100]
    )
    with pytest.raises(ValueError, match=r"expected a whole safetensors file, got .*model-3"):
        Shards(folder)
    index.write_text(json.dumps({"weight_map": {"x": "model-9.safetensors"}}))
    with pytest.raises(
        FileNotFoundError, match=r"weights: expected all shards of .* got none at .*model-9"
    ):
        Shards(folder)


#: Peak of a child beyond what it had after warming up, in MiB: the peak of the resident set, which
#: counts what torch, LAPACK and mapped files hold, not only what Python's allocator sees.
CHILD = """
import sys, torch
import tcur_kernels as tcur
from tcur_kernels.decompose import Leverage, open_stack
def resident(field):
    with open("/proc/self/status") as file:
        return next(int(x.split()[1]) / 1024 for x in file if x.startswith(field))
def run(path, n3, workspace):
    stack = open_stack(path, [f"layer{i}" for i in range(n3)], max_workspace=workspace << 20)
    rule = Leverage("randomized") if sys.argv[3] == "randomized" else sys.argv[3]
    d = tcur.tensor_cur(stack, 4, rule, "projection")
    return d.relative_error(stack)
torch.set_num_threads(1)
run(sys.argv[1], 4, 16)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew, without that of the imports
before = resident("VmRSS")
run(sys.argv[2], 24, 32)
print(resident("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """24 slices of 1024 x 768, 72 MiB; as an fp64 spectrum twice as much."""
    folder = tmp_path_factory.mktemp("large")
    for name, n3 in (("small", 4), ("large", 24)):
        slices = {f"layer{i}": torch.randn(1024, 768) for i in range(n3)}
        save_file(slices, folder / f"{name}.safetensors")
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("rule", ["norm", "norm2", "randomized"])
def test_peak_memory_is_bounded(rule, large):
    """A stack of 72 MiB, 144 MiB in the spectrum, in a workspace of 32 MiB."""
    command = [sys.executable, "-c", CHILD, large / "small.safetensors"]
    command += [large / "large.safetensors", rule]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    # Beside the workspace: C, R and the core, their spectra in fp64, and freed blocks that the
    # allocator keeps, which vary from run to run.
    assert float(result.stdout) < 32 + 16
