"""The build: what it says and does where a compiler is missing."""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch
from torch.utils.cpp_extension import include_paths

from tcur_kernels.operators import native

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


def test_instruction_sets_are_all_or_those_that_are_asked_for(setup, monkeypatch):
    monkeypatch.delenv("TCUR_ISA", raising=False)
    assert setup.instruction_sets() == ["avx2", "avx512", "baseline"]
    monkeypatch.setenv("TCUR_ISA", "")
    assert setup.instruction_sets() == ["avx2", "avx512", "baseline"]
    monkeypatch.setenv("TCUR_ISA", "avx2")
    assert setup.instruction_sets() == ["avx2"]
    monkeypatch.setenv("TCUR_ISA", "avx2 mmx")
    with pytest.raises(SystemExit, match=r"TCUR_ISA: expected some of .*baseline.*got .*mmx"):
        setup.instruction_sets()


def test_instruction_sets_are_those_of_the_target(setup, monkeypatch, tmp_path):
    """Of a cross compiler that is not this machine."""
    monkeypatch.delenv("TCUR_ISA", raising=False)
    program(tmp_path / "bin" / "cross", "echo aarch64-linux-gnu")
    monkeypatch.setenv("CXX", "cross -pipe")
    assert setup.target_machine() == "aarch64"
    assert setup.instruction_sets() == ["baseline"]
    assert setup.cpu_folder().name.endswith("-aarch64") == (platform.machine() != "aarch64")
    monkeypatch.setenv("TCUR_ISA", "avx2")
    with pytest.raises(SystemExit, match=r"TCUR_ISA: expected some of \['baseline'\], got .*avx2"):
        setup.instruction_sets()


def test_a_library_that_is_asked_for_is_built_alone(setup, monkeypatch):
    made = {"cpu_extension": "cpu", "cuda_extension": None}
    for name, extension in made.items():
        monkeypatch.setitem(
            setup.extensions.__globals__, name, lambda extension=extension: extension
        )
    monkeypatch.delenv("TCUR_ONLY", raising=False)
    assert setup.extensions() == (["cpu"], True)
    for only, wanted in (("cpu", ["cpu"]), ("cuda", [])):
        monkeypatch.setenv("TCUR_ONLY", only)
        assert setup.extensions() == (wanted, False)
    monkeypatch.setenv("TCUR_ONLY", "rocm")
    with pytest.raises(SystemExit, match="TCUR_ONLY: expected cpu or cuda, got rocm"):
        setup.extensions()


def test_nvcc_compiles_what_changed(setup, monkeypatch, tmp_path):
    """By the command, by the torch, and by the files that the compiler read."""
    monkeypatch.chdir(tmp_path)
    source, header = tmp_path / "a.cu", tmp_path / "a.h"
    target = setup.cuda_object(source)
    target.parent.mkdir(parents=True)

    def compile_it(command="nvcc -O3"):
        now = time.time()
        for path in (source, header):
            path.touch()
            os.utime(path, (now - 60, now - 60))
        target.write_text("")
        target.with_suffix(".command").write_text(setup.text_of(command.split()))
        target.with_suffix(".d").write_text(f"{target} : {source} \\\n    {header}\n")

    command = ["nvcc", "-O3"]
    assert not setup.is_up_to_date(source, command)
    compile_it()
    assert setup.is_up_to_date(source, command)
    assert not setup.is_up_to_date(source, ["nvcc", "-O2"])
    compile_it("nvcc -O3 -arch=other")
    assert not setup.is_up_to_date(source, command)
    compile_it()
    os.utime(header, (time.time() + 60,) * 2)
    assert not setup.is_up_to_date(source, command)
    compile_it()
    header.unlink()
    assert not setup.is_up_to_date(source, command)
    compile_it()
    monkeypatch.setattr(torch, "__version__", "2.99")
    assert not setup.is_up_to_date(source, command)


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
    library = tmp_path / "tcur_kernels" / "_cuda.torch.so"
    library.parent.mkdir()
    library.write_text("of other sources")
    # From before the libraries had their names, when they belonged to one Python.
    earlier = [library.with_name(name) for name in ("_cpu.cpython-311-any.so", "_cuda.so")]
    for path in earlier:
        path.write_text("which nothing loads")
    (tmp_path / "other.cpp").write_text("#include <Python.h>\nPyMODINIT_FUNC PyInit_other();")
    setuptools.setup(
        packages=[],
        ext_modules=[setuptools.Extension("other", ["other.cpp"])],
        cmdclass={"build_ext": build_ext(has_all=has_all)},
        script_args=["-q", "build_ext", "--build-lib", str(tmp_path / "out")],
    )
    assert library.exists() != has_all
    assert not any(path.exists() for path in earlier)


def test_other_processors_get_plain_cpp(tmp_path):
    """Off x86-64 the baseline is the one variant, and nothing of x86 is left in it."""
    program = tmp_path / "elsewhere.cpp"
    cpu = ROOT / "csrc" / "cpu"
    units = [cpu / "isa.cpp", *sorted(cpu.glob("avx*/*.cpp")), *sorted(cpu.glob("baseline/*.cpp"))]
    assert len(units) > 10
    includes = "\n".join(f'#include "{unit}"' for unit in units)
    program.write_text(f"""
        #include "{cpu}/kernels.h"
        #include "{cpu}/isa.h"
        #include <algorithm>
        #include <atomic>
        #include <cstring>
        #include <stdexcept>
        #include <utility>
        #undef __x86_64__  // the system's headers are this machine's, ours are another's
        {includes}
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
    library = native.cpu_library()

    def output(*command):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    names = [line.split()[-1] for line in output("nm", library).splitlines()]
    kernels = [name for name in names if re.search(r"product_planesI[fd]Li[248]E", name)]
    assert kernels
    for name in kernels:
        body = output("objdump", "-d", "--no-show-raw-insn", f"--disassemble={name}", library)
        assert "prefetch" in body, name


def test_cuda_sources_that_passed_are_known_as_long_as_they_stay(tmp_path):
    for name in ("csrc/cuda", "csrc/common", ".ci"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "tests").mkdir()
    for name in ("setup.py", "constraints.txt", "tests/cuda_host.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    program = tmp_path / ".ci" / "cuda_sources.py"

    def has_passed():
        return subprocess.run([sys.executable, program], check=False).returncode == 0

    (tmp_path / ".ci" / "cuda_checked.txt").write_text("of other sources\n")
    assert not has_passed()
    code = f"import sys; sys.path.insert(0, {str(program.parent)!r}); import cuda_sources as c"
    subprocess.run([sys.executable, "-c", f"{code}; c.record()"], check=True)
    assert has_passed()
    for name in ("csrc/cuda/launch.h", "csrc/common/check.h", "setup.py", ".ci/cuda_checks.py"):
        kept = (tmp_path / name).read_text()
        (tmp_path / name).write_text(f"{kept}\n")
        assert not has_passed(), name
        (tmp_path / name).write_text(kept)
        assert has_passed(), name


@pytest.fixture
def sources(monkeypatch):
    """What the tests of the kernels for GPUs depend on."""
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    import kernel_sources

    return kernel_sources


def test_kernels_that_passed_are_known_as_long_as_they_and_their_tests_stay(sources, tmp_path):
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in (*sources.FOLDERS, ".ci"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("constraints.txt", *sources.FILES, *(f"tests/test_{n}.py" for n in sources.TESTS)):
        shutil.copy(ROOT / name, tmp_path / name)
    program = tmp_path / ".ci" / "kernel_sources.py"

    def has_passed(*arguments):
        return subprocess.run([sys.executable, program, *arguments], check=False).returncode == 0

    (tmp_path / ".ci" / "kernels_checked.txt").write_text("of other sources\n")
    assert not has_passed()
    assert has_passed("--record")
    assert has_passed()
    changed = ("csrc/cuda/launch.h", "tcur_kernels/operators/triton/launch.py", "setup.py")
    changed += ("tests/conformance/table.py", "tests/test_triton.py", "tests/oldest_triton.txt")
    for name in changed:
        kept = (tmp_path / name).read_text()
        (tmp_path / name).write_text(f"{kept}\n")
        assert not has_passed(), name
        (tmp_path / name).write_text(kept)
        assert has_passed(), name
    pins = (ROOT / "constraints.txt").read_text()
    (tmp_path / "constraints.txt").write_text(pins.replace("torch==", "torch==1"))
    assert not has_passed()


def test_tests_that_are_recorded_are_those_of_the_marked_modules(sources):
    """What is left out where nothing changed must be what the record depends on."""
    mark = "mark." + "kernels"
    marked = {p.stem for p in Path(__file__).parent.rglob("test_*.py") if mark in p.read_text()}
    assert marked == {f"test_{name}" for name in sources.TESTS}
