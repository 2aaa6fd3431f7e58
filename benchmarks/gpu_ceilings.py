"""Measures the ceilings of a device: the rates of a copy and of products in every precision."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .gpu_bench import Bench, Ceilings
from .gpu_clock import Contender
from .gpu_rows import Row

#: name -> dtype, and whether torch may round fp32 operands to TF32.
PRODUCTS = {
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bf16": (torch.bfloat16, False),
}


def product(a: Tensor, tf32: bool) -> Tensor:
    """A square matrix times itself, with or without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        return a @ a
    finally:
        torch.set_float32_matmul_precision(before)


def _sizes(bench: Bench) -> tuple[int, int]:
    """The number of elements to copy, and the number of rows of the matrices."""
    return (2**16, 64) if bench.tiny else (2**29, 8192)


def ceilings(bench: Bench) -> Ceilings:
    """The ceilings, measured once per process, which takes about a second."""
    if bench.ceilings is None:
        count, size = _sizes(bench)
        source = torch.randn(count, device=bench.device)
        target = torch.empty_like(source)
        rate = 2 * source.nbytes / bench.quick(partial(target.copy_, source))
        del source, target
        products = {}
        for name, (dtype, tf32) in PRODUCTS.items():
            a = torch.randn(size, size, device=bench.device).to(dtype)
            products[name] = 2 * size**3 / bench.quick(partial(product, a, tf32))
        bench.ceilings = Ceilings(rate, products)
    return bench.ceilings


def _rows(bench: Bench) -> None:
    found = ceilings(bench)
    count, size = _sizes(bench)
    rate = found.bytes_per_ms
    case = f"copy of {4 * count / 1e9:.2g} GB fp32"
    note = f"{rate / 1e9:.3g} TB/s read and written"
    bench.rows.add(Row("rates", case, "copy", "torch", 8 * count / rate, note=note))
    for name, operations in found.products.items():
        ms, note = 2 * size**3 / operations, f"{operations / 1e9:.3g} TFLOP/s"
        bench.rows.add(Row("rates", f"product of {size}", name, "torch", ms, note=note))


def _narrowing(bench: Bench, section: str, case: str, shape: tuple[int, ...]) -> None:
    source = torch.randn(*shape, device=bench.device)
    wide, narrow = torch.empty_like(source), torch.empty_like(source, dtype=torch.bfloat16)
    contenders = [
        Contender("copy", "to fp32", lambda: [partial(wide.copy_, source)]),
        Contender("copy", "to bf16", lambda: [partial(narrow.copy_, source)]),
        Contender("read", "sum", lambda: [source.sum]),
    ]
    bench.race(section, case, contenders, yardstick="")


def run(bench: Bench) -> None:
    """Adds rows for the ceilings, and for copies that narrow or only read."""
    bench.piece("rates", "ceilings", partial(_rows, bench))
    shape = (6, 20, 24) if bench.tiny else (64, 2048, 4096)
    case = f"copies of {'x'.join(map(str, shape))} fp32"
    bench.piece("rates", case, partial(_narrowing, bench, "rates", case, shape))
