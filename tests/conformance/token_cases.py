"""Calls of the operators on tokens, by one core and by many, and of what ends packed gradients."""

import itertools

import torch

from cases import N3

from .backends import SINGLE
from .cases import (
    ALL_SLOW,
    BF16,
    EMULATOR,
    EVERY_ISA,
    F32,
    F64,
    FAST,
    IDS,
    LENGTHS,
    STACKS,
    TOKEN_FORMS,
    case,
    meant,
    wide,
)


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
            matrix=is_matrix or (n3 == 48 and not packed),
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
    # More tiles than one block takes.
    yield case(name, 2, (68, 70, 68), tokens=(5,), first=1)


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
        amounts = [((2, 70), FAST)] + ([((2, 35), EMULATOR)] if rank == 3 else [])
        for weight, (tokens, meant_for) in itertools.product((True, False), amounts):
            yield case(
                name,
                n3,
                (10, 9, rank),
                meant_for=meant_for,
                tokens=tokens,
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
            matrix=is_matrix or (n3 == 48 and turned),
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
    yield case(
        name, 3, (6, 9, 2), elements=(BF16,), meant_for=ALL_SLOW, tokens=(4,), first=1, weight=False
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
    for n3 in (1, 12, 47):
        yield case(name, n3, (40, 50, 8), tokens=(70,), first=n3 - 1, weight=False)
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
    for turned in (False, True):  # more rows than cores and fewer
        for ids, adapters in (("fewer", 3), ("more", 7)):
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
                adapters=adapters,
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
        adapters=40,
    )
    yield case(
        "core_grad_tokens",
        12,
        (11, 40, 5),
        meant_for=EVERY_ISA,
        tokens=(64, 9),
        first=7,
        ids="many",
        adapters=40,
    )
    for ids, adapters in (("fewer", 3), ("more", 7)):
        yield case(
            "core_grad_tokens",
            12,
            (10, 9, 3),
            tokens=(len(IDS[ids]), 5),
            slices=2,
            first=4,
            ids=ids,
            adapters=adapters,
        )
    for n3, shape in STACKS:
        yield case("cur_linear", n3, shape, meant_for=FAST, tokens=(6, 5), ids="mixed")
    for name in ("cur_linear", "core_grad_tokens"):  # no rows
        yield case(name, 5, (6, 9, 3), meant_for=ALL_SLOW, tokens=(0, 7), first=1, ids="none")
