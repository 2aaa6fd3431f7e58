"""``python -m benchmarks``: ``run`` measures named cases; ``report`` writes tables and plots."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping

import torch

from tcur_kernels.operators import native

from . import (
    cast,
    cost_rule,
    materialize,
    memory,
    neighbour,
    overhead,
    packed,
    ranks,
    report,
    rows,
    scaling,
    selection,
    selection_memory,
    serving,
    small,
    step,
    store,
    store_memory,
)
from .memory import Peak
from .timing import Timing

OPERATIONS = {
    "materialize": materialize,
    "scaling": scaling,
    "cast": cast,
    "step": step,
    "small": small,
    "memory": memory,
    "neighbour": neighbour,
    "overhead": overhead,
    "serving": serving,
    "packed": packed,
    "ranks": ranks,
    "store": store,
    "store_memory": store_memory,
    "selection": selection,
    "selection_memory": selection_memory,
    "cost_rule": cost_rule,
}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="write tables and plots from the rows")
    run = commands.add_parser("run", help="time the chosen cases and append the rows")
    run.add_argument("--op", choices=OPERATIONS, action="append", help="default: all")
    known = [case for module in OPERATIONS.values() for case in module.CASES]
    run.add_argument("--case", choices=known, action="append", help="default: all")
    run.add_argument("--rounds", type=int, default=9, help="interleaved rounds per case")
    run.add_argument("--quick", action="store_true", help="two rounds, nothing appended")
    isas = native.cpu_facts().get("isa_runnable", [])
    run.add_argument("--isa", choices=isas, help="our kernels' instruction set; default: the best")
    run.add_argument("--cache", type=int, metavar="KIB", help="size tiles for such an L2 cache")
    run.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.command == "report":
        print(*report.write(), sep="\n")
    else:
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Runs the chosen cases and prints a table for each."""
    torch.set_num_threads(args.threads)
    native.force(args.isa, args.cache and 1024 * args.cache)
    # torch.compile warns about the complex tensors of the baselines.
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")
    for op in args.op or OPERATIONS:
        module = OPERATIONS[op]
        for case, description in module.CASES.items():
            if args.case and case not in args.case:
                continue
            measured = module.measure(case, 2 if args.quick else args.rounds)
            print(f"\n{op} {case} {description}, {args.threads} threads")
            show(measured, module.YARDSTICK)
            if not args.quick:
                is_forced = args.isa is not None or args.cache is not None
                path = rows.append(op, case, description, measured, is_forced)
                print(f"rows appended to {path.name}")


def show(measured: Mapping[str, Timing | Peak], yardstick: str) -> None:
    """Prints one case."""
    print(f"{'':22}{'':>10}{'p20 .. p80':>18}{'/ ' + yardstick:>10}")
    for name, result in measured.items():
        if isinstance(result, Timing):
            value, spread = (
                f"{result.median_ms:.2f} ms",
                f"{result.p20_ms:.2f} .. {result.p80_ms:.2f}",
            )
        else:
            value, spread = f"{result.peak_mb:.0f} MB", ""
        print(f"{name:20}{value:>12}{spread:>18}{result.ratio:10.2f}")


main()
