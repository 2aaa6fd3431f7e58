"""Drives every operator of the CPU library over awkward sizes; `tests/sanitizers.py` starts it.

    drive.py memory FOLDER          every case of the conformance suite, every instruction set
    drive.py threads FOLDER         fewer cases, by several threads of Python at a time

FOLDER holds the package with the library that is looked at. The last line says how many calls there
were. Results are not compared with float64, which the conformance suite does with the package's own
library. They are compared with one another: threads of Python beside others get the same bits.
"""

import argparse
import itertools
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import tcur_kernels
from conformance.backends import BESIDE, CPU
from conformance.cases import BF16, F32, F64, case
from conformance.data import arguments, compute
from conformance.table import CASES
from conformance.test_inputs import LAID_OUT, every_second, laid_out, shifted, turned
from tcur_kernels.operators import native

F16 = torch.float16
#: Slices: one, two, primes, more than any kernel has a form of its own for.
SLICES = (1, 2, 3, 31, 127, 257, 2049)
#: (n1, n2, rank): one number, primes, a tail after a full vector of each instruction set.
SHAPES = ((1, 1, 1), (7, 11, 1), (31, 17, 5), (33, 65, 2))
#: Dtypes of factors and of elements.
DTYPES = ((F32, F32), (F32, BF16), (F32, F16), (F64, F64))
TOKENS = ((0,), (1,), (67,), (3, 5))
AT_ONCE = 4  # threads of Python


def awkward(is_quick):
    """Cases beside those of the conformance suite."""
    sizes = (SLICES[-2:], SHAPES[:2], DTYPES[:2]) if is_quick else (SLICES, SHAPES, DTYPES)
    for n3, shape, (factors, element) in itertools.product(*sizes):
        if n3 > 1000 and shape[0] > 7:
            continue
        how = {"factors": factors, "elements": (element,)}
        for weights in ("none", "stack", "layers", "odd"):
            yield case("materialize", n3, shape, weights=weights, **how)
        yield case("materialize_out", n3, shape, weights="beside", **how)
        yield case("core_grad_dense", n3, shape, **how)
        if element == factors:
            yield case("core_of_packed", n3, shape, count=2, **how)
        for tokens in TOKENS[: 2 if n3 > 1000 else None]:
            slices = min(2, n3)
            how |= {"tokens": tokens, "slices": slices, "first": n3 - slices}
            for packed in (False, True):
                yield case("core_grad_tokens", n3, shape, packed=packed, **how)
            for turn, weight in itertools.product((False, True), repeat=2):
                yield case("cur_linear", n3, shape, transposed=turn, weight=weight, **how)
        if n3 < 1000:
            how |= {"tokens": (6, 2), "ids": "mixed"}
            yield case("core_grad_tokens", n3, shape, **how)
            for turn in (False, True):
                yield case("cur_linear", n3, shape, transposed=turn, weight=False, **how)


def kept(cases):
    """Those that the CPU library takes."""
    return [each for each in dict.fromkeys(cases) if CPU[0].lacks(each) is None]


def result(one, given):
    """What the library makes of a case."""
    return compute(one, CPU[0].run_case(one), given)


def same(a, b):
    """Whether two results have the same bits; what is no number equals itself."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(tensor):
    """The numbers as bytes."""
    return tensor.contiguous().flatten().view(torch.uint8)


def in_turn(cases):
    """Every case by one thread of torch and by three, every layout by three; returns the calls."""
    calls = 0
    for one in cases:
        given = arguments(one)[0]
        for threads in (1, 3):
            torch.set_num_threads(threads)
            result(one, given)
            calls += 1
        if BESIDE in one.meant_for or one in LAID_OUT:
            for layout in (turned, every_second, shifted):
                result(one, laid_out(given, layout))
                calls += 1
    return calls


def at_once(cases):
    """Every case by several threads of Python at a time, each in another order.

    They begin together, when no plan is made and no instruction set is chosen yet.
    """
    torch.set_num_threads(1)  # those of torch's own operators, which nobody looks into
    start = threading.Barrier(AT_ONCE)
    given = {one: arguments(one)[0] for one in cases}

    def run(seed):
        order = random.Random(seed).sample(cases, len(cases))
        if seed == 0:
            order = cases  # with all others at least once in the same order
        start.wait()
        return {one: result(one, given[one]) for one in order}

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(run, range(AT_ONCE)))
    for one in cases:
        alone = result(one, given[one])
        assert all(same(each[one], alone) for each in found), f"{one}: other bits beside others"
    return len(cases) * (AT_ONCE + 1)


def main():
    """Says how many calls there were, and by which instruction sets."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=["memory", "threads"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--few", action="store_true", help="what a planted fault is seen by")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    options = parser.parse_args()
    where = Path(tcur_kernels.__file__)
    assert options.folder in where.parents, f"expected the package of {options.folder}, got {where}"
    assert native.cpu_error() is None, native.cpu_error()

    whole = [each for each in CASES if not each.matrix]
    reaching = [each for each in CASES if BESIDE in each.meant_for]
    sets, calls = native.cpu_facts()["isa_runnable"], 0
    if options.few:
        sets = sets[:1]
    for isa in sets:
        if isa != native.cpu_facts()["isa_chosen"]:
            native.force(isa=isa)
        torch.manual_seed(0)
        if options.kind == "threads":
            calls += at_once(kept(reaching))
        elif options.few:
            calls += in_turn(kept(reaching))
        else:
            suite = reaching if options.quick else whole
            calls += in_turn(kept([*suite, *LAID_OUT, *awkward(options.quick)]))
    print(f"calls {calls} of {', '.join(sets)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
