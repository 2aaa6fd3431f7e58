"""Tensors without values, and nested ones whose rows differ in length."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tcur_kernels as tcur
from cases import make_case
from plain import product
from tcur_kernels.operators import functional
from tolerance import assert_equal_in_float64, same_mathematics

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("mode", ["auto", "materialized", "factored"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_layers_on_meta(mode, dtype, bias):
    model = nn.Sequential(*[nn.Linear(12, 12, bias) for _ in range(3)]).to(dtype)
    base = copy.deepcopy(model).to("meta")
    adapter = tcur.adapt(model, rank=2, mode=mode)
    model.to("meta")
    for shape in ((12,), (5, 12), (2, 5, 12), (0, 12)):
        x = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
        y, same = model(x), base(x)
        assert (y.shape, y.dtype, y.device) == (same.shape, same.dtype, same.device)
        y.sum().backward()
        assert (x.grad.shape, x.grad.dtype) == (x.shape, dtype)
        for stack in adapter.stacks.values():
            assert stack.core.grad.shape == stack.core.shape
            assert stack.core.grad.is_meta


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_public_functions_on_meta(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    case = make_case(4, 6, 9, 2, wide, dtype)

    def results(case):
        factors, core, w = case.factors, case.core, case.weight
        device = core.device
        x = torch.zeros(2, 3, 9, dtype=dtype, device=device)
        bias, ids = x.new_zeros(6), torch.zeros(2, dtype=torch.int64, device=device)
        args = (w[1], bias, factors)
        lateral, horizontal = case.lateral.to(dtype), case.horizontal.to(dtype)
        return [
            factors.lateral_hat,
            tcur.cur_product(factors, core),
            tcur.materialize(w, factors, core),
            tcur.materialize(w, factors, core, out=torch.empty_like(w)),
            tcur.cur_linear(x, *args, core, 1),
            tcur.cur_linear(x, *args, core, 1, effective=w[1]),
            tcur.cur_linear(x, *args, torch.stack([core, core]), 1, adapter_ids=ids),
            functional.slice_update(factors, core, 1, 2),
            functional.project(x, factors),
            tcur.t_product(lateral, horizontal),
            tcur.t_transpose(lateral),
            tcur.t_identity(3, 4, dtype, device),
            tcur.t_pinv(lateral),
            *tcur.t_svd(lateral),
            tcur.multirank(lateral),
        ]

    tensors = (case.weight, case.lateral, case.horizontal, case.core)
    found = results(type(case)(*(each.to("meta") for each in tensors)))
    for one, same in zip(found, results(case), strict=True):
        assert one.is_meta
        assert (one.shape, one.dtype) == (same.shape, same.dtype)


def test_ranks_are_values():
    with pytest.raises(ValueError, match="a: expected a tensor with values, got one on meta"):
        tcur.tubal_rank(torch.empty(2, 3, 4, device="meta"))


def jagged(*rows):
    return torch.nested.nested_tensor(list(rows), layout=torch.jagged, requires_grad=True)


@pytest.fixture(params=DTYPES, ids=str)
def layer(request):
    dtype = request.param
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    case = make_case(4, 6, 9, 2, wide, dtype)
    case.core.requires_grad_()
    factors, bias = case.factors, torch.randn(6).to(dtype)
    return case, lambda x, **how: tcur.cur_linear(
        x, case.weight[1], bias, factors, case.core, 1, 0.5, **how
    )


@pytest.mark.parametrize("way", ["factors", "effective", "dense"])
def test_rows_of_different_lengths(layer, way):
    case, linear = layer
    how = {"dense_grad": way == "dense"}
    if way == "effective":
        how["effective"] = case.weight[1]
    rows = [torch.randn(n, 9).to(case.weight.dtype) for n in (3, 0, 5)]
    x = jagged(*rows)
    y = linear(x, **how)
    assert y.shape[0] == 3
    assert y.shape[2] == 6
    assert torch.equal(y.values(), linear(torch.cat(rows), **how))
    assert (y + F.linear(x, case.weight[1])).shape == y.shape  # of the very same rows
    own = torch.cat(rows).requires_grad_()
    wanted = torch.autograd.grad(linear(own, **how).float().sin().sum(), (own, case.core))
    found = torch.autograd.grad(y.values().float().sin().sum(), (x, case.core))
    assert torch.equal(found[0].values(), wanted[0])
    assert torch.equal(found[1], wanted[1])


def test_rows_in_other_layouts():
    case = make_case(4, 6, 9, 2, torch.float64)
    args = (case.weight[1], None, case.factors, case.core, 1)
    turned = jagged(torch.randn(3, 2, 9).double(), torch.randn(5, 2, 9).double()).transpose(1, 2)
    lengths, starts = torch.tensor([3, 2, 4]), torch.tensor([0, 1, 2])
    x = torch.randn(3, 7, 9, dtype=torch.float64)
    with_holes = torch.nested.narrow(x, 1, starts, lengths, layout=torch.jagged)
    for x in (turned, with_holes):
        rows = tcur.cur_linear(x, *args).unbind()
        assert_equal_in_float64(rows, [tcur.cur_linear(row, *args) for row in x.unbind()])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_that_are_refused(layer):
    _, linear = layer
    dtype = layer[0].weight.dtype
    x = jagged(torch.randn(4, 9).to(dtype), torch.randn(5, 9).to(dtype))
    with pytest.raises(ValueError, match=r"x: expected \[..., 9\], got \[2, 9, j"):
        linear(x.transpose(1, 2))  # nine tokens, too
    with pytest.raises(ValueError, match="adapter_ids: expected None with a nested x"):
        linear(x, adapter_ids=torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="z: expected None with a nested x"):
        linear(x, z=torch.randn(9, 8))
    strided = torch.nested.nested_tensor([torch.randn(3, 9).to(dtype)])
    with pytest.raises(ValueError, match=r"x: expected layout torch\.jagged of a nested"):
        linear(strided)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_for_nested_inputs_made_of_its_update(dtype):
    """Any rank and slices, in the dtype of the core, differentiable and compiled."""
    case = make_case(5, 6, 9, 3, torch.float32, dtype)
    factors, core, weight = case.factors, case.core.requires_grad_(), case.weight[2:4].flatten(0, 1)

    def layer(x, core):
        update = functional.slice_update(factors, core, 2, 2, 0.5)
        return F.linear(x, (weight + update).to(dtype)).values()

    x = jagged(torch.randn(3, 9).to(dtype), torch.randn(5, 9).to(dtype))
    update = product(*(t.detach().double() for t in (case.lateral, core, case.horizontal)))
    exact = 0.5 * update[2:4].flatten(0, 1)
    found = functional.slice_update(factors, core, 2, 2, 0.5)
    assert found.dtype == torch.float32
    assert (found - exact).norm() <= 1e-6 * exact.norm()
    y = layer(x, core)
    wanted = torch.autograd.grad(y.float().sum(), (x, core))
    assert wanted[1].abs().sum() > 0
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, core)
    assert torch.equal(compiled, y)
    found = torch.autograd.grad(compiled.float().sum(), (x, core))
    assert torch.equal(found[0].values(), wanted[0].values())
    assert same_mathematics(found[1], wanted[1])
