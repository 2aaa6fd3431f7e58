"""``python -m benchmarks.gpu --out DIR``: measures and tests the kernels on a GPU.

One command for a machine with a GPU; nothing need be installed. It first builds the compiled
libraries if they are missing. Then it runs sections (``--section`` chooses them): ceilings of the
device, every operator beside a copy or its floor, the kernels of the operators, training steps,
serving, a whole UNETR, tests, sanitizers.

Every section runs in its own process. If a section breaks, it is restarted after the piece of work
that broke it. Rows are appended to ``DIR/rows.csv`` as soon as they exist, with logs beside it. At
the end a short table and the failures are printed. ``--device cpu --tiny`` makes a dry run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from tcur_kernels.files.whole import replacing

from .commit import ROOT, commit
from .gpu_bench import Bench, DeviceLost
from .gpu_build import last_line
from .gpu_clock import Clock, first_line
from .gpu_progress import Progress
from .gpu_rows import Row, Rows, facts, read, shortened, show, table

SECONDS = 510.0  # of the ten minutes for which a machine is lent; the rest is for its start
GRACE = 15.0  # seconds for work that still runs at a deadline
STUCK = 90.0  # a process hangs if one piece of work, or its start, takes more seconds
RESTARTS = 6  # of a section, at most
LOST = 77  # exit status of a process whose device accepts no more calls


@dataclass(frozen=True)
class Section:
    """A function of a module, and its limits in seconds."""

    module: str
    function: str
    seconds: float
    files: str | None = None  # its second argument, as a path in the folder for logs
    stuck: float = STUCK


SECTIONS = {
    "rates": Section("benchmarks.gpu_ceilings", "run", 40),
    "materialize": Section("benchmarks.gpu_operators", "run", 120),
    "kernels": Section("benchmarks.gpu_kernels", "run", 150, files=".", stuck=170),
    "gradients": Section("benchmarks.gpu_gradients", "run", 120),
    "step": Section("benchmarks.gpu_models", "training", 120),
    "tests": Section("benchmarks.gpu_checks", "tests", 200, files=".", stuck=200),
    "sanitizer": Section("benchmarks.gpu_checks", "sanitizer", 140, files=".", stuck=200),
    "serving": Section("benchmarks.gpu_models", "serving", 40),
    "unetr": Section("benchmarks.gpu_unetr", "run", 120),
    "sweep": Section("benchmarks.gpu_operators", "sweep", 100),
}
BUILD = Section("benchmarks.gpu_build", "run", 220, files="build.log", stuck=300)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for rows and logs")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: a dry run")
    names = ", ".join(SECTIONS)
    parser.add_argument(
        "--section",
        nargs="+",
        choices=SECTIONS,
        metavar="NAME",
        default=list(SECTIONS),
        help=f"in this order; of {names}; default: all",
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument("--commit", help="where there is no git: what rows are to name")
    # Runs a section in this process: its name, module, function and perhaps files.
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    return args


def run_section(args: argparse.Namespace) -> None:
    """Runs a section in this process; an exception becomes a row."""
    device = torch.device(args.device)
    if args.tiny:
        torch.set_num_threads(1)  # the work is too small to share
    name, module, function, *files = args.child
    rows = Rows(args.out / "rows.csv", facts(device, args.commit))
    bench = Bench(Clock(device, args.until, args.tiny), rows, Progress(args.progress))
    try:
        # Imported late, because this imports the package and with it the libraries.
        run = getattr(importlib.import_module(module), function)
        run(bench, *(args.out / file for file in files))
    except DeviceLost as error:
        print(f"{name}: no more calls of the device: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(LOST)  # without cleanup, which would need the device
    except Exception as error:
        rows.add(Row(name, "", "", note=f"FAILED: {first_line(error)}"))
        traceback.print_exc()


class Driver:
    """Runs sections as processes and watches them."""

    def __init__(self, args: argparse.Namespace, rows: Rows, until: float) -> None:
        self.args, self.rows, self.until = args, rows, until

    def run(self, name: str, section: Section, folder: Path) -> None:
        """Runs one section, restarting it after each break, until it ends or its time is over."""
        if self.until - time.time() < 5:
            self.rows.add(Row(name, "", "", note="left out: no time"))
            return
        until = min(self.until, time.time() + section.seconds)
        path = folder / f"{name}.progress"
        for _ in range(RESTARTS):
            before = Progress(path).count()
            ended = self._process(name, section, path, until)
            if ended == "":
                return
            progress = Progress(path)
            if ended != "lost":  # in that case the process has already added a row
                where = progress.latest().removeprefix(f"{name} ")
                self.rows.add(Row(name, where, "", note=f"FAILED: {ended}"))
            if progress.count() == before or until - time.time() < 15:
                return

    def _process(self, name: str, section: Section, progress: Path, until: float) -> str:
        """Runs one process of a section; returns "" or how it failed."""
        command = [sys.executable, "-m", "benchmarks.gpu"]
        command += ["--child", name, section.module, section.function]
        command += [] if section.files is None else [section.files]
        command += ["--out", str(self.args.out), "--device", self.args.device]
        command += ["--until", str(until), "--progress", str(progress)]
        command += ["--commit", self.args.commit, *(["--tiny"] if self.args.tiny else [])]
        log = self.args.out / "sections.log"
        with open(log, "ab") as errors:
            errors.write(f"-- {name}\n".encode())
            errors.flush()
            process = subprocess.Popen(command, cwd=ROOT, stderr=errors, start_new_session=True)
        started, stopped = time.time(), ""
        while process.poll() is None and not stopped:
            time.sleep(0.1)
            now = time.time()
            latest = max(started, progress.stat().st_mtime if progress.exists() else 0.0)
            if now > until + GRACE:
                stopped = f"stopped {GRACE:.0f} s after its time"
            elif now - latest > section.stuck:
                stopped = f"stopped after {section.stuck:.0f} s without an end"
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the process, or children that it left
        process.wait()
        if stopped or process.returncode == 0:
            return stopped
        if process.returncode == LOST:
            return "lost"
        status = process.returncode
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return f"{how}: {last_line(log)}"


def main() -> None:
    """Runs all sections, then prints the table and what failed."""
    args = parse()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: expected a device that is here, got cuda without a GPU")
    if args.child is not None:
        run_section(args)
        return
    started = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    args.commit = args.commit or commit()
    path = args.out / "rows.csv"
    before = len(read(path)) if path.exists() else 0
    driver = Driver(args, Rows(path, facts(device, args.commit)), started + args.seconds)
    with tempfile.TemporaryDirectory() as folder:
        for name, section in {"build": BUILD, **{n: SECTIONS[n] for n in args.section}}.items():
            begun = time.time()
            driver.run(name, section, Path(folder))
            print(f"-- {name}: {time.time() - begun:.0f} s\n", flush=True)
    rows = read(path, before)
    lines = table(rows)
    with replacing(args.out / "table.txt") as fresh:
        fresh.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("ms (% of copy)\n" + "\n".join(shortened(lines, 50, 130)))
    failed = [show(row) for row in rows if row.is_bad]
    print(f"\n{time.time() - started:.0f} s, {len(rows)} rows, {len(failed)} failed")
    for line in failed[:25]:
        print(line[:180])
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
