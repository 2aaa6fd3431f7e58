"""What every backend is asked: operator, sizes and dtypes, stated once.

`CASES` are those whose values are compared with float64. Sizes are small, and there are many of
them: one number; ragged edges; one full tile and several; each form of a transform.
"""

import itertools
from dataclasses import dataclass

import torch

from cases import N3

from .backends import ALL, BESIDE, EMULATED, HALVES, INTERPRETER, SINGLE

#: Those of the backends with few cases that a case is meant for.
FAST, EMULATOR, INTERPRETED = (), (EMULATED,), (INTERPRETER,)
ALL_SLOW, EVERY_ISA, EVERYWHERE = (
    (EMULATED, INTERPRETER),
    (BESIDE,),
    (EMULATED, INTERPRETER, BESIDE),
)

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

#: Rows of a batch by the cores they name: often, out of order, not at all.
IDS = {"mixed": [3, 0, 3, 1, 0, 3], "one": [2], "same": [1, 1, 1, 1], "falling": [4, 3, 2, 1, 0]}
IDS["many"] = [row * row % 5 for row in range(64)]
ADAPTERS = 5


@dataclass(frozen=True)
class Case:
    """One call of one operator; what it is given is random, and the same for every backend.

    Attributes:
        shape: (n1, n2, rank).
        elements: dtypes of weights or tokens, and of the result where it is asked for.
        precision: "bf16" are factors in that dtype; "tf32" is a language.
        meant_for: the backends with few cases that take it.
        matrix: whether slow ones leave it to ``-m matrix``.
        how: pairs of names and values that the makers of arguments below understand.
    """

    operator: str
    n3: int
    shape: tuple
    factors: torch.dtype = F32
    elements: tuple = (F32,)
    precision: str = "ieee"
    meant_for: tuple = EMULATOR
    matrix: bool = False
    how: tuple = ()

    def __str__(self):
        parts = [self.operator, self.n3, "x".join(map(str, self.shape))]
        if self.precision != "ieee":
            parts.append(self.precision)
        if self.factors != F32:
            parts.append("factors-float64")
        if self.elements != (F32,):
            parts.append("-".join(str(each).removeprefix("torch.") for each in self.elements))
        parts += [f"{name}={value}" for name, value in self.how]
        return "-".join(map(str, parts)).replace(" ", "")

    def get(self, name, default=None):
        """One of ``how``."""
        return dict(self.how).get(name, default)

    @property
    def is_reduction(self):
        """Whether it adds up tokens, elements of a matrix or layers."""
        return self.operator.startswith("core_")


def case(operator, n3, shape, *, factors=F32, elements=(F32,), precision="ieee", meant_for=EMULATOR,
         matrix=False, **how):  # fmt: skip
    """A `Case` with the rest of its keywords in ``how``."""
    given = tuple((name, value) for name, value in how.items() if value is not None)
    return Case(operator, n3, shape, factors, elements, precision, meant_for, matrix, given)


#: (n1, n2, rank): one number; fewer rows than a tile and a ragged edge; full tiles; several; rows
#: that are no multiple of 16 bytes.
SHAPES = [
    ((1, 1, 1), EMULATOR),
    ((3, 5, 3), EMULATOR),
    ((17, 136, 8), EMULATOR),
    ((9, 45, 9), EMULATOR),
]
SHAPES += [((4, 64, 1), FAST), ((13, 150, 8), FAST), ((9, 515, 2), FAST)]
#: Lengths that meet every branch of the transforms on a CPU: no pair, one line, one codelet, two
#: with an odd and an even outer length, levels with full blocks of lines and a rest, even lengths
#: by levels.
LENGTHS = (1, 2, 3, 5, 8, 13, 45, 48, 94, 97)
#: Those of GPUs as adapters have them: (n3, shape).
STACKS = (
    (5, (6, 9, 2)),
    (48, (33, 70, 8)),
    (47, (20, 36, 8)),
    (128, (17, 40, 4)),
    (1, (40, 130, 8)),
    (12, (50, 60, 34)),
)
#: One length for each form and each parity; 66 makes two parts of a long tube. (n3, rank).
FORMS = [
    *[(n3, 3) for n3 in (1, 2, 3, 12, 47, 48)],
    *[(n3, rank) for n3 in (2, 12) for rank in (1, 8)],
    (5, 17),
    (66, 3),
]
MORE_FORMS = [
    *[(n3, rank) for n3 in (1, 3, 47, 48) for rank in (1, 8)],
    *[(n3, 3) for n3 in (4, 5, 16, 17, 64, 65, 130)],
]
#: The same for operators on tokens, and which of them are left to ``-m matrix``.
TOKEN_FORMS = [(n3, 3, False) for n3 in (1, 2, 3, 12, 47, 48)]
TOKEN_FORMS += [(4, rank, False) for rank in (1, 8, 17)]
TOKEN_FORMS += [(n3, rank, True) for n3 in (1, 2, 3, 12, 47, 48) for rank in (1, 8)]


def meant(backends, *dtypes):
    """fp64 is for the fast backends."""
    return FAST if F64 in dtypes else backends


def wide(*dtypes):
    """dtype of factors that go with elements of these."""
    return F64 if F64 in dtypes else F32


def w_eff_cases():
    """`materialize` as a tensor of its own."""
    name = "materialize"
    for n3, (shape, meant_for) in itertools.product(N3, SHAPES):
        yield case(name, n3, shape, meant_for=meant_for, weights="none")
    for is_matrix, forms in ((False, FORMS), (True, MORE_FORMS)):
        for n3, rank in forms:
            yield case(name, n3, (18, 35, rank), meant_for=INTERPRETED, matrix=is_matrix)
    for n3, shape in STACKS:
        for dtype, out in itertools.product((F32, BF16), SINGLE):
            yield case(name, n3, shape, elements=(dtype, out), meant_for=FAST)
    for weights, dtype, out in itertools.product(("stack", "layers"), ALL, ALL):
        for n3, n2 in ((12, 70), (12, 37), (12, 40), (17, 37), (17, 40)):
            if n2 == 70 or F64 not in (dtype, out):
                meant_for, factors = meant(EMULATOR, dtype, out), wide(dtype, out)
                elements = (dtype, out)
                shape = (6, n2, 3)
                yield case(
                    name,
                    n3,
                    shape,
                    factors=factors,
                    elements=elements,
                    meant_for=meant_for,
                    weights=weights,
                )
    for n3, dtype in itertools.product(LENGTHS, (F32, F64)):
        yield case(name, n3, (11, 150, 5), factors=dtype, elements=(dtype,), meant_for=EVERY_ISA)
    for n3, dtype, weights in itertools.product((3, 12, 17), HALVES, ("none", "stack", "layers")):
        for out in (dtype, F32):
            yield case(
                name, n3, (5, 20, 3), elements=(dtype, out), meant_for=ALL_SLOW, weights=weights
            )
    for n3, dtype in itertools.product((3, 12, 17), (F32, BF16)):
        yield case(name, n3, (16, 32, 3), elements=(dtype, F32), meant_for=ALL_SLOW, weights="odd")
    # Weights in fp64 with factors in fp32, which make an update in fp32.
    yield case(name, 5, (6, 9, 2), elements=(F64, F32), meant_for=ALL_SLOW)
    yield case(name, 5, (6, 9, 2), elements=(F32, F64), meant_for=ALL_SLOW)


def w_eff_in_place_cases():
    """`materialize_out`: whole stacks, and matrices of several slices side by side."""
    name = "materialize_out"
    for weights, dtype, out in itertools.product(("none", "stack", "layers"), SINGLE, SINGLE):
        for n3, n2 in ((5, 40), (17, 37)):
            if weights != "none" or dtype == F32:
                yield case(name, n3, (6, n2, 3), elements=(dtype, out), weights=weights)
    yield case(name, 5, (6, 40, 2), meant_for=ALL_SLOW)
    for n3, shape in itertools.product(N3[1:], ((1, 1, 1), (3, 5, 1), (13, 150, 1))):
        yield case(name, n3, shape, meant_for=FAST, weights="beside")
    for n3, shape in itertools.product((2, 3, 12, 17, 47, 48, 66), ((18, 35, 3), (3, 16, 3))):
        yield case(name, n3, shape, meant_for=INTERPRETED, weights="beside")
    for n3, dtype in itertools.product(LENGTHS[2:], (F32, F64)):
        yield case(
            name,
            n3,
            (11, 150, 5),
            factors=dtype,
            elements=(dtype,),
            meant_for=EVERY_ISA,
            weights="beside",
        )
    # Rows that are written past the caches, aligned for that and not; all slices in one matrix.
    yield case(name, 6, (130, 1408, 1), meant_for=FAST, weights="beside", counts=(3, 1, 2))
    yield case(name, 6, (130, 1400, 1), meant_for=FAST, weights="beside", counts=(2, 3, 1))
    yield case(name, 12, (5, 70, 1), meant_for=FAST, weights="beside", counts=(12,))
    for dtype, out in itertools.product(ALL, ALL):
        for n3, n2 in ((12, 70), (12, 37), (12, 40), (17, 37), (17, 40)):
            if n2 == 70 or F64 not in (dtype, out):
                meant_for, factors = meant(EMULATOR, dtype, out), wide(dtype, out)
                yield case(
                    name,
                    n3,
                    (6, n2, 3),
                    factors=factors,
                    elements=(dtype, out),
                    meant_for=meant_for,
                    weights="beside",
                )
    for n3, dtype in itertools.product((3, 12, 17), HALVES):
        for out in (dtype, F32):
            yield case(
                name, n3, (5, 20, 3), elements=(dtype, out), meant_for=ALL_SLOW, weights="beside"
            )
    for n3, shape in STACKS:
        for dtype, out in itertools.product((F32, BF16), (F32, BF16)):
            yield case(name, n3, shape, elements=(dtype, out), meant_for=FAST, weights="beside")


def dense_gradient_cases():
    """`core_grad_dense`."""
    name = "core_grad_dense"
    for n3, (shape, meant_for) in itertools.product(N3, SHAPES):
        yield case(name, n3, shape, meant_for=meant_for)
    for is_matrix, forms in ((False, FORMS), (True, MORE_FORMS)):
        for n3, rank in forms:
            yield case(name, n3, (18, 35, rank), meant_for=INTERPRETED, matrix=is_matrix)
    for n3, shape in STACKS:
        yield case(name, n3, shape, meant_for=FAST)
    for n3, dtype in itertools.product(LENGTHS, (F32, F64)):
        yield case(name, n3, (11, 150, 5), factors=dtype, elements=(dtype,), meant_for=EVERY_ISA)
    for n3 in (3, 17):
        yield case(name, n3, (3, 530, 2), meant_for=INTERPRETED)  # several spans
    yield case(name, 12, (36, 40, 34), meant_for=INTERPRETED)  # more ranks than one product takes
    for n3, dtype in itertools.product((12, 17), SINGLE):
        yield case(name, n3, (6, 70, 3), elements=(dtype,))
    yield case(name, 12, (6, 70, 3), factors=F64, elements=(F64,), meant_for=FAST)
    for dtype in (*HALVES, F64):
        yield case(name, 5, (6, 20, 3), elements=(dtype,), meant_for=ALL_SLOW)
    for n3 in (3, 12):
        yield case(name, n3, (300, 700, 2), meant_for=FAST)  # long sums
        yield case(name, n3, (300, 700, 2), meant_for=FAST, mean=3.0)


def token_gradient_cases():
    """`core_grad_tokens`, by one core."""
    name = "core_grad_tokens"
    amounts = (((1,), 1), ((3, 5), 3), ((600,), 2), ((0,), 1))
    for n3, (tokens, slices), packed in itertools.product(N3, amounts, (False, True)):
        slices = min(slices, n3)
        yield case(
            name,
            n3,
            (6, 9, 3),
            tokens=tokens,
            slices=slices,
            first=(n3 - slices) // 2,
            packed=packed,
        )
    for (n3, rank, is_matrix), packed in itertools.product(TOKEN_FORMS, (False, True)):
        slices = min(2, n3)
        yield case(
            name,
            n3,
            (20, 19, rank),
            meant_for=ALL_SLOW,
            matrix=is_matrix,
            tokens=(2, 35),
            slices=slices,
            first=n3 - slices,
            packed=packed,
        )
    for (n3, shape), packed in itertools.product(STACKS, (False, True)):
        slices = min(2, n3)
        yield case(
            name,
            n3,
            shape,
            meant_for=FAST,
            tokens=(300,),
            slices=slices,
            first=n3 - slices,
            packed=packed,
        )
    for (tokens, slices), packed in itertools.product(((0, 1), (1, 3), (600, 2)), (False, True)):
        yield case(
            name, 3, (6, 9, 2), meant_for=ALL_SLOW, tokens=(tokens,), slices=slices, packed=packed
        )
    for n3, rank, way in itertools.product((1, 2, 7, 12), (1, 3, 8), ("z", "dense")):
        yield case(name, n3, (10, 9, rank), tokens=(70,), first=n3 - 1, way=way)
    for n3, rank, way in itertools.product((1, 12), (1, 8, 34), ("z", "dense")):
        yield case(name, n3, (40, 36, rank), tokens=(70,), first=n3 - 1, way=way)
    for way in ("z", "dense"):
        yield case(name, 5, (10, 9, 3), meant_for=ALL_SLOW, tokens=(70,), first=4, way=way)
    # z and p of more tokens than blocks take at a time, and no multiple, by factors of ones.
    for n3, rank, dtype in itertools.product((1, 2, 12, 48), (1, 3, 8, 34), (F32, BF16)):
        rank, slices = min(rank, 400 // n3), min(n3, 2)
        yield case(
            name,
            n3,
            (rank, rank, rank),
            elements=(dtype,),
            tokens=(333,),
            slices=slices,
            first=n3 - slices,
            way="ones",
        )
    for n3, dtype in itertools.product((1, 12, 47), SINGLE):
        yield case(name, n3, (40, 50, 8), elements=(dtype,), tokens=(70,), first=n3 - 1)
    for n3 in LENGTHS:
        for dtype, packed in itertools.product((F32, F64), (False, True)):
            yield case(
                name,
                n3,
                (11, 150, 5),
                factors=dtype,
                elements=(dtype,),
                meant_for=EVERY_ISA,
                tokens=(70,),
                first=n3 - 1,
                packed=packed,
            )
    yield case(name, 5, (6, 9, 2), elements=(F64,), meant_for=ALL_SLOW, tokens=(7,), first=1)
    # Long sums; numbers of one sign, whose partial sums grow as the tokens do.
    for mean, packed in itertools.product((0.0, 3.0), (False, True)):
        yield case(name, 12, (8, 8, 8), tokens=(5000,), first=5, packed=packed, mean=mean)
        yield case(name, 5, (6, 9, 3), meant_for=FAST, tokens=(50_000,), packed=packed, mean=mean)
    yield case(name, 3, (6, 9, 2), meant_for=ALL_SLOW, tokens=(2500,), mean=3.0)


def packed_cases():
    """`core_of_packed`: layers whose gradients are added up."""
    name = "core_of_packed"
    for n3, count, rank in itertools.product((*N3, 127, 600), (0, 1, 48), (1, 3, 8)):
        for precision in ("ieee", "tf32"):
            yield case(name, n3, (rank, rank, rank), precision=precision, count=count)
    for n3, count in itertools.product(N3, (0, 1, 48)):
        yield case(name, n3, (3, 3, 3), factors=F64, elements=(F64,), meant_for=FAST, count=count)
    for (n3, rank, is_matrix), count in itertools.product(TOKEN_FORMS, (0, 1, 48)):
        yield case(name, n3, (rank, rank, rank), meant_for=ALL_SLOW, matrix=is_matrix, count=count)
    for n3, dtype in itertools.product(LENGTHS, (F32, F64)):
        yield case(
            name, n3, (5, 5, 5), factors=dtype, elements=(dtype,), meant_for=EVERY_ISA, count=3
        )
    for n3, (_, _, rank) in STACKS:
        yield case(name, n3, (rank, rank, rank), meant_for=FAST, count=48)
    yield case(name, 12, (3, 3, 3), count=3000, mean=3.0)


def linear_cases():
    """`cur_linear`, by one core."""
    name = "cur_linear"
    for n3, rank, turned, slices in itertools.product(N3, (1, 3, 8), (False, True), (1, 3)):
        slices = min(slices, n3)
        for weight in (True, False):
            meant_for = EMULATOR if rank == 3 else FAST
            yield case(
                name,
                n3,
                (10, 9, rank),
                meant_for=meant_for,
                tokens=(2, 70),
                slices=slices,
                first=n3 - slices,
                transposed=turned,
                weight=weight,
                bias=weight and not turned,
            )
    for (n3, rank, is_matrix), turned in itertools.product(TOKEN_FORMS, (False, True)):
        slices = min(2, n3) if turned or n3 < 47 else 1
        yield case(
            name,
            n3,
            (20, 19, rank),
            meant_for=ALL_SLOW,
            matrix=is_matrix,
            tokens=(2, 20),
            slices=slices,
            first=n3 - slices,
            transposed=turned,
            bias=not turned,
        )
    for turned in (False, True):
        yield case(
            name,
            3,
            (20, 19, 3),
            meant_for=ALL_SLOW,
            tokens=(2, 50),
            first=2,
            transposed=turned,
            weight=False,
        )
    for leading, turned in itertools.product(((), (0,), (2, 0), (1,)), (False, True)):
        yield case(
            name, 4, (6, 9, 2), meant_for=ALL_SLOW, tokens=leading, first=1, transposed=turned
        )
    for dtype in (BF16, torch.float16, F64):
        yield case(
            name,
            12,
            (6, 20, 3),
            factors=wide(dtype),
            elements=(dtype,),
            meant_for=meant(EMULATOR, dtype),
            tokens=(40,),
            first=3,
        )
        yield case(
            name, 5, (6, 20, 3), elements=(dtype,), meant_for=ALL_SLOW, tokens=(40,), first=3
        )
    for n3, dtype in itertools.product((1, 12, 47), SINGLE):
        yield case(name, n3, (40, 50, 8), elements=(dtype,), tokens=(70,), first=n3 - 1)
    for n3, rank, turned in itertools.product((1, 2, 12, 48), (1, 3, 8, 34), (False, True)):
        rank, slices = min(rank, 400 // n3), min(n3, 2)
        yield case(
            name,
            n3,
            (rank, rank, rank),
            tokens=(333,),
            slices=slices,
            first=n3 - slices,
            transposed=turned,
            weight=False,
            way="ones",
        )
    for dtype in SINGLE:  # outputs of no multiple of four numbers
        yield case(name, 4, (37, 40, 3), elements=(dtype,), tokens=(71,), first=2)
    yield case(name, 5, (6, 20, 3), meant_for=ALL_SLOW, tokens=(40,), first=3, z=True)
    for n3, shape in STACKS:
        for dtype in (F32, BF16):
            yield case(
                name, n3, shape, elements=(dtype,), meant_for=FAST, tokens=(3, 5), first=n3 - 1
            )
    for n3, dtype in itertools.product(LENGTHS, (F32, F64)):
        yield case(
            name,
            n3,
            (11, 150, 5),
            factors=dtype,
            elements=(dtype,),
            meant_for=EVERY_ISA,
            tokens=(70,),
            first=n3 - 1,
            weight=False,
        )
    for turned in (False, True):
        yield case(
            "w_eff_linear",
            4,
            (6, 9, 2),
            meant_for=ALL_SLOW,
            tokens=(5,),
            first=1,
            transposed=turned,
            bias=not turned,
        )


def many_cores_cases():
    """A core per row of tokens."""
    for n3, turned, slices in itertools.product(N3, (False, True), (1, 3)):
        slices = min(slices, n3)
        yield case(
            "cur_linear",
            n3,
            (10, 9, 3),
            tokens=(6, 7),
            slices=slices,
            first=n3 - slices,
            transposed=turned,
            bias=not turned,
            ids="mixed",
        )
    for n3, ids, length in itertools.product(N3, ("mixed", "one", "same", "falling"), (1, 5, 300)):
        slices = min(2, n3)
        for way in ("x", "z"):
            yield case(
                "core_grad_tokens",
                n3,
                (6, 9, 3),
                meant_for=FAST,
                way=way,
                slices=slices,
                tokens=(len(IDS[ids]), length),
                first=n3 - slices,
                ids=ids,
            )
    for slices, turned in itertools.product((1, 2), (False, True)):
        yield case(
            "cur_linear",
            5,
            (6, 9, 3),
            meant_for=ALL_SLOW,
            tokens=(5, 40),
            slices=slices,
            first=1,
            transposed=turned,
            ids="falling",
        )
        yield case(
            "core_grad_tokens",
            5,
            (6, 9, 3),
            meant_for=ALL_SLOW,
            tokens=(6, 40),
            slices=slices,
            first=1,
            ids="mixed",
        )
    for turned in (False, True):  # fewer rows than cores and more
        for ids in ("one", "mixed"):
            yield case(
                "cur_linear",
                12,
                (10, 9, 3),
                tokens=(len(IDS[ids]), 5),
                slices=2,
                first=4,
                transposed=turned,
                weight=False,
                ids=ids,
            )
    yield case(
        "cur_linear",
        12,
        (11, 40, 5),
        meant_for=EVERY_ISA,
        tokens=(64, 9),
        first=7,
        weight=False,
        ids="many",
    )
    yield case(
        "core_grad_tokens",
        12,
        (11, 40, 5),
        meant_for=EVERY_ISA,
        tokens=(64, 9),
        first=7,
        ids="many",
    )
    for ids in ("one", "mixed"):
        yield case(
            "core_grad_tokens",
            12,
            (10, 9, 3),
            tokens=(len(IDS[ids]), 5),
            slices=2,
            first=4,
            ids=ids,
        )
    for n3, shape in STACKS:
        yield case("cur_linear", n3, shape, meant_for=FAST, tokens=(6, 5), ids="mixed")
    for name in ("cur_linear", "core_grad_tokens"):  # no rows
        yield case(name, 5, (6, 9, 3), meant_for=ALL_SLOW, tokens=(0, 7), first=1, ids="none")


def precision_cases():
    """Arithmetic with rounded operands, which keeps the promise of its precision."""
    for precision in ("tf32", "bf16"):
        for n3 in (1, 12, 17, 2, 3, 47, 48):
            is_matrix = n3 not in (1, 12, 17)
            how = {"precision": precision, "meant_for": ALL_SLOW, "matrix": is_matrix}
            yield case("materialize", n3, (24, 34, 8), weights="none", **how)
            yield case("core_grad_dense", n3, (24, 34, 8), **how)
            yield case("core_grad_tokens", n3, (24, 34, 8), tokens=(100,), first=n3 - 1, **how)
            yield case(
                "cur_linear", n3, (24, 34, 8), tokens=(100,), first=n3 - 1, weight=False, **how
            )
        for n3, rank in itertools.product((1, 12, 47), (3, 9, 33)):
            for name in ("materialize", "materialize_out"):
                yield case(name, n3, (34, 36, rank), precision=precision, weights="none")
            yield case("core_grad_dense", n3, (34, 36, rank), precision=precision)
        for n3, shape in STACKS:
            yield case(
                "materialize", n3, shape, precision=precision, meant_for=FAST, weights="none"
            )
    for n3 in (1, 12, 47):
        yield case(
            "cur_linear",
            n3,
            (40, 50, 8),
            precision="bf16",
            tokens=(300,),
            first=n3 - 1,
            weight=False,
        )
        for tokens, dtype in itertools.product((70, 300), SINGLE):
            yield case(
                "core_grad_tokens",
                n3,
                (40, 50, 8),
                elements=(dtype,),
                precision="bf16",
                tokens=(tokens,),
                first=n3 - 1,
            )
    for dtype in SINGLE:
        yield case(
            "cur_linear", 4, (37, 40, 3), elements=(dtype,), precision="bf16", tokens=(71,), first=2
        )
    for n3, rank, turned in itertools.product((1, 2, 12, 48), (1, 3, 8, 34), (False, True)):
        rank, slices = min(rank, 400 // n3), min(n3, 2)
        yield case(
            "cur_linear",
            n3,
            (rank, rank, rank),
            elements=(BF16,),
            precision="bf16",
            tokens=(333,),
            slices=slices,
            first=n3 - slices,
            transposed=turned,
            weight=False,
            way="ones",
        )


CASES = list(
    dict.fromkeys(
        itertools.chain(
            w_eff_cases(),
            w_eff_in_place_cases(),
            dense_gradient_cases(),
            token_gradient_cases(),
            packed_cases(),
            linear_cases(),
            many_cores_cases(),
            precision_cases(),
        )
    )
)
