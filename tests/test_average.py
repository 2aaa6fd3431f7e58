"""The mean of adapter files is the mean of their W_eff; what has no mean is refused."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import rewriting
import tcur_kernels as tcur
from adapted import randomise
from models import Tiny
from plain import Plain
from tolerance import assert_equal_in_float64

KEPT = ("head", "blocks.?.norm")


def trained(path, seed, dtype=torch.float32, metadata=None, factors=False, **kwargs):
    """Writes an adapter of the tiny model: random cores, and norms that saw ``seed`` batches."""
    torch.manual_seed(0)
    model = Tiny().to(dtype)
    adapter = tcur.adapt(model, **{"rank": 2, **kwargs})
    torch.manual_seed(seed)
    randomise(adapter)
    if adapter.train_also:
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn_like(parameter))
        for _ in range(seed):
            model.train()(torch.randn(4, 7, 6, dtype=dtype))
    adapter.metadata = metadata or {}
    adapter.save(path, factors=factors)
    return adapter


def weights(adapter):
    """W_eff by plain torch in float64, and all else that is trained."""
    parameters = Plain(adapter, torch.float64).parameters()
    return {name: value.detach().double() for name, value in parameters.items()}


def mean(values, shares):
    return sum(share * value for share, value in zip(shares, values, strict=True))


@pytest.mark.parametrize("train_also", [(), KEPT])
def test_the_mean_of_the_effective_weights(tmp_path, train_also):
    paths = [tmp_path / name for name in "abc"]
    clients = [
        trained(path, seed, torch.float64, train_also=train_also)
        for seed, path in enumerate(paths, 1)
    ]
    counts = (10, 20, 70)
    tcur.Adapter.average(dict(zip(paths, counts, strict=True)), tmp_path / "mean")
    torch.manual_seed(0)
    adapter = tcur.load_adapter(Tiny().double(), tmp_path / "mean")
    own = [weights(client) for client in clients]
    for name, value in weights(adapter).items():
        wanted = mean([w[name] for w in own], (0.1, 0.2, 0.7))
        assert_equal_in_float64(value, wanted)
    for name, is_trained in (("blocks.0.attn.qkv", True), ("head", bool(train_also))):
        assert torch.equal(own[0][f"{name}.weight"], own[1][f"{name}.weight"]) != is_trained
    buffers = [dict(client.model.named_buffers()) for client in clients]
    for name, value in adapter.model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            assert_equal_in_float64(value, mean([b[name] for b in buffers], (0.1, 0.2, 0.7)))
        elif name.endswith("num_batches_tracked"):  # 1, 2 and 3: the mean is 2.6
            assert value.item() == (3 if train_also else 0)


def test_it_is_rounded_once(tmp_path):
    """The mean of three numbers, summed in fp64: in fp32 nearly half of them would be off."""
    paths = [tmp_path / name for name in "abc"]
    adapters = [trained(path, seed) for seed, path in enumerate(paths, 1)]
    files = {**dict.fromkeys(paths, 7), paths[0]: 3, str(paths[0]): 4}  # one of them twice
    tcur.Adapter.average(files, tmp_path / "mean")
    for name, core in load_file(tmp_path / "mean").items():
        own = [a.stacks[name.removeprefix("core.")].core.detach().double() for a in adapters]
        assert core.dtype == torch.float32
        assert torch.equal(core, (sum(own) / 3).float())


def header_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_mean_of_equal_files_is_that_file(tmp_path):
    """Also a file over itself: it is read before it is written. Strings are paths."""
    for name in "abc":
        trained(tmp_path / name, 1, train_also=KEPT, metadata={"k": 1}, factors=True)
    header, tensors = header_of(tmp_path / "a"), load_file(tmp_path / "a")
    first, others = tmp_path / "a", {str(tmp_path / "b"): 0.3, tmp_path / "c": 1e-9}
    tcur.Adapter.average({first: 1, str(first): 2, **others}, first)
    assert header_of(first) == header
    found = load_file(first)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_what_the_files_share_is_kept(tmp_path):
    common = {"spacing": [1.0, 2.0], "task": {"name": "x"}}
    trained(tmp_path / "a", 1, metadata={**common, "client": 1, "a": 0}, factors=True)
    trained(tmp_path / "b", 2, metadata={"client": 2, **common}, factors=True)
    tcur.Adapter.average({tmp_path / "a": 1, tmp_path / "b": 1}, tmp_path / "mean")
    assert tcur.read_metadata(tmp_path / "mean") == common
    assert "lateral.8x8" in load_file(tmp_path / "mean")
    trained(tmp_path / "b", 2)
    tcur.Adapter.average({tmp_path / "a": 1, tmp_path / "b": 1}, tmp_path / "mean")
    assert "lateral.8x8" not in load_file(tmp_path / "mean")
    tcur.load_adapter(base(), tmp_path / "mean")


def base():
    torch.manual_seed(0)
    return Tiny()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 1}, "rank in stack 8x8 2 at"),
        ({"alpha": 2.0}, r"alpha in stack 8x8 1\.0 at .*, got 2\.0"),
        ({"basis": "slices"}, "basis in stack 8x8 orthonormal at .*, got slices"),
        ({"precision": "bf16"}, "precision in stack 8x8 ieee at"),
        ({"mode": "factored"}, "mode in stack 8x8 auto at"),
        ({"selection": "deim"}, "rows of R in stack 8x8 that are the same at"),
        ({"targets": "mlp.?"}, "names of stacks that are the same at .*, got others"),
        ({"targets": ["attn.qkv", "mlp.?"]}, "layers in stack 8x8 that are the same at"),
        ({"train_also": "embed"}, "patterns of train_also that are the same"),
        ({"dtype": torch.float64}, r"dtype of the base in stack 8x8 torch\.float32 at"),
    ],
)
def test_files_that_differ_in_more_than_numbers(tmp_path, change, message):
    trained(tmp_path / "a", 1)
    trained(tmp_path / "b", 1, **change)
    with pytest.raises(ValueError, match=f"weights: expected {message}"):
        tcur.Adapter.average({tmp_path / "a": 1, tmp_path / "b": 1}, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_other_bases(tmp_path):
    trained(tmp_path / "a", 1)
    for name, what in (("blocks.0.attn.qkv", "weights of the base in stack"), ("embed", "frozen")):
        model = base()
        with torch.no_grad():
            model.get_submodule(name).weight += 1
        stacks = tcur.load_adapter(base(), tmp_path / "a").stacks
        indices = {key: (stack.rows, stack.columns) for key, stack in stacks.items()}
        tcur.adapt(model, rank=2, selection=indices).save(tmp_path / "b")
        with pytest.raises(ValueError, match=f"weights: expected {what} .* got others"):
            tcur.Adapter.average({tmp_path / "a": 1, tmp_path / "b": 1}, tmp_path / "mean")


def test_buffers_that_only_one_training_changed(tmp_path):
    trained(tmp_path / "a", 1, train_also=KEPT)
    trained(tmp_path / "b", 0, train_also=KEPT)
    with pytest.raises(ValueError, match=r"tensor buffer.*num_batches.*: torch.int64 .*, got none"):
        tcur.Adapter.average({tmp_path / "a": 1, tmp_path / "b": 1}, tmp_path / "mean")


def rewritten(path, name, value):
    """Replaces a tensor of a file."""
    rewriting.rewritten(path, tensors={name: value})


def test_numbers_without_a_mean(tmp_path):
    paths = {tmp_path / "a": 1, tmp_path / "b": 1}
    for seed, path in enumerate(paths, 1):
        trained(path, seed, train_also="head")

    def average():
        tcur.Adapter.average(paths, tmp_path / "mean")

    def both(name, *values):
        for path, value in zip(paths, values, strict=True):
            rewritten(path, name, value)

    both("trained.head.bias", torch.zeros(5), torch.tensor([0, 1, torch.inf, 0, 0]))
    with pytest.raises(ValueError, match=r"finite numbers in trained.head.bias, .* in .*b$"):
        average()
    largest = torch.finfo(torch.float32).max
    both("trained.head.bias", torch.full((5,), largest), torch.full((5,), -largest))
    paths[tmp_path / "b"] = -0.9
    with pytest.raises(ValueError, match=r"trained.head.bias, got NaN or Inf in their mean"):
        average()
    paths[tmp_path / "b"] = 1
    both("trained.head.bias", torch.zeros(5), torch.zeros(5))
    both("buffer.mask", torch.tensor([True, False]), torch.tensor([True, True]))
    with pytest.raises(ValueError, match=r"same buffer.mask, whose booleans have no mean"):
        average()
    # The same in all files: nothing has to be averaged.
    limits = torch.tensor([0, -torch.inf])
    both("buffer.mask", torch.tensor([True, False]), torch.tensor([True, False]))
    both("buffer.limits", limits, limits)
    assert not (tmp_path / "mean").exists()
    average()
    assert torch.equal(load_file(tmp_path / "mean")["buffer.limits"], limits)


def test_complex_parameters(tmp_path):
    paths = {tmp_path / "a": 1, tmp_path / "b": 3}
    for path, value in zip(paths, (1 + 2j, 3 - 4j), strict=True):
        trained(path, 1)
        rewritten(path, "trained.phase", torch.tensor([value]))
    tcur.Adapter.average(paths, tmp_path / "mean")
    assert load_file(tmp_path / "mean")["trained.phase"].tolist() == [2.5 - 2.5j]


def test_bad_weights(tmp_path):
    trained(tmp_path / "a", 1)
    a, out = tmp_path / "a", tmp_path / "mean"
    for wrong, message in (
        ([a], r"expected {path: weight}, got list"),
        ({a: "1"}, "expected numbers, got str"),
        ({a: True}, "expected numbers, got bool"),
        ({1: 1.0}, "expected paths, got int"),
    ):
        with pytest.raises(TypeError, match=f"weights: {message}"):
            tcur.Adapter.average(wrong, out)
    for wrong, message in (
        ({}, "a sum above 0, got a sum of 0"),
        ({a: 0}, "a sum above 0, got a sum of 0"),
        ({a: -1.0}, "a sum above 0, got a sum of -1"),
        ({a: float("nan")}, "expected finite numbers, got nan"),
        ({a: float("inf")}, "expected finite numbers, got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            tcur.Adapter.average(wrong, out)
    with pytest.raises(FileNotFoundError, match="expected an adapter file, got none at"):
        tcur.Adapter.average({a: 1, tmp_path / "x": 1}, out)
    assert not out.exists()
