"""``python -m benchmarks.cpu_count``: counts, and appends a row for each case and setting.

It needs objdump, a C++ compiler and a processor that runs the instruction sets. ``python -m
benchmarks report`` writes the table.
"""

from __future__ import annotations

import argparse

from benchmarks.commit import commit

from . import cases, report


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_count", description=__doc__)
    parser.add_argument("--case", action="append", help='as "48x768x768x8"; default: all')
    parser.add_argument(
        "--setting", type=int, action="append", help="number in cases.SETTINGS; default: all"
    )
    args = parser.parse_args()
    loaded = commit()
    for number, setting in enumerate(cases.SETTINGS):
        if args.setting and number not in args.setting:
            continue
        for shape in cases.SHAPES:
            key = report.key_of(shape, *setting)
            if args.case and key["case"] not in args.case:
                continue
            counted = cases.count(shape, *setting)
            report.append(key, loaded, counted)
            print(*key.values(), *(f"{n}={v:.3g}" for n, v in counted.items()), flush=True)


main()
