"""Finds and loads the compiled libraries `_cpu` and `_cuda`; never compiles, never warns.

Loading a library registers its kernels with torch. Without it, the package still imports, traces
and runs on the reference backend, and asking for the library's backend gives an error with the
reason. `_cpu` is loaded with the package. So is `_cuda` if torch has CUDA. If torch has none,
`cuda_facts` loads `_cuda` only to inspect it; its calls into torch's CUDA part stay unbound.
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
        "l2_cache": _cpu.second_level_cache(),
    }


def strip_columns(dtype: torch.dtype) -> int:
    """How many columns the CPU kernels of the chosen instruction set work on together."""
    assert _cpu is not None
    columns: int = _cpu.strip_columns(dtype.itemsize)
    return columns


# For a traced graph it is a constant, like `cuda_absence` below.
strip_columns._dynamo_marked_constant = True  # type: ignore[attr-defined]


def force(isa: str | None = None, l2_cache: int | None = None) -> None:
    """Runs another instruction set, or sizes tiles for another second-level cache, in bytes.

    It is for tests and benchmarks.
    """
    assert _cpu is not None
    if isa is not None:
        _cpu.use_isa(isa)
    if l2_cache is not None:
        _cpu.use_second_level_cache(l2_cache)


def _load_cuda() -> tuple[ctypes.CDLL | None, str | None]:
    """The CUDA library, or None and the reason why it is absent."""
    path = Path(__file__).parent.parent / "_cuda.so"
    if not path.exists():
        return None, f"no {path.name}"
    try:
        return ctypes.CDLL(str(path), mode=os.RTLD_LAZY), None
    except OSError as error:
        return None, str(error)


#: What `_load_cuda` found. A plain global, because torch.compile looks through caches of functions.
_found: tuple[ctypes.CDLL | None, str | None] | None = None


def _cuda() -> tuple[ctypes.CDLL | None, str | None]:
    """The CUDA library, or the reason why it is absent. It is looked for once."""
    global _found
    if _found is None:
        _found = _load_cuda()
    return _found


def cuda_error() -> str | None:
    """Why the CUDA library is absent, or None if it is loaded; loads it."""
    return _cuda()[1]


def cuda_facts() -> dict[str, Any]:
    """What was compiled into the CUDA library, and why it does not run here if it does not."""
    library, error = _cuda()
    if library is None:
        return {"built": False, "error": error}
    return {"built": True, "architectures": _architectures(library), "error": _absent_everywhere()}


def _architectures(library: ctypes.CDLL) -> list[str]:
    """What the kernels were compiled for: "90" is code for sm_90, "100+PTX" PTX for later GPUs."""
    library.tcur_cuda_architectures.restype = ctypes.c_char_p
    names: bytes = library.tcur_cuda_architectures()
    return names.decode().split()


def _absent_everywhere() -> str | None:
    """Why the CUDA library runs on no device here, or None if it runs on one."""
    reasons = [
        cuda_absence(torch.device("cuda", index)) for index in range(torch.cuda.device_count())
    ]
    if None in reasons:
        return None
    return reasons[0] if reasons else "torch sees no GPU here"


def cuda_absence(device: torch.device) -> str | None:
    """Why the CUDA library does not run on a device of that name, or None if it does.

    A kernel that was compiled for other architectures would fail at its launch.
    """
    if torch.version.hip is not None:
        return "CUDA kernels do not run on ROCm"
    library, error = _cuda()
    if library is None:
        return error
    capability = torch.cuda.get_device_capability(device)
    names = _architectures(library)
    if any(_runs_on(name, capability) for name in names):
        return None
    major, minor = capability
    return f"compiled for {', '.join(names)}, not for the {major}.{minor} of {device}"


# A traced graph is for one device, which is asked while it is traced. This is what
# `torch.compiler.assume_constant_result` does, but that imports the compiler.
cuda_absence._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _runs_on(name: str, capability: tuple[int, int]) -> bool:
    """Whether what was compiled for an architecture runs on devices of a compute capability.

    Code runs on devices with the same first number and an equal or larger second one. Code for
    "90a" runs only on sm_90. The driver compiles PTX for any later device.
    """
    number = name.removesuffix("+PTX").rstrip("af")
    built = int(number[:-1]), int(number[-1])
    if name.endswith("+PTX"):
        return capability >= built
    if name != number:
        return capability == built
    return capability[0] == built[0] and capability >= built


if torch.version.cuda is not None:
    _cuda()
