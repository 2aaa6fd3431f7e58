"""What the wheel and the sdist hold, and which systems the libraries are for, without compiling.

`make wheel` builds them and tries them: make_wheel.py.
"""

import pkgutil
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import setuptools

import tcur_kernels
from make_wheel import EXCLUDED, modules, sources
from tcur_kernels.operators import native

ROOT = Path(__file__).parent.parent
#: The newest symbols that systems of manylinux_2_28 have.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
needs_objdump = pytest.mark.skipif(
    shutil.which("objdump") is None or platform.system() != "Linux", reason="no objdump, or no ELF"
)


def python(*arguments, cwd=ROOT):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_sdist_and_package_are_whole(tmp_path):
    """And the modules alone, never compiled, are a package that says what it lacks."""
    egg_info = ("egg_info", "--egg-base", tmp_path)
    parts = ("sdist", "--dist-dir", tmp_path, "build_py", "--build-lib", tmp_path / "lib")
    python("setup.py", "-q", *egg_info, *parts)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert sources() | modules() <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    built = {path.relative_to(tmp_path / "lib").as_posix() for path in tmp_path.rglob("lib/*/**/*")}
    assert {name for name in built if (tmp_path / "lib" / name).is_file()} == modules()
    code = "import tcur_kernels as t; i = t.build_info(); print(i['backends'], i['cpu'])"
    said = python("-c", code, cwd=tmp_path / "lib")
    assert said == "['reference'] {'built': False, 'error': 'no _cpu.torch.so'}\n"


def test_one_wheel_serves_every_python():
    distribution = setuptools.Distribution({"name": "any", "version": "1", "ext_modules": [None]})
    command = runpy.run_path(str(ROOT / "setup.py"))["Wheel"](distribution)
    command.plat_name, command.plat_name_supplied = "linux_x86_64", True
    command.root_is_pure = False
    assert command.get_tag() == ("py3", "none", "linux_x86_64")


def test_libraries_are_no_modules():
    """Python would find them, and fail to import them."""
    for name in (native.CPU_LIBRARY, native.CUDA_LIBRARY):
        module = f"tcur_kernels.{name.partition('.')[0]}"
        assert PathFinder.find_spec(module, tcur_kernels.__path__) is None
    found = {module.name for module in pkgutil.iter_modules(tcur_kernels.__path__)}
    assert not any("cpu" in name or "cuda" in name for name in found)


def test_a_library_that_does_not_load_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "operators" / "native.py"))
    assert native._load_cpu() == (None, "no _cpu.torch.so")
    (tmp_path / "_cpu.torch.so").write_text("torn")
    library, reason = native._load_cpu()
    assert library is None
    assert "_cpu.torch.so" in reason


@pytest.mark.skipif(
    shutil.which("c++") is None or platform.system() != "Linux", reason="no C++ compiler"
)
def test_a_library_of_other_sources_says_why(monkeypatch, tmp_path):
    """As after an update without a build: a function that Python asks for is not in it."""
    monkeypatch.setattr(native, "__file__", str(tmp_path / "operators" / "native.py"))
    (tmp_path / "other.cpp").write_text('extern "C" int tcur_cpu_other() { return 1; }')
    target = str(tmp_path / native.CPU_LIBRARY)
    command = ["c++", "-shared", "-fPIC", str(tmp_path / "other.cpp"), "-o", target]
    subprocess.run(command, check=True)
    library, reason = native._load_cpu()
    assert library is None
    assert "tcur_cpu_compiler" in reason


def test_a_processor_that_runs_nothing_in_the_library(monkeypatch):
    """It is said, once from the kernels and once from here, in the same words."""

    class Library:
        def tcur_cpu_chosen_isa(self):
            return None

        def tcur_cpu_strip_columns(self, bytes_):
            return 0

        def tcur_cpu_absence(self):
            return b"tcur: this processor runs none"

    monkeypatch.setattr(native, "_cpu", Library())
    for ask in (native.chosen_isa, lambda: native.strip_columns(native.torch.float32)):
        with pytest.raises(RuntimeError, match="tcur: this processor runs none"):
            ask()


def test_what_cannot_be_forced_changes_nothing():
    before = native.chosen_isa(), native.second_level_cache()
    wrong = (("none", 4096), (before[0], 0), (before[0], 2**63), ("avx2\0", None), ("", None))
    for isa, cache in wrong:
        with pytest.raises(ValueError, match=r"(name|bytes): expected .*got "):
            native.force(isa, cache)
        assert (native.chosen_isa(), native.second_level_cache()) == before


@needs_objdump
def test_the_cpu_library_is_for_the_systems_of_the_wheel():
    """No symbol of later ones, nothing of Python, and no library but torch's and the system's."""
    path = native.cpu_library()
    listed = subprocess.run(["objdump", "-T", path], capture_output=True, text=True, check=True)
    asked = [line for line in listed.stdout.splitlines() if "*UND*" in line]
    assert asked
    for line in asked:
        for name, numbers in re.findall(r"\b(GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)\b", line):
            assert tuple(map(int, numbers.split("."))) <= NEWEST[name], line
        assert not re.match(r"_?Py", line.split()[-1]), line
    dynamic = subprocess.run(["objdump", "-p", path], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"NEEDED +(\S+)", dynamic.stdout))
    torchs = {name for name in needed if any(Path(name).match(each) for each in EXCLUDED)}
    system = ("libstdc++", "libm", "libgcc_s", "libc", "libpthread", "ld-linux-x86-64")
    assert {name.split(".")[0] for name in needed - torchs} <= {*system, "ld-linux-aarch64"}
