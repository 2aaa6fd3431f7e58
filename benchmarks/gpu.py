"""``python -m benchmarks.gpu --out DIR``: all that is to be known of the kernels on a GPU.

One command for a machine with a GPU, within nine minutes, with nothing to install: builds the
compiled libraries if they are missing, measures the copy rate and the rates of matrix products,
runs the tests on the device for every GPU backend, runs a small set under ``compute-sanitizer``
where that works, then times every operator, training steps, a captured step and many adapters in
one batch. Rows are in ``DIR/rows.csv`` as soon as they exist, logs beside them; the last thing
printed is a short table. ``--device cpu --tiny`` is the same command as a dry run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from .gpu_build import build

SECONDS = 510  # of the nine minutes; the rest is for what is running when they end


def main() -> None:
    """Reads the command line and runs all sections, each whatever became of the others."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for rows and logs")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: a dry run")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: expected a device that is here, got cuda without a GPU")
    if args.tiny:
        torch.set_num_threads(1)  # there is nothing to share
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    build(args.out / "build.log", device)

    # Only now: these import the package, and with it the libraries.
    from . import gpu_checks, gpu_clock, gpu_models, gpu_operators

    seconds = SECONDS - (time.monotonic() - started)
    clock = gpu_clock.Clock(device, seconds, 3 if args.tiny else 20)
    rows = gpu_clock.Rows(args.out / "rows.csv", device)
    bench = gpu_clock.Bench(clock, rows, args.tiny)
    sections = {
        "rates": lambda: gpu_checks.rates(bench),
        "tests": lambda: gpu_checks.tests(bench, args.out),
        "sanitizer": lambda: gpu_checks.sanitizer(bench, args.out),
        "operators": lambda: gpu_operators.run(bench),
        "training": lambda: gpu_models.training(bench),
        "capture": lambda: gpu_models.capture(bench),
        "serving": lambda: gpu_models.serving(bench),
        "sweep": lambda: gpu_operators.sweep(bench),
    }
    for name, section in sections.items():
        try:
            section()
        except Exception as error:  # what a section could not do is a row; the next ones go on
            first = str(error).strip().splitlines()
            note = f"FAILED: {type(error).__name__}: {first[0] if first else ''}"
            rows.add(gpu_clock.Row(name, "", "", note=note))
    print(f"\nms (% of copy)\n{gpu_clock.table(rows.all)}")
    failed = [row for row in rows.all if row.note.startswith(("FAILED", "WRONG"))]
    print(f"\n{time.monotonic() - started:.0f} s, {len(rows.all)} rows, {len(failed)} failed")
    for row in failed:
        print(gpu_clock.show(row))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
