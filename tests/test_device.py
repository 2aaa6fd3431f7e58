"""The operators on any device, by the public functions: ``pytest --device cuda`` on a GPU.

Without the option they run on the CPU, so that what a GPU is to be tested with is tested itself.
"""

import pytest
import torch
from torch.nn import functional as F

import tcur_kernels as tcur
from cases import counts_of, make_case, side_by_side, slices_of
from plain import product
from tcur_kernels.operators import contract, reference
from tolerance import PROMISE, assert_close, assert_composition_close, relative_error

CASES = {
    "small": (5, 6, 9, 2),
    "attention": (48, 33, 70, 8),
    "prime": (47, 20, 36, 8),
    "long": (128, 17, 40, 4),
    "single": (1, 40, 130, 8),
    "wide_rank": (12, 50, 60, 34),
}


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        here = {"cpu": ["cpu"], "cuda": ["cuda", "triton"]}
        names = here[metafunc.config.getoption("--device")]
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request, device):
    """Every backend that runs on the device."""
    case = make_case(2, 3, 4, 1)
    try:
        tcur.cur_product(case.factors.to(device), case.core.to(device), request.param)
    except RuntimeError as error:
        pytest.skip(f"{request.param}: {error}")
    return request.param


@pytest.fixture(params=CASES.values(), ids=CASES)
def stack(request):
    return make_case(*request.param)


def on(device, case):
    """Factors, weight and core on the device."""
    return case.factors.to(device), case.weight.to(device), case.core.to(device)


def language(backend):
    return "triton" if backend == "triton" else ""


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_materialize(device, backend, stack, weight_dtype, out_dtype):
    stack.weight = stack.weight.to(weight_dtype)
    factors, weight, core = on(device, stack)
    double = stack.double()
    exact = reference.materialize(double.weight, *double.spectra, double.core, 0.5)
    same = reference.materialize(stack.weight, *stack.spectra, stack.core, 0.5).to(out_dtype)
    out = torch.full_like(weight, float("nan"), dtype=out_dtype)
    result = tcur.materialize(weight, factors, core, 0.5, out=out, backend=backend)
    assert_close(result.cpu(), same, exact)
    layers = list(weight.unbind())
    again = tcur.materialize(layers, factors, core, 0.5, out_dtype, backend=backend)
    assert torch.equal(again, result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [0, 50, 5000])
def test_dense_gradients_of_16_bits(device, backend, stack, dtype, tokens):
    """Summed in fp32: fp16 would overflow, and bf16 lose most of its digits."""
    n1, n2 = stack.weight.shape[1:]
    factors, weight, core = on(device, stack)
    x, grad_y = ((30 + torch.randn(tokens, n)).to(dtype) for n in (n2, n1))
    args = (weight[0].to(dtype), None, factors, core.requires_grad_(), 0)
    y = tcur.cur_linear(x.to(device), *args, backend=backend, dense_grad=True)
    (found,) = torch.autograd.grad(y, core, grad_y.to(device))

    def by_tokens(case):
        wide, n3 = case.core.dtype, case.core.shape[0]
        return reference.core_grad_tokens(x.to(wide), grad_y.to(wide), *case.spectra, n3, 0)

    if not tokens:
        assert not found.any()
        return
    assert_composition_close(found.cpu(), lambda: by_tokens(stack), by_tokens(stack.double()))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_side_by_side(device, backend, stack, weight_dtype, out_dtype):
    """As in the weights of GPT-2's fused projections: the numbers of single slices."""
    factors, weight, core = on(device, stack)
    weight = weight.to(weight_dtype)
    n3, n1, n2 = weight.shape
    counts = counts_of(n3)
    shape = weight.shape if n3 == 1 else (n3 * n1 * n2,)
    out = torch.full(shape, float("nan"), dtype=out_dtype, device=device)
    tcur.materialize(side_by_side(weight, counts), factors, core, 0.5, out=out, backend=backend)
    w_eff = tcur.materialize(weight, factors, core, 0.5, out_dtype, backend=backend)
    assert torch.equal(slices_of(out.flatten(), counts, n1, n2), w_eff)


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_the_update_keeps_its_promise(device, backend, stack, precision):
    if precision != "ieee" and backend not in ("triton", "cuda"):
        pytest.skip("computes in fp32 alone")
    factors, _, core = on(device, stack)
    exact = reference.cur_product(
        stack.double().spectra[0], stack.double().core, stack.double().spectra[1]
    )
    product = tcur.cur_product(factors, core, backend, precision=precision)
    assert relative_error(product.cpu(), exact) <= PROMISE[precision]


def test_gradients_of_the_core(device, backend, stack):
    n3, n1, n2 = stack.weight.shape
    factors, weight, _ = on(device, stack)
    exact = reference.core_grad_dense(stack.weight.double(), *stack.double().spectra)
    same = reference.core_grad_dense(stack.weight, *stack.spectra)
    grad = contract.operator("core_grad_dense", language(backend))(weight, *factors.packed())
    assert_close(grad.cpu(), same, exact)
    slices = min(2, n3)
    x, grad_y = torch.randn(300, n2), torch.randn(300, slices * n1)
    args = (n3, n3 - slices, slices)
    exact = reference.core_grad_tokens(x.double(), grad_y.double(), *stack.double().spectra, *args)
    same = reference.core_grad_tokens(x, grad_y, *stack.spectra, *args)
    op = contract.operator("core_grad_tokens", language(backend))
    grad = op(x.to(device), grad_y.to(device), *factors.packed(), *args)
    assert_close(grad.cpu(), same, exact)
    packed = op(x.to(device), grad_y.to(device), *factors.packed(), *args, None, 1, True)
    args = (*args, None, 1, True)
    exact = reference.core_grad_tokens(x.double(), grad_y.double(), *stack.double().spectra, *args)
    assert_close(packed.cpu(), reference.core_grad_tokens(x, grad_y, *stack.spectra, *args), exact)
    several = torch.randn(48, *stack.core.shape)
    core = contract.operator("core_of_packed", language(backend))(several.to(device), 0.7)
    exact = reference.core_of_packed(several.double(), 0.7)
    assert_close(core.cpu(), reference.core_of_packed(several, 0.7), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cur_linear_and_its_gradients(device, backend, stack, dtype):
    n3 = stack.weight.shape[0]
    factors, weight, core = on(device, stack)
    x = torch.randn(3, 5, weight.shape[2]).to(dtype)
    here, core = x.to(device).requires_grad_(), core.requires_grad_()
    weight = weight[n3 - 1].to(dtype)
    y = tcur.cur_linear(here, weight, None, factors, core, n3 - 1, 0.5, backend)
    double = stack.double()
    rest = (*double.spectra, double.core, n3 - 1, 1, 0.5)
    exact = reference.cur_linear(x.double(), weight.cpu().double(), None, *rest)
    narrow = (*stack.spectra, stack.core, n3 - 1, 1, 0.5)
    same = reference.cur_linear(x, weight.cpu(), None, *narrow)
    assert_close(y.cpu(), same, exact)
    if dtype == torch.float32:
        grads = torch.autograd.grad(y.square().sum(), (here, core))

        def plain(case):
            x_, core = (t.detach().to(case.core.dtype).requires_grad_() for t in (x, case.core))
            w_eff = case.weight + 0.5 * product(case.lateral, core, case.horizontal)
            return torch.autograd.grad(F.linear(x_, w_eff[-1]).square().sum(), (x_, core))

        grads = [grad.cpu() for grad in grads]
        assert_composition_close(grads, lambda: plain(stack), plain(double))


def test_a_core_per_row(device, backend, stack):
    _n3, _n1, n2 = stack.weight.shape
    factors, weight, _ = on(device, stack)
    cores = torch.randn(3, *stack.core.shape)
    ids = torch.tensor([2, 0, 2, 1])
    x = torch.randn(4, 5, n2)
    y = tcur.cur_linear(
        x.to(device), weight[0], None, factors, cores.to(device), 0, 0.5, backend,
        adapter_ids=ids.to(device),
    )  # fmt: skip
    args = (0, 1, 0.5, ids)
    base = F.linear(x.double(), stack.weight[0].double())
    exact = base + reference.slice_update(
        x.double(), *stack.double().spectra, cores.double(), *args
    )
    same = F.linear(x, stack.weight[0]) + reference.slice_update(x, *stack.spectra, cores, *args)
    assert_close(y.cpu(), same, exact)


def test_small_edges(device, backend):
    """No token, no row, one number; a strided weight; another stream."""
    case = make_case(5, 6, 9, 2)
    factors, weight, core = on(device, case)
    y = tcur.cur_linear(
        torch.randn(0, 9, device=device), weight[1], None, factors, core, 1, backend=backend
    )
    assert y.shape == (0, 6)
    wide = torch.randn(5, 6, 18, device=device)
    strided = tcur.materialize(wide[:, :, ::2], factors, core, backend=backend)
    assert torch.equal(
        strided, tcur.materialize(wide[:, :, ::2].contiguous(), factors, core, backend=backend)
    )
    if device.type == "cuda":
        expected = tcur.cur_product(factors, core, backend)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = tcur.cur_product(factors, core, backend)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(result, expected)


def test_roots_first_asked_for_within_a_capture(device, backend):
    """They are made beside the capture, and the graph finds them at every replay."""
    if backend != "cuda":
        pytest.skip("only the CUDA kernels keep tables of roots")
    op = contract.operator("core_grad_tokens", language(backend))

    def arguments(n3):
        factors = make_case(n3, 6, 9, 2).factors.to(device)
        x, grad_y = torch.randn(30, 9, device=device), torch.randn(30, 6, device=device)
        return x, grad_y, *factors.packed(), n3, 1, 1

    op(*arguments(23))  # what torch sets up at the first product must not be part of the graph
    args = arguments(29)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad = op(*args)
    for _ in range(2):
        args[0].normal_()
        graph.replay()
        assert torch.equal(grad, op(*args))


def test_another_device_than_the_current_one(device, backend):
    """Kernels run where their tensors are, on that device's current stream."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs and --device cuda")
    case = make_case(12, 20, 36, 8)
    there = torch.device("cuda", 1)

    def run(device):
        factors, weight, core = on(device, case)
        x = torch.ones(4, 36, device=device)
        w_eff = tcur.materialize(weight, factors, core, backend=backend)
        grad = contract.operator("core_grad_dense", language(backend))(weight, *factors.packed())
        return w_eff, grad, tcur.cur_linear(x, weight[0], None, factors, core, 0, backend=backend)

    with torch.cuda.device(0):
        away = run(there)
    for ours, theirs in zip(run(torch.device("cuda", 0)), away, strict=True):
        assert theirs.device == there
        assert torch.equal(ours.cpu(), theirs.cpu())


def test_layers_in_a_cuda_graph(device, backend):
    """Weights of layers are read where they are, a table of their addresses with every replay."""
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    case = make_case(12, 20, 36, 8)
    factors, weight, core = on(device, case)
    layers, out = [w.clone() for w in weight], torch.empty_like(weight)

    def run():
        tcur.materialize(layers, factors, core, out=out, backend=backend)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles, and puts the addresses on the device
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for layer in layers:
        layer.add_(1.0)
    core.mul_(2.0)
    graph.replay()
    replayed = out.clone()
    run()
    assert torch.equal(replayed, out)
