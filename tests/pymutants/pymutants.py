"""Breaks Triton's kernels, or the Python around the operators, and asks whether the suite notices.

    python tests/pymutants/pymutants.py --language triton [--count N] [--seed S] [--only I]
    python tests/pymutants/pymutants.py --language python [--count N] [--seed S] [--only I]

Triton's mutants are a table (`triton_table`). Those of Python are made by the mutation operators of
cosmic-ray (`python_mutants`), of which ``--count`` are drawn: some of each function. The last line
says how many were noticed, by module. Mutants that change nothing which anybody could rely on are
in `equivalent.csv`, with the reason. It exits with 1 if another one was not noticed.
"""

import argparse
import collections
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parent
sys.path[:0] = [str(HERE), str(TESTS), str(TESTS.parent)]

#: What notices a broken kernel: interpreted, and quick enough to be run hundreds of times.
OF_TRITON = ["conformance/test_values.py", "conformance/test_inputs.py"]
OF_TRITON += ["conformance/test_buffers.py", "conformance/test_contract.py"]
OF_TRITON += ["interpreted", "test_triton.py", "-k"]
OF_TRITON += ["not opcheck and not autocast and not graph and not a_broken and not interpreter"]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language", choices=("triton", "python"), required=True)
    parser.add_argument("--count", type=int, help="how many; default: all, 400 of Python")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="numbers, as they are printed")
    parser.add_argument("--modules", nargs="+", help="of these modules alone, operators/checks")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests for a mutant")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--map", type=Path, help="file that keeps which tests reach which lines")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, help="in place of those chosen here")
    return parser.parse_args()


def main():
    given = arguments()
    if given.language == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import pytest

    from equivalent import reason_for
    from forking import CAUGHT, HUNG, NONE, SURVIVED, UNREACHED, Forks

    if given.language == "triton":
        import triton_mutants as source

        tests = OF_TRITON
    else:
        import python_mutants as source

        tests = source.TESTS
    mutants = list(enumerate(source.mutants()))
    if given.modules:
        mutants = [each for each in mutants if each[1].module in given.modules]
    if given.only:
        mutants = [each for each in mutants if each[0] in given.only]
    else:
        count = given.count or (400 if given.language == "python" else len(mutants))
        mutants = drawn(mutants, count, given.seed)
    start, verdicts = None, collections.defaultdict(collections.Counter)

    def report(number, mutant, verdict, test):
        if verdict == NONE:
            return
        reason = reason_for(mutant) if verdict in (SURVIVED, UNREACHED) else None
        verdict = "equivalent" if reason else verdict
        verdicts[mutant.module][verdict] += 1
        if verdict not in (CAUGHT, "equivalent"):
            print(f"{verdict:10} {mutants[number][0]:5} {mutant}", flush=True)
        elif given.only:
            print(f"{verdict:10} {mutants[number][0]:5} {mutant} by {test or reason}", flush=True)
        elif number % 50 == 49:
            print(f"{number + 1} of {len(mutants)}, {time.time() - start:.0f} s", flush=True)

    def is_late():
        nonlocal start
        start = start or time.time()  # the map comes before the first of them
        return given.minutes is not None and time.time() - start > 60 * given.minutes

    with tempfile.TemporaryDirectory() as folder:
        forks = Forks(
            [mutant for _, mutant in mutants], source.files(), folder, given.budget, given.map,
            report, is_late,
        )  # fmt: skip
        os.chdir(TESTS)
        quiet = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header"]
        code = pytest.main([*quiet, *(given.tests or tests)], plugins=[forks])
    total = sum(verdicts.values(), collections.Counter())
    caught, tried = total[CAUGHT] + total[HUNG], sum(total.values())
    survived = total[SURVIVED] + total[UNREACHED]
    result = {
        "kind": "mutants",
        "language": given.language.capitalize(),
        "tried": tried,
        "caught": caught,
        "equivalent": total["equivalent"],
        "survived": survived,
        "unreached": total[UNREACHED],
        "hung": total[HUNG],
        "seed": given.seed,
        "modules": {module: dict(counts) for module, counts in sorted(verdicts.items())},
    }
    print("RESULT " + json.dumps(result), flush=True)
    sys.exit(1 if survived or code not in (0, 5) else 0)


def drawn(mutants, count, seed):
    """So many of them, in their order: one of each function first, then any."""
    if count >= len(mutants):
        return mutants
    generator = random.Random(seed)
    mixed = generator.sample(mutants, len(mutants))
    by_function = collections.defaultdict(list)
    for each in mixed:
        by_function[each[1].module, each[1].function].append(each)
    first = [each[0] for each in by_function.values()]
    numbers = {number for number, _ in first}
    rest = [each for each in mixed if each[0] not in numbers]
    return sorted([*first, *rest][:count], key=lambda each: each[0])


if __name__ == "__main__":
    main()
