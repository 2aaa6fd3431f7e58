"""Finds and loads the compiled libraries, for CPUs and for CUDA; never compiles, never warns.

Loading a library registers its kernels with torch. Without it, the package still imports, traces
and runs on the reference backend, and asking for the library's backend gives an error with the
reason. The CPU library is loaded with the package. So is the CUDA library if torch has CUDA. If
torch has none, `cuda_facts` loads it only to inspect it; its calls into torch's CUDA part stay
unbound.

Both are plain shared libraries without Python in them: one file serves every version of Python. A
dot within their names keeps Python's import system from taking them for modules.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch

#: Names of the libraries in the package's folder.
CPU_LIBRARY, CUDA_LIBRARY = "_cpu.torch.so", "_cuda.torch.so"
#: What the functions of the CPU library return; c_char_p is text that the library keeps.
_CPU_FUNCTIONS: dict[str, Any] = {
    "compiler": ctypes.c_char_p,
    "torch_target": ctypes.c_char_p,
    "compiled_isas": ctypes.c_char_p,
    "runnable_isas": ctypes.c_char_p,
    "absence": ctypes.c_char_p,
    "chosen_isa": ctypes.c_char_p,
    "strip_columns": ctypes.c_int64,
    "use_isa": None,
    "plans_made": ctypes.c_int64,
    "second_level_cache": ctypes.c_int64,
    "use_second_level_cache": None,
}
_CPU_ARGUMENTS: dict[str, Any] = {
    "strip_columns": ctypes.c_int64,
    "use_isa": ctypes.c_char_p,
    "use_second_level_cache": ctypes.c_int64,
}


def _path(name: str) -> Path:
    """Where a library of the package lies, if it was built."""
    return Path(__file__).parent.parent / name


def _load_cpu() -> tuple[ctypes.PyDLL | None, str | None]:
    """The CPU library, or None and the reason why it is absent."""
    path = _path(CPU_LIBRARY)
    if not path.exists():
        return None, f"no {path.name}"
    try:
        # PyDLL keeps the interpreter's lock: these calls take no time, and one that let go of the
        # lock would have to wait for other threads to get it back.
        library = ctypes.PyDLL(str(path))
        for name, result in _CPU_FUNCTIONS.items():
            function = getattr(library, f"tcur_cpu_{name}")
            function.restype = result
            function.argtypes = [_CPU_ARGUMENTS[name]] if name in _CPU_ARGUMENTS else []
    except (OSError, AttributeError) as error:  # AttributeError: a library of other sources
        return None, str(error)
    return library, None


_cpu, _cpu_error = _load_cpu()


def cpu_error() -> str | None:
    """Why the CPU library is absent, or None if it is loaded."""
    return _cpu_error


def cpu_library() -> Path:
    """The file of the CPU library; for tests and benchmarks that read its machine code.

    Raises:
        RuntimeError: it is not loaded.
    """
    _loaded()
    return _path(CPU_LIBRARY)


def _loaded() -> ctypes.PyDLL:
    """The CPU library; an error if it is absent."""
    if _cpu is None:
        raise RuntimeError(f"the CPU library is not built here ({_cpu_error})")
    return _cpu


def _text(value: bytes | None) -> str:
    """Text of the library; where it has none, no variant is in use, and the library says why."""
    if value is None:
        raise RuntimeError(_loaded().tcur_cpu_absence().decode())
    return value.decode()


def compiled_isas() -> list[str]:
    """Instruction sets that the CPU library was compiled for, best first; none if it is absent."""
    return [] if _cpu is None else _text(_cpu.tcur_cpu_compiled_isas()).split()


def runnable_isas() -> list[str]:
    """Those of `compiled_isas` that this processor runs."""
    return [] if _cpu is None else _text(_cpu.tcur_cpu_runnable_isas()).split()


def chosen_isa() -> str:
    """The instruction set in use.

    Raises:
        RuntimeError: the CPU library is absent, or this processor runs nothing in it.
    """
    return _text(_loaded().tcur_cpu_chosen_isa())


def second_level_cache() -> int:
    """Bytes of the second-level cache of a core, which the CPU kernels size their tiles for.

    Raises:
        RuntimeError: the CPU library is absent.
    """
    return int(_loaded().tcur_cpu_second_level_cache())


def plans_made() -> int:
    """Tables of transforms that the CPU library has made so far; for tests.

    Raises:
        RuntimeError: the CPU library is absent.
    """
    return int(_loaded().tcur_cpu_plans_made())


def cpu_facts() -> dict[str, Any]:
    """What was compiled into the CPU library and what of it runs here."""
    if _cpu is None:
        return {"built": False, "error": _cpu_error}
    return {
        "built": True,
        "compiler": _text(_cpu.tcur_cpu_compiler()),
        "torch_target": _text(_cpu.tcur_cpu_torch_target()),
        "isa_compiled": compiled_isas(),
        "isa_runnable": runnable_isas(),
        "isa_chosen": chosen_isa(),
        "l2_cache": second_level_cache(),
    }


def strip_columns(dtype: torch.dtype) -> int:
    """How many columns the CPU kernels of the chosen instruction set work on together."""
    columns = int(_loaded().tcur_cpu_strip_columns(dtype.itemsize))
    if not columns:
        chosen_isa()  # says why there is none
    return columns


# For a traced graph it is a constant, like `cuda_absence` below.
strip_columns._dynamo_marked_constant = True  # type: ignore[attr-defined]


def force(isa: str | None = None, l2_cache: int | None = None) -> None:
    """Runs another instruction set, or sizes tiles for another second-level cache, in bytes.

    It is for tests and benchmarks.

    Raises:
        ValueError: this processor or the library lacks that instruction set, or the cache has no
            room. Nothing is changed then.
    """
    library = _loaded()
    if isa is not None and isa not in runnable_isas():
        raise ValueError(f"name: expected one of {', '.join(runnable_isas())}, got {isa}")
    if l2_cache is not None and l2_cache <= 0:
        raise ValueError(f"bytes: expected a positive number, got {l2_cache}")
    if l2_cache is not None and l2_cache >= 2**63:  # ctypes would cut it off
        raise ValueError(f"bytes: expected less than 2**63, got {l2_cache}")
    if isa is not None:
        library.tcur_cpu_use_isa(isa.encode())
    if l2_cache is not None:
        library.tcur_cpu_use_second_level_cache(l2_cache)


def _load_cuda() -> tuple[ctypes.CDLL | None, str | None]:
    """The CUDA library, or None and the reason why it is absent."""
    path = _path(CUDA_LIBRARY)
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
