"""``python -m benchmarks.sass``: counts what a GPU would execute. No GPU is needed.

``count`` counts named cases and appends the rows; ``triton`` does so for Triton's kernels;
``report`` writes the tables of the documents; ``hot`` prints the instructions of a main kernel and
how often a warp issues each.
"""

from __future__ import annotations

import argparse

from .. import commit, documents
from . import count, report, rows, triton_rows
from .cases import CASES, Case

ARCHITECTURES = ("sm_90", "sm_100")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sass", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    counted = commands.add_parser("count", help="count cases and append the rows")
    counted.add_argument("--case", action="append", help="part of the names; default: all")
    counted.add_argument("--architecture", action="append", help="as sm_90; default: both")
    counted.add_argument(
        "--spread",
        type=int,
        default=count.SPREAD,
        help="blocks to execute of a launch whose blocks differ",
    )
    counted.add_argument("--commit", help="of the sources in csrc, where it is another one")
    ours = commands.add_parser("triton", help="count Triton's kernels and append the rows")
    ours.add_argument("--case", action="append", help="part of the names; default: all")
    commands.add_parser("report", help="write the tables of the documents")
    hot = commands.add_parser("hot", help="print how often instructions are issued")
    hot.add_argument("case", help="part of the name of a case; the first that has it")
    hot.add_argument("--architecture", default=ARCHITECTURES[0])
    args = parser.parse_args()
    if args.command == "report":
        tables = report.tables(rows.read()) | {"sass_triton": triton_rows.comparison()}
        print(*documents.fill(tables, report.DOCUMENTS), sep="\n")
    elif args.command == "triton":
        count_triton(args.case or [""])
    elif args.command == "hot":
        print_hot(named([args.case])[0], args.architecture)
    else:
        for case in named(args.case or [""]):
            for architecture in args.architecture or ARCHITECTURES:
                found = count.of_case(case, architecture, args.spread)
                rows.append(rows.of_case(case, found, args.commit or commit.commit()))
                show(case, architecture, found)


def count_triton(parts: list[str]) -> None:
    """Counts what Triton launches for the cases whose names have one of these parts."""
    for name, elements, launches in triton_rows.cases():
        if any(part in name for part in parts):
            own = triton_rows.of_call(name, elements, launches, commit.commit())
            rows.append([own], triton_rows.PATH, triton_rows.FIELDS)
            print(name, own["total"], own["factor_bytes"], flush=True)


def named(parts: list[str]) -> list[Case]:
    """The cases whose names have one of these parts.

    Raises:
        SystemExit: there is none.
    """
    found = [case for case in CASES if any(part in case.name for part in parts)]
    if not found:
        names = "\n".join(case.name for case in CASES)
        raise SystemExit(f"expected a part of one of these names, got {parts}:\n{names}")
    return found


def show(case: Case, architecture: str, found: list[count.Counted]) -> None:
    """Prints one case."""
    print(f"{case.name}, {architecture}")
    for one in found:
        row = one.row(case)
        print(f"  {row['kernel']}: {one.instructions} warp instructions, {row['total']} a number")


def print_hot(case: Case, architecture: str) -> None:
    """Prints the instructions of the main kernel and how often a warp issues each on average."""
    one = count.main_of(count.of_case(case, architecture))
    warps = one.launch.blocks * -(-one.launch.threads // 32)
    for instruction in one.kernel.code:
        times = one.issued.instructions[instruction.address] / warps
        guard = f"@{instruction.guard} " if instruction.guard else ""
        text = f"{guard}{instruction.opcode} {', '.join(instruction.operands)}"
        print(f"{instruction.address:6x} {times:10.2f} {instruction.kind:10} {text}")


if __name__ == "__main__":
    main()
