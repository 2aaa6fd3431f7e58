"""Fuzzing: random calls of every operator and public function, on every backend that runs here.

    python tests/fuzz/fuzz.py --count 100000 --seed 0 --workers 2
    python tests/fuzz/fuzz.py --seed 0 --only 4711        # one call again, in this process

Call number I of seed S is always the same. Calls run in processes of their own, so that one that
crashes or hangs is reported, and the next ones go on. The last line is ``RESULT`` and an object.
"""

import argparse
import collections
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
#: A call that takes longer hangs. The emulator of a GPU is slow on a busy machine.
LIMIT = 400
#: Bytes that a process may have, address space that torch reserves included.
MEMORY = 12 << 30
#: The backend that needs a process of its own, and which part of the calls it gets besides.
INTERPRETED, INTERPRETED_PART = "triton_interpreted", 500
#: Out of so many calls, how many go to which backend; the rest are public functions.
SHARES = {"reference": 20, "cpu_best": 30, "cpu_other": 14, "cudahost": 3}
FUNCTIONS = 33


def paths():
    """Has this program find the modules of the tests, wherever it is started."""
    for folder in (TESTS.parent, TESTS, TESTS / "fuzz"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def make(seed, index, without=(), only_backend=None):
    """Call number ``index``."""
    import torch

    import fuzz_functions
    import fuzz_operators
    from fuzz_draw import Draw

    draw = Draw(seed, index)
    torch.manual_seed(draw.randrange(2**31))
    here = fuzz_operators.backends(tuple(without))
    if only_backend == "functions":
        return fuzz_functions.make(draw)
    if only_backend is not None:
        return fuzz_operators.make(draw, here[only_backend])
    names, weights = [], []
    for name, backend in here.items():
        kind = name if backend.isa is None else "cpu_other" if backend.few else "cpu_best"
        names.append(name)
        weights.append(SHARES.get(kind, 5))
    names.append(None)
    weights.append(FUNCTIONS)
    (chosen,) = draw.choices(names, weights)
    if chosen is None:
        return fuzz_functions.make(draw)
    return fuzz_operators.make(draw, here[chosen])


def work(seed, indices, without=(), only_backend=None):
    """Runs calls one after the other; yields before each and after each."""
    import torch

    import fuzz_judge

    torch.use_deterministic_algorithms(True)  # which fills empty tensors with NaN
    torch.set_num_threads(1)
    for index in indices:
        yield {"start": index}
        call, error, found = None, None, None
        try:
            call = make(seed, index, without, only_backend)
            found = fuzz_judge.verdict(call)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        yield {
            "done": index,
            "backend": getattr(call, "backend", "?"),
            "name": getattr(call, "name", "?"),
            "verdict": found if error is None else "wrong",
            "error": error and error[:1500],
            "text": getattr(call, "text", "")[:1500],
        }


def as_worker(args):
    """The process of some calls: a line of JSON on stdout before and after each."""
    # A size without measure must fail at once, and not take the memory of the machine.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    indices = range(args.first, args.last, args.step)
    for line in work(args.seed, indices, args.without, args.backend):
        os.write(1, (json.dumps(line) + "\n").encode())


class Worker:
    """A process that works through every ``step``-th index, and is started anew where it ends."""

    def __init__(self, args, first):
        self.args, self.next = args, first
        self.start()

    #: What a worker runs; the tests plant another.
    program = __file__

    def start(self):
        """Goes on with the call after the last one."""
        args = self.args
        command = [sys.executable, self.program, "--worker", "--seed", str(args.seed)]
        command += ["--first", str(self.next), "--last", str(args.last), "--step", str(args.step)]
        command += [f"--without={name}" for name in args.without]
        command += ["--backend", args.backend] if args.backend else []
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "TRITON_INTERPRET": "0"}
        if args.backend == INTERPRETED:
            environment["TRITON_INTERPRET"] = "1"
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment)
        os.set_blocking(self.process.stdout.fileno(), False)
        self.running, self.rest, self.since = None, b"", None
        self.errors = b""

    def lines(self):
        """What it has said since."""
        chunk = self.process.stdout.read()
        *whole, self.rest = (self.rest + (chunk or b"")).split(b"\n")
        for line in whole:
            told = json.loads(line)
            if "start" in told:
                self.running, self.since = told["start"], time.monotonic()
                self.next = told["start"] + self.args.step
            else:
                self.running = None
            yield told

    def has_ended(self):
        return self.process.poll() is not None

    def hangs(self):
        return self.running is not None and time.monotonic() - self.since > LIMIT


def drive(args, report=print):
    """Runs all calls in processes; returns what became of them."""
    counts, by_backend, by_name = (collections.Counter() for _ in range(3))
    faults, workers = [], [Worker(args, args.first + i) for i in range(args.workers)]
    selector = selectors.DefaultSelector()

    def watch(worker):
        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def fault(told):
        faults.append(told)
        report(f"{told['verdict']}: call {told['done']} of seed {args.seed}: {told['text']}")
        report(f"    {told['error']}")

    for worker in workers:
        watch(worker)
    began, shown = time.monotonic(), 0
    while workers:
        for key, _ in selector.select(timeout=5):
            for told in key.data.lines():
                if "start" in told:
                    continue
                counts[told["verdict"]] += 1
                by_backend[told["backend"]] += 1
                by_name[told["name"]] += 1
                if told["verdict"] == "wrong":
                    fault(told)
        for worker in list(workers):
            is_stuck = worker.hangs()
            if is_stuck:
                worker.process.kill()
                worker.process.wait()
            if not worker.has_ended():
                continue
            for told in worker.lines():  # what was left to read
                if "done" in told:
                    counts[told["verdict"]] += 1
                    by_backend[told["backend"]] += 1
                    by_name[told["name"]] += 1
                    if told["verdict"] == "wrong":
                        fault(told)
            selector.unregister(worker.process.stdout)
            workers.remove(worker)
            code, errors = worker.process.returncode, worker.process.stderr.read()[-1500:]
            worker.process.stdout.close()
            worker.process.stderr.close()
            if worker.running is not None or code != 0:
                kind = "hang" if is_stuck else "crash"
                counts[kind] += 1
                how = f"no answer in {LIMIT} s" if is_stuck else f"ended by {_name_of(code)}"
                words = f"{how} {errors.decode(errors='replace')}"
                fault({"verdict": kind, "done": worker.running, "text": "", "error": words})
                if worker.running is None:
                    continue  # before its first call: no further one would do better
                if worker.next < args.last:
                    worker.start()
                    workers.append(worker)
                    watch(worker)
        tried = sum(counts.values())
        if args.progress and tried - shown >= args.progress:
            shown = tried
            report(f"{tried} calls, {time.monotonic() - began:.0f} s, {dict(counts)}")
    return counts, by_backend, by_name, faults


def _name_of(code):
    """An exit status in words."""
    if code >= 0:
        return f"status {code}"
    return signal.Signals(-code).name


def result(counts, by_backend, by_name, faults):
    """The object of the last line."""
    return {
        "kind": "fuzz",
        "tried": sum(counts.values()),
        "right": counts["right"],
        "refused": counts["refused"],
        "crashes": counts["crash"],
        "hangs": counts["hang"],
        "silent": counts["wrong"],
        "by_backend": dict(sorted(by_backend.items())),
        "by_name": dict(sorted(by_name.items())),
        "reproduce": [fault["done"] for fault in faults][:20],
    }


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max(1, min(8, os.cpu_count() or 1)))
    parser.add_argument("--only", type=int, help="this call alone, in this very process")
    parser.add_argument("--without", action="append", default=[], help="a backend to leave out")
    parser.add_argument("--backend", help="calls of operators by this backend alone")
    parser.add_argument("--progress", type=int, default=10_000, help="report every so many calls")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--last", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.last = args.first + args.count if args.last is None else args.last
    args.step = args.workers if args.step is None else args.step
    return args


def main():
    args = parse()
    paths()
    if args.worker:
        as_worker(args)
        return 0
    if args.only is not None:
        *_, told = work(args.seed, [args.only], args.without, args.backend)
        print(json.dumps(told, indent=2))
        return int(told["verdict"] == "wrong")
    if "cudahost" not in args.without:
        import cuda_host

        cuda_host.build()  # may take minutes, in which the first calls would seem to hang
    found = drive(args, lambda line: print(line, flush=True))
    if args.backend is None and INTERPRETED not in args.without:
        of_triton = argparse.Namespace(**vars(args))
        of_triton.backend = INTERPRETED
        of_triton.last = args.first + args.count // INTERPRETED_PART
        more = drive(of_triton, lambda line: print(line, flush=True))
        found = [a + b for a, b in zip(found, more, strict=True)]
    print("RESULT " + json.dumps(result(*found)))
    return int(bool(found[3]))


if __name__ == "__main__":
    sys.exit(main())
