"""The CUDA library where there is no GPU: it loads, tells what it holds, and is chosen by rule."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import tcur_kernels as tcur
from cases import make_case
from tcur_kernels.operators import contract, cost, dispatch, native

NAMES = (
    "materialize", "materialize_out", "core_grad_dense", "core_grad_tokens", "core_of_packed",
    "cur_linear",
)  # fmt: skip

built = pytest.mark.skipif(native.cuda_error() == "no _cuda.torch.so", reason="built without nvcc")


@built
def test_it_loads_without_a_gpu_and_registers_its_operators():
    code = f"""
import torch
from tcur_kernels.operators import native
has = torch._C._dispatch_has_kernel_for_dispatch_key
before = [has(f"tcur::{{name}}", "CUDA") for name in {NAMES!r}]
print(any(before) == (torch.version.cuda is not None), native.cuda_error())
print(all(has(f"tcur::{{name}}", "CUDA") for name in {NAMES!r}))
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["True", "None", "True"]


@built
def test_it_tells_its_architectures():
    facts = tcur.build_info()["cuda"]
    assert facts["built"]
    assert facts["architectures"]
    assert all(name.removesuffix("+PTX").rstrip("af").isdigit() for name in facts["architectures"])


def on_gpu(n3=48, dtype=torch.float32):
    """What the choice of a backend sees of factors on a GPU."""
    return SimpleNamespace(device=torch.device("cuda"), n3=n3, dtype=dtype)


def language(backend, factors):
    return dispatch.language_of("materialize", backend, factors, "ieee")


class Library:
    """Stands for a CUDA library that was compiled for some architectures."""

    def __init__(self, architectures):
        self.tcur_cuda_architectures = lambda: architectures.encode()


@pytest.fixture
def machine(monkeypatch):
    """Sets what the library was compiled for, and the compute capabilities of the GPUs here."""

    def set_up(architectures, *capabilities):
        monkeypatch.setattr(native, "_cuda", lambda: (Library(architectures), None))
        monkeypatch.setattr(contract, "has_kernel", lambda *args: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device: capabilities[device.index or 0]
        )

    return set_up


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("80 90 100 100+PTX", (8, 0), True),
        ("80 90 100 100+PTX", (8, 6), True),  # code of the same first number
        ("80 90 100 100+PTX", (7, 5), False),
        ("80 90 100 100+PTX", (12, 0), True),  # by PTX
        ("80 90 100", (12, 0), False),
        ("86", (8, 0), False),  # no older second number
        ("90", (10, 0), False),
        ("90a", (9, 0), True),
        ("100a", (10, 3), False),  # "a" is for its own device alone
    ],
)
def test_a_gpu_that_nothing_was_compiled_for(machine, monkeypatch, architectures, capability, runs):
    """ "auto" takes another backend, "cuda" is refused, and `build_info` says why."""
    machine(architectures, capability)
    info = tcur.build_info()
    assert info["cuda"]["built"]
    assert info["cuda"]["architectures"] == architectures.split()
    assert ("cuda" in info["backends"]) == runs
    if runs:
        assert info["cuda"]["error"] is None
        assert language("auto", on_gpu()) == language("cuda", on_gpu()) == ""
        return
    reason = (
        f"compiled for {architectures.replace(' ', ', ')}, not for the "
        f"{capability[0]}.{capability[1]} of cuda:0"
    )
    assert info["cuda"]["error"] == reason
    assert language("auto", on_gpu()) == "triton"
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    assert language("auto", on_gpu()) == "reference"
    with pytest.raises(RuntimeError, match=r"'cuda' is not built here \(compiled for .* of cuda"):
        language("cuda", on_gpu())


def test_each_gpu_is_asked_for_itself(machine):
    machine("90", (8, 6), (9, 0))
    info = tcur.build_info()
    assert info["cuda"]["error"] is None
    assert "cuda" in info["backends"]
    assert native.cuda_absence(torch.device("cuda", 0)) is not None
    assert native.cuda_absence(torch.device("cuda", 1)) is None
    machine("90")
    assert tcur.build_info()["cuda"]["error"] == "torch sees no GPU here"


def test_rocm_takes_no_cuda_kernels(machine, monkeypatch):
    machine("90", (9, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert native.cuda_absence(torch.device("cuda", 0)) == "CUDA kernels do not run on ROCm"


def test_the_choice_compiles(machine):
    """The device is asked while the graph is traced, without a break."""

    def function(x):
        return x + 1 if native.cuda_absence(torch.device("cuda", 0)) is None else x - 1

    for capability, wanted in (((9, 0), 1.0), ((8, 0), -1.0)):
        machine("90", capability)
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert compiled(torch.zeros(())).item() == wanted


def test_without_the_library_a_gpu_takes_another_backend(monkeypatch):
    monkeypatch.setattr(native, "_cuda", lambda: (None, "no _cuda.torch.so"))
    assert tcur.build_info()["cuda"] == {"built": False, "error": "no _cuda.torch.so"}
    assert language("auto", on_gpu()) != ""
    with pytest.raises(
        RuntimeError, match=r"backend: 'cuda' is not built here \(no _cuda.torch.so\).*nvcc"
    ):
        language("cuda", on_gpu())


def test_a_library_that_does_not_load_says_why(monkeypatch, tmp_path):
    (tmp_path / "_cuda.torch.so").write_text("torn")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    library, error = native._load_cuda()
    assert library is None
    assert "_cuda.torch.so" in error


def test_what_cuda_is_asked_for(machine):
    machine("90", (9, 0))
    assert language("cuda", on_gpu()) == language("cuda", on_gpu(n3=2048)) == ""
    assert language("auto", on_gpu()) == ""
    assert language("auto", on_gpu(dtype=torch.float64)) == "reference"
    for factors in (on_gpu(dtype=torch.float64), on_gpu(n3=2049)):
        with pytest.raises(
            ValueError, match="expected fp32 factors of at most 2048 slices for 'cuda'"
        ):
            language("cuda", factors)
    case = make_case(4, 6, 9, 2)
    with pytest.raises(ValueError, match="backend: expected one for tensors on cpu, got 'cuda'"):
        tcur.cur_product(case.factors, case.core, "cuda")


def test_the_rule_on_a_gpu():
    def choose(name="materialize", n3=48, dtype=torch.float32, available=("cuda", "triton")):
        return cost.choose_gpu_backend(name, n3=n3, dtype=dtype, available=available)

    assert choose() == "cuda"
    assert choose(n3=128) == "cuda"
    assert choose(n3=127) == "triton"  # a prime: both multiply by the matrix
    assert choose("core_grad_dense", n3=127) == "cuda"
    assert choose(n3=500) == "triton"
    assert choose(n3=500, available=["cuda"]) == "cuda"
    assert choose("cur_linear", n3=500) == "cuda"
    assert choose(n3=3000) == "triton"
    assert choose(available=["triton"]) == "triton"
    assert choose(available=[]) == "reference"
    assert choose(n3=3000, available=["cuda"]) == "reference"
    assert choose(dtype=torch.float64) == "reference"


def test_lengths_with_codelets():
    lengths = [n3 for n3 in range(1, 200) if cost.has_codelets(n3)]
    assert lengths[:17] == [*range(1, 17), 18]
    assert {48, 64, 96, 128, 144} < set(lengths)
    assert not {17, 47, 127, 145, 160} & set(lengths)
    assert max(lengths) == 144
