"""Calls at every precision, most of them with rounded operands."""

import itertools

import torch

from .backends import SINGLE
from .cases import ALL_SLOW, BF16, EVERYWHERE, F32, FAST, STACKS, case


def precision_cases():
    """Arithmetic with rounded operands, which keeps the promise of its precision."""
    for precision in ("ieee", "tf32", "bf16"):
        for n3 in (1, 12, 17, 2, 3, 47, 48):
            is_matrix = n3 not in (1, 12)
            how = {"precision": precision, "meant_for": ALL_SLOW, "matrix": is_matrix}
            yield case("materialize", n3, (24, 34, 8), weights="none", **how)
            yield case("core_grad_dense", n3, (24, 34, 8), **how)
            yield case("core_grad_tokens", n3, (24, 34, 8), tokens=(100,), first=n3 - 1, **how)
            yield case(
                "cur_linear", n3, (24, 34, 8), tokens=(100,), first=n3 - 1, weight=False, **how
            )
    for precision in ("tf32", "bf16"):
        for n3, rank in itertools.product((1, 12, 47), (3, 9, 33)):
            for name in ("materialize", "materialize_out"):
                yield case(name, n3, (34, 36, rank), precision=precision, weights="none")
            yield case("core_grad_dense", n3, (34, 36, rank), precision=precision)
        for n3, shape in STACKS:
            yield case(
                "materialize", n3, shape, precision=precision, meant_for=FAST, weights="none"
            )
    for n3, tokens in itertools.product((1, 12, 47), (70, 300)):
        for dtype, weight in ((F32, True), (BF16, True), (torch.float16, True), (F32, False)):
            yield case(
                "cur_linear",
                n3,
                (40, 50, 8),
                elements=(dtype,),
                precision="bf16",
                tokens=(tokens,),
                first=n3 - 1,
                weight=weight,
            )
        for dtype in SINGLE:
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
    yield from held_in_fp32_cases()
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


def held_in_fp32_cases():
    """What a processor without units for bf16 is given: factors that hold bf16 in fp32."""
    how = {"precision": "bf16", "bf16_operands": True, "tokens": (70,)}
    for n3, dtype in itertools.product((1, 12, 47), SINGLE):
        where = {"elements": (dtype,), "first": n3 - 1, **how}
        for turned, weight in itertools.product((False, True), repeat=2):
            yield case("cur_linear", n3, (40, 50, 8), transposed=turned, weight=weight, **where)
        yield case("core_grad_tokens", n3, (40, 50, 8), **where)
    several = {"slices": 2, "first": 1, "meant_for": EVERYWHERE, **how}
    yield case("cur_linear", 4, (37, 40, 3), **several)
    yield case("core_grad_tokens", 4, (37, 40, 3), **several)
    for way in ("z", "dense"):
        yield case("core_grad_tokens", 4, (37, 40, 3), way=way, first=2, **how)
    ids = {**how, "tokens": (6, 11), "ids": "mixed", "first": 2}
    yield case("cur_linear", 4, (37, 40, 3), **ids)
    yield case("core_grad_tokens", 4, (37, 40, 3), **ids)
    yield case("w_eff_linear", 4, (37, 40, 3), first=2, **how)
