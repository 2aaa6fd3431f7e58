"""The public functions with the Triton kernels, in Triton's interpreter."""

import pytest
import torch

import oracle
import tcur_kernels as tcur
from cases import make_case
from tolerance import PROMISE, relative_error


def test_the_public_face():
    case = make_case(4, 6, 9, 2)
    factors, core = case.factors, case.core
    exact = oracle.cur_product(case.lateral, core, case.horizontal)
    exact_w_eff = case.weight.double() + exact
    assert "triton" in tcur.build_info()["backends"]
    for precision in ("ieee", "tf32", "bf16"):
        how = {"backend": "triton", "precision": precision}
        product = tcur.cur_product(factors, core, **how)
        out = tcur.materialize(case.weight, factors, core, out=torch.empty(4, 6, 9), **how)
        w_eff = tcur.materialize(list(case.weight), factors, core, **how)
        assert torch.equal(out, w_eff)
        y = tcur.cur_linear(torch.eye(9), case.weight[1], None, factors, core, 1, **how)
        for actual, wanted in ((product, exact), (w_eff, exact_w_eff), (y, exact_w_eff[1].T)):
            assert relative_error(actual, wanted) <= PROMISE[precision]
    with pytest.raises(TypeError, match=r"factors: expected dtype torch.float32 for 'triton'"):
        tcur.cur_product(case.double().factors, core.double(), backend="triton")
