"""A store of adapters: few are on the device, all are served, and never one for another."""

import copy
import os
import threading

import pytest
import torch

import tcur_kernels as tcur
from fake_cuda import FakeStreams
from models import Tiny
from test_batch import by_rows, some_cores
from test_batch_ids import Words
from tolerance import assert_composition_close, same_mathematics

NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture
def adapter():
    torch.manual_seed(0)
    return tcur.adapt(Words(), ["more.*"], rank=2)


def filled(adapter, directory=None, **how):
    store = adapter.store(**(how or {"slots": 2}), directory=directory)
    cores = dict(zip(NAMES, some_cores(adapter, len(NAMES)), strict=True))
    for name, core in cores.items():
        store.add(name, core)
    return store, cores


def check(store, adapter, cores, names, x):
    """That each row of ``x`` is computed with the core of its name, or with the base alone."""
    with store.batch(names):
        y = adapter.model(x)
    every = [*cores.values(), {k: torch.zeros_like(c) for k, c in cores["a"].items()}]
    ids = torch.tensor([NAMES.index(name) if name else len(NAMES) for name in names])
    assert_composition_close(y, *by_rows(adapter, every, ids, x))
    return y


@pytest.mark.parametrize("waits", ["in memory", "in a file"])
def test_adapters_come_and_go_and_each_row_has_its_own(waits, adapter, tmp_path):
    directory = tmp_path if waits == "in a file" else None
    store, cores = filled(adapter, directory)
    x = torch.randn(3, 4, 6)
    seen = []
    batches = (["a", "b", "a"], ["c", None, "c"], ["b", "c", "b"], ["e", "d", None], ["a"] * 3)
    for names in (*batches, ["d", None, "d"], ["b"] * 3):
        check(store, adapter, cores, names, x)
        seen.append(store.loaded)
    assert seen == [
        ("a", "b"),
        ("b", "c"),
        ("b", "c"),
        ("e", "d"),
        ("d", "a"),
        ("a", "d"),
        ("d", "b"),
    ]
    assert (len(store), list(store), "a" in store, "x" in store) == (5, list(NAMES), True, False)
    one = sum(core.nbytes for core in cores["a"].values())
    assert (store.nbytes, store.nbytes_waiting, store.slots) == (3 * one, 5 * one, 2)
    assert repr(store) == "AdapterStore(5 adapters, 2 of them in 2 slots)"
    assert not list(tmp_path.iterdir())


def test_files_and_names_are_added_and_a_removed_place_is_used_again(adapter, tmp_path):
    store, cores = filled(adapter, tmp_path)
    with torch.no_grad():
        adapter.stacks["6x6"].core.copy_(cores["b"]["6x6"])
    adapter.save(tmp_path / "file")
    x = torch.randn(2, 4, 6)
    store.load(["a"])
    for name, entry in (("a", tmp_path / "file"), ("b", "default")):
        before = store.nbytes_waiting
        store.remove(name)
        assert name not in store.loaded
        store.add(name, entry)
        assert store.nbytes_waiting == before
    (tmp_path / "file").unlink()  # it is no longer needed
    with torch.no_grad():
        adapter.stacks["6x6"].core.zero_()  # nor are the values of the model's adapter
    check(store, adapter, cores | {"a": cores["b"]}, ["a", "b"], x)


def test_smaller_ranks_are_added(adapter):
    """By the same reader as `stack_cores`, see there."""
    store = adapter.store(slots=1)
    half = {"6x6": torch.randn(2, 2, 2, dtype=torch.float64).bfloat16()}
    store.add("half", half)
    store.load(["half"])
    (core,) = store._cores["6x6"]
    assert torch.equal(core, half["6x6"].float())


def test_slots_by_bytes(adapter):
    one = adapter.stacks["6x6"].core.nbytes
    assert adapter.store(max_bytes=4 * one + 3).slots == 3
    assert adapter.store(max_bytes=4 * one + 3).nbytes <= 4 * one + 3
    with pytest.raises(ValueError, match=f"max_bytes: expected at least {2 * one}, for one adapt"):
        adapter.store(max_bytes=2 * one - 1)


def test_tokens_and_packed_sequences_by_name(adapter):
    store, _ = filled(adapter)
    x = torch.randn(2, 3, 6)
    with store.batch([["a", "a", None], ["b", "a", "b"]], per="token"):
        y = adapter.model(x)
    names = ["a", None, "b", "a", "b"]
    with store.batch(names, cu_seqlens=torch.tensor([0, 2, 3, 4, 5, 6])):
        packed = adapter.model(x.view(6, 6))
    assert torch.equal(y.view(6, 6), packed)
    with store.batch([]):
        assert adapter.model(x[:0]).shape == (0, 3, 6)


def test_what_a_batch_uses_stays(adapter):
    store, cores = filled(adapter)
    x = torch.randn(2, 4, 6)
    with store.batch(["a", "b"]):
        before = adapter.model(x)
        with pytest.raises(
            ValueError, match="name: expected an adapter that no batch uses, got 'a'"
        ):
            store.remove("a")
        with (
            pytest.raises(
                RuntimeError, match="expected slots for 1 more adapters, got 0: other ba"
            ),
            store.batch(["c"]),
        ):
            pass
        assert store.loaded == ("a", "b")
        with store.batch(["b"]):  # it is there
            pass
        with pytest.raises(ValueError, match="expected an adapter that no batch uses, got 'b'"):
            store.remove("b")
        assert torch.equal(adapter.model(x), before)
    check(store, adapter, cores, ["c", "d"], x)
    store.remove("a")
    with pytest.raises(ValueError, match="got 'a', which is not one of its 4"):
        store.load(["a"])


def test_nothing_leaves_if_what_comes_cannot_be_read(adapter, tmp_path):
    store, _ = filled(adapter, tmp_path)
    store.load(["a", "b"])
    os.truncate(store._waiting._file, store.nbytes_waiting - 4)
    with pytest.raises(OSError, match=r"directory: expected \d+ bytes of cores, got"):
        store.load(["e"])
    assert store.loaded == ("a", "b")
    store.load(["d"])  # whose record is whole
    assert store.loaded == ("b", "d")


def test_a_full_disk_loses_no_place(adapter, tmp_path, monkeypatch):
    from tcur_kernels.adapters import waiting

    store, cores = filled(adapter, tmp_path)
    store.remove("a")
    before = store.nbytes_waiting
    with monkeypatch.context() as patched:
        patched.setattr(waiting.os, "pwrite", lambda *args: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                store.add("a", cores["a"])
    monkeypatch.setattr(waiting.os, "pwrite", in_pieces(waiting.os.pwrite))
    store.add("a", cores["a"])
    assert store.nbytes_waiting == before
    check(store, adapter, cores, ["a"], torch.randn(1, 4, 6))


def in_pieces(write):
    return lambda file, data, offset: write(file, data[:5], offset)


def test_threads_share_slots_and_none_gets_another_adapter(adapter):
    """Two slots for five adapters, two threads at a time with one each."""
    store, cores = filled(adapter)
    x = torch.randn(1, 4, 6)
    with torch.no_grad():
        wanted = {name: check(store, adapter, cores, [name], x) for name in NAMES}
    turns, wrong, added = threading.Semaphore(2), [], tcur.StackedCores(cores["a"])

    def serve(seed):
        order = torch.randperm(100, generator=torch.Generator().manual_seed(seed)) % 5
        for index in order.tolist():
            name = NAMES[index]
            with turns, torch.no_grad(), store.batch([name]):
                if not same_mathematics(adapter.model(x), wanted[name]):
                    wrong.append(name)

    def come_and_go():
        for turn in range(100):
            store.add(f"new {turn}", added)
            store.remove(f"new {turn}")

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(3)]
    threads.append(threading.Thread(target=come_and_go))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(store) == 5


def test_a_compiled_model_sees_what_was_loaded(adapter):
    store, cores = filled(adapter)
    x = torch.randn(2, 4, 6)
    torch._dynamo.reset()
    compiled = torch.compile(adapter.model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.inference_mode():
        for names in (["a", "b"], ["c", None], ["d", "d"]):
            with store.batch(names):
                y = compiled(x)
                assert same_mathematics(y, adapter.model(x))
    check(store, adapter, cores, ["d", "e"], x)  # outside of inference mode, too


def test_a_backward_after_other_cores_were_loaded_is_refused(adapter):
    store, _ = filled(adapter)
    x = torch.randn(1, 4, 6, requires_grad=True)
    with store.batch(["a"]):
        y = adapter.model(x)
    store.load(["b", "c"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_streams_wait_for_loads_and_loads_for_batches(adapter, monkeypatch):
    """On CUDA a batch may still be computed when its context has ended."""
    store, _ = filled(adapter)
    fake = FakeStreams(monkeypatch)
    for stream, names in ((1, ["a"]), (2, ["a", "b"]), (3, ["a"]), (1, ["c"])):
        fake.stream = stream
        with store.batch(names):
            fake.log.append(f"{stream} runs")
    assert [entry for entry in fake.log if "6x6" not in entry] == [
        "1 runs",
        "2 waits for event of 1",  # the end of a batch that may read what is overwritten
        "2 waits for event of 1",  # the load before this one
        "2 runs",
        "3 waits for event of 2",
        "3 runs",
        "1 waits for event of 1",
        "1 waits for event of 2",
        "1 waits for event of 3",
        "1 waits for event of 2",
        "1 runs",
    ]
    fake.capture = 7
    with (
        pytest.raises(RuntimeError, match="batch: expected no capture of a CUDA graph, got one"),
        store.batch(["a"]),
    ):
        pass


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({}, ValueError, "slots: expected either slots or max_bytes, got neither"),
        ({"slots": 1, "max_bytes": 9}, ValueError, "slots: expected either slots or max_bytes, g"),
        ({"slots": 0}, ValueError, "slots: expected at least 1, got 0"),
        ({"slots": 1.0}, TypeError, "slots: expected an int, got float"),
        ({"max_bytes": True}, TypeError, "max_bytes: expected an int, got bool"),
        ({"slots": 1, "directory": "nowhere"}, FileNotFoundError, "directory: expected a direct"),
    ],
)
def test_bad_stores(adapter, how, error, message):
    with pytest.raises(error, match=message):
        adapter.store(**how)


def test_bad_adapters_and_names(adapter, tmp_path):
    store, cores = filled(adapter)
    other = tcur.adapt(copy.deepcopy(adapter.merge(inplace=False)).double(), ["more.*"], rank=2)
    other.save(tmp_path / "other")
    for name, entry, error, message in (
        ("a", cores["a"], ValueError, "name: expected a name that is free, got 'a'"),
        (1, cores["a"], TypeError, "name: expected a str, got int"),
        ("x", tmp_path / "other", ValueError, "path: expected an adapter of this base, got one of"),
        ("x", tmp_path / "none", FileNotFoundError, "path: expected an adapter file, got none at"),
        ("x", {}, TypeError, "adapter: expected a core for stack 6x6, got none"),
        ("x", {"6x6": torch.ones(2)}, ValueError, r"adapter: expected a core \[2, 2, 2\] for sta"),
        ("x", {"6x6": torch.full((2, 2, 2), torch.inf)}, ValueError, "adapter: expected finite n"),
        ("x", {"6x6": torch.ones(2, 2, 2).double() * 1e300}, ValueError, "adapter: exp"),
    ):
        with pytest.raises(error, match=message):
            store.add(name, entry)
        assert list(store) == list(NAMES)
    for names, error, message in (
        (["a", "nobody"], ValueError, "names: expected adapters of this store, got 'nobody', whi"),
        (["a", "b", "c"], ValueError, "names: expected at most 2 adapters in a batch, as many as"),
        ("a", TypeError, "names: expected a sequence of names, got str"),
        (None, TypeError, "names: expected a sequence of names, got NoneType"),
        ([["a"], "b"], TypeError, "names: expected names of rows or of tokens, got "),
        ([["a"], ["a", "b"]], ValueError, "names: expected as many in each row, got 1 and 2"),
        ([["a", 3]], TypeError, "names: expected names or None, got int"),
        ([["a", "b"]], ValueError, r"adapter_ids: expected \[B\] with per='row', got \[1, 2\]"),
    ):
        with pytest.raises(error, match=message), store.batch(names):
            pass
        assert not +store._users
    torch.manual_seed(0)
    more = tcur.adapt(Tiny(), rank=2, train_also="head")
    for make in (lambda: more.store(slots=1), lambda: more.tenants(1)):
        with pytest.raises(ValueError, match="expected adapters of cores alone, got train_also"):
            make()


def test_a_name_that_another_thread_took_meanwhile(adapter, monkeypatch):
    store, cores = filled(adapter, slots=1)
    read, before = store._read, store.nbytes_waiting

    def meanwhile(entry):
        monkeypatch.setattr(store, "_read", read)
        store.add("x", entry)
        return read(entry)

    monkeypatch.setattr(store, "_read", meanwhile)
    with pytest.raises(ValueError, match="name: expected a name that is free, got 'x'"):
        store.add("x", cores["a"])
    assert store.nbytes_waiting == before + before // len(NAMES)
