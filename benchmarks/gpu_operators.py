"""Checks `materialize` and times it beside a copy of the same shape and dtypes, and plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import tcur_kernels as tcur
from tcur_kernels.operators import reference

from .baselines import S1, S2, eager
from .gpu_bench import Bench
from .gpu_clock import Contender, Run

Shape = tuple[int, int, int, int]

#: name -> (n3, n1, n2, rank); the large ones represent projections of a whole language model.
SHAPES: dict[str, Shape] = {
    "vit_b_attention": (48, 768, 768, 8),
    "vit_b_mlp_up": (12, 3072, 768, 8),
    "vit_b_mlp_down": (12, 768, 3072, 8),
    "llama_8b_k_v": (64, 1024, 4096, 8),
    "llama_8b_q_o": (64, 4096, 4096, 8),
    "square_128": (128, 4096, 4096, 8),
    "wide_64": (64, 4096, 11008, 8),
}
TINY: Shape = (6, 20, 24, 2)
VIT_B = ("vit_b_attention", "vit_b_mlp_up", "vit_b_mlp_down")
SWEEP: list[Shape] = [(n3, 768, 768, 8) for n3 in (1, 2, 4, 47, 96, 127)]
SWEEP += [(n3, 2048, 2048, rank) for n3 in (12, 48, 64, 128) for rank in (4, 8, 16, 32)]
#: Relative error of an update above which a kernel is wrong, in fp32 and with 16-bit dtypes.
LIMIT, NARROW_LIMIT = 1e-5, 2e-2
FP32, BF16 = torch.float32, torch.bfloat16
#: dtypes of the base and of the result.
DTYPES = ((FP32, FP32), (FP32, BF16), (BF16, BF16))
#: If a stack has more bytes, its layers are views of it, to save memory.
SEPARATE = 2**31


def backends(device: torch.device) -> list[str]:
    """The backends of this package to compare on a device."""
    if device.type == "cuda":
        return ["cuda", "triton"]
    return ["cpu" if "cpu" in tcur.build_info()["backends"] else "reference", "triton"]


def why_absent(backend: str, device: torch.device) -> str | None:
    """Why a backend is not available, or None if it is; runs nothing."""
    info = tcur.build_info()
    if backend in info["backends"]:
        return None
    return str(info.get(backend, {}).get("error", f"it does not run on {device.type} here"))


def name_of(dtype: torch.dtype) -> str:
    """fp32 or bf16."""
    return {FP32: "fp32", BF16: "bf16"}[dtype]


def text(shape: Sequence[int]) -> str:
    """Sizes as they are written in a row."""
    return "x".join(map(str, shape))


@dataclass
class Data:
    """One random stack on a device."""

    weight: Tensor
    lateral: Tensor
    horizontal: Tensor
    core: Tensor

    @staticmethod
    def make(shape: Shape, device: torch.device) -> Data:
        """Makes normal numbers, scaled so that the update is about as large as the weight."""
        n3, n1, n2, rank = shape
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device) / rank**0.5

        return Data(
            normal(n3, n1, n2), normal(n3, n1, rank), normal(n3, rank, n2), normal(n3, rank, rank)
        )

    @property
    def factors(self) -> tcur.CURFactors:
        """The frozen factors."""
        return tcur.CURFactors(self.lateral, self.horizontal)

    @property
    def spectra(self) -> tuple[Tensor, Tensor]:
        """Half spectra of C and R."""
        return reference.half_spectrum(self.lateral), reference.half_spectrum(self.horizontal)

    def exact_update(self, rows: Tensor) -> Tensor:
        """Some rows of C*U*R, in float64."""
        lateral = self.lateral[:, rows].double()
        return tcur.t_product(tcur.t_product(lateral, self.core.double()), self.horizontal.double())


class Checked:
    """A check of W_eff: some rows are compared with float64, and all numbers must be finite."""

    def __init__(self, data: Data, limit: float) -> None:
        n1 = data.weight.shape[1]
        self.rows = torch.arange(0, n1, max(1, n1 // 7), device=data.weight.device)
        self.exact, self.limit = data.exact_update(self.rows), limit

    def __call__(self, run: Callable[[], object], weight: Tensor, out: Tensor) -> str | None:
        """What is wrong with ``out`` after ``run``, or None."""
        out.fill_(float("nan"))
        run()
        update = out[:, self.rows].double() - weight[:, self.rows].double()
        error = float((update - self.exact).norm() / self.exact.norm())
        if not error < self.limit:
            return f"relative error {error:.2g}"
        return None if bool(torch.isfinite(out.sum(dtype=FP32))) else "not all of it is finite"


def materialize(
    bench: Bench, section: str, case: str, shape: Shape, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Times W_eff of a stack and of its layers with every backend, beside a copy."""
    base, narrow = dtypes
    data = Data.make(shape, bench.device)
    factors, core = data.factors, data.core
    stacked = data.weight.to(base)
    count = bench.clock.sets(stacked.numel() * (base.itemsize + narrow.itemsize))
    stacks = [stacked, *(stacked.clone() for _ in range(count - 1))]
    outs = [torch.empty_like(stacked, dtype=narrow) for _ in stacks]
    is_large = stacked.nbytes > SEPARATE
    layers = [
        list(stack.unbind()) if is_large else [w.clone() for w in stack.unbind()]
        for stack in stacks
    ]
    checked = Checked(data, LIMIT if dtypes == (FP32, FP32) else NARROW_LIMIT)

    def copies() -> list[Run]:
        return [partial(o.copy_, w) for w, o in zip(stacks, outs, strict=True)]

    def ours(weights: Sequence[Tensor | list[Tensor]], backend: str) -> list[Run]:
        return [
            partial(tcur.materialize, w, factors, core, out=o, backend=backend)
            for w, o in zip(weights, outs, strict=True)
        ]

    contenders = [Contender("copy", "torch", copies)]
    for backend in backends(bench.device):
        absent = why_absent(backend, bench.device)
        for form, weights in (("stack", stacks), ("layers", layers)):
            make = partial(ours, weights, backend)

            def check(make: Callable[[], list[Run]] = make) -> str | None:
                return checked(make()[0], stacked, outs[0])

            contenders.append(Contender(form, backend, make, check=check, absent=absent))
    bench.race(section, case, contenders)


Update = Callable[[Tensor], Tensor]


def baselines(bench: Bench, section: str, case: str, shape: Shape, narrow: torch.dtype) -> None:
    """Times plain torch, launched, beside the same copy; its allocations may not fit."""
    data = Data.make(shape, bench.device)
    out = torch.empty_like(data.weight, dtype=narrow)
    checked = Checked(data, 1e-4 if narrow == FP32 else NARROW_LIMIT)
    made: dict[str, Update] = {}

    def make_eager(function: Callable[..., Tensor] = eager) -> Update:
        spectra = data.spectra
        return lambda core: function(data.weight, *spectra, core)

    makers: dict[str, Callable[[], Update]] = {
        "eager": make_eager,
        "compile": lambda: make_eager(compiled(bench, eager)),
        "S1": lambda: S1(data.weight, *data.spectra),
        "S2": lambda: S2(data.weight, *data.spectra),
    }

    def runs(name: str) -> list[Run]:
        made[name] = makers[name]()
        return [lambda: made[name](data.core).to(narrow)]

    def check(name: str) -> str | None:
        return checked(lambda: out.copy_(made[name](data.core)), data.weight, out)

    contenders = [Contender("copy", "torch", lambda: [partial(out.copy_, data.weight)])]
    contenders += [
        Contender(name, "torch", partial(runs, name), "launched", check=partial(check, name))
        for name in makers
    ]
    bench.race(section, case, contenders)


def compiled(bench: Bench, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiles with ``torch.compile``; a dry run only traces, since only that could break."""
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager" if bench.tiny else "inductor")


def run(bench: Bench) -> None:
    """Times W_eff at the shapes of whole models: our kernels first, then the baselines."""
    shapes = {"tiny": TINY} if bench.tiny else SHAPES
    section = "materialize"
    for name, shape in shapes.items():
        for dtypes in DTYPES if name in VIT_B else DTYPES[:2]:
            case = f"{name} {text(shape)} {'->'.join(map(name_of, dtypes))}"
            bench.piece(section, case, partial(materialize, bench, section, case, shape, dtypes))
    for narrow in (FP32, BF16):
        for name in [*VIT_B, "llama_8b_k_v"] if not bench.tiny else shapes:
            case = f"{name} {text(shapes[name])} fp32->{name_of(narrow)} plain torch"
            work = partial(baselines, bench, section, case, shapes[name], narrow)
            bench.piece(section, case, work)


def sweep(bench: Bench) -> None:
    """Times W_eff for many lengths n3 and ranks."""
    section = "sweep"
    for shape in [(1, 8, 8, 4), (12, 8, 8, 8)] if bench.tiny else SWEEP:
        case = f"{text(shape)} fp32->fp32"
        bench.piece(section, case, partial(materialize, bench, section, case, shape, DTYPES[0]))
