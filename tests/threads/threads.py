"""Several threads on one adapted model: scripts of operations at random, each result checked.

    python tests/threads/threads.py --seconds 300 --seed 0

Every result must have the bits that a single thread gets for the same adapter and input. What is
refused must be refused by one of the messages of `REFUSALS`. Anything else is silent, or a crash.
Python switches threads every microsecond. At the end come all cases of processes (`children.py`).
With ``--count`` there are so many rounds and nothing else. The last line is RESULT and a JSON
object.
"""

import argparse
import faulthandler
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent))

import children
import tcur_kernels as tcur
from models import Tiny

NAMES = ("default", "b", "c")
THREADS, OPERATIONS = 4, 25
#: A thread that hangs fails the program after so many seconds, with the frames of all threads.
LIMIT = 600
#: What may be refused: a change while another thread is inside, what a merged model cannot do, a
#: store whose slots are all in use, and, by torch, a backward after the weights were merged.
REFUSALS = re.compile(
    r"expected no other thread inside the model"
    r"|expected an? (un)?merged adapter"
    r"|expected an adapter that is not active"
    r"|names: expected slots for"
    r"|modified by an inplace operation"
)


class World:
    """One adapted model with several adapters, and what a single thread makes of it.

    Attributes:
        cores: adapter -> stack -> its core; of the model's own adapters, and of others.
    """

    def __init__(self, seed, mode):
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.model = Tiny(blocks=2).eval()
        self.adapter = tcur.adapt(self.model, rank=2, mode=mode)
        for name in NAMES[1:]:
            self.adapter.add(name)
        self.inputs = [torch.randn(*size, 6) for size in ((1, 3), (3, 5), (2, 40))]
        self.cores = {name: self.some_cores() for name in (*NAMES, "d", "e", "f")}
        with torch.no_grad():
            for name in NAMES:
                for stack, core in self.adapter._cores(name).items():
                    core.copy_(self.cores[name][stack])
        self.stacked = self.adapter.stack_cores([self.cores[name] for name in self.cores])
        self.store = self.adapter.store(slots=3)
        for name, cores in self.cores.items():
            self.store.add(name, cores)
        #: Of the active adapter, by its name and input: every way that a model may compute.
        self.active, self.merged = {}, {}
        with torch.no_grad():
            for name in NAMES:
                self.adapter.activate(name)
                for index, x in enumerate(self.inputs):
                    self.active[name, index] = self.model(x)
                self.adapter.merge()
                for index, x in enumerate(self.inputs):
                    self.merged[name, index] = self.model(x)
                self.adapter.unmerge()
            with self.adapter.disable():
                self.plain = [self.model(x) for x in self.inputs]
        self.rows = {}  # what a batch gives, by ids and input; filled before the threads start
        for index, x in enumerate(self.inputs):
            for first in range(len(self.cores)):
                ids = self.ids_of(index, first)
                self.rows[index, first] = self.by_rows(self.stacked, x, ids, needs_grad=True)
        self.others = [self.some_cores() for _ in range(THREADS)]
        self.alone = {
            (number, index): self.by_rows(
                self.adapter.stack_cores([self.others[number]]), x, torch.tensor([0])
            )[0]
            for number in range(THREADS)
            for index, x in enumerate(self.inputs)
        }

    def some_cores(self):
        """Random cores for all stacks."""
        return {
            name: 0.5 * torch.randn(stack.core.shape, generator=self.generator)
            for name, stack in self.adapter.stacks.items()
        }

    def ids_of(self, index, first):
        """Ids of the rows of an input, of which the first is given."""
        rows = self.inputs[index].shape[0]
        return torch.tensor([(first + row) % len(self.cores) for row in range(rows)])

    def by_rows(self, stacked, x, ids, needs_grad=False):
        """The result of a batch, and the gradients of its cores if they are needed."""
        if not needs_grad:
            with torch.no_grad(), self.adapter.batch(stacked, ids):
                return self.model(x), None
        own = {name: core.detach().clone().requires_grad_() for name, core in stacked.items()}
        with self.adapter.batch(tcur.StackedCores(own), ids):
            y = self.model(x)
        y.square().sum().backward()
        return y.detach(), {name: core.grad for name, core in own.items()}


class Worker:
    """One thread: does its operations, and counts what became of them."""

    def __init__(self, world, number, seed, folder):
        self.world, self.number, self.folder = world, number, folder
        self.random = random.Random(f"{seed} {number}")
        self.counts, self.wrong = Counter(), []

    def run(self, start, operations=OPERATIONS):
        """Does random operations."""
        names = [*SERVING * 3, *(CHANGING if self.number < 2 else ())]
        start.wait()
        for _ in range(operations):
            name = self.random.choice(names)
            self.counts["tried"] += 1
            try:
                is_right = getattr(self, name)()
            except Exception as error:
                if REFUSALS.search(str(error)):
                    self.counts["refused"] += 1
                else:
                    self.counts["crashes"] += 1
                    self.wrong.append(f"{name}: {traceback.format_exc()}")
            else:
                self.counts["right" if is_right else "silent"] += 1
                if not is_right:
                    self.wrong.append(f"{name}: the result is another")

    def choose(self):
        """One of the inputs."""
        index = self.random.randrange(len(self.world.inputs))
        return index, self.world.inputs[index]

    # -- what all threads do

    def serve(self):
        """Rows of a batch."""
        index, x = self.choose()
        first = self.random.randrange(len(self.world.cores))
        y, _ = self.world.by_rows(self.world.stacked, x, self.world.ids_of(index, first))
        return torch.equal(y, self.world.rows[index, first][0])

    def serve_from_store(self):
        """Rows by their names, which come into slots and leave them."""
        index, x = self.choose()
        first = self.random.randrange(len(self.world.cores))
        every = list(self.world.cores)
        names = [every[number] for number in self.world.ids_of(index, first)]
        with torch.no_grad(), self.world.store.batch(names):
            y = self.world.model(x)
        return torch.equal(y, self.world.rows[index, first][0])

    def come_and_go(self):
        """An adapter of this thread is added to the store, served and removed."""
        index, x = self.choose()
        name = f"of {self.number}"
        self.world.store.add(name, self.world.others[self.number])
        try:
            with torch.no_grad(), self.world.store.batch([name] * len(x)):
                y = self.world.model(x)
        finally:
            self.world.store.remove(name)
        return torch.equal(y, self.world.alone[self.number, index])

    def train(self):
        """Forward and backward of a batch with cores of its own."""
        index, x = self.choose()
        first = self.random.randrange(len(self.world.cores))
        ids = self.world.ids_of(index, first)
        y, grads = self.world.by_rows(self.world.stacked, x, ids, needs_grad=True)
        wanted, wanted_grads = self.world.rows[index, first]
        same = all(torch.equal(grads[name], wanted_grads[name]) for name in grads)
        if not same or not torch.equal(y, wanted):
            far = {name: float((grads[name] - wanted_grads[name]).abs().max()) for name in grads}
            far["y"] = float((y - wanted).abs().max())
            self.wrong.append(f"train of input {index}, first {first}: off by {far}")
            return False
        return True

    def call(self):
        """A call outside of a batch: by one adapter, whichever is active, in all of its layers."""
        index, x = self.choose()
        with torch.no_grad():
            y = self.world.model(x)
        allowed = {"plain": self.world.plain[index]}
        for name in NAMES:
            allowed[name] = self.world.active[name, index]
            allowed[f"{name}, merged"] = self.world.merged[name, index]
        if any(torch.equal(y, each) for each in allowed.values()):
            return True
        # How far each is off tells a rounding from a mixture of two adapters.
        far = {name: float((y - each).abs().max()) for name, each in allowed.items()}
        self.wrong.append(f"call of input {index}: off by {far}")
        return False

    def save(self):
        """A file of one adapter holds its cores."""
        name = self.random.choice(NAMES)
        path = Path(self.folder, f"{self.number}.safetensors")
        self.world.adapter.save(path, name)
        read = self.world.adapter._cores(path)
        return all(torch.equal(core, self.world.cores[name][s]) for s, core in read.items())

    # -- what two of them do, too

    def activate(self):
        """Another adapter for all threads."""
        self.world.adapter.activate(self.random.choice(NAMES))
        return True

    def swap(self):
        """An adapter is loaded again, active or not."""
        name = self.random.choice(NAMES)
        path = Path(self.folder, f"{self.number} {name}.safetensors")
        if not path.exists():
            self.world.adapter.save(path, name)
        self.world.adapter.load(path, name)
        return True

    def merge(self):
        """Merged for a moment."""
        self.world.adapter.merge()
        for _ in range(200):  # until no other thread is inside
            try:
                self.world.adapter.unmerge()
            except RuntimeError as error:
                if not REFUSALS.search(str(error)):
                    raise
                time.sleep(0.01)
            else:
                return True
        raise AssertionError("unmerge: refused two hundred times")

    def invalidate(self):
        """W_eff is built anew."""
        self.world.adapter.invalidate()
        return True


SERVING = ("serve", "serve_from_store", "come_and_go", "train", "call", "save")
CHANGING = ("activate", "activate", "swap", "merge", "invalidate")


def one_round(seed, operations=OPERATIONS):
    """Threads on a new model; returns what became of their operations, and what was wrong."""
    mode = ("materialized", "factored")[seed % 2]
    world, start = World(seed, mode), threading.Barrier(THREADS)
    interval = sys.getswitchinterval()
    with tempfile.TemporaryDirectory() as folder:
        workers = [Worker(world, number, seed, folder) for number in range(THREADS)]
        threads = [threading.Thread(target=w.run, args=(start, operations)) for w in workers]
        sys.setswitchinterval(1e-6)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
    counts = sum((worker.counts for worker in workers), Counter())
    return counts, [line for worker in workers for line in worker.wrong]


def main():
    """Rounds until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--count", type=int, help="rounds, in place of seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started, counts, wrong, rounds = time.monotonic(), Counter(), [], 0
    told = started
    while True:
        is_done = time.monotonic() - started > options.seconds
        if is_done if options.count is None else rounds >= options.count:
            break
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        seed = options.seed + rounds
        found, lines = one_round(seed)
        counts, rounds = counts + found, rounds + 1
        wrong += [f"--seed {seed} --count 1: {line}" for line in lines]
        if time.monotonic() - told > 60:
            told = time.monotonic()
            print(f"{rounds} rounds, {dict(counts)}", flush=True)
    faulthandler.cancel_dump_traceback_later()
    for case in children.CASES if options.count is None else ():
        words = [sys.executable, children.__file__, case]
        said = subprocess.run(words, capture_output=True, text=True, check=False)
        is_right = said.stdout.strip() == "right"
        counts.update({"tried": 1, "processes": 1, "right" if is_right else "crashes": 1})
        if not is_right:
            wrong.append(f"children.py {case}: {said.stdout}{said.stderr}")
    for line in wrong[:20]:
        print(line)
    keys = ("tried", "right", "refused", "crashes", "silent", "processes")
    result = {"kind": "threads", **{key: counts[key] for key in keys}, "rounds": rounds}
    print("RESULT " + json.dumps(result))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
