"""What is told of an operator once: arguments, derivatives by name, kernels in some languages."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import tcur_kernels as tcur
from cases import make_case
from tcur_kernels.operators import contract, dispatch, reference
from tcur_kernels.operators.contract import CurLinear, Derivative, Operator, WEffLinear
from tolerance import assert_equal_in_float64

LANGUAGES = pytest.mark.parametrize(
    "language", contract.LANGUAGES, ids=lambda name: name or "compiled"
)


class Every(NamedTuple):
    """An argument of every type."""

    a: Tensor
    b: Tensor | None
    c: Sequence[Tensor]
    d: float
    e: torch.dtype
    f: int = 3
    g: contract.Size = 1
    h: bool = False
    i: Tensor | None = None


class Into(NamedTuple):
    """A buffer that is written."""

    a: Tensor
    out: contract.Written


def test_the_schema_is_that_of_the_record():
    assert contract.schema_of(Every) == (
        "(Tensor a, Tensor? b, Tensor[] c, float d, ScalarType e, int f=3, SymInt g=1,"
        " bool h=False, Tensor? i=None) -> Tensor"
    )
    assert contract.schema_of(Into) == "(Tensor a, Tensor(a!) out) -> ()"
    assert contract.written_by(Into) == ("out",)


@pytest.mark.parametrize("language", [*contract.LANGUAGES, contract.CUDA_TF32])
def test_every_operator_is_registered_by_its_record(language):
    for name, entry in contract.OPERATORS.items():
        schema = contract.operator(name, language)._schema
        stated = torch._C.parse_schema(contract.qualified(name, language) + entry.schema)
        assert str(schema) == str(stated)
        assert [argument.name for argument in schema.arguments] == [*entry.arguments._fields]


def test_gradients_go_by_name():
    found = contract.gradients(CurLinear, core="of core", x="of x")
    assert CurLinear(*found) == CurLinear("of x", *[None] * 4, "of core", *[None] * 8)
    with pytest.raises(TypeError, match=r"gradients: expected .*'core'.*, got \['cores'\]"):
        contract.gradients(CurLinear, cores=1)


def by_w_eff(packed, x, w_eff, core, first, slices, **how):
    lateral_hat, horizontal_hat = packed
    given = {"bias": None, "scale": 0.5, "transposed": False, **how}
    return WEffLinear(
        x=x,
        w_eff=w_eff,
        lateral_hat=lateral_hat,
        horizontal_hat=horizontal_hat,
        core=core,
        slice_index=first,
        slices=slices,
        **given,
    )


@LANGUAGES
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("slices", [1, 2])
def test_a_map_by_w_eff_and_its_gradients(language, transposed, slices):
    """Values are those of a plain product, derivatives those of the factors, in float64."""
    case = make_case(5, 4, 6, 2, torch.float64)
    core = case.core.requires_grad_()
    x = torch.randn(3, 7, 4 * slices if transposed else 6, dtype=torch.float64, requires_grad=True)
    bias = None if transposed else torch.randn(4 * slices, dtype=torch.float64)
    weight = case.weight[2 : 2 + slices].reshape(4 * slices, 6)
    w_eff = reference.materialize(case.weight, *case.spectra, core.detach(), 0.5)
    w_eff = w_eff[2 : 2 + slices].reshape(4 * slices, 6)
    how = {"bias": bias, "transposed": transposed}
    a = by_w_eff(case.packed, x, w_eff, core, 2, slices, **how)
    y = contract.operator("w_eff_linear", language)(*a)
    assert torch.equal(y, x @ w_eff if transposed else F.linear(x, w_eff, bias))
    shared = {name: given for name, given in a._asdict().items() if name != "w_eff"}
    factored = CurLinear(**shared, weight=weight)
    same = contract.operator("cur_linear", language)(*factored)
    grads = (torch.autograd.grad(each.sin().sum(), (x, core)) for each in (y, same))
    assert_equal_in_float64(next(grads), next(grads))


@pytest.mark.parametrize("language", [name for name in contract.LANGUAGES if name])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"core": torch.ones(1, 5, 2, 2)}, r"core: expected \[5, 2, 2\], or \[adapters, 5, 2, 2\]"),
        ({"core": torch.ones(2, 2)}, r"core: expected \[n3, rank, rank\], or \[adapters, n3, "),
        ({"z": torch.ones(3, 9)}, r"z: expected \[3, 10\], got \[3, 9\]"),
        ({"z": torch.ones(4, 10)}, r"z: expected \[3, 10\], got \[4, 10\]"),
        ({"z": torch.ones(30)}, r"z: expected \[3, 10\], got \[30\]"),
    ],
)
def test_what_does_not_fit_a_layer_is_told_with_its_sizes(language, wrong, words):
    case = make_case(5, 4, 6, 2)
    a = by_w_eff(case.packed, torch.ones(3, 6), None, case.core, 1, 1)._asdict()
    del a["w_eff"]
    a = CurLinear(**{**a, "weight": None, **wrong})
    with pytest.raises((ValueError, RuntimeError), match=words):
        contract.operator("cur_linear", language)(*a)


@LANGUAGES
def test_second_derivatives_by_w_eff(language):
    case = make_case(3, 3, 4, 2, torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    packed, core = case.packed, case.core.requires_grad_()
    op = contract.operator("w_eff_linear", language)

    def linear(x, core):
        """W_eff as a function of the core, to which the operator does not look."""
        w_eff = reference.materialize(case.weight, *case.spectra, core.detach(), 0.5)[1]
        return op(*by_w_eff(packed, x, w_eff, core, 1, 1))

    assert gradcheck(linear, (x, core))
    assert gradgradcheck(linear, (x, core))


@LANGUAGES
def test_w_eff_linear_in_a_graph(language):
    case = make_case(5, 6, 9, 2)
    packed, core, w_eff = case.packed, case.core.requires_grad_(), case.weight[1]
    op = contract.operator("w_eff_linear", language)

    def run(x, core):
        return op(*by_w_eff(packed, x, w_eff, core, 1, 1)).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (7, 11):
        x = torch.randn(tokens, 9, requires_grad=True)
        grads = [torch.autograd.grad(each(x, core), (x, core)) for each in (run, compiled)]
        assert all(map(torch.equal, *grads))
    for x in (torch.randn(7, 9), torch.randn(9, 7).T):
        a = by_w_eff(packed, x.requires_grad_(), w_eff, core, 1, 1, bias=torch.randn(6))
        torch.library.opcheck(op, tuple(a))


def test_the_public_function_by_w_eff_in_a_graph():
    case = make_case(5, 6, 9, 2)
    factors, core, x = case.factors, case.core.requires_grad_(), torch.randn(7, 9)

    def run(x, core):
        return tcur.cur_linear(x, case.weight[1], None, factors, core, 1, effective=case.weight[2])

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    results = []
    for function in (run, compiled):
        y = function(x, core)
        results.append((y, *torch.autograd.grad(y.sum(), core)))
    assert all(map(torch.equal, *results))


class Doubled(NamedTuple):
    """Of the toy operators: the reference has them both, the CPU one of them."""

    x: Tensor
    times: float = 2.0


class Undoubled(NamedTuple):
    """The same arguments, a record of its own."""

    x: Tensor
    times: float = 2.0


@pytest.fixture(scope="module")
def toys():
    """`toy` has a kernel for the CPU, and its derivative `toy_grad` has none."""

    def backward(ctx, grad, language):
        assert language == ctx.language
        return contract.gradients(Doubled, x=contract.run(language, Undoubled(grad, ctx.times)))

    def save(ctx, a):
        ctx.times, ctx.language = a.times, ""

    def add(name, arguments, derivative=None):
        contract.add(
            Operator(
                name,
                arguments,
                fake=lambda a: torch.empty_like(a.x),
                plain=lambda a: a.x * a.times,
                flops=lambda a: a.x[0],
                derivative=derivative,
            )
        )

    add("toy", Doubled, Derivative(backward, save))
    add("toy_grad", Undoubled)
    library = torch.library.Library("tcur", "FRAGMENT")
    library.impl("toy", lambda x, times=2.0: x + x * (times - 1), "CPU")
    yield
    for name in ("toy", "toy_grad"):
        del contract.OPERATORS[name]
    library._destroy()


def test_an_operator_may_exist_in_one_language_alone(toys):
    factors = make_case(4, 6, 9, 2).factors
    assert dispatch.language_of("toy", "auto", factors, "ieee") == ""
    assert dispatch.language_of("toy_grad", "auto", factors, "ieee") == "reference"
    x = torch.randn(3, requires_grad=True)
    y = dispatch.operator("toy", "auto", factors, "ieee")(*Doubled(x, 3.0))
    assert torch.equal(y, 3 * x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((3,), 3.0))
    alone = dispatch.operator("toy_grad", "auto", factors, "ieee")
    assert torch.equal(alone(*Undoubled(x.detach())), 2 * x)
    compiled = torch.compile(
        lambda x: dispatch.operator("toy_grad", "auto", factors, "ieee")(*Undoubled(x)),
        backend="aot_eager",
        fullgraph=True,
    )
    assert torch.equal(compiled(x.detach()), 2 * x)


def test_an_operator_that_a_backend_lacks_is_named(toys):
    factors = make_case(4, 6, 9, 2).factors
    with pytest.raises(RuntimeError, match="a kernel of operator 'toy_grad', got 'cpu'"):
        dispatch.operator("toy_grad", "cpu", factors, "ieee")
    operators = tcur.build_info()["operators"]
    assert operators["toy"][:2] == ["reference", "cpu"]
    assert "cpu" not in operators["toy_grad"]
    assert all("cpu" in operators[name] for name in ("materialize", "cur_linear", "w_eff_linear"))


def test_an_operator_without_a_derivative_refuses_to_have_one(toys):
    alone = contract.operator("toy_grad", "reference")
    x = torch.randn(3, requires_grad=True)
    y = alone(x)
    with pytest.raises(RuntimeError, match="toy_grad has no derivative"):
        y.sum().backward()
    torch.library.opcheck(alone, (x.detach(),))


def test_a_gpu_takes_what_has_the_operator(toys, monkeypatch):
    """Triton has no toy, nor has CUDA: "auto" asks both, and goes by the reference."""
    monkeypatch.setattr(dispatch.native, "cuda_absence", lambda device: None)
    here = {"n3": 4, "dtype": torch.float32, "device": torch.device("cuda")}
    factors = type("Factors", (), here)()
    assert dispatch.language_of("toy_grad", "auto", factors, "ieee") == "reference"
    monkeypatch.setattr(contract, "has_kernel", lambda name, language, device: language == "")
    assert dispatch.language_of("toy_grad", "auto", factors, "ieee") == ""
