"""Every test starts from one seed, and uninitialised memory is full of NaN."""

import os
from pathlib import Path

import pytest
import torch

#: Tests that place their tensors themselves, whatever the default device is.
PLACED = (Path(__file__).parent / "conformance", Path(__file__).parent / "test_device.py")

# Tests of Triton kernels on the CPU need its interpreter, which is chosen when Triton is imported:
# they run in a session of their own (`test_triton.py` starts it), and there alone.
# Those of `conformance` run in both.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="default device of the tests: cpu or cuda")
    parser.addoption("--isa", help="instruction set of the CPU kernels, in place of the best one")


def pytest_configure(config):
    isa = config.getoption("--isa")
    if isa is not None:
        from tcur_kernels import _cpu

        _cpu.use_isa(isa)


@pytest.fixture(autouse=True)
def _reproducible(request):
    torch.manual_seed(0)
    # Fills torch.empty, new_empty of the compiled library included, with NaN: an element that a
    # kernel forgets to write cannot pass for a zero.
    on_cpu = request.config.getoption("--device") == "cpu"  # CUDA has sums without such a form
    torch.use_deterministic_algorithms(True, warn_only=not on_cpu)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _default_device(request):
    """On another device, tensors are made there, but where tests place their own."""
    device = request.config.getoption("--device")
    if device == "cpu" or any(path in (request.path, request.path.parent) for path in PLACED):
        yield
        return
    with torch.device(device):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """CUDA kernels take no fp64, and say so: such a test has nothing to run on a GPU."""
    try:
        return (yield)
    except RuntimeError as error:
        if "for CUDA kernels" not in str(error) or item.config.getoption("--device") == "cpu":
            raise
        pytest.skip(str(error).splitlines()[0])
