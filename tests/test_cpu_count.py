"""The counter of executed instructions counts a loop as by hand; its table says its rows."""

import ctypes
import os
import platform
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.cpu_count import cases, listing, report, stepping
from tcur_kernels.operators import native

ROOT = Path(__file__).parent.parent
#: Reads a line in every turn, and writes a vector to the stack and asks for a line far away.
LOOP = """
.text
.globl sums
.type sums, @function
sums:
  xor %eax, %eax
1:
  vfmadd231ps (%rdi,%rax), %ymm0, %ymm1
  vmovups %ymm1, -64(%rsp)
  prefetcht1 0x100000(%rdi)
  add $64, %rax
  dec %rsi
  jnz 1b
  vmovntps %ymm1, (%rdi)
  vzeroupper
  ret
.size sums, .-sums
"""

needs_tools = pytest.mark.skipif(
    shutil.which("objdump") is None
    or shutil.which(os.environ.get("CXX", "c++").split()[0]) is None
    or platform.system() != "Linux"
    or platform.machine() != "x86_64"
    or "avx2" not in native.runnable_isas(),
    reason="no objdump or compiler, or another processor or system",
)


@needs_tools
@pytest.mark.parametrize("turns", [100, 1000])
def test_a_loop_is_counted_as_by_hand(turns, tmp_path):
    source, path = tmp_path / "sums.s", tmp_path / "sums.so"
    source.write_text(LOOP)
    compiler = os.environ.get("CXX", "c++").split()[0]
    subprocess.run([compiler, "-shared", str(source), "-o", str(path)], check=True)
    sums = ctypes.CDLL(str(path)).sums
    library = stepping.Library(path)
    numbers = torch.zeros(2 * 16 * turns)
    place = (numbers.data_ptr() + 63) // 64 * 64
    arguments = ctypes.c_int64(place), ctypes.c_int64(turns)

    def call():
        for _ in range(3):
            sums(*arguments)

    caches = cases.MACHINES["Zen 2"].caches
    steps = library.count(call, library.entry("sums"), caches)
    times = Counter()
    for one, count in steps.times.items():
        times[one.name] += count
    repeated = ("vfmadd231ps", "vmovups", "prefetcht1", "add", "dec", "jne")
    assert times == {"xor": 1, "vmovntps": 1, "vzeroupper": 1, "ret": 1} | dict.fromkeys(
        repeated, turns
    )
    assert steps.on_stack == turns
    counted = cases.per_weight(steps)  # each of the 8 numbers written past the caches is a weight
    assert counted["weights"] == 8
    assert (counted["fmas"], counted["prefetches"]) == (turns / 8, turns / 8)
    assert (counted["loaded_bytes"], counted["stored_bytes"]) == (turns * 4, turns * 4 + 4)
    # 100 lines stay in the first level but for the one that was written past it; 1000 do not. The
    # line of the stack does, though it has changed.
    assert steps.to_first == (1 if turns == 100 else turns)
    assert steps.from_first == steps.from_second == 0
    assert steps.to_second == 1
    with pytest.raises(RuntimeError, match="expected 5 calls of the function, got 3"):
        library.count(call, library.entry("sums"), caches, warm=4)


@pytest.mark.parametrize(
    ("text", "kind", "loaded", "stored"),
    [
        ("vbroadcastss 0x4(%rcx),%ymm2", "moves", 4, 0),
        ("vbroadcastss %xmm1,%ymm2", "vector", 0, 0),
        ("vfmadd132ps (%rcx){1to8},%ymm6,%ymm9", "fmas", 4, 0),
        ("vfmadd231ps (%rdx),%zmm12,%zmm7", "fmas", 64, 0),
        ("vfmadd231ss 0x8(%rdx,%rax,4),%xmm12,%xmm7", "fmas", 4, 0),
        ("vmovss %xmm0,(%rax)", "moves", 0, 4),
        ("vmovntdq %ymm0,(%rax)", "moves", 0, 32),
        ("vextractf128 $0x1,%ymm0,(%rax)", "vector", 0, 16),
        ("vaddps %ymm0,%ymm1,%ymm2", "vector", 0, 0),
        ("prefetcht0 (%rax)", "prefetches", 0, 0),
        ("add $0x40,%rax", "scalar", 0, 0),
        ("addq $0x1,(%rax)", "scalar", 8, 8),
        ("mov 0x8(%rsp),%r8d", "scalar", 4, 0),
        ("cmpb $0x0,(%rax)", "scalar", 1, 0),
        ("lea 0x8(%rsp),%rax", "scalar", 0, 0),
    ],
)
def test_instructions_are_read(text, kind, loaded, stored):
    one = listing.instruction(f"  1a2b:\t{text}")
    memory = one.memory
    assert one.kind == kind
    assert (memory.bytes if memory and memory.is_loaded else 0) == loaded
    assert (memory.bytes if memory and memory.is_stored else 0) == stored


def test_the_page_says_what_was_counted():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    begin, end = "<!-- begin cpu_count -->\n", "<!-- end cpu_count -->\n"
    rows = report.read()
    assert page.split(begin)[1].split(end)[0] == report.table(rows)
    assert {row["isa"] for row in rows} == {"avx512", "avx2"}
