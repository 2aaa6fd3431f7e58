"""Every operator against plain torch, checked first: what `python -m benchmarks.gpu` times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tcur_kernels as tcur
from tcur_kernels import ops, reference

from .baselines import S1, S2, eager
from .gpu_clock import Bench, Row

#: name -> (n3, n1, n2, rank); the two large ones stand for a whole language model's projections.
SHAPES = {
    "vit_b_attention": (48, 768, 768, 8),
    "vit_b_mlp_up": (12, 3072, 768, 8),
    "vit_b_mlp_down": (12, 768, 3072, 8),
    "llama_8b_q_o": (64, 4096, 4096, 8),
    "llama_8b_k_v": (64, 1024, 4096, 8),
    "square_128": (128, 4096, 4096, 8),
    "wide_64": (64, 4096, 11008, 8),
}
SWEEP_N3 = (1, 12, 24, 48, 64, 96, 128)
SWEEP_RANK = (4, 8, 16, 32)
#: Relative error of the update that tells a wrong kernel.
LIMIT = 1e-5
TOKENS = 4096


def contender_backends(device: torch.device) -> list[str]:
    """The backends of this package to be compared on a device."""
    return ["cuda", "triton"] if device.type == "cuda" else ["cpu", "triton"]


def why_absent(backend: str, factors: tcur.CURFactors, core: Tensor) -> str | None:
    """None where a backend runs for these tensors, or else its own words."""
    try:
        tcur.cur_product(factors, core, backend)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


@dataclass
class Data:
    """One random stack on a device."""

    weight: Tensor
    lateral: Tensor
    horizontal: Tensor
    core: Tensor

    @staticmethod
    def make(shape: tuple[int, int, int, int], device: torch.device) -> Data:
        """Normal numbers, scaled so that the update is about as large as the weight."""
        n3, n1, n2, rank = shape
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device) / rank**0.5

        return Data(
            normal(n3, n1, n2), normal(n3, n1, rank), normal(n3, rank, n2), normal(n3, rank, rank)
        )

    def exact_update(self, rows: Tensor) -> Tensor:
        """Some rows of C*U*R, in float64."""
        lateral = self.lateral[:, rows].double()
        return tcur.t_product(tcur.t_product(lateral, self.core.double()), self.horizontal.double())


def materialize(bench: Bench, name: str, shape: tuple[int, int, int, int], full: bool) -> None:
    """W_eff in fp32; with ``full`` in bf16 too, and against all baselines."""
    data = Data.make(shape, bench.device)
    weight, core = data.weight, data.core
    factors = tcur.CURFactors(data.lateral, data.horizontal)
    rows = torch.arange(0, shape[1], max(1, shape[1] // 7), device=bench.device)
    exact = data.exact_update(rows)
    for dtype in (torch.float32, torch.bfloat16) if full else (torch.float32,):
        case = f"{name} {'x'.join(map(str, shape))} {str(dtype)[6:]}"
        moved = weight.numel() * (4 + dtype.itemsize)
        for backend in contender_backends(bench.device):
            reason = why_absent(backend, factors, core)
            if reason is not None:
                bench.rows.add(Row("materialize", case, backend, note=f"absent: {reason}"))
                continue
            out = torch.empty_like(weight, dtype=dtype)
            run = materializer(weight, factors, core, out, backend)
            update = run()[:, rows].double() - weight[:, rows].double()
            error = float((update - exact).norm() / exact.norm())
            limit = LIMIT if dtype == torch.float32 else 2e-2
            if not error < limit:
                bench.rows.add(Row("materialize", case, backend, note=f"WRONG: error {error:.2g}"))
                continue
            bench.measure("materialize", case, backend, run, moved)
            del out, run
        if full:
            for contender, make in baselines(bench, data).items():
                bench.measure("materialize", case, contender, lazily(make, core, dtype), moved)


def materializer(
    weight: Tensor, factors: tcur.CURFactors, core: Tensor, out: Tensor, backend: str
) -> Callable[[], Tensor]:
    """Our contender."""
    return lambda: tcur.materialize(weight, factors, core, out=out, backend=backend)


Update = Callable[[Tensor], Tensor]


def lazily(make: Callable[[], Update], core: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A baseline that is made when it is called first: running out of memory is a row then."""
    made: list[Update] = []

    def run() -> Tensor:
        if not made:
            made.append(make())
        return made[0](core).to(dtype)

    return run


def baselines(bench: Bench, data: Data) -> dict[str, Callable[[], Update]]:
    """Plain torch, by name."""
    weight = data.weight

    def spectra() -> tuple[Tensor, Tensor]:
        return reference.half_spectrum(data.lateral), reference.half_spectrum(data.horizontal)

    def make_eager(function: Callable[..., Tensor] = eager) -> Update:
        factors = spectra()
        return lambda core: function(weight, *factors, core)

    return {
        "eager": make_eager,
        "compile": lambda: make_eager(compiled(bench, eager)),
        "S1": lambda: S1(weight, *spectra()),
        "S2": lambda: S2(weight, *spectra()),
    }


def compiled(bench: Bench, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """By ``torch.compile``; a dry run needs no code, tracing is what could break."""
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager" if bench.tiny else "inductor")


def gradients(bench: Bench, name: str, shape: tuple[int, int, int, int], tokens: int) -> None:
    """The gradient of the core, from a dense G and from tokens, and the factored layer."""
    n3, n1, n2, rank = shape
    data = Data.make(shape, bench.device)
    factors = tcur.CURFactors(data.lateral, data.horizontal)
    spectra = reference.half_spectrum(data.lateral), reference.half_spectrum(data.horizontal)
    x = torch.randn(tokens, n2, device=bench.device)
    grad_y = torch.randn(tokens, n1, device=bench.device)
    at, q = n3 // 2, n3 * rank
    weight = data.weight[at]
    how = (at, 1, 1.0, False, False)
    floats = tokens * (n1 + n2) + q * (n1 + n2)  # tokens in and out, or both in; the factors
    #: operator -> numbers to be moved, its arguments, the same in plain torch
    calls: dict[str, tuple[int, tuple[Any, ...], Callable[..., Tensor], tuple[Any, ...]]] = {
        "core_grad_dense": (
            n3 * n1 * n2,
            (data.weight, *factors.packed()),
            reference.core_grad_dense,
            (data.weight, *spectra),
        ),
        "core_grad_tokens": (
            floats,
            (x, grad_y, *factors.packed(), n3, at, 1),
            reference.core_grad_tokens,
            (x, grad_y, *spectra, n3, at),
        ),
        "cur_linear": (
            floats + n1 * n2,
            (x, weight, None, *factors.packed(), data.core, *how),
            reference.cur_linear,
            (x, weight, None, *spectra, data.core, at),
        ),
    }
    for op, (moved, args, plain, plain_args) in calls.items():
        case = f"{name} {'x'.join(map(str, shape))} {tokens} tokens"
        expected = plain(*plain_args)
        for backend in contender_backends(bench.device):
            reason = why_absent(backend, factors, data.core)
            if reason is not None:
                bench.rows.add(Row(op, case, backend, note=f"absent: {reason}"))
                continue
            run = partial(ops.operator(op, "triton" if backend == "triton" else ""), *args)
            error = float((run() - expected).norm() / expected.norm())
            if not error < LIMIT:
                bench.rows.add(Row(op, case, backend, note=f"WRONG: error {error:.2g}"))
                continue
            bench.measure(op, case, backend, run, 4 * moved)
        bench.measure(op, case, "eager", partial(plain, *plain_args), 4 * moved)
        run = partial(compiled(bench, plain), *plain_args)
        bench.measure(op, case, "compile", run, 4 * moved)


def run(bench: Bench) -> None:
    """All operators at the shapes of whole models."""
    if bench.tiny:
        materialize(bench, "tiny", (6, 20, 24, 2), full=True)
        gradients(bench, "tiny", (6, 20, 24, 2), 30)
        return
    for name, shape in SHAPES.items():
        materialize(bench, name, shape, full=True)
        torch.cuda.empty_cache()
    for name in ("vit_b_attention", "vit_b_mlp_up", "llama_8b_k_v"):
        gradients(bench, name, SHAPES[name], TOKENS)
        torch.cuda.empty_cache()


def sweep(bench: Bench) -> None:
    """`materialize` over lengths and ranks."""
    sizes = (8, 8) if bench.tiny else (2048, 2048)
    for n3 in SWEEP_N3[:2] if bench.tiny else SWEEP_N3:
        for rank in SWEEP_RANK[:2] if bench.tiny else SWEEP_RANK:
            materialize(bench, "sweep", (n3, *sizes, rank), full=False)
