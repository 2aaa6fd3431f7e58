"""Public functions decide their own precision: autocast changes neither a bit nor a dtype."""

import pytest
import torch

import tcur_kernels as tcur
from cases import make_case
from tcur_kernels.autocast import outside_autocast
from tcur_kernels.operators import functional

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def functions(n3, dtype):
    """Functions of nothing by their names, and the leaves that they differentiate."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    case = make_case(n3, 6, 9, 2, wide, dtype)
    factors, core, weight = case.factors, case.core.requires_grad_(), case.weight
    x, bias = torch.randn(2, 3, 9).to(dtype).requires_grad_(), torch.randn(6).to(dtype)
    cores, ids = torch.randn(2, *core.shape).to(wide).requires_grad_(), torch.tensor([1, 0])
    lateral, small, horizontal = (
        t.detach().to(dtype) for t in (case.lateral, core, case.horizontal)
    )
    w_eff = tcur.materialize(weight, factors, core.detach())[0]
    w64 = weight.double()

    def linear(bias=bias, core=core, **how):
        return tcur.cur_linear(x, weight[0], bias, factors, core, 0, 0.5, **how)

    found = {
        "cur_product": lambda: tcur.cur_product(factors, core),
        "cur_product by reference": lambda: tcur.cur_product(factors, core, "reference"),
        "materialize": lambda: tcur.materialize(weight, factors, core),
        "materialize by reference": lambda: tcur.materialize(
            list(weight), factors, core, backend="reference"
        ),
        "out": lambda: tcur.materialize(
            weight, factors, core.detach(), out=torch.empty_like(weight)
        ),
        "cur_linear": linear,
        "no bias": lambda: linear(None),
        "by reference": lambda: linear(backend="reference"),
        "effective": lambda: linear(effective=w_eff),
        "adapter_ids": lambda: linear(core=cores, adapter_ids=ids),
        "z": lambda: linear(z=functional.project(x, factors)),
        "dense_grad": lambda: linear(dense_grad=True),
        "project": lambda: functional.project(x, factors),
        "slice_update": lambda: functional.slice_update(factors, core, 0),
        "factors": lambda: tcur.CURFactors(lateral, horizontal).lateral_hat,
        "t_product": lambda: tcur.t_product(lateral, small),
        "t_transpose": lambda: tcur.t_transpose(lateral),
        "t_pinv": lambda: tcur.t_pinv(lateral),
        "t_svd": lambda: torch.cat([each.double().flatten() for each in tcur.t_svd(lateral)]),
        "multirank": lambda: tcur.multirank(lateral),
        "modewise_cur": lambda: tcur.modewise_cur(weight, [1, 2, 2]).reconstruct(),
        "matrix_cur": lambda: tcur.matrix_cur(weight[0], 2).reconstruct(),
        "float64": lambda: tcur.tensor_cur(w64, 2).reconstruct(),
    }
    for selection in ("norm", "leverage", "deim"):
        found[selection] = lambda selection=selection: tcur.tensor_cur(
            weight, 2, selection=selection
        ).reconstruct()
    if dtype != torch.float64:
        found["bf16"] = lambda: linear(precision="bf16")
    return found, (x, core, cores)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n3", [1, 4])
def test_nothing_changes(n3, dtype, autocast):
    found, leaves = functions(n3, dtype)
    for name, function in found.items():
        wanted = function()
        with torch.autocast("cpu", autocast):
            actual = function()
        assert actual.dtype == wanted.dtype, name
        assert torch.equal(actual, wanted), name
        if wanted.requires_grad:
            grads = [
                torch.autograd.grad(y.float().sin().sum(), leaves, allow_unused=True)
                for y in (actual, wanted)
            ]
            for one, same in zip(*grads, strict=True):
                assert (one is None) == (same is None), name
                assert one is None or torch.equal(one, same), name


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_changes_where_functions_are_transformed(dtype, autocast):
    found, _ = functions(4, dtype)
    for name in ("cur_product", "materialize", "cur_linear", "no bias", "z", "slice_update"):
        batched = torch.func.vmap(lambda x, name=name: found[name]() + x)
        wanted = batched(torch.zeros(2))
        with torch.autocast("cpu", autocast):
            assert torch.equal(batched(torch.zeros(2)), wanted), name


def test_usual_devices_are_not_asked_for(monkeypatch):
    """Compilers of torch 2.10 and 2.11 cannot trace the question."""

    def asked(device_type):
        raise AssertionError(device_type)

    monkeypatch.setattr(torch.amp, "is_autocast_available", asked)
    for device_type in ("cpu", "cuda"):
        with torch.autocast("cpu"), outside_autocast(torch.device(device_type)):
            assert torch.is_autocast_enabled("cpu") == (device_type == "cuda")
    with pytest.raises(AssertionError, match="xpu"):
        outside_autocast(torch.device("xpu"))
