"""Processes that are started from one with an adapted model; `test_processes.py` runs each case.

    python tests/threads/children.py CASE

Each case is a process of its own, in which torch has used its threads. It prints "right", or what
is wrong. A child that hangs is ended by its alarm.
"""

import copy
import faulthandler
import multiprocessing
import pickle
import signal
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

sys.path += [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]

import tcur_kernels as tcur
from models import Tiny

SECONDS = 120  # of a child


def adapted():
    """A model with two adapters whose cores are not zero, and an input."""
    torch.manual_seed(0)
    model = Tiny(width=16, blocks=2).eval()
    # By "auto", few tokens go by W_eff only where it is at hand; the other way rounds otherwise.
    adapter = tcur.adapt(model, rank=2, mode="materialized")
    adapter.add("b")
    with torch.no_grad():
        for name in adapter.names:
            for core in adapter._cores(name).values():
                core.normal_(std=0.5)
    return model, adapter, torch.randn(3, 40, 6)


def forward_backward(model, x):
    """The result and all gradients, in bits that do not depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    torch.set_num_threads(threads)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **grads}


def same(a, b):
    """Whether two such results have the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def use_threads(model, x):
    """Has torch start its threads, in its own operators and in ours."""
    torch.set_num_threads(3)
    large = torch.randn(700, 700)
    for _ in range(2):
        (large @ large).sum()
        (large + large).exp().sum()
        model(x).sum().backward()
    factors = tcur.CURFactors(torch.randn(12, 300, 4), torch.randn(12, 4, 300))
    tcur.materialize(torch.randn(12, 300, 300), factors, torch.randn(12, 4, 4), 0.5)


def in_child(context, target, *args):
    """Runs a function in a process; it sends one object, which is returned."""
    ours, theirs = multiprocessing.Pipe()
    child = context.Process(target=_answer, args=(theirs, target, *args))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(SECONDS) else None
    except EOFError:
        found = None
    child.join(5)
    assert found is not None, f"expected an answer, got exit code {child.exitcode}"
    return pickle.loads(found)


def _answer(pipe, target, *args):
    signal.alarm(SECONDS)
    # By value: tensors in shared memory are gone with this process.
    pipe.send(pickle.dumps(target(*args)))
    pipe.close()


FORK, SPAWN = (multiprocessing.get_context(name) for name in ("fork", "spawn"))


def fork():
    """A child that is forked while another thread is inside the model computes as the parent."""
    model, _, x = adapted()
    wanted = forward_backward(model, x)
    use_threads(model, x)
    is_over = threading.Event()

    def serve():
        while not is_over.is_set():
            with torch.no_grad():
                model(x)

    server = threading.Thread(target=serve)
    server.start()
    try:
        for _ in range(5):
            assert same(in_child(FORK, forward_backward, model, x), wanted)
    finally:
        is_over.set()
        server.join()
    assert torch.get_num_threads() == 3
    assert same(forward_backward(model, x), wanted)


def fork_in_a_change():
    """A child that is forked in the middle of a change of another thread refuses the model."""
    model, adapter, x = adapted()
    inside, go_on = threading.Event(), threading.Event()
    write = adapter._write

    def slow(learned):
        inside.set()
        go_on.wait(SECONDS)
        write(learned)

    adapter._write = slow
    changing = threading.Thread(target=adapter.activate, args=("b",))
    changing.start()
    inside.wait(SECONDS)
    said = in_child(FORK, _message, model, x)
    go_on.set()
    changing.join()
    assert "fork: expected a model that no other thread changes" in said, said
    model(x)


def _message(model, x):
    try:
        model(x)
    except Exception as error:
        return str(error)
    return "nothing"


def spawn():
    """A pickled model computes the same in a process that shares nothing, and so does a copy."""
    model, adapter, x = adapted()
    wanted = forward_backward(model, x)
    use_threads(model, x)
    assert same(in_child(SPAWN, forward_backward, model, x), wanted)
    assert same(forward_backward(copy.deepcopy(model), x), wanted)
    twin = pickle.loads(pickle.dumps(adapter))
    twin.activate("b")
    adapter.activate("b")
    assert same(forward_backward(twin.model, x), forward_backward(model, x))


def pickles():
    """What belongs to one process says so."""
    _, adapter, _ = adapted()
    for owner in (adapter.store(slots=1), adapter.tenants(1)):
        for send in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="stay in the process that made"):
                send(owner)


class Features(Dataset):
    """Inputs with what an adapted model makes of them."""

    def __init__(self, model, inputs):
        self.model, self.inputs = model, inputs

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        torch.set_num_threads(1)
        with torch.no_grad():
            return self.model(self.inputs[index][None])[0]


def loader(context):
    """Workers of a DataLoader whose dataset holds an adapted model."""
    model, _, x = adapted()
    torch.set_num_threads(1)
    with torch.no_grad():
        wanted = torch.stack([model(row[None])[0] for row in x])
    use_threads(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        workers = DataLoader(
            Features(model, x),
            batch_size=1,
            num_workers=2,
            multiprocessing_context=context,
            timeout=SECONDS,
        )
        found = torch.cat(list(workers))
    assert torch.equal(found, wanted)


def store():
    """Forked readers of a store in a file read what was there when they were forked."""
    model, adapter, x = adapted()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kept = adapter.store(slots=1, directory=folder)
        kept.add("default", "default")
        kept.add("b", "b")
        wanted = {name: _served(kept, model, x, name) for name in ("default", "b")}
        ours, theirs = FORK.Pipe()
        child = FORK.Process(target=_reads_later, args=(theirs, kept, model, x))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child.start()
        # The child has read nothing yet. What is removed here would be in its way.
        kept.remove("b")
        zeros = {name: torch.zeros_like(s.core) for name, s in adapter.stacks.items()}
        kept.add("zeros", zeros)
        ours.send("read")
        assert ours.poll(SECONDS), "expected an answer"
        found, said = pickle.loads(ours.recv())
        child.join()
        assert all(torch.equal(found[name], y) for name, y in wanted.items())
        assert "directory: expected the process that made the store" in said, said
        kept.remove("zeros")
        kept.add("again", "b")
        assert torch.equal(_served(kept, model, x, "again"), wanted["b"])


def _served(kept, model, x, name):
    with torch.no_grad(), kept.batch([name] * len(x)):
        return model(x)


def _reads_later(pipe, kept, model, x):
    signal.alarm(SECONDS)
    pipe.recv()
    found = {name: _served(kept, model, x, name) for name in ("default", "b")}
    try:
        kept.add("mine", "default")
    except RuntimeError as error:
        pipe.send(pickle.dumps((found, str(error))))


def shared():
    """Cores in shared memory: what another process writes is computed with at the next call."""
    model, adapter, x = adapted()
    torch.set_num_threads(1)
    model.share_memory()
    with torch.no_grad():
        before = model(x)
    in_child(FORK, _steps, model, x, 3)
    twin, other, _ = adapted()
    with torch.no_grad():
        twin(x)
    _steps(twin, x, 3)
    for name, stack in adapter.stacks.items():
        assert stack.core.is_shared()
        assert torch.isfinite(stack.core).all()
        assert torch.equal(stack.core, other.stacks[name].core)
    with torch.no_grad():
        y = model(x)
        assert torch.equal(y, twin(x))
    assert not torch.equal(y, before)


def _steps(model, x, count):
    torch.set_num_threads(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    for _ in range(count):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return count


CASES = {
    "fork": fork,
    "fork_in_a_change": fork_in_a_change,
    "spawn": spawn,
    "pickles": pickles,
    "loader_fork": lambda: loader("fork"),
    "loader_spawn": lambda: loader("spawn"),
    "loader_forkserver": lambda: loader("forkserver"),
    "store": store,
    "shared": shared,
}

if __name__ == "__main__":
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True)
    CASES[sys.argv[1]]()
    print("right")
