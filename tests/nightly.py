"""All that tries far more than the tests do, one program after another: `make nightly`.

Each program of `PROGRAMS` prints, as its last line, ``RESULT`` and a JSON object: what was tried
and how it ended (`result_of`). Every result is appended as a row to ``tests/nightly.csv``, together
with the commit and the machine. The newest rows of each program are the table of docs/trust.md.
What a program prints is kept in ``build/nightly``.

Exits with 1 if anything was wrong: a crash, a silent result, a program that ended with another
status than 0, one that ran past its time, or one without a result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from benchmarks import appending, documents  # noqa: E402
from benchmarks.commit import CODE, commit, now  # noqa: E402

ROWS = ROOT / "tests" / "nightly.csv"
PAGE = ROOT / "docs" / "trust.md"
LOGS = ROOT / "build" / "nightly"
#: What a result may count. What is tried is always counted; with mutants, those that were caught;
#: with all else, crashes and silent results.
COUNTS = ("tried", "right", "refused", "caught", "crashes", "silent")
#: Columns of a row. "more" has what a program counts beside that, "wrong" what went wrong.
COLUMNS = ("time", "commit", "processor", "isa", "torch", "python", "program", "kind", "what")
COLUMNS += (*COUNTS, "seconds", "seed", "more", "wrong")
#: Lines of a program that failed which are shown.
SHOWN = 40
#: The most parts of a value that are recorded.
PARTS = 6


@dataclass(frozen=True)
class Program:
    """One of the programs: its name for ``--only``, its command, and minutes that it may take."""

    name: str
    command: str
    minutes: float

    def arguments(self) -> list[str]:
        """The command as the system takes it; ``python`` is the one that runs this."""
        first, *rest = shlex.split(self.command)
        return [sys.executable if first == "python" else first, *rest]


#: One line for each. The order is that of the table.
PROGRAMS = (
    Program("calls", "python tests/fuzz/fuzz.py --count 100000 --seed 0", 180),
    Program("files", "python tests/hostile/hostile.py --count 20000 --seed 0", 120),
    Program("faults", "python tests/faults/faults.py", 60),
    Program("threads", "python tests/threads/threads.py --seconds 300 --seed 0", 30),
    Program("sanitizers", "python tests/sanitizers.py", 60),
    Program("mutants-cpu", "python tests/mutants/mutants.py --language cpu", 240),
    Program("mutants-cuda", "python tests/mutants/mutants.py --language cuda", 240),
    Program("mutants-triton", "python tests/pymutants/pymutants.py --language triton", 240),
    Program("mutants-python", "python tests/pymutants/pymutants.py --language python", 240),
)


class WrongResultError(ValueError):
    """A RESULT line that does not say what it has to."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended: its results, and what went wrong, or ""."""

    results: tuple[Mapping[str, object], ...]
    seconds: float
    wrong: str


def result_of(line: str) -> dict[str, object]:
    """The object of a RESULT line.

    It has "kind", a text, and counts: "tried"; either "caught", or "crashes" and "silent"; and
    "right" and "refused" where they apply. "language" or "what", and "seed", say more about the
    kind.

    Raises:
        WrongResultError: it is no JSON object, or a count is missing or no whole number.
    """
    try:
        found = json.loads(line.removeprefix("RESULT "))
    except json.JSONDecodeError as error:
        raise WrongResultError(f"RESULT: expected a JSON object, got {line[:200]!r}") from error
    if not isinstance(found, dict) or not isinstance(found.get("kind"), str):
        raise WrongResultError(f"RESULT: expected an object with a kind, got {line[:200]!r}")
    needed = ("tried", "caught") if "caught" in found else ("tried", "crashes", "silent")
    for name in COUNTS:
        count = found.get(name, None if name in needed else 0)
        if type(count) is not int or count < 0:
            raise WrongResultError(f"RESULT: {name}: expected a count, got {count!r}")
    if not found["tried"]:
        raise WrongResultError("RESULT: tried: expected something that was tried, got 0")
    return found


def run(program: Program, log: Path) -> Outcome:
    """Runs a program until it ends or its time is over, with its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    started = time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            program.arguments(),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it started ends with it
        )
        try:
            status = process.wait(60 * program.minutes)
            wrong = "" if status == 0 else f"ended with status {status}"
        except subprocess.TimeoutExpired:
            wrong = f"killed after {program.minutes:g} minutes"
        finally:
            end(process)
    seconds = time.monotonic() - started
    text = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    results, unread = [], ""
    for line in text:
        if line.startswith("RESULT "):
            try:
                results.append(result_of(line))
            except WrongResultError as error:
                unread = str(error)
    if not unread and not (results and text[-1].startswith("RESULT ")):
        unread = "no RESULT in the last line"
    return Outcome(tuple(results), seconds, wrong or unread)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a program, and whatever it has started and left."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def rows_of(program: Program, outcome: Outcome, about: Mapping[str, str]) -> list[dict[str, str]]:
    """A row for each result; without any, one that counts a crash."""
    common = {**about, "program": program.name, "seconds": f"{outcome.seconds:.0f}"}
    if not outcome.results:
        crashed = {"kind": program.name, "crashes": "1", "wrong": outcome.wrong}
        return [{**common, **crashed}]
    rows = []
    for found in outcome.results:
        named = ("kind", "seed", *COUNTS)
        row = {name: str(found[name]) for name in named if name in found}
        row["what"] = str(found.get("language", found.get("what", "")))
        own = {*row, "language", "seconds"}
        others = {name: text_of(value) for name, value in found.items() if name not in own}
        more = ", ".join(f"{name} {text}" for name, text in others.items() if text)
        row["more"] = " ".join(more.split())
        rows.append({**common, **row, "wrong": outcome.wrong})
    return rows


def text_of(value: object) -> str:
    """A value in a few words. What has many parts is in the log alone."""
    if isinstance(value, Mapping):
        parts = [f"{name} {part}" for name, part in value.items()]
    elif isinstance(value, list | tuple):
        parts = [str(part) for part in value]
    else:
        return str(value)
    return " and ".join(parts) if len(parts) <= PARTS else f"({len(parts)} parts)"


def is_right(row: Mapping[str, str]) -> bool:
    """Whether nothing went wrong."""
    return not row["wrong"] and row["crashes"] in ("", "0") and row["silent"] in ("", "0")


def newest(rows: Iterable[Mapping[str, str]]) -> dict[str, list[Mapping[str, str]]]:
    """The rows of the last run of each program, by its name, in the order of `PROGRAMS`."""
    found: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        last = found.get(row["program"], [])
        found[row["program"]] = [*(r for r in last if r["time"] == row["time"]), row]
    return {program.name: found[program.name] for program in PROGRAMS if program.name in found}


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """The newest rows as Markdown."""
    if not rows:
        return "No run is recorded yet.\n"
    heads = ["what is tried", *COUNTS, "beside that", "day", "commit", "on"]
    lines = []
    for run_of in newest(rows).values():
        for row in run_of:
            beside = "; ".join(filter(None, (row["more"], row["wrong"])))
            lines.append(
                [
                    " ".join(filter(None, (row["kind"], row["what"]))),
                    *(thousands(row[name]) for name in COUNTS),
                    beside or "–",
                    row["time"][:10],
                    row["commit"],
                    f"{row['processor']}, {row['isa']}, torch {row['torch']}",
                ]
            )
    return documents.table(heads, [[cell.replace("|", "/") for cell in line] for line in lines])


def thousands(count: str) -> str:
    """A count as it is read: 100,000; a dash where a program does not count it."""
    return f"{int(count):,}" if count else "–"


def write(rows: Sequence[Mapping[str, str]]) -> None:
    """Writes the table of docs/trust.md."""
    documents.fill({"nightly": table(rows)}, [PAGE])


def circumstances() -> dict[str, str]:
    """What all rows of a run share: the code and the machine."""
    import torch

    import tcur_kernels as tcur
    from benchmarks.rows import processor_name

    return {
        "commit": commit((*CODE, "tests/*.py")),
        "processor": processor_name(),
        "isa": str(tcur.build_info()["cpu"].get("isa_chosen", "none")),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def summary(rows: Sequence[Mapping[str, str]]) -> str:
    """A run in a line: sums, and whether all is right."""
    sums = {name: sum(int(row.get(name) or 0) for row in rows) for name in COUNTS}
    wrong = sum(not is_right(row) for row in rows)
    said = ", ".join(f"{name} {count:,}" for name, count in sums.items())
    return f"{said}: {f'{wrong} of {len(rows)} WRONG' if wrong else 'all right'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the programs, appends their rows, writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    names = [program.name for program in PROGRAMS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    chosen = parser.parse_args(arguments)
    about, made = circumstances(), []
    for program in PROGRAMS:
        if program.name not in chosen.only:
            continue
        print(f"{program.name}: {program.command}", flush=True)
        log = LOGS / f"{program.name}.log"
        outcome = run(program, log)
        rows = rows_of(program, outcome, {"time": now(), **about})
        rows = [{**dict.fromkeys(COLUMNS, ""), **row} for row in rows]
        appending.append(ROWS, COLUMNS, rows)
        write(appending.read(ROWS))
        made += rows
        print(f"  {outcome.seconds:.0f} s, {summary(rows)} {outcome.wrong}".rstrip(), flush=True)
        if not all(map(is_right, rows)):
            last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN:]
            print(*(f"  | {line}" for line in last), f"  all of it: {log}", sep="\n", flush=True)
    print(summary(made))
    return 0 if all(map(is_right, made)) else 1


if __name__ == "__main__":
    sys.exit(main())
