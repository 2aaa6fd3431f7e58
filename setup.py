"""Build of the compiled kernels; everything else is in pyproject.toml."""

import os
import shutil
from pathlib import Path

from setuptools import setup


def cpu_extension():
    """`tcur_kernels._cpu`: operators on the LibTorch stable ABI, and a pybind11 module of facts."""
    # Imported here: the sdist and the metadata need neither torch nor pybind11.
    import pybind11
    from torch.utils.cpp_extension import CppExtension

    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise SystemExit(
            f"tcur_kernels: no C++ compiler: '{compiler}' is not on the PATH; "
            "install g++ or clang (C++17), or name one by CXX."
        )
    return CppExtension(
        "tcur_kernels._cpu",
        sources=["csrc/module.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))],
        depends=sorted(map(str, Path("csrc").rglob("*.h"))),
        include_dirs=[pybind11.get_include()],
        extra_compile_args=[
            "-O3",
            "-g0",
            "-fopenmp-simd",  # vectorise marked loops; threads come from torch
            "-ffp-contract=fast",
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-psabi",  # vectors never cross a function that is not inlined
            "-DTORCH_TARGET_VERSION=0x020a000000000000",  # one binary for torch 2.10 and later
        ],
    )


def build_ext():
    from torch.utils.cpp_extension import BuildExtension

    return BuildExtension.with_options(use_ninja=True)


setup(ext_modules=[cpu_extension()], cmdclass={"build_ext": build_ext()})
