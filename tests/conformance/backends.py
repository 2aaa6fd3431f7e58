"""The backends: how each is called, whether it is here, and what it is able to do.

A process runs some of them: Triton's interpreter is chosen when Triton is imported, and tensors are
on the CPU unless ``--device cuda`` says otherwise.
"""

import os
from dataclasses import dataclass, field, replace

import torch

from tcur_kernels.operators import contract, native

from .calls import call

HALVES = (torch.bfloat16, torch.float16)
SINGLE = (torch.float32, *HALVES)
ALL = (*SINGLE, torch.float64)

#: Operators on tokens, and those on all slices; what neither list has takes no factors.
ON_TOKENS = ("core_grad_tokens", "cur_linear", "w_eff_linear")
ON_SLICES = ("materialize", "materialize_out", "core_grad_dense")

#: Backends that take those cases alone that are meant for them: a GPU that is emulated and kernels
#: that are interpreted are slow, and instruction sets beside the best one differ in little.
EMULATED, INTERPRETER, BESIDE = "emulated", "interpreter", "beside"


@dataclass(frozen=True)
class Backend:
    """One way to run the operators.

    Attributes:
        languages: suffix of the operators at each precision; a precision that is absent has none.
        device: where its tensors are.
        isa: instruction set of the CPU that is forced.
        factors: dtypes of packed factors with cores of the same, fp32 and perhaps fp64.
        elements: dtypes of weights, tokens and results.
        narrow: operators that take factors in bf16; those on tokens do in every language.
        bf16_in_fp32: whether those on tokens also take factors that hold bf16 in fp32.
        longest: slices that a tube may have.
        few: `EMULATED`, `INTERPRETER` or `BESIDE`, which take the cases meant for them alone.
        sums_in_blocks: whether long sums keep their digits; plain torch is a yardstick, no promise.
        rounds: whether it rounds operands itself at a precision below fp32.
        bad_id: what becomes of a row whose id no core has: it is refused, or "nan".
        checks: the words of its refusals, "compiled", or "python" where `given` makes them.
        gradcheck: whether derivatives can be checked by differences, which needs fp64.
        traced: whether `torch.compile` sees one whole graph, and quickly enough for a test.
    """

    name: str
    languages: dict = field(hash=False)
    device: str = "cpu"
    isa: str | None = None
    factors: tuple = (torch.float32, torch.float64)
    elements: tuple = ALL
    narrow: tuple = ON_TOKENS
    bf16_in_fp32: bool = True
    longest: int | None = None
    few: str | None = None
    sums_in_blocks: bool = True
    rounds: bool = False
    bad_id: str = "refused"
    checks: str = "compiled"
    gradcheck: bool = True
    traced: bool = True

    def __str__(self):
        return self.name

    def place(self, value):
        """Tensors, and lists of them, where the backend has its own."""
        if isinstance(value, torch.Tensor):
            return value.to(self.device)
        if isinstance(value, (list, tuple)):
            return [self.place(each) for each in value]
        return value

    def run(self, name, /, precision="ieee", **given):
        """An operator on the backend's device; what it returns is there too."""
        given = {key: self.place(value) for key, value in given.items()}
        return call(name, self.languages[precision], **given)

    def run_case(self, case):
        """``run(operator, **arguments)`` at the precision of a case; writes buffers on the CPU."""

        def run(name, /, **given):
            if "out" not in given:
                return self.run(name, case.precision, **given)
            out = self.place(given["out"])
            assert self.run(name, case.precision, **{**given, "out": out}) is None
            if out is not given["out"]:
                given["out"].copy_(out)
            return None

        return run

    def lacks(self, case):
        """Why the backend cannot do a case, or None if it can."""
        if case.precision not in self.languages:
            return f"{case.precision} is no precision of it"
        if case.factors not in self.factors:
            return f"factors of {case.factors}"
        if not set(case.elements) <= set(self.elements):
            return f"elements of {case.elements}"
        if case.precision == "bf16" and case.operator not in self.narrow:
            return "factors in bf16"
        if case.get("bf16_operands") and not (self.bf16_in_fp32 and case.operator in ON_TOKENS):
            return "factors that hold bf16 in fp32"
        if self.longest is not None and case.n3 > self.longest:
            return f"{case.n3} slices"
        return None

    def takes(self, case):
        """Whether the suite runs a case here."""
        is_meant = not case.matrix if self.few is None else self.few in case.meant_for
        return is_meant and self.lacks(case) is None


PLAIN = Backend(
    "reference",
    {"ieee": "reference", "bf16": "reference"},
    narrow=(*ON_TOKENS, *ON_SLICES),
    sums_in_blocks=False,
    checks="python",
)
CPU = [Backend(f"cpu_{isa}", {"ieee": "", "bf16": ""}, isa=isa) for isa in native.compiled_isas()]
ON_GPU = {
    "factors": (torch.float32,),
    "narrow": (*ON_TOKENS, *ON_SLICES),
    "bad_id": "nan",
    "gradcheck": False,
}
CUDA = Backend(
    "cuda",
    {"ieee": "", "bf16": "", "tf32": contract.CUDA_TF32},
    device="cuda",
    elements=SINGLE,
    bf16_in_fp32=False,
    longest=2048,
    **ON_GPU,
)
#: The sources of the CUDA kernels, compiled for the host (`cuda_host`).
CUDAHOST = Backend(
    "cudahost",
    {"ieee": "cudahost", "bf16": "cudahost", "tf32": "cudahost_tf32"},
    elements=SINGLE,
    bf16_in_fp32=False,
    longest=2048,
    few=EMULATED,
    traced=False,
    **ON_GPU,
)
TRITON = Backend(
    "triton",
    {"ieee": "triton", "bf16": "triton", "tf32": "triton_tf32"},
    device="cuda",
    rounds=True,
    checks="python",
    **ON_GPU,
)
INTERPRETED = Backend(
    "triton_interpreted",
    TRITON.languages,
    few=INTERPRETER,
    rounds=True,
    checks="python",
    traced=False,
    **ON_GPU,
)
BACKENDS = {each.name: each for each in (PLAIN, *CPU, CUDA, CUDAHOST, TRITON, INTERPRETED)}

IS_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


def absence(backend):
    """Why a backend is not in this process, or None if it is; registers its operators if so."""
    if backend.name == INTERPRETED.name:
        return _absence_of_triton() if IS_INTERPRETER else "its process has TRITON_INTERPRET=1"
    if IS_INTERPRETER:
        return "this process has Triton's interpreter"
    if backend.isa is not None and backend.isa not in native.runnable_isas():
        return f"this processor has no {backend.isa}"
    if backend.device == "cuda":
        if not torch.cuda.is_available():
            return "torch sees no GPU here"
        if backend.name == CUDA.name:
            return native.cuda_absence(torch.device("cuda", 0))
        return _absence_of_triton()
    if backend.name == CUDAHOST.name:
        import cuda_host

        cuda_host.load()
    return None


def _absence_of_triton():
    try:
        import tcur_kernels.operators.triton  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def chosen(device="cpu", isa=None):
    """The backends that a session is asked to run, whether they are here or not.

    In the interpreter's process that is the interpreter alone. On a GPU there is the reference
    beside the kernels for it; on the CPU every instruction set, or the one of ``--isa``.
    """
    if IS_INTERPRETER:
        return [INTERPRETED]
    if device != "cpu":
        return [replace(PLAIN, device=device), CUDA, TRITON]
    if isa is not None:
        return [PLAIN, next(each for each in CPU if each.isa == isa)]
    best, *others = [each for each in CPU if each.isa in native.runnable_isas()]  # best first
    return [PLAIN, best, *(replace(each, few=BESIDE) for each in others), CUDAHOST]


def one_of_each_language(backends):
    """What does not depend on the instruction set is tested with the best one."""
    return [each for each in backends if each.few != BESIDE]
