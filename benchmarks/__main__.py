"""``python -m benchmarks``: time `materialize` on named cases and append the rows."""

from __future__ import annotations

import argparse

import torch

from . import materialize, rows


def main() -> None:
    """Runs the chosen cases, prints a table each, appends the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--case", choices=materialize.CASES, action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds per case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for case in args.case or materialize.CASES:
        shape = materialize.CASES[case]
        timings = materialize.measure(case, args.rounds)
        print(f"\nmaterialize {case} {shape}, fp32, {args.threads} threads")
        print(f"{'':14}{'median ms':>10}{'p20 .. p80':>18}{'/ stream':>10}")
        for name, t in timings.items():
            spread = f"{t.p20_ms:.2f} .. {t.p80_ms:.2f}"
            print(f"{name:14}{t.median_ms:10.2f}{spread:>18}{t.ratio:10.2f}")
        path = rows.append("materialize", case, shape, timings)
    print(f"\nrows appended to {path}")


main()
