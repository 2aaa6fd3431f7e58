"""The launches that the Triton operators make, compiled and executed without a GPU.

Launches are recorded instead of run. Triton compiles their kernels for any architecture, and
`machine` executes some programs of them. The tests compile the same launches.
"""

from __future__ import annotations

import itertools
import math
import re
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tcur_kernels.operators.contract import CoreGradDense, MaterializeOut
from tcur_kernels.operators.triton import (
    blocks,
    core_grad_dense,
    cur_linear,
    launch,
    materialize,
    mix,
    products,
)

from . import listing, machine, memory, model

MODULES = (blocks, core_grad_dense, cur_linear, materialize, mix, products)
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
#: Options of a launch that are not the kernel's own.
BUILD = ("num_warps", "num_stages", "maxnreg")
#: Bytes from one tensor's made-up address to the next one's. Their sectors tell tensors apart.
APART = 1 << 40


@dataclass
class Launch:
    """One recorded launch of a kernel."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        """The kernel and how it is specialised."""
        return f"{self.kernel.__name__} {self.options}"

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by the names of the kernel's arguments."""
        named = zip(self.kernel.arg_names, self.args, strict=False)
        return {name: value for name, value in named if isinstance(value, torch.Tensor)}


@dataclass
class Recorder:
    """Stands in for `wrap_triton`."""

    launches: list[Launch]

    def __call__(self, kernel: Any) -> Any:
        """Something that is launched as the kernel is."""

        def of_grid(grid: tuple[int, ...]) -> Callable[..., None]:
            assert all(n > 0 for n in grid), (kernel, grid)
            return lambda *args, **options: self.launches.append(
                Launch(kernel, args, options, grid)
            )

        return mock.MagicMock(__getitem__=lambda _, grid: of_grid(grid))


def record(
    arch: str, call: Callable[[], object], launches: list[Launch] | None = None
) -> list[Launch]:
    """The launches that ``call`` would make on a device of an architecture."""
    recorder = Recorder([] if launches is None else launches)
    with mock.patch.object(launch, "arch_of", return_value=arch):
        patches = [mock.patch.object(module, "wrap_triton", recorder) for module in MODULES]
        for patch in patches:
            patch.start()
        try:
            call()
        finally:
            for patch in patches:
                patch.stop()
    return recorder.launches


def compiled(arch: str, launched: Launch) -> Any:
    """Compiles as Triton would at that launch, without the device."""
    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64)
    else:
        target = GPUTarget("cuda", int(arch[3:]), 32)
    kernel, options = launched.kernel, dict(launched.options)
    build = {name: options.pop(name) for name in BUILD if name in options}
    signature, attributes = {}, {}
    for place, (name, value) in enumerate(zip(kernel.arg_names, launched.args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            aligned = True
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name] = "i32"
            aligned = value % 16 == 0 and not kernel.params[place].do_not_specialize
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    constants = {name: options[name] for name in kernel.arg_names[len(launched.args) :]}
    signature.update(dict.fromkeys(constants, "constexpr"))
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=build)


# What is below is for NVIDIA's architectures alone.


@dataclass(frozen=True)
class Counted:
    """What a launch would execute.

    Attributes:
        kernel: its name.
        registers, local_bytes: of a thread.
        shared_bytes: of a program.
        programs: that fit into a multiprocessor together.
        classes: lane instructions of the whole launch, by class.
        read: bytes asked for by the warps, by argument, in sectors; "?": where addresses are not
            known. A sector counts once for each instruction that asks for it.
        once: the same, but a sector counts once for each program. A program's warps share it in
            the first-level cache, so this is what comes from the second-level cache.
        written: bytes.
        widths: bytes of a lane's loads and stores, with how often each stands in the code.
    """

    kernel: str
    registers: int
    local_bytes: int
    shared_bytes: int
    programs: int
    classes: dict[str, float]
    read: dict[str, float]
    once: dict[str, float]
    written: float
    widths: dict[str, Counter[int]] = field(compare=False)


def machine_code(built: Any) -> listing.Kernel:
    """The machine code of a kernel that Triton compiled."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(built.asm["cubin"])
        return next(iter(listing.read(path).values()))


def arguments_of(built: Any, launched: Launch) -> bytes:
    """The arguments as they lie in constant memory, with made-up addresses.

    Triton passes those that are not constants in order. Behind them it may pass addresses of
    scratch memory, which are 0 here.
    """
    entry = re.search(r"\.entry[^(]*\((.*?)\)", built.asm["ptx"], re.DOTALL)
    assert entry, "the PTX has no entry"
    kinds = re.findall(r"\.param \.(\w)(\d+)", entry.group(1))
    values = [*launched.args, *[0] * (len(kinds) - len(launched.args))]
    data = bytearray()
    for place, ((kind, width), value) in enumerate(zip(kinds, values, strict=True)):
        size = int(width) // 8
        data += bytes(-len(data) % size)
        if isinstance(value, torch.Tensor):
            value = (place + 1) * APART
        data += struct.pack("<f", value) if kind == "f" else value.to_bytes(size, "little")
    return bytes(data)


def sample(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Some programs of a grid: from the middle, and both along an axis that has but two."""
    axes = [range(size) if size == 2 else (size // 2,) for size in grid]
    return list(itertools.product(*axes))


def count(arch: str, launched: Launch, at: Iterable[tuple[int, ...]] | None = None) -> Counted:
    """Compiles a launch and executes some of its programs.

    Args:
        arch: as "sm_90".
        launched: the launch.
        at: the programs. They stand for all of them.
    """
    built = compiled(arch, launched)
    kernel = machine_code(built)
    program = machine.Program(kernel)
    warps = launched.options["num_warps"]
    arguments = arguments_of(built, launched)
    constants = machine.constants_of(kernel, 32 * warps, launched.grid, arguments)
    chosen = list(sample(launched.grid) if at is None else at)
    times = math.prod(launched.grid) / len(chosen)
    kinds = {one.address: one.kind for one in kernel.code}
    names = dict(enumerate(launched.kernel.arg_names, 1))
    classes: Counter[str] = Counter()
    read: Counter[str] = Counter()
    once: Counter[str] = Counter()
    written = 0.0
    for place in chosen:
        issued = machine.Issued()
        for warp in range(warps):
            issued.add(program.run(constants, place, warp, 32 * warps))
        for address, number in issued.instructions.items():
            classes[kinds[address]] += 32 * number
        unknown = issued.sectors["read"] - issued.places.total()
        read["?"] += 32 * unknown
        once["?"] += 32 * unknown
        for piece, number in issued.places.items():
            name = names.get(32 * piece // APART, "?")
            read[name] += 32 * number
            once[name] += 32
        written += 32 * issued.sectors["written"]
    return Counted(
        kernel=launched.kernel.__name__,
        registers=kernel.registers,
        local_bytes=kernel.local_bytes,
        shared_bytes=built.metadata.shared,
        programs=model.blocks_together(kernel, 32 * warps, built.metadata.shared),
        classes={name: number * times for name, number in classes.items()},
        read={name: number * times for name, number in read.items() if number},
        once={name: number * times for name, number in once.items() if number},
        written=written * times,
        widths={name: widths(kernel, name) for name in ("LDG", "STG")},
    )


def widths(kernel: listing.Kernel, name: str) -> Counter[int]:
    """Bytes of a lane's loads (LDG) or stores (STG), with how often each stands in the code."""
    return Counter(memory.width_of(one) for one in kernel.code if one.name == name)


# The launches at a shape.


def materialize_launches(
    arch: str,
    shape: tuple[int, int, int, int],
    base: torch.dtype,
    out: torch.dtype,
    layers: bool = False,
) -> list[Launch]:
    """Of W_eff of a stack, or of separate layers, at n3, n1, n2 and a rank."""
    n3, n1, n2, rank = shape
    stack = _empty(n3, n1, n2, dtype=base)
    weights = list(stack) if layers else [stack]
    factors = _empty(n1, n3 * rank), _empty(n3 * rank, n2)
    core, w_eff = _empty(n3, rank, rank), _empty(n3, n1, n2, dtype=out)
    arguments = MaterializeOut(weights, *factors, core, 0.5, w_eff)
    return record(arch, lambda: materialize.run(arguments, "ieee"))


def core_grad_launches(
    arch: str, shape: tuple[int, int, int, int], grad: torch.dtype
) -> list[Launch]:
    """Of the core's gradient from a dense one."""
    n3, n1, n2, rank = shape
    arguments = CoreGradDense(
        _empty(n3, n1, n2, dtype=grad), _empty(n1, n3 * rank), _empty(n3 * rank, n2)
    )
    return record(arch, lambda: core_grad_dense.run(arguments, "ieee"))


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
