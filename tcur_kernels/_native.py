"""Finds and loads the compiled libraries `_cpu` and `_cuda`; never compiles, never warns.

Loading one registers its kernels of the operators with torch. Without it the package still
imports, traces and runs on the reference backend; asking for its backend then says why. `_cpu` is
loaded with the package, and so is `_cuda` where torch has CUDA; where torch has none, `_cuda` is
loaded to be looked at, by `cuda_facts`, and its calls into torch's CUDA part stay unbound.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """The extension module, or None and the reason why it is absent."""
    try:
        return importlib.import_module(f"tcur_kernels.{name}"), None
    except ImportError as error:
        return None, str(error)


_cpu, _cpu_error = _load("_cpu")


def cpu_error() -> str | None:
    """Why the CPU library is absent, or None if it is loaded."""
    return _cpu_error


def cpu_facts() -> dict[str, Any]:
    """What was compiled into the CPU library and what of it runs here."""
    if _cpu is None:
        return {"built": False, "error": _cpu_error}
    return {
        "built": True,
        "compiler": _cpu.compiler,
        "torch_target": _cpu.torch_target,
        "isa_compiled": _cpu.compiled_isas(),
        "isa_runnable": _cpu.runnable_isas(),
        "isa_chosen": _cpu.chosen_isa(),
    }


def _load_cuda() -> tuple[ctypes.CDLL | None, str | None]:
    """The CUDA library, or None and the reason why it is absent."""
    path = Path(__file__).with_name("_cuda.so")
    if not path.exists():
        return None, f"no {path.name}"
    try:
        return ctypes.CDLL(str(path), mode=os.RTLD_LAZY), None
    except OSError as error:
        return None, str(error)


#: What `_load_cuda` found. A plain global, because torch.compile looks through caches of functions.
_found: tuple[ctypes.CDLL | None, str | None] | None = None


def _cuda() -> tuple[ctypes.CDLL | None, str | None]:
    """The CUDA library or the reason, looked for once."""
    global _found
    if _found is None:
        _found = _load_cuda()
    return _found


def cuda_error() -> str | None:
    """Why the CUDA library is absent, or None if it is loaded; loads it."""
    return _cuda()[1]


def cuda_facts() -> dict[str, Any]:
    """What was compiled into the CUDA library."""
    library, error = _cuda()
    if library is None:
        return {"built": False, "error": error}
    library.tcur_cuda_architectures.restype = ctypes.c_char_p
    return {"built": True, "architectures": library.tcur_cuda_architectures().decode().split()}


if torch.version.cuda is not None:
    _cuda()
