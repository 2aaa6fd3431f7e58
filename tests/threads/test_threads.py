"""Several threads on one adapted model: right, or refused, and never half of the one and half of
the other.
"""

import asyncio
import contextvars
import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from torch import nn

import tcur_kernels as tcur
import threads as program
from models import Checkpointed, Tiny
from tcur_kernels.adapters.waiting import InMemory
from tolerance import same_mathematics


@pytest.fixture
def switching():
    """Python switches threads every microsecond."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def adapted(model=None, **kwargs):
    model = Tiny(blocks=2).eval() if model is None else model
    adapter = tcur.adapt(model, rank=2, **kwargs)
    adapter.add("b")
    with torch.no_grad():
        for name in adapter.names:
            for core in adapter._cores(name).values():
                core.normal_(std=0.5)
    return model, adapter, torch.randn(2, 7, 6)


def results_of(number, run):
    """What ``run`` returns, or raises, in so many threads that begin together."""
    start = threading.Barrier(number)

    def one(index):
        start.wait()
        try:
            return run(index)
        except Exception as error:
            return error

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(one, range(number)))


@pytest.mark.filterwarnings("ignore:state_dict. the model is merged")
@pytest.mark.parametrize("seed", [0, 1, 2, 14])
def test_scripts_of_operations(seed):
    """Served, trained, stored, switched, loaded, saved and merged at the same time."""
    counts, wrong = program.one_round(seed, operations=12)
    assert not wrong, wrong[0]
    assert counts["right"] + counts["refused"] == counts["tried"]
    assert counts["right"] > counts["tried"] / 2


class Meeting(nn.Module):
    """Two adapted layers, between which a call waits for another thread."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.inside, self.go_on = threading.Event(), threading.Event()

    def forward(self, x):
        x = self.first(x)
        self.inside.set()
        assert self.go_on.wait(60)
        return self.second(x)


CHANGES = {
    "activate": lambda adapter, path: adapter.activate("b"),
    "load": lambda adapter, path: adapter.load(path),
    "merge": lambda adapter, path: adapter.merge(),
    "change_basis": lambda adapter, path: adapter.change_basis("slices"),
    "disable": lambda adapter, path: adapter.disable().__enter__(),
}


@pytest.mark.parametrize("way", ["saved", "loaded"])
def test_no_change_while_another_thread_goes_through_the_state(way):
    model, adapter, _ = adapted(Meeting())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def meet(*args):
        model.inside.set()
        assert model.go_on.wait(60)

    if way == "saved":
        model.second.register_state_dict_pre_hook(meet)
    else:
        model.second.register_load_state_dict_post_hook(meet)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(
            *((model.state_dict,) if way == "saved" else (model.load_state_dict, state))
        )
        assert model.inside.wait(60)
        with pytest.raises(RuntimeError, match="activate: expected no other thread inside"):
            adapter.activate("b")
        assert adapter.active == "default"
        model.go_on.set()
        found = other.result()
    found = found if way == "saved" else model.state_dict()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("way", ["saved", "loaded"])
def test_state_waits_for_a_change(way):
    """A checkpoint that begins in the middle of a change has all of it."""
    model, adapter, _ = adapted()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with ThreadPoolExecutor(1) as pool:
        with adapter._changing("activate"):
            other = pool.submit(
                *((model.state_dict,) if way == "saved" else (model.load_state_dict, state))
            )
            assert not wait([other], timeout=0.2).done
        other.result(timeout=60)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.MultiheadAttention])
def test_a_call_that_begins_in_a_change_waits(kind):
    """Also where the weight is merged, which may be over when the change is."""
    model = nn.Sequential(kind(6, 6, 1) if kind is not nn.Linear else kind(6, 6)).eval()
    adapter = tcur.adapt(model, rank=2, targets="*0*")
    x = torch.randn(2, 6, 6)
    given = (x, x, x) if kind is nn.MultiheadAttention else (x,)
    adapter.merge()
    with ThreadPoolExecutor(1) as pool:
        with adapter._changing("unmerge"):
            other = pool.submit(torch.no_grad()(model[0]), *given)
            assert not wait([other], timeout=0.2).done
        other.result(timeout=60)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_no_change_while_another_thread_is_inside(change, compiled, tmp_path):
    model, adapter, x = adapted(Meeting())
    model.go_on.set()
    with torch.no_grad():
        wanted = model(x)
    adapter.save(tmp_path / "b", "b")
    model.inside.clear()
    model.go_on.clear()
    called = model
    if compiled:
        if change != "activate":
            pytest.skip("the same look at the frames")
        torch._dynamo.reset()
        called = torch.compile(model, backend="eager")
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(torch.no_grad()(called), x)
        assert model.inside.wait(60)
        try:
            with pytest.raises(RuntimeError, match=f"{change}: expected no other thread inside"):
                CHANGES[change](adapter, tmp_path / "b")
        finally:
            model.go_on.set()
        y = other.result()
    assert same_mathematics(y, wanted)
    with torch.no_grad():
        assert torch.equal(model(x), wanted)  # nothing has changed
    CHANGES[change](adapter, tmp_path / "b")  # and now it may
    torch._dynamo.reset()


@pytest.mark.parametrize("ways", ["called here", "called elsewhere", "compiled", "leaf"])
@pytest.mark.parametrize("change", CHANGES)
def test_no_change_while_another_thread_is_in_a_backward(change, ways, tmp_path):
    """Kernels of it read the weights, and torch has looked at their versions before."""
    if ways != "called here" and change != "merge":
        pytest.skip("the same look at the frames")
    model, adapter, x = adapted()
    adapter.save(tmp_path / "b", "b")
    inside, go_on = threading.Event(), threading.Event()

    def meet(grad):
        inside.set()
        assert go_on.wait(60)
        return grad

    def forward(core=None):
        torch._dynamo.reset()
        called = torch.compile(model, backend="eager") if ways == "compiled" else model
        y = core if core is not None else called(x).square().sum()
        y.register_hook(meet)
        return y

    def backward(y):
        return torch.autograd.grad(y, list(adapter.parameters()), torch.ones_like(y))

    if ways == "leaf":  # nothing but a core, which is an output and an input

        def backward(core):
            return torch.autograd.grad(core, core, torch.ones_like(core))

        y = forward(next(iter(adapter.parameters())))
    else:
        y = forward() if ways == "called elsewhere" else None
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: backward(forward() if y is None else y))
        assert inside.wait(60)
        try:
            with pytest.raises(RuntimeError, match=f"{change}: expected .* in a backward"):
                CHANGES[change](adapter, tmp_path / "b")
        finally:
            go_on.set()
        assert len(other.result()) > 0
    CHANGES[change](adapter, tmp_path / "b")  # and now it may
    torch._dynamo.reset()


def test_a_backward_of_another_model_refuses_nothing():
    _, adapter, _ = adapted()
    stranger, inside, go_on = nn.Linear(3, 3), threading.Event(), threading.Event()

    def meet(grad):
        inside.set()
        assert go_on.wait(60)
        return grad

    def backward():
        y = stranger(torch.randn(2, 3))
        y.register_hook(meet)
        y.sum().backward()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(backward)
        assert inside.wait(60)
        try:
            adapter.merge()
        finally:
            go_on.set()
        other.result()


def test_disabled_until_the_last_thread_is_done():
    """One that ended had enabled the adapter for all others."""
    model, adapter, x = adapted()
    with adapter.disable(), torch.no_grad():
        plain = model(x)
    first, second = adapter.disable(), adapter.disable()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with torch.no_grad():
        assert torch.equal(model(x), plain)
        second.__exit__(None, None, None)
        assert not same_mathematics(model(x), plain)


@pytest.mark.parametrize("change", ["merge", "unmerge", "load", "disable", "change_basis"])
def test_merged_by_another_thread_between_the_question_and_the_change(change, tmp_path):
    """Whether a model is merged is asked when no other thread can change that any more."""
    _, adapter, _ = adapted()
    path = tmp_path / "b"
    adapter.save(path, "b")
    if change == "unmerge":
        adapter.merge()
    changes = {**CHANGES, "unmerge": lambda adapter, path: adapter.unmerge()}
    with ThreadPoolExecutor(1) as pool:
        with adapter._gate().held():
            other = pool.submit(changes[change], adapter, path)
            assert not wait([other], timeout=0.2).done  # it has asked, or is about to
            changes["unmerge" if change == "unmerge" else "merge"](adapter, path)
        with pytest.raises(ValueError, match=f"{change}: expected an? (un)?merged adapter"):
            other.result(60)


def test_a_call_that_begins_during_a_change_waits_for_it(monkeypatch):
    model, adapter, x = adapted()
    with torch.no_grad():
        adapter.activate("b")
        wanted = model(x)
        adapter.activate("default")
    half, write = threading.Event(), adapter._write
    others = []

    def slow(learned):
        """The cores of all stacks are exchanged; what else is trained is not yet."""
        others.append(pool.submit(torch.no_grad()(model), x))
        assert not half.wait(0.2)
        assert not others[0].done()
        write(learned)

    monkeypatch.setattr(adapter, "_write", slow)
    with ThreadPoolExecutor(1) as pool:
        adapter.activate("b")
        assert torch.equal(others[0].result(60), wanted)


def test_a_batch_that_ends_up_in_a_merged_model_is_refused():
    model, adapter, x = adapted()
    cores = adapter.stack_cores(["default", "b"])
    with adapter.batch(cores, torch.tensor([0, 1])):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(adapter.merge).result()
        with pytest.raises(ValueError, match="batch: expected an unmerged adapter until its end"):
            model(x)
    adapter.unmerge()


def test_contexts_that_are_carried_to_another_thread():
    """asyncio.to_thread carries a batch, which eager code sees and a compiler does not."""
    torch._dynamo.reset()
    model, adapter, x = adapted()
    cores, ids = adapter.stack_cores(["default", "b"]), torch.tensor([1, 0])
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        own = compiled(x)
        with adapter.batch(cores, ids):
            wanted = model(x)

    async def main():
        with adapter.batch(cores, ids):
            return [await asyncio.to_thread(torch.no_grad()(m), x) for m in (model, compiled)]

    for y in asyncio.run(main()):
        assert same_mathematics(y, wanted)
        assert not same_mathematics(y, own)
    with torch.no_grad():
        assert same_mathematics(compiled(x), own)
    torch._dynamo.reset()


def test_what_was_started_in_a_batch_does_not_outlive_it():
    model, adapter, x = adapted()
    cores, ids = adapter.stack_cores(["default", "b"]), torch.tensor([1, 0])
    with adapter.batch(cores, ids):
        context = contextvars.copy_context()
        assert context.run(model, x).shape == (2, 5)
    with pytest.raises(RuntimeError, match="batch: expected one that is open, got one that ended"):
        context.run(model, x)
    assert model(x).shape == (2, 5)


def test_a_batch_that_another_thread_closes_is_closed_for_eager_code():
    model, adapter, x = adapted()
    with torch.no_grad():
        own = model(x)
    batch = adapter.batch(adapter.stack_cores(["b"]), torch.tensor([0, 0]))

    def inside():
        batch.__enter__()
        with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="different Context"):
            pool.submit(batch.__exit__, None, None, None).result()
        with torch.no_grad():
            return model(x)

    assert torch.equal(contextvars.copy_context().run(inside), own)


@pytest.mark.parametrize("mode", ["materialized", "factored"])
def test_a_base_that_changed_is_noticed_by_all_threads(mode, switching):
    """The first that sees it takes C and R again; the others wait for that."""
    for seed in range(3):
        torch.manual_seed(seed)
        model, _, x = adapted(nn.Sequential(*[nn.Linear(6, 6) for _ in range(6)]), mode=mode)
        model(x)
        other = [torch.randn(6, 6) for _ in model]
        with torch.no_grad():
            for layer, weight in zip(model, other, strict=True):
                layer.base_weight.copy_(weight)
        found = results_of(4, lambda _, m=model, x=x: torch.no_grad()(m)(x))
        with torch.no_grad():
            wanted = model(x)
        assert all(isinstance(y, torch.Tensor) and torch.equal(y, wanted) for y in found), found


def test_no_thread_takes_a_base_for_known_while_another_looks(monkeypatch):
    """C and R are not yet those of the new weights. (The first layer compares a number, too.)"""
    model, adapter, x = adapted(nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)]))
    model(x)
    (stack,) = adapter.stacks.values()
    take, known = stack.base._take, []

    def slow():
        known.extend(stack.base.knows(place) for place in stack.places[1:])
        take()

    monkeypatch.setattr(stack.base, "_take", slow)
    with torch.no_grad():
        for layer in model:
            layer.base_weight.normal_()
    model(x)
    assert known == [False] * 2
    assert all(stack.base.knows(place) for place in stack.places)


def test_cores_that_come_at_the_same_time_stay_apart():
    """Two adapters were once kept under one number, and the first of them was gone."""
    waiting, numbers = InMemory(), []

    class Late:
        """A core while whose copy is made another thread puts one."""

        def to(self, *args, **kwargs):
            with ThreadPoolExecutor(1) as pool:
                numbers.append(pool.submit(waiting.put, {"s": torch.tensor(1)}).result())
            return torch.tensor(0)

    numbers.append(waiting.put({"s": Late()}))
    assert [waiting.get(number)["s"].item() for number in numbers] == [1, 0]


def test_checkpoints_of_several_threads():
    """Each thread trains in a batch of its own; the other's must not be taken for its forward."""
    model, adapter, x = adapted()
    model = Checkpointed(model, use_reentrant=False)
    values = adapter.stack_cores(["default", "b"])

    def gradients(first):
        own = {name: core.clone().requires_grad_() for name, core in values.items()}
        with adapter.batch(tcur.StackedCores(own), torch.tensor([first, 1 - first])):
            y = model(x)
            if meeting is not None:
                meeting.wait(60)  # both have run forward
            y.sum().backward()
        return {name: core.grad for name, core in own.items()}

    meeting = None
    wanted = [gradients(0), gradients(1)]
    meeting = threading.Barrier(2)
    for found, own in zip(results_of(2, gradients), wanted, strict=True):
        assert not isinstance(found, Exception), found
        assert all(torch.equal(found[name], own[name]) for name in own)
    gc.collect()
