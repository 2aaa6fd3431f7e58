"""What every backend is asked: operator, sizes and dtypes, stated once.

`table.CASES` are those whose values are compared with float64. Sizes are small, and there are many
of them: one number; ragged edges; one full tile and several; each form of a transform.
"""

from dataclasses import dataclass

import torch

from .backends import BESIDE, EMULATED, INTERPRETER

#: Those of the backends with few cases that a case is meant for.
FAST, EMULATOR, INTERPRETED = (), (EMULATED,), (INTERPRETER,)
ALL_SLOW, EVERY_ISA, EVERYWHERE = (
    (EMULATED, INTERPRETER),
    (BESIDE,),
    (EMULATED, INTERPRETER, BESIDE),
)

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

#: Rows of a batch by the cores they name: often, out of order, not at all; fewer cores than rows,
#: and more.
IDS = {"mixed": [3, 0, 3, 1, 0, 3], "one": [2], "same": [1, 1, 1, 1], "falling": [4, 3, 2, 1, 0]}
IDS |= {"three": [2, 0, 2], "fewer": [2, 0, 2, 1], "more": [5, 6, 0, 5]}
IDS["many"] = [row * row % 40 for row in range(64)]
#: Cores of a batch where a case does not say how many.
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
    *[(n3, 3) for n3 in (1, 2, 3, 12, 47)],
    *[(n3, rank) for n3 in (2, 12) for rank in (1, 8)],
    (5, 17),
    (66, 3),
]
MORE_FORMS = [
    *[(n3, rank) for n3 in (1, 3, 47, 48) for rank in (1, 8)],
    *[(n3, 3) for n3 in (4, 5, 16, 17, 48, 64, 65, 130)],
]
#: The same for operators on tokens, and which of them are left to ``-m matrix``.
TOKEN_FORMS = [(n3, 3, n3 == 47) for n3 in (1, 2, 3, 12, 47, 48)]
TOKEN_FORMS += [(4, rank, False) for rank in (1, 8, 17)]
TOKEN_FORMS += [(n3, rank, True) for n3 in (1, 2, 3, 12, 47, 48) for rank in (1, 8)]


def meant(backends, *dtypes):
    """fp64 is for the fast backends."""
    return FAST if F64 in dtypes else backends


def wide(*dtypes):
    """dtype of factors that go with elements of these."""
    return F64 if F64 in dtypes else F32
