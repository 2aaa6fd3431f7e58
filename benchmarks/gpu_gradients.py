"""Times the operators of a training step beside their floors: core gradients, factored layers.

The floor of ``core_grad_dense`` is the time to read G once at the rate of a copy. The floor of an
operator on tokens is the larger of two times: for its bytes at the rate of a copy, and for its
operations at the measured rate of a product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import tcur_kernels as tcur
from tcur_kernels.operators import contract, cost, reference

from .gpu_bench import Bench, Ceilings, Medians
from .gpu_ceilings import ceilings
from .gpu_clock import Contender, Run
from .gpu_operators import (
    BF16,
    FP32,
    LIMIT,
    NARROW_LIMIT,
    SHAPES,
    TINY,
    VIT_B,
    Data,
    Shape,
    backends,
    compiled,
    name_of,
    text,
    why_absent,
)
from .gpu_rows import Row

TOKENS = (2048, 4096)
NAMES = (*VIT_B, "llama_8b_k_v")


def operator(name: str, backend: str) -> Callable[..., Tensor]:
    """An operator of this package for a backend."""
    language = backend if backend in ("triton", "reference") else ""
    return contract.operator(name, language)


def wrong(result: Tensor, exact: Tensor, limit: float) -> str | None:
    """What is wrong with a result, or None."""
    error = float((result.double() - exact.double()).norm() / exact.double().norm())
    return None if error < limit else f"relative error {error:.2g}"


def dense(bench: Bench, section: str, case: str, shape: Shape) -> None:
    """``core_grad_dense`` on several G, beside a copy of G, which moves twice the bytes."""
    data = Data.make(shape, bench.device)
    packed = data.factors.packed()
    grads = [data.weight]
    grads += [data.weight.clone() for _ in range(bench.clock.sets(data.weight.nbytes) - 1)]
    target = torch.empty_like(data.weight)
    contenders = [Contender("copy", "torch", lambda: [partial(target.copy_, g) for g in grads])]
    for backend in backends(bench.device):

        def make(backend: str = backend) -> list[Run]:
            op = operator("core_grad_dense", backend)
            return [partial(op, g, *packed) for g in grads]

        def check(make: Callable[[], list[Run]] = make) -> str | None:
            exact = reference.core_grad_dense(data.weight, *data.spectra)
            return wrong(make()[0](), exact, LIMIT)  # type: ignore[arg-type]

        absent = why_absent(backend, bench.device)
        contenders.append(Contender("fp32", backend, make, share=0.5, check=check, absent=absent))
    bench.race(section, case, contenders)


class Tokens:
    """Several sets of inputs and gradients of a stack's layers, each for its own slice."""

    def __init__(self, bench: Bench, shape: Shape, tokens: int, dtype: torch.dtype) -> None:
        n3, n1, n2, _ = shape
        device = bench.device
        self.shape, self.dtype = shape, dtype
        self.data = Data.make(shape, device)
        self.factors = self.data.factors
        self.precision = "bf16" if dtype == BF16 else "ieee"
        self.packed = self.factors.packed(self.precision)
        size = tokens * (n1 + n2) * dtype.itemsize
        self.slices = [i % n3 for i in range(min(24, bench.clock.sets(size)))]
        self.x = [torch.randn(tokens, n2, device=device).to(dtype) for _ in self.slices]
        self.grad_y = [torch.randn(tokens, n1, device=device).to(dtype) for _ in self.slices]
        self.weights = [self.data.weight[i].to(dtype) for i in self.slices]
        self.bias = torch.randn(n1, device=device).to(dtype)
        self.limit = LIMIT if dtype == FP32 else NARROW_LIMIT
        q = self.packed[0].shape[1]
        self.projections = 2 * tokens * q * (n1 + n2)  # operations
        self.base = 2 * tokens * n1 * n2
        self.inner = 4 * tokens * q * shape[3]
        self.bytes_ = size + q * (n1 + n2) * dtype.itemsize

    def floor(self, found: Ceilings, operations: int, extra_bytes: int = 0) -> float:
        """The floor in milliseconds."""
        rate = found.products[name_of(self.dtype)]
        return max((self.bytes_ + extra_bytes) / found.bytes_per_ms, operations / rate)


def by_tokens(bench: Bench, section: str, case: str, t: Tokens, floor_ms: float) -> None:
    """Times ``core_grad_tokens`` on x and dy."""
    n3 = t.shape[0]
    contenders = []
    for backend in backends(bench.device):

        def make(backend: str = backend) -> list[Run]:
            op = operator("core_grad_tokens", backend)
            each = zip(t.x, t.grad_y, t.slices, strict=True)
            return [partial(op, x, dy, *t.packed, n3, at, 1) for x, dy, at in each]

        def check(make: Callable[[], list[Run]] = make) -> str | None:
            tokens = (t.x[0].float(), t.grad_y[0].float())
            exact = reference.core_grad_tokens(*tokens, *t.data.spectra, n3, t.slices[0])
            return wrong(make()[0](), exact, t.limit)  # type: ignore[arg-type]

        absent = why_absent(backend, bench.device)
        contenders.append(
            Contender(
                name_of(t.dtype), backend, make, floor_ms=floor_ms, check=check, absent=absent
            )
        )
    bench.race(section, case, contenders)


def layer(bench: Bench, section: str, case: str, t: Tokens, floor_ms: float) -> None:
    """``cur_linear`` with a bias, beside the plain linear layer."""

    def linear() -> list[Run]:
        return [partial(F.linear, x, w, t.bias) for x, w in zip(t.x, t.weights, strict=True)]

    contenders = [Contender("linear", "torch", linear)]
    for backend in backends(bench.device):

        def make(backend: str = backend) -> list[Run]:
            how = {"backend": backend, "precision": t.precision}
            return [
                partial(tcur.cur_linear, x, w, t.bias, t.factors, t.data.core, at, **how)
                for x, w, at in zip(t.x, t.weights, t.slices, strict=True)
            ]

        def check(make: Callable[[], list[Run]] = make) -> str | None:
            weight, bias, at = t.weights[0].float(), t.bias.float(), t.slices[0]
            spectra = t.data.spectra
            exact = reference.cur_linear(t.x[0].float(), weight, bias, *spectra, t.data.core, at)
            return wrong(make()[0](), exact, t.limit)  # type: ignore[arg-type]

        absent = why_absent(backend, bench.device)
        contenders.append(
            Contender(
                name_of(t.dtype), backend, make, floor_ms=floor_ms, check=check, absent=absent
            )
        )
    bench.race(section, case, contenders)


def choice(bench: Bench, section: str, case: str, t: Tokens) -> None:
    """Times both ways to the gradient of the core, and notes which `cost.choose_gradient` takes."""
    n3, n1, n2, rank = t.shape
    lateral, horizontal = t.packed
    here = [b for b in backends(bench.device) if why_absent(b, bench.device) is None]

    def by_z(backend: str) -> list[Run]:
        op = operator("core_grad_tokens", backend)

        def run(x: Tensor, grad_y: Tensor, at: int) -> Tensor:
            z = x.to(horizontal.dtype) @ horizontal.mT  # fp32 on a CPU without units for bf16
            return op(z, grad_y, lateral, None, n3, at, 1)

        return [partial(run, *each) for each in zip(t.x, t.grad_y, t.slices, strict=True)]

    def by_dense(backend: str) -> list[Run]:
        op = operator("core_grad_tokens", backend)

        def run(x: Tensor, grad_y: Tensor, at: int) -> Tensor:
            return op(grad_y.mT @ x, None, lateral, horizontal, n3, at, 1)

        return [partial(run, *each) for each in zip(t.x, t.grad_y, t.slices, strict=True)]

    contenders = []
    for backend in here:
        contenders += [
            Contender("tokens", backend, partial(by_z, backend)),
            Contender("dense", backend, partial(by_dense, backend)),
        ]
    medians = bench.race(section, case, contenders)
    for backend in here:
        note = _judged(
            medians, backend, cost.choose_gradient(len(t.x[0]), n1, n2, n3, rank, at_once=False)
        )
        bench.rows.add(Row(section, case, "choice", backend, note=note))


def _judged(medians: Medians, backend: str, chosen: str) -> str:
    tokens, whole = (medians.get((name, backend)) for name in ("tokens", "dense"))
    if tokens is None or whole is None:
        return f"{chosen} is chosen, nothing to compare"
    faster = "dense" if whole < tokens else "tokens"
    ratio = max(tokens, whole) / min(tokens, whole)
    is_right = (chosen == "dense") == (faster == "dense")
    return f"{'right' if is_right else 'not right'}: {chosen}; {faster} is faster by {ratio:.2f}"


def plain(bench: Bench, section: str, case: str, t: Tokens) -> None:
    """Times the reference, eager and compiled."""
    n3 = t.shape[0]
    spectra, at = t.data.spectra, t.slices[0]
    x, grad_y, weight = t.x[0], t.grad_y[0], t.weights[0]
    calls: dict[str, tuple[Callable[..., Tensor], tuple[object, ...]]] = {
        "core_grad_dense": (reference.core_grad_dense, (t.data.weight, *spectra)),
        "core_grad_tokens": (reference.core_grad_tokens, (x, grad_y, *spectra, n3, at)),
        "cur_linear": (reference.cur_linear, (x, weight, t.bias, *spectra, t.data.core, at)),
    }

    def compile_(function: Callable[..., Tensor], args: tuple[object, ...]) -> list[Run]:
        return [partial(compiled(bench, function), *args)]

    contenders = []
    for name, (function, args) in calls.items():
        eager = partial(list[Run], [partial(function, *args)])
        contenders.append(Contender(name, "eager", eager, "launched"))
    for name, call in calls.items():
        contenders.append(Contender(name, "compile", partial(compile_, *call), "launched"))
    bench.race(section, case, contenders)


def run(bench: Bench) -> None:
    """Runs everything at the shapes of a ViT-B and of a Llama's keys and values; torch last."""
    shapes = {name: SHAPES[name] for name in NAMES} if not bench.tiny else {"tiny": TINY}
    tokens = TOKENS if not bench.tiny else (30,)
    for name, shape in shapes.items():
        section, case = "core_grad_dense", f"{name} {text(shape)}"
        bench.piece(section, case, partial(dense, bench, section, case, shape))
    for name, shape in shapes.items():
        for count in tokens:
            for dtype in (FP32, BF16):
                case = f"{name} {text(shape)} {count} {name_of(dtype)}"
                bench.piece(
                    "gradients", case, partial(_on_tokens, bench, case, shape, count, dtype)
                )
    for name in ("vit_b_attention", "vit_b_mlp_up") if not bench.tiny else shapes:
        case = f"{name} {text(shapes[name])} {tokens[-1]} fp32 plain torch"
        work = partial(_plainly, bench, case, shapes[name], tokens[-1])
        bench.piece("gradients", case, work)


def _on_tokens(bench: Bench, case: str, shape: Shape, tokens: int, dtype: torch.dtype) -> None:
    found = ceilings(bench)
    t = Tokens(bench, shape, tokens, dtype)
    floor = t.floor(found, t.projections + t.inner)
    by_tokens(bench, "core_grad_tokens", case, t, floor)
    _, n1, n2, _ = shape
    floor = t.floor(found, t.base + t.projections, n1 * n2 * dtype.itemsize)
    layer(bench, "cur_linear", case, t, floor)
    choice(bench, "gradient_way", case, t)


def _plainly(bench: Bench, case: str, shape: Shape, tokens: int) -> None:
    plain(bench, "gradients", case, Tokens(bench, shape, tokens, FP32))
