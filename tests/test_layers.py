"""Stacks and layers: drop-in behaviour, when W_eff is built, what gradients reach."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
import tcur_kernels as tcur
from plain import product, scale_of, sides_of
from tcur_kernels.layers import route, w_eff
from tcur_kernels.operators import cost
from tolerance import PROMISE, assert_composition_close, assert_equal_in_float64, relative_error

MODES = pytest.mark.parametrize("mode", ["materialized", "factored"])


def make_linears(count=3, n1=6, n2=9, fused=True, dtype=torch.float32):
    """``count`` layers of one slice, and a fused one of three slices in their midst."""
    linears = [nn.Linear(n2, n1, dtype=dtype) for _ in range(count)]
    if fused:
        linears.insert(1, nn.Linear(n2, 3 * n1, bias=False, dtype=dtype))
    for linear in linears:
        linear.requires_grad_(False)
    return linears


def make_stack(mode="auto", alpha=0.7, basis="orthonormal", **kwargs):
    linears = make_linears(**kwargs)
    return tcur.TProductStack(linears, rank=2, alpha=alpha, mode=mode, basis=basis), linears


def randomise(stack):
    with torch.no_grad():
        stack.core.normal_()


@pytest.fixture
def builds(monkeypatch):
    """Counts how often W_eff is built."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs["out"].data_ptr())
        return materialize(*args, **kwargs)

    materialize = route.materialize
    monkeypatch.setattr(route, "materialize", counted)
    return calls


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_zero_core_changes_no_bit(mode, dtype):
    stack, linears = make_stack(mode, dtype=dtype)
    x = torch.randn(4, 5, 9, dtype=dtype)
    for layer, linear in zip(stack.layers, linears, strict=True):
        assert torch.equal(layer(x), linear(x))


def by_torch(stack, weights, inputs, dtype):
    """Outputs of layers with these weights; inputs and core as leaves. float64: the definition."""
    weight = torch.cat(weights).unflatten(0, (stack.n3, stack.n1)).to(dtype)
    core = stack.core.detach().to(dtype, copy=True).requires_grad_()
    lateral, horizontal = sides_of(stack, weight)
    update = (oracle.cur_product if dtype == torch.float64 else product)(lateral, core, horizontal)
    blocks = (weight + scale_of(stack) * update).flatten(0, 1).split([len(w) for w in weights])
    inputs = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    biases = [None if layer.bias is None else layer.bias.to(dtype) for layer in stack.layers]
    return tuple(map(F.linear, inputs, blocks, biases)), (*inputs, core)


@MODES
@pytest.mark.parametrize("basis", ["orthonormal", "slices"])
def test_values_and_gradients_against_the_definition(mode, basis):
    """Every slice, the fused ones too, against float64 autograd through bcirc."""
    stack, linears = make_stack(mode, basis=basis)
    randomise(stack)
    inputs = [torch.randn(4, 9, requires_grad=True) for _ in linears]
    outputs = [layer(x) for layer, x in zip(stack.layers, inputs, strict=True)]
    grads = [torch.randn_like(y) for y in outputs]
    torch.autograd.backward(outputs, grads)

    def plain(dtype):
        outputs, leaves = by_torch(stack, [linear.weight for linear in linears], inputs, dtype)
        return outputs + torch.autograd.grad(outputs, leaves, [grad.to(dtype) for grad in grads])

    assert_composition_close(
        (*outputs, *(x.grad for x in inputs), stack.core.grad),
        lambda: plain(torch.float32),
        plain(torch.float64),
    )
    assert all(linear.weight.grad is None for linear in linears)


@MODES
def test_gradient_checks_in_float64(mode):
    stack, _ = make_stack(mode, dtype=torch.float64)
    randomise(stack)
    x = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    core = stack.core

    def run(x, core):
        return stack.layers[1](x)

    assert torch.autograd.gradcheck(run, (x, core))


def test_w_eff_is_built_once_per_core_version(builds):
    stack, _ = make_stack("materialized")
    x = torch.randn(4, 9)
    for _ in range(3):  # gradient accumulation: three passes over all layers, one build
        sum(layer(x).sum() for layer in stack.layers).backward()
    with torch.no_grad():
        stack.layers[0](x)
    assert len(builds) == 1
    optimizer = torch.optim.Adam([stack.core])
    optimizer.step()
    for layer in stack.layers:
        layer(x)
    assert len(builds) == 2


@pytest.mark.parametrize("write", ["data", "copy", "assign"])
def test_no_write_to_the_core_goes_unseen(write):
    """Optimizers of old write through ``.data``, which leaves no trace in the version counter."""
    stack, _ = make_stack("materialized")
    x = torch.randn(4, 9)
    before = stack.layers[0](x)
    value = torch.randn_like(stack.core)
    if write == "data":
        stack.core.data.add_(value)
    elif write == "copy":
        with torch.no_grad():
            stack.core.copy_(value)
    else:
        stack.core.data = value
    assert not torch.equal(stack.layers[0](x), before)


def test_evaluating_in_inference_mode_leaves_nothing_behind():
    """W_eff built there must serve a training step after it: no inference tensor may be kept."""
    stack, _ = make_stack("materialized")
    randomise(stack)
    x = torch.randn(4, 9, requires_grad=True)
    with torch.inference_mode():
        y = stack.layers[0](x)
    again = stack.layers[0](x)
    assert torch.equal(y, again)
    again.sum().backward()
    assert stack.core.grad.abs().max() > 0


def test_new_base_weights_are_seen():
    stack, linears = make_stack("materialized")
    x = torch.randn(4, 9)
    stack.layers[0](x)
    with torch.no_grad():
        linears[0].weight.mul_(2)
    assert torch.equal(stack.layers[0](x), linears[0](x))


class Operands(TorchDispatchMode):
    """Which memory `materialize_out` is given, and every other operator that makes as much."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.given, self.made = numbers, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.name() == "tcur::materialize_out":
            self.given.append([weight.data_ptr() for weight in args[0]])
        is_new = func._schema.returns and func._schema.returns[0].alias_info is None
        if is_new and isinstance(result, torch.Tensor) and result.numel() >= self.numbers:
            self.made.append(func.name())
        return result


@pytest.mark.parametrize("widths", [(1,), (1, 1), (1,) * 5, (3,), (3, 1, 3, 1), (1, 2, 2)], ids=str)
def test_weights_stored_the_other_way_round_are_not_copied(widths):
    """As GPT-2's ``Conv1D`` has them, with one slice or with several side by side."""
    linears = [nn.Linear(30, 20 * width, dtype=torch.float64) for width in widths]
    for linear in linears:
        linear.requires_grad_(False)
    how = {"rank": 2, "alpha": 0.7, "mode": "materialized", "n1": 20}
    plain = tcur.TProductStack(linears, **how)
    for linear in linears:
        linear.weight = nn.Parameter(linear.weight.T.contiguous().T, requires_grad=False)
    stack = tcur.TProductStack(linears, **how)
    x = torch.randn(4, 30, dtype=torch.float64, requires_grad=True)
    for is_new in (True, False):
        randomise(stack)
        plain.core.data.copy_(stack.core)
        with Operands(20 * 30) as operands:  # factors and core are smaller
            stack.layers[0](x)
        assert operands.given == [[linear.weight.data_ptr() for linear in linears]]
        assert operands.made == ["aten::empty.memory_format"] * is_new  # the buffer
        for layer, same in zip(stack.layers, plain.layers, strict=True):
            grads = [torch.autograd.grad(each(x).square().sum(), x)[0] for each in (layer, same)]
            assert_equal_in_float64(*grads)
            assert_equal_in_float64(layer(x), same(x))
    assert_equal_in_float64(stack.effective(x.dtype), plain.effective(x.dtype))
    stack.merge()
    for layer, same in zip(stack.layers, plain.layers, strict=True):
        assert_equal_in_float64(layer(x), same(x))
    stack.unmerge()
    assert stack.layers[0].base_weight.mT.is_contiguous()


def test_stacks_of_both_ways_of_storing():
    """Their W_eff lies as that of nn.Linear, and is right."""
    linears = make_linears(dtype=torch.float64)
    plain = tcur.TProductStack(linears, rank=2, mode="materialized")
    linears[1].weight = nn.Parameter(linears[1].weight.T.contiguous().T, requires_grad=False)
    stack = tcur.TProductStack(linears, rank=2, mode="materialized")
    randomise(stack)
    plain.core.data.copy_(stack.core)
    x = torch.randn(4, 9, dtype=torch.float64)
    for layer, same in zip(stack.layers, plain.layers, strict=True):
        assert_equal_in_float64(layer(x), same(x))
    assert_equal_in_float64(stack.effective(x.dtype), plain.effective(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_w_eff_lies_as_fused_weights_do(dtype):
    """So a product with it is that with the weight: a zero core changes no bit on any BLAS."""
    linears = [nn.Linear(40, width, dtype=dtype).requires_grad_(False) for width in (96, 32, 96)]
    for linear in linears:
        linear.weight = nn.Parameter(linear.weight.T.contiguous().T, requires_grad=False)
    stack = tcur.TProductStack(linears, rank=2, mode="materialized")
    built = stack._built(dtype)
    x = torch.randn(50, 40).to(dtype)
    for place, linear in zip(stack.places, linears, strict=True):
        view = built.view_of(place)
        assert (view.shape, view.stride()) == (linear.weight.shape, linear.weight.stride())
        assert torch.equal(view, linear.weight)
        assert torch.equal(place.module(x), linear(x))


def test_the_buffer_is_reused_but_never_under_a_pending_backward(builds):
    stack, _ = make_stack("materialized")
    x = torch.randn(4, 9, requires_grad=True)
    stack.layers[0](x).sum().backward()
    randomise(stack)
    stack.layers[0](x).sum().backward()
    assert builds[0] == builds[1]  # the graph of the first step is gone: same memory

    pending = stack.layers[0](x)
    expected = torch.autograd.grad(stack.layers[0](x).sum(), x)[0]
    stack.core.data.normal_()  # unseen by autograd, which would refuse the backward below
    stack.layers[0](x)
    assert builds[2] != builds[1]  # the pending graph keeps the old one
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        stack.layers[0](x)  # another dtype in between
    x.grad = None
    pending.sum().backward()
    assert torch.equal(x.grad, expected)


@MODES
def test_a_core_written_before_its_backward_is_refused_as_any_parameter(mode):
    stack, _ = make_stack(mode)
    y = stack.layers[0](torch.randn(4, 9, requires_grad=True))
    randomise(stack)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_random_selection_is_reproducible():
    linears = make_linears(count=2, n1=40, n2=50, fused=False)
    rows = [
        tcur.TProductStack(
            linears, 5, selection="uniform", generator=torch.Generator().manual_seed(seed)
        ).rows
        for seed in (1, 1, 2)
    ]
    assert rows[0] == rows[1] != rows[2]


def test_modes():
    sizes = {"n1": 768, "n2": 768, "n3": 48, "rank": 8, "weight_dtype": torch.float32}
    worth = cost.tokens_worth_materializing(768, 768, 48, 8)
    assert worth == pytest.approx(cost.BALANCE)  # rho is 1

    def choose(mode="auto", tokens=1, is_built=False, **change):
        return cost.choose_mode(mode, tokens=tokens, is_built=is_built, **{**sizes, **change})

    assert choose(tokens=10) == "factored"
    assert choose(tokens=100) == choose(tokens=worth) == "materialized"
    assert choose(tokens=10, is_built=True) == "materialized"
    assert choose(tokens=100, weight_dtype=torch.bfloat16) == "factored"
    for mode in ("materialized", "factored"):
        assert choose(mode, weight_dtype=torch.bfloat16) == mode


def test_auto_materialises_for_many_tokens_only(builds):
    stack, _ = make_stack("auto")
    stack.layers[0](torch.randn(1, 9))
    assert not builds
    stack.layers[0](torch.randn(1000, 9))
    assert len(builds) == 1
    stack.layers[0](torch.randn(1, 9))  # W_eff is at hand: it is used
    assert len(builds) == 1


@MODES
def test_autocast_gives_what_a_linear_layer_gives(mode):
    stack, linears = make_stack(mode)
    x = torch.randn(40, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for layer, linear in zip(stack.layers, linears, strict=True):
            y = layer(x)
            assert y.dtype == torch.bfloat16
            assert torch.equal(y, linear(x))
        randomise(stack)
        stack.layers[1](x).sum().backward()
    assert stack.core.grad.dtype == torch.float32
    assert stack.core.grad.isfinite().all()


def test_drop_in():
    stack, linears = make_stack()
    layer, linear = stack.layers[1], linears[1]
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight"]
    assert list(stack.layers[0].state_dict()) == ["weight", "bias"]
    assert layer.base_weight is linear.weight
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert list(layer.modules()) == [layer]
    assert list(stack.state_dict()) == ["core"]
    expected = "in_features=9, out_features=18, bias=False, slice=1-3 of 6, rank=2"
    assert layer.extra_repr() == expected
    assert "slice=0 of 6" in repr(stack.layers[0])
    assert "n3=6, n1=6, n2=9, rank=2, alpha=0.7, basis=orthonormal, mode=auto" in repr(stack)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_whole_and_independent(clone):
    stack, _ = make_stack("materialized")
    randomise(stack)
    model = nn.Sequential(*stack.layers[:1], nn.ReLU())
    model.add_module("stack", stack)
    x = torch.randn(4, 9)
    y = stack.layers[0](x)
    twin = clone(model)
    assert twin[0].tcur_place.stack is twin.stack
    assert twin.stack.layers[0] is twin[0]
    assert torch.equal(twin[0](x), y)
    randomise(twin.stack)
    assert not torch.equal(twin[0](x), y)
    assert torch.equal(stack.layers[0](x), y)


def test_dtype_moves_keep_core_and_factors_wide():
    stack, _ = make_stack("materialized")
    randomise(stack)
    model = nn.Sequential(*stack.layers)
    model.add_module("stack", stack)
    x = torch.randn(4, 9)
    core = stack.core.detach().clone()
    model.to(torch.bfloat16)
    assert stack.layers[0].weight.dtype == torch.bfloat16
    assert stack.core.dtype == stack.factors.lateral_hat.dtype == torch.float32
    assert stack.factors.slices[0].dtype == torch.bfloat16  # of the base that is there now
    assert stack.lateral.dtype == torch.float32
    assert torch.equal(stack.core, core)
    assert stack.layers[0](x.bfloat16()).dtype == torch.bfloat16
    model.double()
    assert stack.core.dtype == stack.factors.horizontal_hat.dtype == torch.float64
    assert stack.lateral.dtype == torch.float64
    assert torch.equal(stack.core, core.double())
    assert stack.layers[0](x.double()).dtype == torch.float64
    model.to("meta")
    assert stack.core.device.type == "meta"


def test_merge_and_unmerge():
    stack, linears = make_stack("factored")
    randomise(stack)
    before = [linear.weight.clone() for linear in linears]
    x = torch.randn(4, 9)
    adapted = [layer(x) for layer in stack.layers]
    stack.merge()
    assert stack.is_merged
    merged = [layer(x) for layer in stack.layers]
    # The plain layers compute the adapted map now.
    assert all(map(torch.equal, merged, (linear(x) for linear in linears)))
    given = stack, before, [x] * len(before)
    exact, _ = by_torch(*given, torch.float64)
    for outputs in (adapted, merged):
        assert_composition_close(outputs, lambda: by_torch(*given, torch.float32)[0], exact)
    with pytest.raises(ValueError, match="merge: expected an unmerged stack"):
        stack.merge()
    stack.unmerge()
    for linear, weight in zip(linears, before, strict=True):
        assert torch.equal(linear.weight, weight)
    with pytest.raises(ValueError, match="unmerge: expected a merged stack"):
        stack.unmerge()


def test_a_weight_that_requires_grad_is_refused_in_forward():
    stack, linears = make_stack()
    linears[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match="weight: expected a frozen tensor"):
        stack.layers[0](torch.randn(2, 9))


@pytest.mark.parametrize(
    ("linears", "change", "error", "message"),
    [
        ([], {}, ValueError, "linears: expected at least one nn.Linear, got none"),
        ([nn.ReLU()], {}, TypeError, "linears: expected nn.Linear, got ReLU"),
        ([nn.Linear(4, 3)], {}, ValueError, "linears: expected frozen weights"),
        (make_linears(), {"rank": 0}, ValueError, r"rank: expected 1 to min\(n1, n2\) = 6"),
        (make_linears(), {"rank": 7}, ValueError, "rank: expected 1 to"),
        (make_linears(), {"mode": "fast"}, ValueError, "mode: expected one of auto, material"),
        (make_linears(), {"alpha": float("inf")}, ValueError, "alpha: expected a finite number"),
        (make_linears(), {"selection": "best"}, ValueError, "selection: expected one of"),
        (make_linears(), {"n1": 4}, ValueError, "expected out_features to be a multiple of 4"),
        (
            [*make_linears(), *make_linears(n2=8)],
            {},
            ValueError,
            "linears: expected 9 in_features as in the first layer, got 8",
        ),
        (
            [*make_linears(), *make_linears(dtype=torch.half)],
            {},
            ValueError,
            "linears: expected torch.float32 on cpu .* got torch.float16",
        ),
    ],
)
def test_stacks_refuse(linears, change, error, message):
    with pytest.raises(error, match=message):
        tcur.TProductStack(linears, **{"rank": 2, **change})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stacks_refuse_weights_that_are_not_finite(value):
    linears = make_linears()
    linears[2].weight[0, 0] = value
    with pytest.raises(ValueError, match="linears: expected finite numbers, got NaN or Inf"):
        tcur.TProductStack(linears, rank=2)


def test_stacks_refuse_integer_weights():
    linear = nn.Linear(4, 3)
    linear.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"linears: expected a floating dtype, got torch\.int8"):
        tcur.TProductStack([linear], rank=2)


def test_layers_with_one_input_share_z(monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        return project(*args)

    project = w_eff.project
    monkeypatch.setattr(w_eff, "project", counted)
    linears = make_linears(count=3, n1=9, n2=40, fused=False)
    stack = tcur.TProductStack(linears, rank=2)
    x = torch.randn(4, 40, requires_grad=True)
    first, second = stack.layers[0](x), stack.layers[1](x)
    assert len(calls) == 1
    (first.sum() + second.sum()).backward()
    del first, second
    third = stack.layers[2](x)  # nobody kept z any more
    assert len(calls) == 2
    with torch.no_grad():
        x.mul_(2)
    stack.layers[0](x)
    assert len(calls) == 3
    third.sum().backward()
    with torch.no_grad():
        stack.layers[0](x)
    assert len(calls) == 3


@MODES
@pytest.mark.parametrize("n1", [6, 40])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_projections_of_a_stack(mode, n1, autocast):
    linears = make_linears(count=3, n1=n1, n2=40, fused=False)
    x, grad = torch.randn(300, 40), torch.randn(300, n1)
    grads = []
    for precision in ("ieee", "bf16"):
        stack = tcur.TProductStack(linears, rank=4, mode=mode, precision=precision)
        torch.manual_seed(0)
        randomise(stack)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and precision == "bf16"):
            y = stack.layers[1](x)
        y.backward(grad.to(y.dtype))
        grads.append(stack.core.grad)
    error = relative_error(grads[1], grads[0])
    rounds = autocast or n1 == 40 or mode == "factored"  # G of all layers meets exact factors
    assert (error > 0) == rounds
    assert error < PROMISE["bf16"] * (2 if autocast else 1)


def test_a_stack_takes_every_way_to_the_gradient():
    for count, n2 in ((3, 40), (3, 9), (12, 9)):  # z, x, dense
        linears = make_linears(count=count, n1=9, n2=n2, fused=False)
        stack = tcur.TProductStack(linears, rank=4)
        randomise(stack)
        x = torch.randn(4000, n2)
        stack.layers[1](x).square().sum().backward()

        def plain(dtype, given=(stack, [linear.weight for linear in linears], [x] * count)):
            outputs, leaves = by_torch(*given, dtype)
            return torch.autograd.grad(outputs[1].square().sum(), leaves[-1])

        exact = plain(torch.float64)
        assert_composition_close(stack.core.grad, lambda: plain(torch.float32), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_small_update_survives_in_half_precision(dtype, bias, autocast):
    """Far below the last bit it is all there in the mean by the factors; W_eff swallows it."""
    width, size = 128, 1e-4 if dtype == torch.bfloat16 else 1e-5
    linears = [nn.Linear(width, width, bias).requires_grad_(False) for _ in range(4)]
    for linear in linears:
        linear.to(dtype).to(torch.float32 if autocast else dtype)
    x = torch.randn(4000, width).to(dtype)

    def survived(mode):
        stack = tcur.TProductStack(linears, rank=4, mode=mode)
        torch.manual_seed(0)
        randomise(stack)
        weight = torch.stack([linear.weight for linear in linears]).double()
        with torch.no_grad():
            factors = stack.lateral.double(), stack.horizontal.double()
            update = oracle.cur_product(factors[0], stack.core.double(), factors[1])
            stack.core.mul_(size * weight.norm() / (stack.scale * update.norm()))
            update = oracle.cur_product(factors[0], stack.core.double(), factors[1])[1]
            update *= stack.scale
            with torch.autocast("cpu", dtype, enabled=autocast):
                moved = stack.layers[1](x).double() - linears[1](x).double()
        wanted = x.double() @ update.T
        return float((moved * wanted).sum() / wanted.square().sum())

    assert survived("factored") == pytest.approx(1.0, abs=0.1)
    assert survived("materialized") < 0.3
    if not autocast:
        assert survived("auto") == survived("factored")
        plan = tcur.adapt(nn.Sequential(*copy.deepcopy(linears)), rank=4).plan
        says = f"factored: the base is {dtype}, and W_eff rounded to it would swallow small updates"
        assert str(plan).endswith(f"; {says}")
        assert f", rank 4, {says}\n" in plan.describe()


def test_precision_is_checked():
    with pytest.raises(ValueError, match="precision: expected one of ieee, tf32, bf16, got 'fp8'"):
        tcur.TProductStack(make_linears(), rank=2, precision="fp8")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["factored", "materialized", "traced"])
def test_a_layer_that_was_cast_alone(mode, bias):
    """C, R and the core stay in fp64, and so do its products; the result has its dtype."""
    linears = [nn.Linear(9, 6, bias=bias, dtype=torch.float64) for _ in range(3)]
    how = "auto" if mode == "traced" else mode
    linears = [each.requires_grad_(False) for each in linears]
    stack, x = tcur.TProductStack(linears, rank=2, mode=how), torch.randn(4, 9)
    randomise(stack)
    layer = stack.layers[1].float()
    if mode == "traced":
        layer = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        y = layer(x)
        assert y.dtype == torch.float32
        update = tcur.cur_product(stack.factors, stack.core)[1] * stack.scale
        exact = x.double() @ (linears[1].weight.double() + update).T
        exact += linears[1].bias.double() if bias else 0
        assert relative_error(y, exact) < 2 * torch.finfo(torch.float32).eps
        y = stack.layers[0](x.double())  # W_eff of all is not to be had
        update = tcur.cur_product(stack.factors, stack.core)[0] * stack.scale
        exact = nn.functional.linear(x.double(), linears[0].weight + update, linears[0].bias)
    assert relative_error(y, exact) < 1e-14
