"""Reads damaged and hostile files of every kind, and judges what came of each.

    python tests/hostile/hostile.py --count 20000 --seed 0

A file is right if reading gives what the whole one gives, bit for bit. It is refused if the error
is a ValueError, TypeError or OSError that names what was wrong. Anything else is a fault: a crash,
another error, other numbers (silent), too much memory or time, or a look outside of the folder.
"""

import argparse
import collections
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

import damages  # noqa: E402
import subjects  # noqa: E402
import watch  # noqa: E402
from subject import Refused, listing, trained  # noqa: E402

#: Seconds of the processor for one file, and of the clock: a busy machine is no fault of a file.
SECONDS, CLOCK = 10, 300

#: Bytes of memory that reading a file may take beyond what there was.
BYTES = 512 * 2**20

#: Files that one child judges, before its memory has grown too much.
FILES = 2000

#: How a child ends in which the judge itself failed.
FAILED = 77

ALLOWED = (ValueError, TypeError, OSError, Refused)
FOREIGN = (KeyError, UnicodeError, json.JSONDecodeError)


class Slow(BaseException):
    """A file took too long."""


class Judge:
    """Makes the whole files once, and then judges one damaged file after another."""

    def __init__(self, seed, folder):
        self.seed, self.folder = seed, Path(folder)
        self.outside = self.folder / "outside"
        self.outside.mkdir()
        (self.outside / "secret").write_bytes(b"secret")
        trained().save(self.outside / "secret.safetensors")
        self.kept = listing(self.outside)
        self.subjects, self.wanted = {}, {}
        for name, kind in subjects.SUBJECTS.items():
            whole = self.folder / "whole" / name
            whole.mkdir(parents=True)
            subject = kind()
            subject.make(whole)
            self.subjects[name] = subject

    def expected(self, name, reader, subject):
        """What the reader gives for whole files."""
        which = getattr(subject, "file", None)
        key = name, reader, None if which is None else which.name
        if key not in self.wanted:
            folder = subjects.copied(self.folder / "whole" / name, self.folder / "again")
            other = type(subject)()
            if which is not None:
                other.file, other.is_plain = folder / which.name, which.name != "a.safetensors"
            self.wanted[key] = other.readers()[reader](folder)
            shutil.rmtree(folder)
        return self.wanted[key]

    def case(self, index):
        """Judges one file; returns its kind, the verdict, and what reproduces and explains it."""
        rng = damages.generator(self.seed, index)
        name = subjects.kind_of(index)
        subject = self.subjects[name]
        folder = subjects.copied(self.folder / "whole" / name, self.folder / f"case{index}")
        what, is_free = subject.damage(folder, rng, str(self.outside))
        readers = subject.readers()
        reader = rng.choice(sorted(readers))
        wanted = self.expected(name, reader, subject)
        # What is not protected by a digest must come as the file has it.
        plain = None
        if name in ("gradients", "shards"):
            plain = watch.numbers_changed(self.folder / "whole" / name, folder)
        told = f"{name} {index}: {what}, read by {reader}"
        watch.start(folder, self.folder)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, CLOCK)
        try:
            came = readers[reader](folder)
        except Slow:
            return name, "slow", told
        except ALLOWED as error:
            verdict, why = self._refusal(error, subject)
            return name, verdict, f"{told}: {why}"
        except BaseException as error:
            return name, "foreign", f"{told}: {located(error)}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            seen = watch.stop() or self._changed_outside()
            shutil.rmtree(folder, ignore_errors=True)
            if seen:
                return name, "outside", f"{told}: {seen}"  # noqa: B012
        if is_free or came == wanted:
            return name, "right", told
        if plain and watch.alike_but_for(wanted, came, plain):
            return name, "right", told
        return name, "silent", told

    def _changed_outside(self):
        """What changed in the folder beside; libraries write without an event of Python's."""
        now = listing(self.outside)
        if now != self.kept:
            return f"wrote {sorted(now.keys() ^ self.kept.keys()) or 'to files outside'}"
        return ""

    def _refusal(self, error, subject):
        """Whether an error is one that names what was wrong."""
        text = str(error)
        if isinstance(error, FOREIGN):
            return "foreign", located(error)
        first = re.match(r"(\w+)(?: [\w.]+)?: ", text)
        known = (*subject.arguments, "model", "stack")
        # Entries of peft's config are arguments of `TCURConfig`, which knows of no file.
        is_entry = subject.name == "peft" and re.match(r"\w+: expected ", text)
        if "expected" not in text or first is None or len(text) > 20_000:
            return "unnamed", located(error)
        if first.group(1) not in known and not is_entry:
            return "unnamed", located(error)
        if str(self.folder) not in text and first.group(1) not in ("model", "stack", "plan"):
            return ("refused", text[:300]) if is_entry else ("unnamed", f"no path: {text[:300]}")
        return "refused", text[:300]


def located(error):
    """An error with the line that raised it."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:300]} ({where.filename}:{where.lineno})"


def run(seed, start, count, folder):
    """Judges files in processes of their own, so that a crash is a verdict, too."""
    judge = Judge(seed, folder)
    done = start
    results = []
    while done < start + count:
        stop = min(start + count, done + FILES)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            try:
                _work(judge, done, stop, writing)
            except BaseException:  # the judge itself failed, and must not judge on
                traceback.print_exc()
            finally:
                os._exit(FAILED)
        os.close(writing)
        with os.fdopen(reading) as lines:
            for line in lines:
                results.append(tuple(json.loads(line)))
                done += 1
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == FAILED:
            raise RuntimeError(f"the judge failed at file {done}")
        if done < stop:  # it died with the next file
            results.append((subjects.kind_of(done), "crash", f"{done}: status {status}"))
            done += 1
    return results


def _work(judge, start, stop, writing):
    """The child: judges files until it is through, and says each verdict at once."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _late)
    signal.signal(signal.SIGPROF, _late)
    torch.set_num_threads(1)
    watch.install()
    held = watch.address_space()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2 * BYTES, resource.RLIM_INFINITY))
    with os.fdopen(writing, "w") as out:
        for index in range(start, stop):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            name, verdict, told = judge.case(index)
            grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            if grown > BYTES:
                verdict, told = "memory", f"{told}: {grown:,} bytes"
            out.write(json.dumps((name, verdict, told)) + "\n")
            out.flush()
    os._exit(0)


def _late(*_):
    raise Slow


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--folder", help="where to work; by default a temporary folder")
    parser.add_argument("--verbose", action="store_true", help="a line for every file")
    args = parser.parse_args()
    began = time.monotonic()
    folder = tempfile.mkdtemp(dir=args.folder, prefix="hostile")
    try:
        results = run(args.seed, args.start, args.count, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.verbose:
        for _, verdict, told in results:
            print(verdict, ascii(told)[1:-1])
    counts = collections.Counter(verdict for _, verdict, _ in results)
    bad = [(verdict, told) for _, verdict, told in results if verdict not in ("right", "refused")]
    for verdict, told in bad[:40]:
        number = told.split(":")[0].split()[-1]
        print(f"{verdict}: {ascii(told)[1:-1]} (--seed {args.seed} --start {number} --count 1)")
    kinds = {
        kind: dict(collections.Counter(v for k, v, _ in results if k == kind))
        for kind in subjects.SHARES
    }
    others = counts.keys() - {"right", "refused", "silent", "crash"}
    faults = {name: counts[name] for name in sorted(others)}
    told = {
        "kind": "hostile files",
        "tried": len(results),
        "right": counts["right"],
        "refused": counts["refused"],
        "crashes": counts["crash"] + sum(faults.values()),
        "silent": counts["silent"],
        "faults": faults,
        "by kind": kinds,
        "seconds": round(time.monotonic() - began),
    }
    print(f"RESULT {json.dumps(told)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
