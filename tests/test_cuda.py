"""The CUDA library where there is no GPU: it loads, tells what it holds, and is chosen by rule."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import tcur_kernels as tcur
from cases import make_case
from tcur_kernels import _native, cost, functional

NAMES = (
    "materialize", "materialize_out", "core_grad_dense", "core_grad_tokens", "core_of_packed",
    "cur_linear",
)  # fmt: skip

built = pytest.mark.skipif(_native.cuda_error() == "no _cuda.so", reason="built without nvcc")


@built
def test_it_loads_without_a_gpu_and_registers_its_operators():
    code = f"""
import torch
from tcur_kernels import _native
has = torch._C._dispatch_has_kernel_for_dispatch_key
before = [has(f"tcur::{{name}}", "CUDA") for name in {NAMES!r}]
print(any(before) == (torch.version.cuda is not None), _native.cuda_error())
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
    return functional._language(backend, "materialize", factors, "ieee")


def test_without_the_library_a_gpu_takes_another_backend(monkeypatch):
    monkeypatch.setattr(_native, "_cuda", lambda: (None, "no _cuda.so"))
    assert tcur.build_info()["cuda"] == {"built": False, "error": "no _cuda.so"}
    assert language("auto", on_gpu()) != ""
    with pytest.raises(
        RuntimeError, match=r"backend: 'cuda' is not built here \(no _cuda.so\).*nvcc"
    ):
        language("cuda", on_gpu())


def test_a_library_that_does_not_load_says_why(monkeypatch, tmp_path):
    (tmp_path / "_cuda.so").write_text("torn")
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    library, error = _native._load_cuda()
    assert library is None
    assert "_cuda.so" in error


def test_what_cuda_is_asked_for(monkeypatch):
    monkeypatch.setattr(_native, "_cuda", lambda: (object(), None))
    assert language("cuda", on_gpu()) == ""
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
