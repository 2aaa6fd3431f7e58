"""torch's FlopCounterMode counts what layers and operators multiply."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tcur_kernels as tcur
from cases import make_case
from tcur_kernels.operators import contract, functional

N1, N2, RANK, SLICES, TOKENS = 9, 40, 4, 3, 6
Q = SLICES * RANK
BASE = 2 * TOKENS * N1 * N2
INTO_Z, OUT_OF_P = 2 * TOKENS * Q * N2, 2 * TOKENS * N1 * Q


def per_bin(n3):
    """A real product for the bins that are real, four for the others, all twice."""
    return sum(2 if k in (0, n3 / 2) else 8 for k in range(n3 // 2 + 1))


MIX = TOKENS * per_bin(SLICES) * RANK**2  # tokens with the core, and z with p
BUILD = per_bin(SLICES) * N1 * RANK * (RANK + N2)


def make_stack(mode, dtype=torch.float32, **options):
    linears = [nn.Linear(N2, N1, dtype=dtype).requires_grad_(False) for _ in range(SLICES)]
    stack = tcur.TProductStack(linears, rank=RANK, mode=mode, **options)
    nn.init.normal_(stack.core)
    return stack


def counted(run):
    with FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(TOKENS,), (2, 3)], ids=str)
def test_a_layer_through_the_factors(dtype, shape):
    layer = make_stack("factored", dtype).layers[1]
    x = torch.randn(*shape, N2, dtype=dtype, requires_grad=True)
    forward, y = counted(lambda: layer(x))
    assert forward == BASE + INTO_Z + MIX + OUT_OF_P
    backward, _ = counted(y.sum().backward)
    of_x, of_core = BASE + OUT_OF_P + MIX + INTO_Z, OUT_OF_P + MIX
    assert backward == of_x + of_core
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert counted(lambda: layer(x.detach()))[0] == forward


@pytest.mark.parametrize("shape", [(TOKENS,), (2, 3)], ids=str)
def test_a_layer_by_its_effective_weight(shape):
    layer = make_stack("materialized").layers[1]
    x = torch.randn(*shape, N2, requires_grad=True)
    forward, y = counted(lambda: layer(x))
    assert forward == BUILD + BASE + INTO_Z
    assert counted(lambda: layer(x.detach()))[0] == forward - BUILD  # which is kept
    assert counted(y.sum().backward)[0] == BASE + OUT_OF_P + MIX
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert counted(lambda: layer(x.detach()))[0] == BASE


def test_no_less_than_the_layer_that_it_replaces():
    base = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)])
    x = torch.randn(8, 32, requires_grad=True)
    base.requires_grad_(False)
    least = counted(lambda: base(x))[0], counted(lambda: base(x).sum().backward())[0]
    for mode in ("factored", "materialized"):
        model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)])
        tcur.adapt(model, rank=4, mode=mode)
        assert counted(lambda model=model: model(x))[0] > least[0]
        assert counted(lambda model=model: model(x).sum().backward())[0] > least[1]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("autocast", [False, True])
def test_public_functions(backend, autocast):
    case = make_case(4, 6, 9, 2)
    factors, core = case.factors, case.core.requires_grad_()
    x, how = torch.randn(5, 9, requires_grad=True), {"backend": backend}
    build, mix, q = per_bin(4) * 6 * 2 * (2 + 9), 5 * per_bin(4) * 4, 8
    base, into_z, out_of_p = 2 * 5 * 6 * 9, 2 * 5 * q * 9, 2 * 5 * 6 * q
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        flops, product = counted(lambda: tcur.cur_product(factors, core, **how))
        assert flops == build
        assert counted(product.sum().backward)[0] == per_bin(4) * 2 * 9 * (6 + 2)
        assert counted(lambda: tcur.materialize(case.weight, factors, core, **how))[0] == build
        out = torch.empty(4, 6, 9)
        with torch.no_grad():
            run = counted(lambda: tcur.materialize(case.weight, factors, core, out=out, **how))
        assert run[0] == build
        args = (case.weight[1], None, factors, core, 1)
        flops, y = counted(lambda: tcur.cur_linear(x, *args, **how))
        assert flops == base + into_z + mix + out_of_p
        assert counted(y.sum().backward)[0] == flops + into_z + mix + out_of_p
        effective = tcur.materialize(case.weight, factors, core.detach(), **how)[1]
        flops, y = counted(lambda: tcur.cur_linear(x, *args, effective=effective, **how))
        assert flops == base
        assert counted(y.sum().backward)[0] == base + into_z + mix + out_of_p
        z = functional.project(x, factors).detach()
        flops, y = counted(lambda: tcur.cur_linear(x, *args, z=z, **how))
        assert flops == base + mix + out_of_p
        flops, y = counted(lambda: tcur.cur_linear(x.detach(), *args, dense_grad=True, **how))
        dense = 2 * 5 * 6 * 9 + 6 * (2 * q * 9 + per_bin(4) * 4)
        assert counted(y.sum().backward)[0] == dense
        update = counted(lambda: functional.slice_update(factors, core, 1, **how))[0]
        assert update == 6 * (2 * 6 * q + per_bin(4) * 4 + 2 * q * 9)  # a token for each row


@pytest.mark.parametrize("n3", [1, 2, 3, 8])
def test_every_operator_of_every_language_has_a_formula(n3):
    case = make_case(n3, 6, 9, 2)
    lateral_hat, horizontal_hat = case.packed
    for language in contract.LANGUAGES:
        for name in contract.OPERATORS:
            packet = contract.operator(name, language).overloadpacket
            assert packet in FlopCounterMode(display=False).flop_registry
        dense = contract.operator("core_grad_dense", language)
        flops, _ = counted(lambda dense=dense: dense(case.weight, lateral_hat, horizontal_hat))
        assert flops == per_bin(n3) * 2 * 9 * (6 + 2)
        packed = contract.operator("core_of_packed", language)
        flops, _ = counted(lambda packed=packed: packed(torch.randn(2, n3, 2, 2), 1.0))
        assert flops == 0


@pytest.mark.parametrize("first", ["tcur_kernels", "torch.utils.flop_counter"])
def test_the_counter_may_be_imported_before_or_after(first):
    """It brings Triton along, so the package does not import it."""
    code = f"""
import sys, torch, {first}
if {first!r} == "tcur_kernels":
    assert "torch.utils.flop_counter" not in sys.modules
import tcur_kernels, torch.utils.flop_counter
counter = torch.utils.flop_counter
print(torch.ops.tcur.cur_linear in counter.flop_registry, counter.__spec__.origin[-3:])
print(any("tcur" in type(finder).__module__ for finder in sys.meta_path))
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert run.stdout.split() == ["True", ".py", "False"], run.stderr
