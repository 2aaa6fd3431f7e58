"""The benchmarks of packed batches, several ranks and stores: they check, then they time."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_packed_batches(monkeypatch):
    from benchmarks import packed

    monkeypatch.setitem(packed.CASES, "small", (16, 2, 4, 3))
    names = {"rows", "tokens", "packed", "shuffled", "one_by_one", "frozen"}
    assert set(packed.measure("small", 2)) == names
    right = packed._exact
    monkeypatch.setattr(packed, "_exact", lambda *args: 1.001 * right(*args))
    with pytest.raises(RuntimeError, match="rows: row 0 is off by"):
        packed.measure("small", 2)


def test_several_ranks(monkeypatch):
    from benchmarks import ranks

    monkeypatch.setitem(ranks.CASES, "small", (16, 2, 4, 3))
    names = {"one_rank", "padded", "grouped", "four_groups", "frozen"}
    assert set(ranks.measure("small", 2)) == names
    right = ranks._exact
    monkeypatch.setattr(ranks, "_exact", lambda *args: 1.001 * right(*args))
    with pytest.raises(RuntimeError, match="one_rank: row 0 is off by"):
        ranks.measure("small", 2)


def test_stores(monkeypatch):
    from benchmarks import store, store_memory

    monkeypatch.setitem(store.CASES, "small", (12, 3, 16, 2, 5))
    assert set(store.measure("small", 2)) == {"warm", "cold", "cold_in_file", "own_file", "frozen"}
    one = 4 * (8 + 2 + 2) * 8 * 8
    for where in store_memory.WHERE:
        found = store_memory.filled("small", where)
        assert (found["device"], found["waiting"]) == (4 * one, 12 * one)
    monkeypatch.setattr(
        store_memory, "_in_child", lambda case, where: store_memory.filled(case, where)
    )
    measured = store_memory.measure("small", 2)
    assert set(measured) == {"stacked", "device", "host", "host_with_file", "file"}
    assert measured["device"].ratio == pytest.approx(4 / 12)


def test_a_store_that_serves_another_adapter_is_not_timed(monkeypatch):
    from benchmarks import store

    monkeypatch.setitem(store.CASES, "small", (12, 3, 16, 2, 5))

    def fill(filled, adapter, count):
        for index in range(count):
            filled.add(str(index), store._cores(adapter, 99))

    monkeypatch.setattr(store, "fill", fill)
    with pytest.raises(RuntimeError, match="adapter 6: row 0 is off by"):
        store.measure("small", 2)


def test_a_child_that_fails_is_told(monkeypatch):
    from benchmarks import store_memory

    def torn(command, **how):
        assert command[-2:] == ["vit_b_10000", "memory"]
        return subprocess.CompletedProcess(command, 1, "", "torn")

    monkeypatch.setattr(subprocess, "run", torn)
    with pytest.raises(RuntimeError, match="memory: the child process failed:\ntorn"):
        store_memory.measure("vit_b_10000", 2)


def test_tables_without_rows_have_their_heads():
    from benchmarks import report

    for op in ("packed", "ranks", "store", "store_memory"):
        head, line, *more = report.table(op, []).splitlines()
        assert head.startswith("| device | case |")
        assert set(line) == {"|", "-"}
        assert not more
