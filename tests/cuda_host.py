"""The CUDA kernels, built for the host and registered as a language of their own.

g++ compiles the very sources that nvcc compiles; `csrc/cuda/emulator` makes fibers of the CUDA
threads. Objects are kept in `build/`, by what they were made of: after a change only what reads the
changed file is compiled. Nothing of it is ever shipped.

As a program, ``python tests/cuda_host.py LIBRARY``, it runs every kernel under several orders of
the threads and tells whether they agree to the bit; ``--build SOURCES FOLDER FLAG…`` builds.
"""

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths, library_paths

from cases import counts_of, make_case, side_by_side
from tcur_kernels.operators import contract

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc"
#: Where the library of the sources as they are is kept, and its objects.
KEPT = ROOT / "build" / "cuda_host"
LANGUAGE = "cudahost"
LANGUAGE_TF32 = "cudahost_tf32"
#: What its kernels read and write.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Orders of the fibers of a block, and of the blocks: forward, reverse, and two seeds of a shuffle.
ORDERS = (-1, -2, 7, 8)


def build(folder=KEPT, sources=SOURCES, flags=("-O1",)):
    """Compiles ``sources``/cuda for the host, all files at once; returns the library."""
    folder, sources = Path(folder).absolute(), Path(sources).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # other processes wait, and take what is made here
        return _build(folder, sources, flags)


def _build(folder, sources, flags):
    command = [
        os.environ.get("CXX", "c++"),
        "-std=c++17",
        "-g1",
        "-Wall",
        "-Wno-unknown-pragmas",  # unrolling
        "-fPIC",
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        '-DTCUR_ARCHITECTURES="host"',
        *(f"-isystem{path}" for path in include_paths()),
        *flags,
    ]

    def compile_one(source):
        # What a build of the same text left is taken: of the source, and of the headers that the
        # compiler read for it. Other headers would not have been named by the same text.
        for place in (folder, KEPT):
            kept = place / object_of(source, sources, command, place)
            if kept.exists():
                return kept
        part, notes = folder / f"{source.stem}.part", notes_of(source, folder)
        read = ["-MMD", "-MF", str(notes)]
        run([*command, *read, "-x", "c++", "-c", str(source), "-o", str(part)])
        target = folder / object_of(source, sources, command, folder)
        part.rename(target)  # whole, or not there
        return target

    controls = sources / "cuda" / "emulator" / "controls.cpp"
    files = [*sorted((sources / "cuda").glob("*.cu")), controls]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, files))
    name = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()[:16]
    library = folder / f"cuda_{name}.so"
    if library.exists():
        return library
    paths = [f"-L{path}" for path in library_paths()]
    part = library.with_suffix(".part")
    link = [
        command[0],
        "-shared",
        *flags,
        *map(str, objects),
        *paths,
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    run([*link, "-o", str(part)])
    part.rename(library)  # whole, or not there
    return library


def notes_of(source, folder):
    """Where the compiler notes which headers it read."""
    return folder / f"{source.stem}.d"


def object_of(source, sources, command, folder):
    """Name of the object that a command makes of a source, where headers are as noted in a folder.

    The notes may be of a copy of ``sources``; the headers are those of the same name below it.
    """
    notes, headers = notes_of(source, folder), set()
    if notes.exists():
        names = notes.read_text().replace("\\\n", " ").partition(":")[2].split()
        parts = {re.sub(r"^.*/(common|cuda)/", r"\1/", os.path.normpath(name)) for name in names}
        headers = {part for part in parts if part.endswith(".h")}
    made = hashlib.sha256(f"{command} {torch.__version__}".encode() + source.read_bytes())
    for part in sorted(headers):
        path = sources / part
        made.update(part.encode() + (path.read_bytes() if path.exists() else b""))
    return f"{source.stem}-{made.hexdigest()[:16]}.o"


def run(command):
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@functools.cache
def load(library=None):
    """Registers the operators of the host build; returns the library."""
    for language in (LANGUAGE, LANGUAGE_TF32):
        contract.add_language(language)
    host = ctypes.CDLL(str(library or build()))
    host.tcur_host_order.argtypes = host.tcur_host_shared.argtypes = [ctypes.c_int64]
    return host


def operator(name, precision="ieee"):
    return contract.operator(name, LANGUAGE_TF32 if precision == "tf32" else LANGUAGE)


def shifted(tensor):
    """The same numbers, contiguous, from an address that is no multiple of a vector."""
    flat = torch.cat([tensor.new_zeros(1), tensor.flatten()])
    return flat[1:].view(tensor.shape)


#: (n3, n1, n2, rank), the fastest first: without a barrier the first that shows it ends the run.
ORDERED = (
    (12, 18, 36, 3), (5, 34, 132, 1),  # kernels of one length, which take multiples of 4 columns
    (36, 18, 38, 3), (48, 10, 100, 9),  # two factors, with kernels for any length and of one
    (37, 18, 38, 2),  # the product with the matrix
    (2, 1057, 130, 1),  # so many rows that a block of the dense gradient takes several tiles
    (2, 35, 38, 34),  # a rank for which a block holds a slab of the core after another
    (5, 4241, 132, 1),  # several tiles by the kernel of one length
    (257, 9, 9, 1),  # the product with the matrix in two launches of two chunks
    (17, 1057, 130, 1),  # several tiles by the product with the matrix
)  # fmt: skip


def results(n3, n1, n2, rank):
    """What the operators make of fixed inputs; of many rows the dense gradient alone."""
    torch.manual_seed(1)
    case = make_case(n3, n1, n2, rank)
    found = [operator("core_grad_dense")(case.weight, *case.packed)]
    if n1 < 1000:
        update = operator("materialize")
        found.append(update([case.weight], *case.packed, case.core, 0.5, torch.float32))
        matrices, out = side_by_side(case.weight, counts_of(n3)), torch.empty(n3 * n1 * n2)
        operator("materialize_out")(matrices, *case.packed, case.core, 0.5, out=out)
        found.append(out)
        found += on_tokens(case)
    return found


def on_tokens(case, adapters=20):
    """What the operators on tokens make of fixed inputs: 40 rows, by one core and by several.

    20 adapters are two turns of the sort of the rows.
    """
    torch.manual_seed(2)
    n3, n1, n2 = case.weight.shape
    slices = min(2, n3)
    x, grad_y = torch.randn(40, n2), torch.randn(40, slices * n1)
    found = [operator("core_grad_tokens")(x, grad_y, *case.packed, n3, 0, slices)]
    how = (n3, 0, slices, None, 1, True)
    found.append(operator("core_grad_tokens")(x, grad_y, *case.packed, *how))
    parts = torch.randn(7, *case.core.shape)
    found.append(operator("core_of_packed")(parts, 0.5))
    args = (case.core, 0, slices, 0.5)
    found.append(operator("cur_linear")(x, None, None, *case.packed, *args, False))
    found.append(operator("cur_linear")(grad_y, None, None, *case.packed, *args, True))
    ids, many = torch.randint(0, adapters, (40,)), (adapters, *case.core.shape)
    args = (n3, 0, slices, ids, adapters)
    found.append(operator("core_grad_tokens")(x, grad_y, *case.packed, *args))
    args = (torch.randn(many), 0, slices, 0.5, False, None, False, ids)
    found.append(operator("cur_linear")(x, None, None, *case.packed, *args))
    return found


def orders_agree(host):
    """Whether all orders of the threads give the same bits, and numbers."""
    try:
        for sizes in ORDERED:
            first = None
            for order in ORDERS if sizes[1] < 1000 else ORDERS[:2]:
                host.tcur_host_order(order)
                found = results(*sizes)
                first = first or found
                for a, b in zip(found, first, strict=True):
                    if not (torch.isfinite(a).all() and torch.equal(a, b)):
                        return False
    finally:
        host.tcur_host_order(ORDERS[0])
    return True


if __name__ == "__main__":
    if sys.argv[1] == "--build":
        print(build(sys.argv[3], sys.argv[2], sys.argv[4:]))
    else:
        print("agree" if orders_agree(load(sys.argv[1])) else "differ")
