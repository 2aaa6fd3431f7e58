"""The build: what it says and does where a compiler is missing."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

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


def test_without_nvcc_or_architectures_there_is_no_cuda_backend(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    cuda_extension = runpy.run_path("setup.py")["cuda_extension"]
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda_extension().name == "tcur_kernels._cuda"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    assert cuda_extension() is None
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    nvcc.unlink()
    assert cuda_extension() is None


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
