"""``python -m benchmarks``: time an operator or a step on named cases and append the rows."""

from __future__ import annotations

import argparse
import warnings

import torch

from . import materialize, rows, step

OPERATIONS = {"materialize": materialize, "step": step}


def main() -> None:
    """Runs the chosen cases, prints a table each, appends the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--op", choices=OPERATIONS, action="append", help="default: all")
    parser.add_argument("--case", action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds per case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # From inside of torch.compile, which says so of the complex tensors of the baselines.
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")
    chosen = args.op or list(OPERATIONS)
    known = {case for op in chosen for case in OPERATIONS[op].CASES}
    for case in args.case or []:
        if case not in known:
            parser.error(f"--case: expected one of {', '.join(sorted(known))}, got {case}")
    for op in chosen:
        module = OPERATIONS[op]
        for case, description in module.CASES.items():
            if args.case and case not in args.case:
                continue
            timings = module.measure(case, args.rounds)
            print(f"\n{op} {case} {description}, {args.threads} threads")
            print(f"{'':14}{'median ms':>10}{'p20 .. p80':>18}{'/ ' + module.YARDSTICK:>10}")
            for name, t in timings.items():
                spread = f"{t.p20_ms:.2f} .. {t.p80_ms:.2f}"
                print(f"{name:14}{t.median_ms:10.2f}{spread:>18}{t.ratio:10.2f}")
            print(f"row appended to {rows.append(op, case, description, timings)}")


main()
