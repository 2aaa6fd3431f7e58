"""``python -m benchmarks.comparison``: every method on every task, by the same search and seeds.

``run`` trains what is not recorded yet, and appends a row for each training: interrupt it when you
like, the same command goes on. ``report`` writes tables and plots from the rows. ``pictures`` draws
what some methods find in volumes.

Without options of data, the tasks are the repository's own. Each takes a user's data and model in
their place; then the rows go to a file of the user's (``--rows``).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

import torch

from . import pictures, records, report
from .experiment import PARTS, Plan, Run, names_of_methods
from .methods import FEW
from .tasks import TASKS
from .tasks.base import BadDataError, Sources

QUICK_ROWS = Path("runs/comparison/quick.csv")


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line; errors of the user end it with one line."""
    args = parse_args(arguments)
    torch.set_num_threads(1)
    try:
        if args.command != "run" and args.output is None and args.rows != records.FILE:
            raise ValueError(f"--output: expected a folder beside --rows {args.rows}, got none")
        if args.command == "report":
            print(*report.write(args.rows, args.output), sep="\n")
        elif args.command == "pictures":
            plan, rows = plan_of(args), records.read(args.rows)
            print(*pictures.draw(plan, rows, args.output or report.PLOTS), sep="\n")
        else:
            run(args)
    except (BadDataError, records.RowsError, ValueError) as error:
        raise SystemExit(f"{error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on") from None


def plan_of(args: argparse.Namespace) -> Plan:
    """What a command line asks for."""
    names = [field.name for field in fields(Sources)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    own = [name for task in args.tasks for name in TASKS[task].own if name in given]
    for name in own:
        if isinstance(given[name], Path) and not given[name].exists():
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: expected a file or a folder, got {given[name]}: none")
    if own and args.rows == records.FILE:
        option = own[0].replace("_", "-")
        raise ValueError(f"--rows: expected a file of your own beside --{option}, got none")
    kept = {"parts": args.parts} if args.command == "run" else {}
    kept |= {"seeds": (0, 1), "start": (0,), "most": 1} if args.quick else {}
    kept |= {} if args.sizes is None else {"sizes": args.sizes}
    kept |= {} if args.seeds is None else {"seeds": tuple(range(args.seeds))}
    methods = names_of_methods(args.methods)
    at_sizes = methods if args.methods else FEW
    return Plan(Sources(**given), args.tasks, methods, at_sizes, **kept)


def run(args: argparse.Namespace) -> None:
    """Trains."""
    plan = plan_of(args)
    with records.writing(args.rows) as rows:
        made = Run(plan, rows, args.rows, args.jobs)
        made.all()
    if made.failed:
        raise ValueError("some trainings did not end:\n" + "\n".join(made.failed))
    print(f"all rows are in {args.rows}", file=sys.stderr)


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("report", help="write tables and plots from the rows")
    train = commands.add_parser("run", help="train what is not recorded yet")
    drawn = commands.add_parser("pictures", help="draw the best, the median and the worst volume")
    train.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    train.add_argument("--jobs", type=int, default=2, help="trainings at once, one thread each")
    for command in (train, drawn):
        command.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
        usual = "default: all at the size of the search, a few at other sizes"
        command.add_argument("--methods", nargs="+", help=usual)
        command.add_argument("--seeds", type=int, help="how many; default: 5")
        command.add_argument("--sizes", type=int, nargs="+", help="of the training sets")
        command.add_argument("--quick", action="store_true", help="a few steps of everything")
        for field in fields(Sources):
            if field.name != "quick":
                kind = str if field.name == "volume_options" else Path
                command.add_argument(f"--{field.name.replace('_', '-')}", type=kind)
    for command in (shown, drawn):
        command.add_argument(
            "--output", type=Path, help="a folder; default: the repository's documents"
        )
    for command in (shown, train, drawn):
        command.add_argument("--rows", type=Path, help=f"default: {records.FILE.name}")
    args = parser.parse_args(arguments)
    for name in ("seeds", "jobs", "sizes"):
        value = getattr(args, name, None)
        numbers = value if isinstance(value, list) else [1 if value is None else value]
        if min(numbers) < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    if args.rows is None:
        args.rows = QUICK_ROWS if getattr(args, "quick", False) else records.FILE
    return args


if __name__ == "__main__":
    main()
