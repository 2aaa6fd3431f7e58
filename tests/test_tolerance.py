"""The bounds themselves: what they catch, and what they refuse to compare with."""

import ast
import math
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import tcur_kernels as tcur
from conformance.cases import case
from conformance.data import arguments, expected, lengths, norm_of_terms
from models import Tiny
from plain import Plain
from tolerance import (
    CHANCE,
    ORDERS,
    ROUNDING,
    assert_close,
    assert_composition_close,
    assert_equal_in_float64,
    assert_sum_close,
    bound_of_sum,
    relative_error,
    run,
)

TESTS = Path(__file__).parent
TORCHS_OWN = ("assert_close", "allclose", "isclose")


def adapted(mode="auto", blocks=3):
    torch.manual_seed(0)
    adapter = tcur.adapt(Tiny(blocks=blocks).eval(), rank=2, mode=mode)
    with torch.no_grad():
        for stack in adapter.stacks.values():
            stack.core.normal_()
    return adapter


def test_an_adapted_model_is_as_close_as_plain_torch():
    adapter, x = adapted(), torch.randn(4, 7, 6)
    loss = lambda y: y.square().sum()  # noqa: E731
    y, plain = adapter.model(x), Plain(adapter)
    loss(y).backward()
    assert_composition_close(
        (y, *(stack.core.grad for stack in adapter.stacks.values())),
        lambda: plain.with_gradients(loss, x),
        Plain(adapter, torch.float64).with_gradients(loss, x.double()),
    )


DAMAGES = {
    "ignored": lambda adapter, x: exit_of(adapter.disable(), adapter, x),
    "counted twice": lambda adapter, x: (scale(adapter, 2), adapter.model(x))[1],
    "the wrong row": lambda adapter, x: adapter.model(x).roll(1, 0),
    "the wrong layer": lambda adapter, x: (roll(adapter), adapter.model(x))[1],
    "a little": lambda adapter, x: (scale(adapter, 1 + 1e-5), adapter.model(x))[1],
    "half precision inside": lambda adapter, x: adapter.model(x.bfloat16().float()),
}


def exit_of(context, adapter, x):
    with context:
        return adapter.model(x)


@torch.no_grad()
def scale(adapter, by):
    for stack in adapter.stacks.values():
        stack.core *= by


@torch.no_grad()
def roll(adapter):
    for stack in adapter.stacks.values():
        stack.core.copy_(stack.core.roll(1, 0))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_the_bound_of_compositions_has_teeth(damage):
    adapter, x = adapted(blocks=1), torch.randn(4, 7, 6)
    plain, exact = Plain(adapter), Plain(adapter, torch.float64)(x.double())
    assert_composition_close(adapter.model(x), lambda: plain(x), exact)
    with pytest.raises(AssertionError, match="exceeds the bound"):
        assert_composition_close(damage(adapter, x), lambda: plain(x), exact)


def one_after_another(p, z):
    """Σ pᵀz in fp32, token after token."""
    return torch.from_numpy(numpy.add.accumulate((p[:, :, None] * z[:, None]).numpy())[-1])


def by_blocks(p, z):
    """The same, 256 tokens after one another, and the blocks in float64."""
    blocks = zip(p.split(256), z.split(256), strict=True)
    return torch.stack([one_after_another(*block) for block in blocks]).double().sum(0).float()


def in_half_precision(p, z):
    """The same by blocks, whose sums are added up in bf16."""
    total = torch.zeros(p.shape[1], z.shape[1], dtype=torch.bfloat16)
    for block in zip(p.split(256), z.split(256), strict=True):
        total += one_after_another(*block).bfloat16()
    return total.float()


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize(
    ("kernel", "is_honest"),
    [(by_blocks, True), (one_after_another, False), (in_half_precision, False)],
)
def test_a_long_sum_is_not_measured_by_torch(kernel, is_honest, mean):
    """Torch adds up these tokens as badly as the worse kernel does: its error would admit it."""
    long = case("core_grad_tokens", 1, (6, 9, 3), tokens=(50_000,), mean=mean)
    (given, _), (_, exact) = arguments(long), expected(long)
    z, p = given["x"] @ given["horizontal_hat"].T, given["grad_y"] @ given["lateral_hat"]
    found = kernel(p, z)[None]
    size = norm_of_terms(long), lengths(long)
    no_better = one_after_another(p, z)[None]
    assert (relative_error(found, exact) <= bound_of_sum(exact, *size)) == is_honest
    if is_honest:
        assert_sum_close(found, no_better, exact, *size)
        return
    if kernel is one_after_another:
        assert_close(found, no_better, exact)  # torch's own error as it may be
    with pytest.raises(AssertionError, match="exceeds the bound"):
        assert_sum_close(found, no_better, exact, *size)


def test_a_rounding_is_as_large_as_derived():
    """Of numbers whose logarithms are uniform, as mantissas of results are."""
    exact = torch.exp2(torch.linspace(0, 8, 100_001, dtype=torch.float64))
    unit = torch.finfo(torch.float32).eps / 2
    each = (exact.float().double() - exact) / exact / unit
    assert float(each.square().mean().sqrt()) == pytest.approx(ROUNDING, rel=0.02)


def test_the_error_of_a_sum_is_as_large_as_derived():
    """Of many sums in fp32, one term after another: as many roundings as terms before the last."""
    for mean in (0.0, 3.0):
        terms = mean + torch.randn(4000, 500)
        exact = terms.double().sum(0)
        found = torch.from_numpy(numpy.add.accumulate(terms.numpy())[-1])
        size = (terms.double().square().sum() + exact.square().sum()).sqrt() / exact.norm()
        unit = torch.finfo(torch.float32).eps / 2
        derived = ROUNDING * unit * math.sqrt(4000 / 2) * float(size)
        assert derived / 3 < relative_error(found, exact) < derived


def test_orders_are_orders():
    """Other roundings of the same sums, and no others of sums without roundings."""
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 2), nn.Linear(9, 5))
    x = torch.randn(2, 3, 10, 10)

    def plain(model=layers, x=x):
        y = model(x)
        return y, y.sum(), y.mean((0, 1)), y.flatten() @ y.flatten(), y[0, 0].mT @ y[0, 1, :, 0]

    exact = plain(layers.double(), x.double())
    layers.float()
    own = plain()
    assert all(map(torch.equal, run(plain, 0), own))
    seen = [run(plain, seed) for seed in range(1, ORDERS[0])]
    for index, wanted in enumerate(exact):
        assert all(relative_error(results[index], wanted) < 1e-5 for results in seen)
        assert any(not torch.equal(results[index], own[index]) for results in seen)
    whole = torch.randint(-9, 9, (20, 20)).float()
    marked = torch.complex(whole, whole.T).conj()  # and .imag of it is marked as a negative
    for seed in range(3):
        for a in (whole, marked, marked.imag, marked[:, :1].expand(20, 20)):
            assert torch.equal(run(lambda a=a: a @ a, seed), a.clone() @ a.clone())


def test_the_chance_is_that_of_normal_numbers():
    """∫ n F(z)^(n-1) f(z) (1 - F(2z)) dz, where F belongs to |z|."""
    z = torch.linspace(0, 8, 80_001, dtype=torch.float64)
    cumulated = torch.special.erf(z / math.sqrt(2))
    density = math.sqrt(2 / math.pi) * torch.exp(-z.square() / 2)
    beyond = torch.special.erfc(2 * z / math.sqrt(2))
    for count, chance in zip(ORDERS, CHANCE, strict=True):
        found = torch.trapezoid(count * cumulated ** (count - 1) * density * beyond, z)
        assert float(found) == pytest.approx(chance, rel=0.02)


def test_more_orders_are_tried_where_the_first_were_right_by_chance():
    exact = torch.randn(50, dtype=torch.float64)
    unit = torch.randn(50)

    def off_by(error):
        return (exact + error * exact.norm() * unit / unit.norm()).float()

    def plain():
        count.append(None)
        return off_by(1e-5 if len(count) <= ORDERS[0] else 2e-5)

    for error, calls in ((1.5e-5, ORDERS[0]), (3e-5, ORDERS[1])):
        count = []
        assert_composition_close(off_by(error), plain, exact)
        assert len(count) == calls
    count = []
    with pytest.raises(AssertionError, match=r"relative error 5e-05 exceeds the bound 4.0\d?e-05"):
        assert_composition_close(off_by(5e-5), plain, exact)


def test_what_is_not_exact_is_refused():
    """Another fp32 result never stands for the exact one, whatever its dtype is made to be."""
    a = torch.randn(5, 7)
    exact = a.double() @ a.double().T
    assert_close(a @ a.T, a @ a.T, exact)
    for wrong, message in (
        ((a @ a.T).double(), "got numbers of fp32"),
        ((a.bfloat16() @ a.bfloat16().T).double(), "got numbers of fp32"),
        (a @ a.T, "expected float64, got torch.float32"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_close(a @ a.T, a @ a.T, wrong)
        with pytest.raises(AssertionError, match=message):
            assert_composition_close(a @ a.T, lambda: a @ a.T, wrong)


def test_what_is_not_plain_torch_is_refused():
    adapter, x = adapted("factored"), torch.randn(4, 7, 6)
    exact = Plain(adapter, torch.float64)(x.double())
    with pytest.raises(AssertionError, match="expected plain torch, got tcur"):
        assert_composition_close(adapter.model(x), lambda: adapter.model(x), exact)
    with adapter.disable():
        base = adapter.model(x)
    with pytest.raises(AssertionError, match="it computes something else"):
        assert_composition_close(adapter.model(x), lambda: base, exact)
    with pytest.raises(AssertionError, match="it computes something else"):
        assert_close(adapter.model(x), base, exact)


def test_float64_is_compared_with_float64():
    a = torch.randn(5, 7, dtype=torch.float64)
    assert_equal_in_float64((a, a), (a, a * (1 + 1e-12)))
    with pytest.raises(AssertionError, match="relative error 1e-08"):
        assert_equal_in_float64(a, a * (1 + 1e-8))
    with pytest.raises(AssertionError, match=r"expected float64, got torch\.float32"):
        assert_equal_in_float64(a.float(), a)


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda p: p.stem)
def test_no_tolerance_of_taste(path):
    """Numbers of torch are compared by the bounds of `tolerance`, and by no others."""
    for node in ast.walk(ast.parse(path.read_text())):
        is_called = isinstance(node, ast.Attribute) and node.attr in TORCHS_OWN
        is_imported = (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").partition(".")[0] in ("torch", "numpy")
            and any(name.name in TORCHS_OWN for name in node.names)
        )
        if is_called or is_imported:
            raise AssertionError(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
