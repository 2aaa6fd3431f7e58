"""Starts every test with the same seed, and fills uninitialised memory with NaN."""

import os
import sys
from pathlib import Path

import pytest
import torch

# The tests of what a GPU would issue share the recorder of launches with the benchmarks.
sys.path.append(str(Path(__file__).parent.parent))
# What interpreted kernels may touch, and what breaks modules on purpose.
sys.path += [str(Path(__file__).parent / folder) for folder in ("interpreted", "pymutants")]

#: Tests that place their tensors themselves, whatever the default device is.
PLACED = (Path(__file__).parent / "conformance", Path(__file__).parent / "test_device.py")

#: Modules with tests of a minute or more. They come first: at the end one process would run the
#: last of them, and the others would wait for it.
LONG = ("test_triton.py", "test_triton_oldest.py", "test_triton_compile.py", "test_peft_oldest.py")
LONG += ("test_example.py", "test_benchmarks.py", "test_cuda_host.py")

#: Instruction sets that the CPU kernels can be compiled for.
VARIANTS = sorted(
    path.parent.name for path in (Path(__file__).parent.parent / "csrc/cpu").glob("*/isa.h")
)

# Tests of Triton kernels on the CPU need Triton's interpreter, which is chosen when Triton is
# imported. They only run in a separate session, which `test_triton.py` starts. Those of
# `conformance` run in both.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="default device of the tests: cpu or cuda")
    parser.addoption("--isa", help="instruction set of the CPU kernels, in place of the best one")


def pytest_configure(config):
    isa = config.getoption("--isa")
    if isa is not None:
        from tcur_kernels.operators import native

        native.force(isa)


def pytest_collection_modifyitems(items):
    """Long tests first. Names are the same in every process: else xdist refuses to start."""
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        sets = [value for value in given if isinstance(value, (set, frozenset))]
        if " at 0x" in item.nodeid or any(str(value) in item.nodeid for value in sets):
            raise pytest.UsageError(f"{item.nodeid}: expected a name without a set or an address")


@pytest.fixture(autouse=True)
def _reproducible(request):
    torch.manual_seed(0)
    # This fills torch.empty with NaN, also new_empty in the compiled library. If a kernel forgets
    # to write an element, it cannot pass for a zero.
    on_cpu = request.config.getoption("--device") == "cpu"  # some CUDA sums are not deterministic
    torch.use_deterministic_algorithms(True, warn_only=not on_cpu)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _within_tensors():
    """In Triton's interpreter, no kernel touches what it was not given."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from memory import watched

    with watched():
        yield


@pytest.fixture(autouse=True)
def _default_device(request):
    """Makes tensors on the tested device by default, unless a test places its own."""
    device = request.config.getoption("--device")
    if device == "cpu" or any(path in (request.path, request.path.parent) for path in PLACED):
        yield
        return
    with torch.device(device):
        yield


@pytest.fixture(params=VARIANTS)
def isa(request):
    """Every instruction set of the CPU kernels in turn."""
    from tcur_kernels.operators import native

    if request.param not in native.runnable_isas():
        pytest.skip(f"this processor, or the library, has no {request.param}")
    before = native.chosen_isa()
    native.force(request.param)
    yield request.param
    native.force(before)


@pytest.fixture
def job(monkeypatch):
    """The modules of the segmentation job, see `segmentation_files.Modules`."""
    from segmentation_files import modules

    return modules(monkeypatch)


@pytest.fixture(scope="module")
def original():
    """The network that checkpoints of the segmentation job hold."""
    from segmentation_files import tiny_unetr

    return tiny_unetr()


@pytest.fixture(scope="module")
def weights(original):
    return original.state_dict()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skips a test on a GPU if a CUDA kernel refuses fp64, since it has nothing to run there."""
    try:
        return (yield)
    except RuntimeError as error:
        if "for CUDA kernels" not in str(error) or item.config.getoption("--device") == "cpu":
            raise
        pytest.skip(str(error).splitlines()[0])
