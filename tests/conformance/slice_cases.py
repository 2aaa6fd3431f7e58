"""Calls of the operators on all slices: W_eff, and the gradient of a core from that of W_eff."""

import itertools

from cases import N3

from .backends import ALL, HALVES, SINGLE
from .cases import (
    ALL_SLOW,
    BF16,
    EMULATOR,
    EVERY_ISA,
    F32,
    F64,
    FAST,
    FORMS,
    INTERPRETED,
    LENGTHS,
    MORE_FORMS,
    SHAPES,
    STACKS,
    case,
    meant,
    wide,
)


def w_eff_cases():
    """`materialize` as a tensor of its own."""
    name = "materialize"
    for n3, (shape, meant_for) in itertools.product(N3, SHAPES):
        yield case(name, n3, shape, meant_for=meant_for, weights="none")
    for is_matrix, forms in ((False, FORMS), (True, MORE_FORMS)):
        for n3, rank in forms:  # long ones are among those of `materialize_out`
            is_left = is_matrix or n3 > 48
            yield case(name, n3, (18, 35, rank), meant_for=INTERPRETED, matrix=is_left)
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
    # A last tile of slices with one in it; more rows than a program of the first step takes.
    yield case(name, 65, (3, 5, 1), meant_for=INTERPRETED, weights="none")
    # A rank for which a program takes one tile, and its roots as they are.
    yield case(name, 18, (18, 35, 9), meant_for=INTERPRETED)
    yield case(name, 5, (70, 5, 2), meant_for=INTERPRETED)
    # Weights in fp64 with factors in fp32, which make an update in fp32.
    yield case(name, 5, (6, 9, 2), elements=(F64, F32), meant_for=ALL_SLOW)
    yield case(name, 5, (6, 9, 2), elements=(F32, F64), meant_for=ALL_SLOW)


def w_eff_in_place_cases():
    """`materialize_out`: whole stacks, and matrices of several slices side by side."""
    name = "materialize_out"
    for weights, dtype, out in itertools.product(("stack", "layers"), SINGLE, SINGLE):
        for n3, n2 in itertools.product((12, 17), (37, 40)):
            yield case(name, n3, (6, n2, 3), elements=(dtype, out), weights=weights)
    yield case(name, 5, (6, 40, 3), weights="none")
    yield case(name, 5, (6, 40, 2), meant_for=ALL_SLOW)
    for n3, shape in itertools.product(N3[1:], ((1, 1, 1), (3, 5, 1), (13, 150, 1))):
        yield case(name, n3, shape, meant_for=FAST, weights="beside")
    for n3, shape in itertools.product((2, 3, 12, 17, 47, 48, 66), ((18, 35, 3), (3, 16, 3))):
        is_left = n3 >= 47 and shape[0] > 3
        yield case(name, n3, shape, meant_for=INTERPRETED, matrix=is_left, weights="beside")
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
    yield case(name, 6, (130, 1402, 1), meant_for=FAST, weights="beside", counts=(1, 1, 4))
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
                    counts=(3, 1, 2, 3, 3) if n2 == 70 else None,
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
    for rank in (9, 17):
        yield case(name, 3, (18, 35, rank), meant_for=INTERPRETED)  # the same for few slices
    yield case(name, 5, (3, 5, 1), meant_for=INTERPRETED)  # fewer rows of R̂ than a program reads
    yield case(name, 32, (3, 5, 1), meant_for=INTERPRETED)  # a last tile of slices with one in it
    for n3, dtype in itertools.product((12, 17), SINGLE):
        yield case(name, n3, (6, 70, 3), elements=(dtype,))
    yield case(name, 12, (6, 70, 3), factors=F64, elements=(F64,), meant_for=FAST)
    yield case(name, 2, (802, 20, 2), meant_for=FAST)  # several tiles for each task, and a rest
    for dtype in (*HALVES, F64):
        yield case(name, 5, (6, 20, 3), elements=(dtype,), meant_for=ALL_SLOW)
    for n3 in (3, 12):
        yield case(name, n3, (300, 700, 2), meant_for=FAST)  # long sums
        yield case(name, n3, (300, 700, 2), meant_for=FAST, mean=3.0)
