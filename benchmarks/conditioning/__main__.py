"""``python -m benchmarks.conditioning``: which basis, rule and learning rate cores learn best with.

``compare`` gives every method the same search for a learning rate, on validation data, and then
trains it with more seeds. ``sweep`` trains cores over ranks and rates. Both append a row for each
training and leave out what is recorded already. ``report`` writes the tables and the plot from the
rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..comparison.tasks.base import Sources
from . import report
from .experiment import NAMES, Experiment, compare, sweep


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conditioning", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report")
    for name in ("compare", "sweep"):
        run = commands.add_parser(name)
        run.add_argument("--task", choices=NAMES, nargs="+", default=list(NAMES))
        run.add_argument("--methods", nargs="+", help="default: all of the task")
        run.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
        run.add_argument("--threads", type=int, default=1)
        run.add_argument("--encoder", type=Path, help="default: of the package")
        run.add_argument("--wordnet", type=Path, default=Sources.wordnet)
    args = parser.parse_args()
    if args.command == "report":
        print(*report.write(), sep="\n")
        return
    torch.set_num_threads(args.threads)
    what = compare if args.command == "compare" else sweep
    for name in args.task:
        sources = Sources(encoder=args.encoder, wordnet=args.wordnet)
        what(Experiment(name, sources), args.methods, tuple(args.part))


main()
