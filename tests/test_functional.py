"""The functional face: what it returns, and what it refuses by name."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
import tcur_kernels as tcur
from cases import make_case, side_by_side, slices_of
from plain import product
from tcur_kernels.operators import dispatch, functional, native, reference
from tcur_kernels.operators.core_gradient import _sum_over_tokens
from tolerance import assert_close, assert_composition_close, same_mathematics

BACKENDS = pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])


@pytest.fixture
def case():
    return make_case(4, 6, 9, 2)


@BACKENDS
def test_products_and_gradients_against_the_definition(backend):
    case = make_case(12, 6, 9, 3)
    double = case.double()
    core, core32, core64 = (c.core.clone().requires_grad_() for c in (case, case, double))
    (lateral, horizontal), weights, x = case.spectra, list(case.weight), torch.randn(5, 9)
    exact = oracle.w_eff(double.weight, double.lateral, core64, double.horizontal, 0.5)
    results = {
        "materialize": (
            tcur.materialize(weights, case.factors, core, 0.5, backend=backend),
            reference.materialize(case.weight, lateral, horizontal, core32, 0.5),
            exact,
        ),
        "cur_product": (
            tcur.cur_product(case.factors, core, backend),
            reference.cur_product(lateral, core32, horizontal),
            oracle.cur_product(double.lateral, core64, double.horizontal),
        ),
        "cur_linear": (
            tcur.cur_linear(x, weights[3], None, case.factors, core, 3, 0.5, backend),
            reference.cur_linear(x, weights[3], None, lateral, horizontal, core32, 3, 1, 0.5),
            x.double() @ exact[3].T,
        ),
    }
    for actual, same, wanted in results.values():
        grad = torch.randn_like(actual)
        gradients = [
            torch.autograd.grad(value, leaf, grad.to(value.dtype), retain_graph=True)[0]
            for value, leaf in ((actual, core), (same, core32), (wanted, core64))
        ]
        assert_close(actual, same, wanted)
        assert_close(*gradients)


def test_effective_gives_the_same_map(case):
    """Through the factors or through W_eff: values and gradients of the same function."""
    x = torch.randn(5, 9)
    w_eff = tcur.materialize(case.weight, case.factors, case.core)

    def run(linear, x, core):
        x, core = x.detach().requires_grad_(), core.detach().requires_grad_()
        y = linear(x, core)
        return (y, *torch.autograd.grad(y.square().sum(), (x, core)))

    def by_torch(x, core):
        product_of = oracle.cur_product if x.dtype == torch.float64 else product
        update = product_of(case.lateral, core, case.horizontal)
        return x @ (case.weight[2].to(x.dtype) + update[2]).T

    exact = run(by_torch, x.double(), case.core.double())
    for effective in (None, w_eff[2]):

        def linear(x, core, effective=effective):
            args = (case.weight[2], None, case.factors, core, 2)
            return tcur.cur_linear(x, *args, effective=effective)

        actual = run(linear, x, case.core)
        assert_composition_close(actual, lambda: run(by_torch, x, case.core), exact)


def test_half_precision_factors_are_computed_in_fp32():
    case = make_case(4, 6, 9, 2, torch.bfloat16)
    factors = case.factors
    assert factors.dtype == torch.float32
    assert (factors.n3, factors.n1, factors.n2, factors.rank) == (4, 6, 9, 2)
    assert "n3=4, n1=6, n2=9, rank=2" in repr(factors)
    moved = factors.to("cpu")
    assert torch.equal(moved.lateral_hat, factors.lateral_hat)


def test_out_is_reused(case):
    buffer = torch.empty(4, 6, 9)
    result = tcur.materialize(case.weight, case.factors, case.core, out=buffer)
    assert result is buffer
    assert torch.equal(buffer, tcur.materialize(case.weight, case.factors, case.core))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_slices_side_by_side(case, backend):
    matrices = side_by_side(case.weight, [3, 1])
    out = torch.empty(216)
    how = {"out": out, "backend": backend}
    assert tcur.materialize(matrices, case.factors, case.core, 0.5, **how) is out
    w_eff = tcur.materialize(case.weight, case.factors, case.core, 0.5, backend=backend)
    assert torch.equal(slices_of(out, [3, 1], 6, 9), w_eff)


def test_build_info():
    info = tcur.build_info()
    assert info["version"] == tcur.__version__
    assert info["backends"][:2] == ["reference", "cpu"]
    assert info["cuda"]["built"] == (native.cuda_error() is None)
    assert info["cpu"]["isa_chosen"] in info["cpu"]["isa_runnable"]
    assert set(info["cpu"]["isa_runnable"]) <= set(info["cpu"]["isa_compiled"])
    assert "baseline" in info["cpu"]["isa_compiled"]
    assert info["cpu"]["torch_target"] == "2.10"
    assert info["cpu"]["compiler"].split()[0] in ("gcc", "clang")


def test_without_the_compiled_library(monkeypatch, case):
    """A tree that was never built runs on the reference, and says how to get more."""
    monkeypatch.setattr(native, "_cpu", None)
    monkeypatch.setattr(native, "_cpu_error", "no _cpu.torch.so")
    assert "cpu" not in tcur.build_info()["backends"]
    assert tcur.build_info()["cpu"] == {"built": False, "error": native.cpu_error()}
    product = tcur.cur_product(case.factors, case.core)
    assert torch.equal(product, tcur.cur_product(case.factors, case.core, "reference"))
    with pytest.raises(RuntimeError, match=r"backend: 'cpu' is not built here .*pip install"):
        tcur.cur_product(case.factors, case.core, "cpu")


def test_absent_backends_are_refused(monkeypatch, case):
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    with pytest.raises(RuntimeError, match=r"backend: 'triton' is not installed .*pip install"):
        tcur.cur_product(case.factors, case.core, "triton")
    assert "triton" not in tcur.build_info()["backends"]


def test_triton_takes_fp32_alone(monkeypatch, case):
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", True)
    double = case.double()
    with pytest.raises(TypeError, match=r"factors: expected dtype torch.float32 for 'triton'"):
        tcur.cur_product(double.factors, double.core, "triton")


def test_triton_takes_tensors_on_gpus_alone(case):
    triton = pytest.importorskip("tcur_kernels.operators.triton")
    if triton.INTERPRETED:
        pytest.skip("the interpreter takes tensors on the CPU")
    with pytest.raises(ValueError, match="backend: expected one for tensors on cpu, got 'triton'"):
        tcur.cur_product(case.factors, case.core, "triton")


def test_nested_tokens_are_refused_with_what_else_is_wrong(case):
    x = torch.nested.nested_tensor([torch.ones(2, 9), torch.ones(3, 9)], layout=torch.jagged)
    of_a_layer = {"x": x, "weight": case.weight[1], "bias": None, "slice_index": 1}
    for wrong, message in (
        ({"core": case.core[:1]}, r"core: expected \[4, 2, 2\], got \[1, 2, 2\]"),
        ({"factors": case.core}, "factors: expected CURFactors, got Tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            tcur.cur_linear(**{**of_a_layer, "factors": case.factors, "core": case.core, **wrong})


def test_precisions_of_absent_backends_are_refused(case):
    with pytest.raises(ValueError, match=r"precision: .* for backend 'cpu', got 'tf32'"):
        tcur.cur_product(case.factors, case.core, "cpu", precision="tf32")
    with pytest.raises(ValueError, match=r"precision: .* for backend 'reference', got 'bf16'"):
        tcur.materialize(
            case.weight, case.factors, case.core, backend="reference", precision="bf16"
        )
    with pytest.raises(ValueError, match=r"precision: expected one of ieee, tf32, bf16, got 'fp8'"):
        tcur.cur_product(case.factors, case.core, precision="fp8")


def test_precisions_of_devices(monkeypatch):
    cpu, meta, cuda = map(torch.device, ("cpu", "meta", "cuda:0"))
    for precision in ("ieee", "bf16"):
        for device in (cpu, meta, cuda):
            dispatch.check_precision(precision, device)
    dispatch.check_precision("tf32", meta)  # layers without values may go anywhere
    with pytest.raises(
        ValueError, match="precision: expected ieee or bf16 for tensors on cpu, got 'tf32'"
    ):
        dispatch.check_precision("tf32", cpu)
    with pytest.raises(ValueError, match="precision: expected one of ieee, tf32, bf16, got 'fp8'"):
        dispatch.check_precision("fp8", cpu)
    for triton, absence in ((True, "not built"), (False, None), (False, "not built")):
        monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", triton)
        monkeypatch.setattr(native, "cuda_absence", lambda device, absence=absence: absence)
        if triton or absence is None:
            dispatch.check_precision("tf32", cuda)
            continue
        with pytest.raises(ValueError, match="on cuda:0 without Triton or compiled CUDA kernels"):
            dispatch.check_precision("tf32", cuda)


def test_fp64_factors_have_one_precision():
    case = make_case(4, 6, 9, 2, torch.float64)
    args = (torch.ones(2, 9).double(), case.weight[1], None, case.factors, case.core, 1)
    with pytest.raises(ValueError, match="precision: expected ieee for fp64 factors, got 'bf16'"):
        tcur.cur_linear(*args, precision="bf16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("tokens", [50, 9000])  # several blocks
@pytest.mark.parametrize("way", ["backward", "again", "compiled"])
def test_dense_gradients_of_16_bits_are_summed_in_fp32(dtype, backend, slices, tokens, way):
    """As exact as fp32 for these very numbers, and where a sum exceeds what fp16 can hold."""
    case = make_case(4, 6, 9, 2)
    factors, core = case.factors, case.core.requires_grad_()
    weight = case.weight[1 : 1 + slices].flatten(0, 1).to(dtype)
    x = (30 + torch.randn(tokens, 9)).to(dtype)
    grad_y = (30 + torch.randn(tokens, weight.shape[0])).to(dtype)

    def gradient(core):
        how = {"dense_grad": True, "backend": backend}
        y = tcur.cur_linear(x, weight, None, factors, core, 1, 0.5, **how)
        return torch.autograd.grad(y, core, grad_y, create_graph=way == "again")[0]

    if way == "compiled":
        torch._dynamo.reset()
        function = torch.compile(
            lambda core: tcur.cur_linear(
                x, weight, None, factors, core, 1, 0.5, dense_grad=True, backend=backend
            ),
            backend="aot_eager",
            fullgraph=True,
        )
        (found,) = torch.autograd.grad(function(core), core, grad_y)
    else:
        found = gradient(core)

    def by_tokens(case):
        wide = case.core.dtype
        where = (4, 1, slices)
        return 0.5 * reference.core_grad_tokens(x.to(wide), grad_y.to(wide), *case.spectra, *where)

    if dtype == torch.float16 and tokens == 9000:
        assert (grad_y.double().T @ x.double()).max() > torch.finfo(dtype).max
    assert_composition_close(found, lambda: by_tokens(case), by_tokens(case.double()))


def test_dense_gradients_on_a_gpu_are_one_product():
    """Whose operands nobody widens."""
    called = []

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode():
        grads, tokens = (torch.empty(50, n, dtype=torch.bfloat16, device="cuda") for n in (6, 9))
        with Called():
            total = _sum_over_tokens(grads, tokens)
    assert (total.shape, total.dtype) == ((6, 9), torch.float32)
    assert "aten.mm.dtype" in called
    assert "aten._to_copy.default" not in called


def test_other_devices_take_the_reference(case):
    meta = case.factors.to("meta")
    assert dispatch.language_of("materialize", "auto", meta, "ieee") == "reference"
    with pytest.raises(ValueError, match="backend: expected one for tensors on meta, got 'cpu'"):
        dispatch.language_of("materialize", "cpu", meta, "ieee")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lateral": torch.ones(4, 6)}, ValueError, r"lateral: expected \[n3, n1, r\]"),
        ({"horizontal": torch.ones(4, 2)}, ValueError, r"horizontal: expected \[n3, r, n2\]"),
        ({"horizontal": torch.ones(4, 3, 9)}, ValueError, r"horizontal: expected \[4, 2, n2\]"),
        ({"horizontal": torch.ones(3, 2, 9)}, ValueError, r"horizontal: expected \[4, 2, n2\]"),
        ({"lateral": torch.ones(4, 6, 2).int()}, TypeError, "lateral: expected a floating"),
        ({"lateral": [1]}, TypeError, "lateral: expected a torch.Tensor, got list"),
        ({"lateral": torch.full((4, 6, 2), torch.nan)}, ValueError, "lateral: expected finite"),
        ({"horizontal": torch.full((4, 2, 9), torch.inf)}, ValueError, "horizontal: expected fin"),
        (
            {"lateral": torch.ones(4, 6, 2).double()},
            TypeError,
            "horizontal: expected torch.float64",
        ),
        ({"lateral": torch.ones(4, 1, 2)}, ValueError, "lateral: expected a rank of at most"),
        (
            {"lateral": torch.ones(4, 6, 2, requires_grad=True)},
            ValueError,
            "lateral: expected a frozen tensor, got requires_grad=True",
        ),
        (
            {"horizontal": torch.ones(4, 2, 9, requires_grad=True)},
            ValueError,
            "horizontal: expected a frozen tensor",
        ),
        ({"horizontal": torch.ones(4, 2, 9, device="meta")}, ValueError, "horizontal: .* on cpu"),
    ],
)
def test_factors_refuse(change, error, message):
    arguments = {"lateral": torch.ones(4, 6, 2), "horizontal": torch.ones(4, 2, 9), **change}
    with pytest.raises(error, match=message):
        tcur.CURFactors(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"core": torch.ones(4, 3, 3)}, ValueError, r"core: expected \[4, 2, 2\], got \[4, 3, 3\]"),
        ({"core": torch.ones(4, 2, 2).double()}, TypeError, "core: expected dtype torch.float32"),
        ({"core": torch.ones(4, 2, 2).int()}, TypeError, "core: expected a floating dtype"),
        ({"core": torch.ones(4, 2, 2, device="meta")}, ValueError, "core: expected a tensor on"),
        ({"factors": torch.ones(3)}, TypeError, "factors: expected CURFactors, got Tensor"),
        ({"weight": torch.ones(4, 9, 6)}, ValueError, r"weight: expected \[4, 6, 9\]"),
        ({"weight": [torch.ones(6, 9)] * 3}, ValueError, r"weight: expected 4 tensors \[6, 9\]"),
        ({"weight": [torch.ones(9, 6)] * 4}, ValueError, r"weight: expected \[6, 9\]"),
        ({"weight": torch.ones(4, 6, 9).int()}, TypeError, "weight: expected a floating dtype"),
        (
            {"weight": torch.ones(4, 6, 9).double()},
            TypeError,
            "weight: expected at most the precision of fp32",
        ),
        (
            {"weight": torch.ones(4, 6, 9, requires_grad=True)},
            ValueError,
            "weight: expected a frozen tensor",
        ),
        (
            {"weight": [torch.ones(6, 9)] * 3 + [torch.ones(6, 9).half()]},
            TypeError,
            "weight: expected dtype torch.float32, got torch.float16",
        ),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
        ({"scale": torch.tensor(0.5)}, TypeError, "scale: expected a number, got a torch.Tensor"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype: expected a floating dtype"),
        ({"out_dtype": torch.float8_e5m2}, TypeError, "out_dtype: expected one of torch.float32, "),
        (
            {"weight": torch.ones(4, 6, 9).to(torch.float8_e5m2)},
            TypeError,
            "weight: expected one of .*, got torch.float8_e5m2",
        ),
        ({"weight": []}, ValueError, r"weight: expected 4 tensors \[6, 9\], got 0"),
        (
            {"weight": [torch.ones(6, 27), torch.ones(6, 9)]},
            ValueError,
            r"weight: expected 4 tensors \[6, 9\], got 2",
        ),
        (
            {"weight": [torch.ones(6, 27), torch.ones(6, 8)], "out": torch.empty(216)},
            ValueError,
            r"weight: expected \[6, slices \* 9\], got \[6, 8\]",
        ),
        (
            {"weight": [torch.ones(6, 27), torch.ones(6, 18)], "out": torch.empty(216)},
            ValueError,
            r"weight: expected 4 slices \[6, 9\] together, got 5",
        ),
        (
            {"weight": [torch.ones(6, 27), torch.ones(6, 9)], "out": torch.empty(4, 6, 9)},
            ValueError,
            r"out: expected a contiguous \[216\], got \[4, 6, 9\]",
        ),
        (
            {"weight": [torch.ones(6, 9)] * 4, "out": torch.empty(216)},
            ValueError,
            r"out: expected a contiguous \[4, 6, 9\], got \[216\]",
        ),
        ({"out": torch.empty(4, 6, 8)}, ValueError, r"out: expected a contiguous \[4, 6, 9\]"),
        ({"out": torch.empty(4, 9, 6).mT}, ValueError, "out: expected a contiguous"),
        ({"out": torch.empty(4, 6, 9).int()}, TypeError, "out: expected a floating dtype"),
        (
            {"out": torch.empty(4, 6, 9), "out_dtype": torch.half},
            TypeError,
            "out: expected dtype torch.float16",
        ),
        (
            {"out": torch.empty(4, 6, 9), "core": torch.ones(4, 2, 2, requires_grad=True)},
            ValueError,
            "out: expected None while the core requires grad",
        ),
        ({"backend": "gpu"}, ValueError, "backend: expected one of auto.*got 'gpu'"),
    ],
)
def test_materialize_refuses(case, change, error, message):
    arguments = {"weight": case.weight, "factors": case.factors, "core": case.core, **change}
    with pytest.raises(error, match=message):
        tcur.materialize(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 8)}, ValueError, r"x: expected \[..., 9\], got \[3, 8\]"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected"),
        ({"x": torch.ones(3, 9).int()}, TypeError, "x: expected a floating dtype"),
        ({"x": torch.ones(3, 9).half()}, TypeError, "x: expected dtype torch.float32"),
        ({"x": torch.ones(3, 9, device="meta")}, ValueError, "x: expected a tensor on cpu"),
        ({"weight": torch.ones(7, 9)}, ValueError, r"weight: expected \[slices \* 6, 9\]"),
        ({"weight": torch.ones(6, 9).int()}, TypeError, "weight: expected a floating dtype"),
        ({"weight": None}, TypeError, r"weight: expected a torch\.Tensor, got NoneType"),
        ({"z": torch.ones(3, 7)}, ValueError, r"z: expected \[3, 8\], got \[3, 7\]"),
        ({"weight": torch.ones(6, 8)}, ValueError, "weight: expected"),
        ({"weight": torch.ones(0, 9)}, ValueError, "weight: expected"),
        ({"weight": torch.ones(6, 9, requires_grad=True)}, ValueError, "weight: expected a frozen"),
        ({"bias": torch.ones(5)}, ValueError, r"bias: expected \[6\], got \[5\]"),
        ({"bias": torch.ones(6).half()}, TypeError, "bias: expected dtype"),
        ({"bias": torch.ones(6, requires_grad=True)}, ValueError, "bias: expected a frozen"),
        ({"slice_index": 4}, ValueError, "slice_index: expected 0 to 3 .* got 4"),
        ({"slice_index": -1}, ValueError, "slice_index: expected 0 to 3"),
        ({"slice_index": 1.0}, TypeError, "slice_index: expected an int, got float"),
        (
            {"slice_index": 2, "weight": torch.ones(18, 9)},
            ValueError,
            "slice_index: expected 0 to 1 for 3 of 4 slices, got 2",
        ),
        ({"effective": torch.ones(5, 9)}, ValueError, r"effective: expected \[6, 9\]"),
        ({"effective": torch.ones(6, 9).half()}, TypeError, "effective: expected dtype"),
        (
            {"effective": torch.ones(6, 9, device="meta")},
            ValueError,
            "effective: expected a tensor on cpu",
        ),
        ({"z": torch.ones(3, 8, device="meta")}, ValueError, "z: expected a tensor on cpu"),
        ({"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
    ],
)
def test_cur_linear_refuses(case, change, error, message):
    arguments = {
        "x": torch.ones(3, 9),
        "weight": case.weight[1],
        "bias": None,
        "factors": case.factors,
        "core": case.core,
        "slice_index": 1,
        **change,
    }
    with pytest.raises(error, match=message):
        tcur.cur_linear(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"slices": 0}, ValueError, "slices: expected 1 to 4, got 0"),
        ({"slices": 5}, ValueError, "slices: expected 1 to 4, got 5"),
        ({"slices": 1.0}, TypeError, "slices: expected an int, got float"),
        ({"slice_index": 3, "slices": 2}, ValueError, "slice_index: expected 0 to 2"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
    ],
)
def test_slice_update_refuses(case, change, error, message):
    arguments = {"factors": case.factors, "core": case.core, "slice_index": 1, **change}
    with pytest.raises(error, match=message):
        functional.slice_update(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 9).int()}, TypeError, "x: expected a floating dtype"),
        ({"x": torch.ones(3, 8)}, ValueError, r"x: expected \[..., 9\], got \[3, 8\]"),
        ({"transposed": True, "slices": 2}, ValueError, r"x: expected \[..., 12\], got \[3, 9\]"),
        ({"slice_index": 3, "slices": 2}, ValueError, "slice_index: expected 0 to 2"),
        ({"core": torch.ones(2, 4, 2, 3)}, ValueError, r"core: expected \[adapters, 4, 2, 2\]"),
        ({"core": torch.ones(4, 2, 2)}, ValueError, r"core: expected \[adapters, 4, 2, 2\]"),
        ({"adapter_ids": torch.tensor([0, 2, 0])}, ValueError, "adapter_ids: expected 0 to 1"),
        (
            {"adapter_ids": torch.zeros(3, dtype=torch.int64, device="meta")},
            ValueError,
            "adapter_ids: expected a tensor on cpu, got one on meta",
        ),
    ],
)
def test_update_linear_refuses(case, change, error, message):
    arguments = {
        "x": torch.ones(3, 9),
        "factors": case.factors,
        "core": torch.stack([case.core, case.core]),
        "slice_index": 1,
        "adapter_ids": torch.tensor([0, 1, 0]),
        **change,
    }
    with pytest.raises(error, match=message):
        functional.update_linear(**arguments)


def test_project_refuses_tokens_that_are_no_numbers(case):
    with pytest.raises(TypeError, match="x: expected a floating dtype"):
        functional.project(torch.ones(3, 9).int(), case.factors)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_buffer_may_be_the_weight_itself(backend):
    case = make_case(12, 40, 300, 3)
    wanted = tcur.materialize(case.weight, case.factors, case.core, 0.5, backend=backend)
    how = {"out": case.weight, "backend": backend}
    tcur.materialize(case.weight, case.factors, case.core, 0.5, **how)
    assert torch.equal(case.weight, wanted)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_tokens_of_any_leading_shape(case, leading):
    """Features are the last axis, wherever that is."""
    n1, n2 = case.weight.shape[1:]
    x = torch.randn(*leading, n2)
    given = (case.weight[0], None, case.factors, case.core, 0)
    y, z = tcur.cur_linear(x, *given), functional.project(x, case.factors)
    assert y.shape == (*leading, n1)
    assert z.shape == (*leading, case.factors.n3 * case.factors.rank)
    assert same_mathematics(y.reshape(-1, n1), tcur.cur_linear(x.reshape(-1, n2), *given))
    with pytest.raises(ValueError, match="x: expected"):
        tcur.cur_linear(torch.randn(*leading, n2 + 1), *given)
