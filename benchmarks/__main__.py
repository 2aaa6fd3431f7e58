"""``python -m benchmarks run``: time named cases, append rows. ``report``: write the tables."""

from __future__ import annotations

import argparse
import warnings

import torch

from . import cost_rule, materialize, report, rows, step

OPERATIONS = {"materialize": materialize, "step": step, "cost_rule": cost_rule}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="write the tables of the documents from the rows")
    run = commands.add_parser("run", help="time the chosen cases and append the rows")
    run.add_argument("--op", choices=OPERATIONS, action="append", help="default: all")
    known = [case for module in OPERATIONS.values() for case in module.CASES]
    run.add_argument("--case", choices=known, action="append", help="default: all")
    run.add_argument("--rounds", type=int, default=9, help="interleaved rounds per case")
    run.add_argument("--quick", action="store_true", help="two rounds, nothing appended")
    run.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.command == "report":
        print(*report.write(), sep="\n")
    else:
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Runs the chosen cases and prints a table each."""
    torch.set_num_threads(args.threads)
    # From inside of torch.compile, which says so of the complex tensors of the baselines.
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")
    for op in args.op or OPERATIONS:
        module = OPERATIONS[op]
        for case, description in module.CASES.items():
            if args.case and case not in args.case:
                continue
            timings = module.measure(case, 2 if args.quick else args.rounds)
            print(f"\n{op} {case} {description}, {args.threads} threads")
            print(f"{'':22}{'median ms':>10}{'p20 .. p80':>18}{'/ ' + module.YARDSTICK:>10}")
            for name, t in timings.items():
                spread = f"{t.p20_ms:.2f} .. {t.p80_ms:.2f}"
                print(f"{name:22}{t.median_ms:10.2f}{spread:>18}{t.ratio:10.2f}")
            if not args.quick:
                print(f"row appended to {rows.append(op, case, description, timings).name}")


main()
