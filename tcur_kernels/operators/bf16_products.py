"""How products of the precision "bf16" run on a processor: in bf16, or in fp32.

torch leaves products of bf16 matrices to oneDNN, or to a loop of its own. Without units for them,
both are slower than products in fp32: a little on AVX-512, and 4 to 75 times on AVX2. There the
operands are rounded to bf16 all the same, but held and multiplied in fp32. A sum is in fp32 either
way, so the two differ in the order of a sum alone.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

#: Whether this processor has the units. Asked once. A plain global, because torch.compile looks
#: through caches of functions.
_units: bool | None = None


def _ask() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    # oneDNN also says yes where it emulates bf16 by AVX-512. Every processor with AMX has the units
    # of AVX-512 too.
    return bool(torch.cpu._is_avx512_bf16_supported())


def has_units() -> bool:
    """Whether products of bf16 matrices are as fast on this processor as products in fp32."""
    global _units
    if _units is None:
        _units = _ask()
    return _units


# A traced graph is for one processor. This is what `torch.compiler.assume_constant_result` does,
# but that imports the compiler.
has_units._dynamo_marked_constant = True  # type: ignore[attr-defined]


def in_fp32(device: torch.device) -> bool:
    """Whether operands on this device are rounded to bf16 and then multiplied in fp32."""
    return device.type == "cpu" and not has_units()


def rounded(x: Tensor) -> Tensor:
    """The operand in fp32, after rounding to bf16. One in bf16 is only widened."""
    return x.to(torch.bfloat16).to(torch.float32)


def facts() -> dict[str, str]:
    """How the products of every precision that the CPU has run on it."""
    narrow = "bf16" if has_units() else "operands rounded to bf16, multiplied in fp32"
    return {"ieee": "fp32", "bf16": narrow}
