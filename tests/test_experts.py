"""Experts: parameters ``[experts, n1, n2]`` of modules whose own forward multiplies by them."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tcur_kernels as tcur
from adapted import randomise
from expert_models import (
    ALL,
    EXPERTS,
    IDS,
    IN,
    ONE,
    OUT,
    TARGETS,
    Experts,
    Model,
    adapted,
    exactly,
    tokens,
    with_gradients,
)
from tcur_kernels.layers import expert_weights
from tolerance import (
    assert_composition_close,
    assert_equal_in_float64,
    relative_error,
    same_mathematics,
)

#: Each way to multiply reads one of two parameters.
pytestmark = pytest.mark.filterwarnings("ignore:.*never ran")


@pytest.mark.parametrize("mode", ["factored", "materialized"])
@pytest.mark.parametrize("way", [*ONE, *ALL])
def test_experts_compute_with_w_eff(way, mode):
    x, ids = tokens(way)
    base = Model(way)
    model = copy.deepcopy(base)
    adapter = tcur.adapt(model, TARGETS, rank=3, mode=mode, stacks="layer")
    assert torch.equal(model(x, ids), base(x, ids))
    randomise(adapter, 0.1)
    if not way.startswith("grouped"):  # torch has no grouped product in float64
        x = x.double()
        model.double()
    found = with_gradients(model, adapter, x, ids)
    kept = [index for index, each in enumerate(found) if each is not None]
    assert len(kept) == 3  # each way reads one of the two parameters
    exact = exactly(adapter, x, ids, way)()
    for index in kept:
        if x.dtype == torch.float64:
            assert_equal_in_float64(found[index], exact[index])
        else:
            assert same_mathematics(found[index], exact[index].float())
    merged = adapter.merge(inplace=False)
    assert type(merged.experts) is Experts
    assert same_mathematics(merged(x, ids), exact[0].to(x.dtype))


@pytest.mark.parametrize("way", ["times", "grouped"])
def test_rounding(way):
    model, adapter = adapted(way, targets="columns" if way == "times" else "rows", mode="factored")
    x, ids = tokens(way)
    found = with_gradients(model, adapter, x, ids)
    same = exactly(adapter, x, ids, way, torch.float32)
    assert_composition_close(found, same, exactly(adapter, x, ids, way)())


@pytest.mark.parametrize("way", [way for way in (*ONE, *ALL) if "of" not in way.split()])
def test_products_compute_no_weight(way, monkeypatch):
    model, adapter = adapted(way, mode="factored")
    monkeypatch.setattr(expert_weights.EffectiveWeight, "numbers", None)  # using it fails
    assert any(each is not None for each in with_gradients(model, adapter, *tokens(way))[2:])
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.equal(model(*tokens(way)), model(*tokens(way)))


class Allocated(TorchDispatchMode):
    """The largest number of elements of a tensor that is no view of ``known``."""

    def __init__(self, *known):
        super().__init__()
        self.known = {each.untyped_storage().data_ptr() for each in known}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        lazy = (expert_weights.EffectiveWeight, expert_weights.Part)
        assert not any(isinstance(each, lazy) for each in tree_leaves((args, kwargs)))
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if (
                isinstance(each, torch.Tensor)
                and each.untyped_storage().data_ptr() not in self.known
            ):
                self.largest = max(self.largest, each.numel())
        return out


@pytest.mark.parametrize("way", ["linear", "times"])
def test_one_expert_at_a_time_allocates_nothing_of_the_size_of_all(way):
    model, _ = adapted(way, mode="factored", rank=1)
    x, ids = tokens(way)
    model(x, ids)  # what is prepared once
    parameters = (model.experts.base_rows, model.experts.base_columns)
    with Allocated(*parameters) as seen:
        y = model(x, ids)
        y.square().sum().backward()
    assert 0 < seen.largest <= 2 * OUT * IN < parameters[0].numel()
    # Other functions get the numbers; a mode sees them computed.
    with Allocated(*parameters) as seen:
        model.experts.rows.sum().backward()
    assert seen.largest == parameters[0].numel()


def test_one_expert_is_computed_alone():
    model, adapter = adapted(mode="auto")
    w = adapter.merge(inplace=False).experts.rows
    with torch.no_grad():
        assert same_mathematics(model.experts.rows[2].clone(), w[2])
        assert same_mathematics(model.experts.rows[-1, 3:5].clone(), w[-1, 3:5])
        each = [one.clone() for one in model.experts.rows]
        assert adapter.stacks["12x8"]._kept._eager is None
    assert same_mathematics(torch.stack(each), w)
    built, adapter = adapted(mode="materialized")
    with torch.no_grad():  # the first expert begins where all of them do
        assert torch.equal(built.experts.rows.clone()[0], built.experts.rows[0].clone())
    with pytest.raises(IndexError, match="index 4 is out of bounds for dimension 0 with size 4"):
        model.experts.rows[EXPERTS]
    assert same_mathematics(model.experts.rows[1:3].detach(), w.detach()[1:3])
    assert same_mathematics(model.experts.rows.permute(2, 0, 1).detach(), w.permute(2, 0, 1))
    assert same_mathematics(model.experts.rows.transpose(0, 1).detach(), w.transpose(0, 1))
    picked = model.experts.rows[IDS]
    with torch.no_grad():
        assert repr(model.experts.rows[IDS]) == repr(picked.detach())
    assert same_mathematics(copy.deepcopy(model.experts.rows.detach()[IDS]), w[IDS])
    assert same_mathematics(pickle.loads(pickle.dumps(model.experts.rows.detach()[1])), w[1])
    assert len(picked) == len(IDS)
    assert picked.requires_grad
    assert picked.shape == (len(IDS), OUT, IN)


class Norm(torch.autograd.Function):
    """A function of autograd that gets a part itself."""

    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        return weight.square().sum()

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad * 2 * weight


@pytest.mark.parametrize(
    "part", [lambda w: w[1], lambda w: w[IDS], lambda w: w.mT, lambda w: w[IDS].mT]
)
def test_a_part_may_be_given_to_a_function_of_autograd(part):
    model, adapter = adapted()
    core, rows = adapter.stacks["12x8"].core, model.experts.rows
    (wanted,) = torch.autograd.grad(part(rows).square().sum(), core)
    (by_function,) = torch.autograd.grad(Norm.apply(part(rows)), core)
    assert same_mathematics(by_function, wanted)
    with torch._C.DisableTorchFunctionSubclass():
        (below,) = torch.autograd.grad(part(model.experts.rows).square().sum(), core)
    assert same_mathematics(below, wanted)
    with torch._C.DisableTorchFunctionSubclass():
        (below,) = torch.autograd.grad(torch.square(part(rows)).sum(), core)
    assert same_mathematics(below, wanted)


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
def test_any_other_function_gets_the_numbers():
    model, adapter = adapted()
    experts, plain = model.experts, adapter.merge(inplace=False).experts
    x, batch, out = torch.randn(5, IN), torch.randn(EXPERTS, 5, IN), torch.empty(5, OUT)

    def results(w):
        yield from (w.T, torch.transpose(w, 0, 2), w.swapaxes(0, 1), w.permute(2, 0, 1), w[None][0])
        yield from (w.unbind(1)[2], w[True][0], w[[1, 2]], w.mT @ w, F.linear(w[0], x))
        yield torch.mm(x, w[0].mT, out=out)
        yield torch.bmm(batch, w.mT, out=torch.empty(EXPERTS, 5, OUT))
        yield from (x @ w.mT, batch.double() @ w.mT.double(), torch.matmul(batch[0, 0], w.mT))
        yield from (torch._grouped_mm(batch, w.mT), w[1][2], w[1].t().t(), w.mT[IDS])

    with torch.no_grad():
        for found, wanted in zip(results(experts.rows), results(plain.rows), strict=True):
            assert same_mathematics(found + 0, wanted + 0)
    for wrong in (lambda w: F.linear(x[:, 1:], w[0]), lambda w: torch.bmm(batch, w)):
        with pytest.raises(RuntimeError):
            wrong(experts.rows)


@pytest.mark.parametrize("way", ["linear", "times", "grouped", "picked"])
def test_base_weights_are_not_trained(way):
    model, adapter = adapted(way)
    for name in ("rows", "columns"):  # new parameters, as code that loads weights makes them
        held = getattr(model.experts, f"base_{name}").detach().clone()
        setattr(model.experts, name, nn.Parameter(held))
    found = with_gradients(model, adapter, *tokens())
    assert any(each is not None for each in found[2:])
    assert not model.experts.base_rows.requires_grad or way == "times"
    for parameter in (model.experts.base_rows, model.experts.base_columns):
        parameter.requires_grad_()
    with pytest.raises(ValueError, match=r"weight: expected .*frozen|requires_grad"):
        model(*tokens())


def test_parts_are_written_like_those_of_a_parameter():
    model, adapter = adapted()
    before = model.experts.base_rows.detach().clone()
    with torch.no_grad():
        copied = model.experts.rows[IDS]
        copied.mul_(0)
        assert not copied.any()  # the copy, and nothing else
        assert torch.equal(model.experts.base_rows, before)
        model.experts.rows[1].zero_()
    assert not model.experts.base_rows[1].any()
    assert torch.equal(model.experts.base_rows[0], before[0])
    x, ids = tokens()
    assert same_mathematics(model(x, ids), adapter.merge(inplace=False)(x, ids))  # C and R as well


@pytest.mark.parametrize("way", ["linear", "times", "times its transpose", "grouped", "picked"])
def test_small_updates_survive_in_16_bits(way):
    model = Model(way).bfloat16()
    torch.manual_seed(2)
    x, ids = torch.randn(512, IN).bfloat16(), torch.randint(EXPERTS, (512,))
    adapter = tcur.adapt(model, TARGETS, rank=3)
    start = model(x, ids)
    assert torch.equal(start, Model(way).bfloat16()(x, ids))
    randomise(adapter, 1e-4)
    y = model(x, ids)
    exact = exactly(adapter, x, ids, way)()[0]
    with adapter.disable():
        model.double()
        model.experts.way = "times" if way == "times" else "linear"
        update = exact - model(x.double(), ids)
    found = (y.double() - start.double() - update) @ update.mT / update.square().sum()
    assert abs(float(found.detach().trace())) < 0.2
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("way", ["linear", "times", "grouped", "picked", "all of them"])
def test_autocast(way):
    x, ids = tokens(way)
    base = Model(way)
    model = copy.deepcopy(base)
    adapter = tcur.adapt(model, TARGETS, rank=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x, ids), base(x, ids))
        randomise(adapter, 0.1)
        y = model(x, ids)
    y.float().sum().backward()
    exact = exactly(adapter, x, ids, way)()[0]
    assert relative_error(y, exact) < 0.05
    assert any(stack.core.grad is not None for stack in adapter.stacks.values())


@pytest.mark.parametrize("way", ["linear", "times", "picked", "as many for each", "all of them"])
def test_derivatives_in_float64(way):
    model, adapter = adapted(way, mode="factored", stacks="layer")
    model.double()
    x, ids = tokens(way)
    x = x[:, :].double().requires_grad_()
    cores = [stack.core for stack in adapter.stacks.values()]
    used = [c for c, g in zip(cores, _grads(model(x, ids), cores), strict=True) if g is not None]
    assert len(used) == 1
    assert torch.autograd.gradcheck(lambda *_: model(x, ids), (x, *used), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *_: model(x, ids).sin(), (x, *used), fast_mode=True)


def _grads(y, cores):
    return torch.autograd.grad(y.sum(), cores, allow_unused=True)


def test_in_a_capture_the_numbers_of_tokens_are_unknown(monkeypatch):
    """CUDA graphs allow no look at them, so W_eff of all experts is built."""
    model, adapter = adapted("grouped", mode="factored")
    found = with_gradients(model, adapter, *tokens())
    monkeypatch.setattr(expert_weights, "streams", SimpleNamespace(capture_of=lambda device: 1))
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    again = with_gradients(model, adapter, *tokens())
    assert same_mathematics(again[0], found[0])
    assert same_mathematics(again[1], found[1])


@pytest.mark.parametrize("mode", ["auto", "factored"])
def test_many_tokens_use_w_eff_where_that_is_less_work(mode):
    for way in ("grouped", "linear", "times"):
        model, adapter = adapted(way, mode=mode)
        x, ids = torch.randn(400, IN), torch.randint(EXPERTS, (400,))
        model(x, ids)
        is_built = any(stack._kept._eager is not None for stack in adapter.stacks.values())
        assert is_built == (mode == "auto")


def test_tokens_of_no_expert_come_last():
    """Experts of other processes are numbers beyond the last."""
    model, adapter = adapted("grouped")
    x, ends = torch.randn(6, IN), torch.tensor([1, 1, 3, 4], dtype=torch.int32)
    y = F.grouped_mm(x, model.experts.rows.mT, offs=ends)
    w = adapter.merge(inplace=False).experts.rows
    assert y.shape == (6, OUT)
    assert same_mathematics(y[:4], F.grouped_mm(x[:4], w.mT, offs=ends))
    none = F.grouped_mm(x[:0], model.experts.rows.mT, offs=torch.zeros(4, dtype=torch.int32))
    assert none.shape == (0, OUT)
