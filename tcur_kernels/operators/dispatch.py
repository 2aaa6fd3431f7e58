"""Chooses the kernels that run: finds the operator for the name of a backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch

from ..autocast import outside_autocast
from . import bf16_products, contract, cost, eager, native
from .factors import PRECISIONS, CURFactors, Precision

Backend = Literal["auto", "reference", "cpu", "triton", "cuda"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

#: Looked up once. Triton itself is imported when it is first used.
_TRITON_INSTALLED = find_spec("triton") is not None

#: For a compiled backend: a function that says why a device cannot use it, and what builds it.
_BUILT_BY = {
    "cpu": (lambda device: native.cpu_error(), "a C++17 compiler"),
    "cuda": (lambda device: native.cuda_absence(device), "CUDA's nvcc, for the GPUs here"),
}


def operator(
    name: str, backend: Backend, factors: CURFactors, precision: Precision
) -> Callable[..., Any]:
    """Returns operator ``name`` for a backend, and plain torch within a transform of functorch."""
    language = language_of(name, backend, factors, precision)
    if not eager.is_transformed():
        return contract.operator(name, language)
    kernel = contract.plain(name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with outside_autocast(factors.device):
            return kernel(*args, **kwargs)

    return call


def language_of(name: str, backend: Backend, factors: CURFactors, precision: Precision) -> str:
    """Returns the language of operator ``name`` for a backend; see `contract`.

    Raises:
        TypeError, ValueError, RuntimeError: the backend does not exist here, cannot work on these
            factors or in this precision, or has no kernel of the operator. With "auto" only the
            precision can be refused.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        chosen = _best_backend(name, factors)
        _check_rounding(name, chosen, precision)
        return _language(chosen, precision)
    _check_rounding(name, backend, precision)
    _check_is_here(backend, factors)
    language = _language(backend, precision)
    if not contract.has_kernel(name, language, factors.device.type):
        raise RuntimeError(
            f"backend: expected one that has a kernel of operator '{name}', got '{backend}'; "
            "use 'auto' or 'reference'"
        )
    return language


def _language(backend: Backend, precision: Precision) -> str:
    if backend == "reference":
        return "reference"
    if backend == "triton":
        return "triton_tf32" if precision == "tf32" else "triton"
    return contract.CUDA_TF32 if precision == "tf32" else ""


def _best_backend(name: str, factors: CURFactors) -> Backend:
    """Returns the fastest backend that has the operator, or the reference if there is no other."""
    device = factors.device
    if device.type == "cpu" and native.cpu_error() is None and contract.has_kernel(name, "", "cpu"):
        return "cpu"
    if device.type != "cuda":
        return "reference"
    here = ["triton"] if _TRITON_INSTALLED else []
    if native.cuda_absence(device) is None and contract.has_kernel(name, "", "cuda"):
        here.append("cuda")
    choose = partial(
        cost.choose_gpu_backend, name.removesuffix("_out"), n3=factors.n3, dtype=factors.dtype
    )
    best = choose(available=here)
    if best == "triton":
        # Only the import, which takes a second, tells which operators Triton has. So Triton is
        # imported only if it would be chosen.
        _import_triton()
        if not contract.has_kernel(name, "triton", "cuda"):
            here.remove("triton")
            best = choose(available=here)
    return best


def _check_rounding(name: str, backend: Backend, precision: Precision) -> None:
    """Refuses a rounding that the backend does not do.

    Only kernels for GPUs round operands to TF32. For C * U * R itself, only they round to bf16.
    """
    is_product = name in ("materialize", "materialize_out")
    rounds = precision == "tf32" or (precision == "bf16" and is_product)
    if rounds and backend not in ("triton", "cuda"):
        raise ValueError(
            f"precision: expected {'ieee' if is_product else 'ieee or bf16'} for "
            f"backend '{backend}', got '{precision}', which is for backends 'triton' and 'cuda'"
        )


def _check_is_here(backend: Backend, factors: CURFactors) -> None:
    """Refuses a backend that cannot run here, or cannot work on these factors."""
    if backend == "reference":
        return
    if backend == "triton":
        _check_triton(factors)
        return
    device = factors.device
    if device.type != backend:
        raise ValueError(f"backend: expected one for tensors on {device}, got '{backend}'")
    absence, needs = _BUILT_BY[backend]
    if (reason := absence(device)) is not None:
        raise RuntimeError(
            f"backend: '{backend}' is not built here ({reason}); install the package "
            f"with {needs}: pip install --no-build-isolation ."
        )
    if backend == "cuda" and not cost.cuda_takes(factors.n3, factors.dtype):
        raise ValueError(
            f"backend: expected fp32 factors of at most {cost.CUDA_SLICES} slices for 'cuda', "
            f"got {factors.dtype} and {factors.n3}; use 'auto' or 'reference'"
        )


def _check_triton(factors: CURFactors) -> None:
    """Imports the Triton kernels. Refuses factors and devices that they cannot work on."""
    if not _TRITON_INSTALLED:
        raise RuntimeError(
            "backend: 'triton' is not installed here; pip install 'tcur_kernels[triton]'"
        )
    if factors.dtype != torch.float32:
        raise TypeError(f"factors: expected dtype torch.float32 for 'triton', got {factors.dtype}")
    is_interpreted = _import_triton()
    if factors.device.type != "cuda" and not is_interpreted:
        raise ValueError(
            f"backend: expected one for tensors on {factors.device}, got 'triton', which runs on "
            "CUDA devices (on the CPU in Triton's interpreter alone: TRITON_INTERPRET=1)"
        )


def _import_triton() -> bool:
    """Imports the kernels, which defines their operators. Returns whether they are interpreted."""
    from . import triton

    return triton.INTERPRETED


def check_precision(precision: str, device: torch.device) -> Precision:
    """Returns the precision if products on the device can have it.

    Raises:
        ValueError: it is not one of `PRECISIONS`, or it is "tf32" and no GPU kernels can run. The
            meta device allows it, because its tensors may be meant for any device.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision != "tf32" or device.type == "meta":
        return precision
    absence = f"tensors on {device}"
    if device.type == "cuda":
        if _TRITON_INSTALLED or native.cuda_absence(device) is None:
            return precision
        absence += " without Triton or compiled CUDA kernels"
    raise ValueError(f"precision: expected ieee or bf16 for {absence}, got 'tf32'")


def build_info() -> dict[str, Any]:
    """Returns what was compiled and which of it runs here.

    The keys are ``version``, ``torch``, ``backends`` (which ones run here), ``operators`` (the
    backends that run each operator here), ``products``, ``cpu`` and ``cuda``. ``cpu`` has the
    compiler, the torch target, the instruction sets compiled, runnable and chosen, and
    ``l2_cache``, the bytes of a core's second-level cache, which tiles are sized for; ``cuda`` has
    the architectures compiled. Both have ``built``. If one does not run here, ``error`` says why:
    it was not built, or ``cuda`` was built for other GPUs. ``backend="auto"`` then uses Triton or
    the reference, as it also does for an operator that a backend has no kernel of.

    ``products["cpu"]`` says how this processor multiplies tokens with the factors, for each
    precision that it has:

    - "ieee": "fp32".
    - "bf16": "bf16" where it has units for that, else "operands rounded to bf16, multiplied in
      fp32", since torch's products of bf16 matrices would be slower.
    """
    from .. import __version__

    cpu, cuda = native.cpu_facts(), native.cuda_facts()
    runs = {"cpu": cpu["built"], "cuda": cuda["error"] is None}
    if _TRITON_INSTALLED:
        runs["triton"] = _import_triton() or torch.cuda.is_available()
    backends = [name for name, is_here in runs.items() if is_here]
    return {
        "version": __version__,
        "torch": torch.__version__,
        "backends": ["reference", *backends],
        "operators": {
            name: ["reference", *(each for each in backends if _has(name, each))]
            for name in contract.OPERATORS
        },
        "products": {"cpu": bf16_products.facts()},
        "cpu": cpu,
        "cuda": cuda,
    }


def _has(name: str, backend: str) -> bool:
    if backend == "triton":
        return contract.has_kernel(name, "triton", "cuda")
    return contract.has_kernel(name, "", backend)
