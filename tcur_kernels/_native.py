"""Finds and loads the compiled library `_cpu`; never compiles, never warns.

Loading it registers the CPU kernels of the operators with torch. Without it the package still
imports, traces and runs on the reference backend; asking for the ``cpu`` backend then says why.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


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
