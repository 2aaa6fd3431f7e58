"""The Triton kernels: run in the interpreter, by a session of its own, and refused elsewhere."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy
import pytest
import torch
import triton
from numpy.lib import NumpyVersion

import tcur_kernels as tcur
from cases import make_case

TESTS = Path(__file__).parent


@pytest.mark.kernels
@pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and NumpyVersion(numpy.__version__) >= "2.4.0",
    reason="its interpreter does not know numpy 2.4 and later",
)
@pytest.mark.parametrize(
    "selected",
    [
        ("conformance/test_values.py",),
        ("conformance", "--ignore=conformance/test_values.py"),
        ("interpreted",),
    ],
    ids=["values", "conformance", "interpreted"],
)
def test_in_the_interpreter(selected):
    """Triton asks for its interpreter when it is imported: hence a process for these tests."""
    command = [sys.executable, "-m", "pytest", "-q", *selected]
    # By the interpreter of Triton 3.6, where numpy still allows what it does.
    command += ["-W", "ignore:Conversion of an array with ndim:DeprecationWarning"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to run on")
def test_it_does_not_run_on_the_cpu():
    case = make_case(4, 6, 9, 2)
    with pytest.raises(ValueError, match=r"backend: .* on cpu, got 'triton', which runs on CUDA"):
        tcur.cur_product(case.factors, case.core, backend="triton")
    assert "triton" not in tcur.build_info()["backends"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to run on")
def test_compiled_graphs_hold_the_launches(monkeypatch):
    """torch.compile sees through the operators, forward and backward: traced here, run nowhere."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from tcur_kernels.operators import contract
    from tcur_kernels.operators.triton import INTERPRETED

    assert not INTERPRETED
    # Tracing a launch asks which device it is for.
    device = mock.MagicMock()
    device.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    monkeypatch.setattr(driver, "_active", device)
    graphs = []

    def trace(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        (outputs,) = graph.graph.output_node().args
        values = [node if node is None else node.meta["val"] for node in outputs]

        def run(*args):
            return [
                torch.zeros([int(size) for size in value.shape], dtype=value.dtype)
                if isinstance(value, torch.Tensor)
                else value
                for value in values
            ]

        return make_boxed_func(run)

    case = make_case(5, 6, 9, 2)
    core, packed, stacked = case.core.requires_grad_(), case.packed, case.weight
    weights = [w.clone() for w in stacked]

    def step(x, core):
        linear = contract.operator("cur_linear", "triton")
        y = linear(x, weights[1], None, *packed, core, 1, 1, 0.5, False)
        op = contract.operator("materialize", "triton")
        whole = op([stacked], *packed, core, 0.5, torch.float32)
        layers = op(weights, *packed, core, 0.5, torch.float32)
        return y.square().sum() + whole.square().sum() + layers.square().sum()

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=trace)
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(torch.randn(7, 9, requires_grad=True), core).backward()
        compiled(torch.randn(11, 9, requires_grad=True), core)
    forward, backward = graphs
    for graph in graphs:
        assert "triton_kernel_wrapper_functional" in graph
        assert "cur_linear_triton" not in graph
        assert "core_grad" not in graph
    # Addresses of layers exist at run time alone: that launch stays a black box.
    assert "tcur.materialize_out_triton" in forward
    assert forward.count("triton_kernel_wrapper_functional") > 4
    assert backward.count("triton_kernel_wrapper_functional") > 4


def test_tables_of_addresses_are_kept_and_not_made_in_a_capture(monkeypatch):
    """A captured graph reads them for as long as it lives, and copies nothing from the host."""
    from tcur_kernels.operators.triton import places

    here = torch.device("cpu")
    tables = [places._table((0, place), here) for place in range(1000)]
    assert all(places._table((0, p), here) is tables[p] for p in range(1000))
    assert tables[7].tolist() == [0, 7]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"weights: expected .* one call before the capture"):
        places._table((0, 1), torch.device("cuda", 0))


def test_where_layers_lie():
    """Alignments are promises to the compiler: a thread loads that many numbers at once."""
    from tcur_kernels.operators.triton.places import base_of

    def weights(start, dtype=torch.float32, columns=8):
        numbers = torch.zeros(400, dtype=dtype)
        return [numbers[at : at + 2 * columns].view(2, columns) for at in (start, 100 + start)]

    unused = torch.empty(0)
    even = base_of(weights(0), [1, 1], 2, 8, unused)
    assert (even.kind, even.aligned, even.places.tolist()) == ("layers", 4, [0, 100])
    assert base_of(weights(0, torch.bfloat16), [1, 1], 2, 8, unused).aligned == 1
    assert base_of(weights(1), [1, 1], 2, 8, unused).aligned == 1
    assert base_of([weights(0)[0], weights(1)[1]], [1, 1], 2, 8, unused).aligned == 1
    beside = base_of(weights(0, columns=12), [2, 2], 2, 6, unused)
    assert (beside.kind, beside.aligned) == ("beside", 2)
    assert beside.places.tolist() == [0, 6, 100, 106, 0, 1, 4, 5, 2, 2, 2, 2]
    # One of them is strided: then all are copied.
    first, second = weights(0)
    second = torch.arange(32.0).view(2, 16)[:, ::2]
    copied = base_of([first, second], [1, 1], 2, 8, unused)
    assert copied.kind == "stack"
    assert torch.equal(copied.tensor, torch.stack([first, second]))


def test_factors_too_large_for_offsets_of_32_bits():
    from tcur_kernels.operators.contract import MaterializeOut
    from tcur_kernels.operators.triton import materialize

    def empty(*shape):
        return torch.empty(*shape, device="meta")

    n1, n3, rank = 1 << 20, 48, 64
    packed = empty(n1, n3 * rank), empty(n3 * rank, 8)
    arguments = MaterializeOut([], *packed, empty(n3, rank, rank), 1.0, empty(n3, n1, 8))
    with pytest.raises(ValueError, match=r"core: expected r \* n1 and r \* n2 below 67108864"):
        materialize.run(arguments, "ieee")
