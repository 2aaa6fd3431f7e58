"""The build: what it says and does where a compiler is missing."""

import importlib
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent


def test_no_compiler_is_one_clear_sentence(tmp_path):
    environment = {**os.environ, "CXX": "no-such-compiler"}
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last == (
        "tcur_kernels: no C++ compiler: 'no-such-compiler' is not on the PATH; "
        "install g++ or clang (C++17), or name one by CXX."
    )
    assert not list(tmp_path.iterdir())


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """setup.py on a machine with an nvcc and without anything else."""
    monkeypatch.chdir(ROOT)
    program(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return SimpleNamespace(**runpy.run_path("setup.py"))


def program(path, text=""):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_gpus_are_compiled_for_where_they_are_or_asked_for(setup, monkeypatch, tmp_path, capsys):
    assert setup.architectures() == []
    assert setup.cuda_extension() is None
    assert "no GPU here, so no kernels for GPUs; with nvcc, TORCH_CUDA_ARCH_LIST='8.0;9.0;10.0" in (
        capsys.readouterr().out
    )
    for says, wanted in (
        ("echo 9.0; echo 8.6; echo 9.0", ["86", "90"]),
        ("echo '[N/A]'", []),
        ("echo 9.0; exit 9", []),  # no driver behind it
    ):
        program(tmp_path / "bin" / "nvidia-smi", says)
        setup.gpus_here.cache_clear()
        assert setup.architectures() == wanted
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0 10.0+PTX")
    assert setup.architectures() == ["80", "90", "100", "100+PTX"]
    command = " ".join(setup.nvcc_command("nvcc"))
    assert command.count("-gencode=") == 4
    assert "code=sm_90 " in command
    assert command.endswith("arch=compute_100,code=compute_100")


def test_without_nvcc_or_architectures_there_is_no_cuda_backend(
    setup, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert setup.cuda_extension().name == "tcur_kernels._cuda"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    assert setup.cuda_extension() is None
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    (tmp_path / "bin" / "nvcc").unlink()
    capsys.readouterr()
    assert setup.cuda_extension() is None
    assert "tcur_kernels: no nvcc here" in capsys.readouterr().out


@pytest.mark.parametrize("has_all", [True, False])
def test_a_library_of_an_earlier_build_does_not_stay(monkeypatch, tmp_path, has_all):
    build_ext = runpy.run_path(str(ROOT / "setup.py"))["build_ext"]
    monkeypatch.chdir(tmp_path)
    library = tmp_path / "tcur_kernels" / "_cuda.so"
    library.parent.mkdir()
    library.write_text("of other sources")
    (tmp_path / "other.cpp").write_text("#include <Python.h>\nPyMODINIT_FUNC PyInit_other();")
    setuptools.setup(
        packages=[],
        ext_modules=[setuptools.Extension("other", ["other.cpp"])],
        cmdclass={"build_ext": build_ext(has_all=has_all)},
        script_args=["-q", "build_ext", "--build-lib", str(tmp_path / "out")],
    )
    assert library.exists() != has_all


def test_other_processors_get_plain_cpp(tmp_path):
    """Off x86-64 the baseline is the one variant, and nothing of x86 is left in it."""
    program = tmp_path / "elsewhere.cpp"
    program.write_text(f"""
        #include "{ROOT}/csrc/cpu/kernels.h"
        #include <atomic>
        #include <cstring>
        #undef __x86_64__  // the system's headers are this machine's, ours are another's
        #include "{ROOT}/csrc/cpu/isa.cpp"
        #include "{ROOT}/csrc/cpu/isa_avx2.cpp"
        #include "{ROOT}/csrc/cpu/isa_avx512.cpp"
        #include "{ROOT}/csrc/cpu/isa_baseline.cpp"
        int main() {{
          const bool alone = tcur::compiled_isas().size() == 1;
          return alone && std::strcmp(tcur::kernels<float>().isa, "baseline") == 0 ? 0 : 1;
        }}
    """)
    includes = [f"-I{path}" for path in include_paths()]
    target = ["-o", str(tmp_path / "elsewhere"), str(program)]
    options = ["-std=c++17", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    compiler = os.environ.get("CXX", "c++").split()[0]
    subprocess.run([compiler, *options, *includes, *target], check=True)
    subprocess.run([tmp_path / "elsewhere"], check=True)


@pytest.mark.skipif(
    shutil.which("objdump") is None or platform.machine() != "x86_64",
    reason="looks for instructions of x86-64, with binutils",
)
def test_the_base_is_fetched_ahead():
    """GCC drops calls of functions that only prefetch, and nothing but speed tells."""
    library = Path(importlib.import_module("tcur_kernels._cpu").__file__)

    def output(*command):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    names = [line.split()[-1] for line in output("nm", library).splitlines()]
    kernels = [name for name in names if re.search(r"product_planesI[fd]Li[248]E", name)]
    assert kernels
    for name in kernels:
        body = output("objdump", "-d", "--no-show-raw-insn", f"--disassemble={name}", library)
        assert "prefetch" in body, name
