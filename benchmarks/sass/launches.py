"""The launches that the CUDA operators make at given shapes, and the machine code of their kernels.

The launches come from a build of the same sources for the host (tests/cuda_host.py), which records
what it would launch. So grids, shared memory and arguments are those of a GPU with as much shared
memory as an H100.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from tcur_kernels.files.whole import replacing

from . import listing

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
#: Where machine code is kept.
KEPT = ROOT / "build" / "sass"


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: its name with template arguments, without namespaces.
        blocks, threads: of the grid, and of a block.
        shared_bytes: that the launch asks for.
        arguments: as they lie in constant memory.
        known: addresses of the device memory that is known, and what lies there.
    """

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    arguments: bytes
    known: tuple[tuple[int, bytes], ...] = ()


@functools.cache
def _module(folder: Path, name: str) -> ModuleType:
    """A module of the repository that is in no package."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def host() -> ModuleType:
    """tests/cuda_host.py, which makes the build for the host."""
    return _module(ROOT / "tests", "cuda_host")


def operator(name: str) -> Callable[..., Any]:
    """An operator of the host build."""
    host().load()
    return host().operator(name)


def package_build() -> ModuleType:
    """setup.py, which has the command of nvcc."""
    return _module(ROOT, "setup")


@functools.cache
def _library() -> tuple[Any, dict[int, str]]:
    """The library, and its functions' names by their places relative to `tcur_host_launch`."""
    path, library = host().build(), host().load()
    text = subprocess.run(
        ["nm", "-C", str(path)], capture_output=True, text=True, check=True
    ).stdout
    symbols = re.findall(r"^([0-9a-f]+) [tTwW] (.+)$", text, re.MULTILINE)
    places = {int(address, 16): name for address, name in symbols}
    start = next(place for place, name in places.items() if name == "tcur_host_launch")
    return library, {place - start: plain_name(name) for place, name in places.items()}


def plain_name(demangled: str) -> str:
    """ "void tcur::some_kernel<48, (tcur::Element)1>(tcur::Args)" as "some_kernel<48, 1>"."""
    own = r"\(anonymous namespace\)::|_GLOBAL__N_\w+::|_INTERNAL_\w+::"
    text = re.sub(r"\((\w+::)*\w+\)(?=\d)", "", re.sub(own, "", demangled))
    match = re.match(r"(?:\w+ )?(?:\w+::)*(\w+(?:<[^()]*>)?)\(", text)
    return match.group(1) if match else demangled


def record(call: Callable[[], object], readable: Sequence[Tensor] = ()) -> list[Launch]:
    """What ``call`` launches of the operators of the host build; nothing is computed.

    Args:
        call: calls an operator.
        readable: tensors whose contents the kernels' branches depend on.
    """
    library, names = _library()
    library.tcur_host_record(ctypes.c_bool(True))
    try:
        call()
        known = tuple(
            (one.data_ptr(), ctypes.string_at(one.data_ptr(), one.nbytes)) for one in readable
        )
        launches = []
        for index in range(library.tcur_host_recorded()):
            numbers = (ctypes.c_int64 * 6)()
            library.tcur_host_launch(ctypes.c_int64(index), numbers)
            place, blocks, threads, shared, address, size = numbers
            arguments = ctypes.string_at(address, size)
            launches.append(Launch(names[place], blocks, threads, shared, arguments, known))
        return launches
    finally:
        library.tcur_host_record(ctypes.c_bool(False))


def compiled(launch: Launch, architecture: str, length: int) -> listing.Kernel:
    """The machine code of its kernel.

    Args:
        launch: which kernel.
        architecture: as "sm_90".
        length: the length of tubes that kernels of their own are compiled for; no other is.

    Raises:
        FileNotFoundError: there is no nvcc.
        LookupError: no source has this kernel.
    """
    for source in _candidates(launch.kernel.partition("<")[0], length):
        kernels = _kernels(source, architecture, length)
        if launch.kernel in kernels:
            return kernels[launch.kernel]
    raise LookupError(f"no source of {launch.kernel} for {architecture}")


def _candidates(name: str, length: int) -> list[Path]:
    """Sources that define a kernel or include a header that does, the likeliest first."""
    definition = re.compile(rf"TCUR_KERNEL\([^\n]*\)\s+{name}\(")

    def defines(source: Path) -> bool:
        text = source.read_text(encoding="utf-8")
        headers = [source.parent / one for one in re.findall(r'#include "([\w.]+)"', text)]
        texts = [text, *(path.read_text(encoding="utf-8") for path in headers if path.exists())]
        return any(definition.search(one) for one in texts)

    # Kernels of a length are in one of several sources (`tubes_part`); others may include the same
    # header, but do not compile what is in it.
    part = f"tubes_{length // 4 % 4}"
    found = filter(defines, sorted((SOURCES / "cuda").glob("*.cu")))
    return sorted(found, key=lambda source: not source.stem.endswith(part))


@functools.cache
def _kernels(source: Path, architecture: str, length: int) -> dict[str, listing.Kernel]:
    """The kernels of a source by their plain names."""
    command = [f"-DTCUR_LENGTHS={length}", f"-arch={architecture}"]
    kernels = listing.read(compile_source(source, command, _text()))
    symbols = "\n".join(kernels)
    demangled = subprocess.run(
        ["c++filt"], input=symbols, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {
        plain_name(name): kernel for name, kernel in zip(demangled, kernels.values(), strict=True)
    }


@functools.cache
def _text() -> bytes:
    """All that a CUDA source may include of this repository."""
    folders = (SOURCES / "common", SOURCES / "cuda")
    return b"".join(path.read_bytes() for one in folders for path in sorted(one.glob("*.h")))


def compile_source(source: Path, options: Sequence[str], headers: bytes = b"") -> Path:
    """The machine code of a source, which is kept until the text, a header or the command changes.

    Raises:
        FileNotFoundError: there is no nvcc.
    """
    nvcc = package_build().find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("expected nvcc on the PATH or in CUDA_HOME")
    everywhere = package_build().nvcc_command(nvcc)  # for all architectures of a build
    command = [option for option in everywhere if not option.startswith("-gencode")]
    command += [*options, "-cubin"]
    made = hashlib.sha256(" ".join(command).encode() + source.read_bytes() + headers)
    target = KEPT / f"{source.stem}-{made.hexdigest()[:16]}.cubin"
    if not target.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        with replacing(target) as fresh:
            package_build().run([*command, str(source), "-o", str(fresh)])
    return target
