"""Trainings in processes of their own: some at once, each on one thread.

A process is forked once data and pretrained model are loaded. So it starts at once, its peak memory
is its own, and nothing that goes wrong in it reaches the others.
"""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

#: What a process computes: plain values by name.
Result = dict[str, Any]


class EndedError(Exception):
    """A process has ended without a result; the message says how."""


def memory_of_this_process(name: str) -> float:
    """Megabytes of a field of Linux's ``/proc/self/status``, such as ``VmRSS`` or ``VmHWM``."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        field, _, value = line.partition(":")
        if field == name:
            return int(value.split()[0]) / 1024
    raise KeyError(name)


def reset_peak() -> None:
    """Lets the peak of this process's memory start at what it has now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def run(
    works: Iterable[tuple[Any, Callable[[], Result]]], jobs: int
) -> Iterator[tuple[Any, Result | EndedError]]:
    """Runs works in forked processes, at most ``jobs`` at once.

    ``works`` is read as processes become free, in this process.

    Yields:
        What names a work, and its result, in the order in which they end.

    Raises:
        Whatever ends the caller: all processes are stopped first.
    """
    context = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[Any, Any]] = {}
    rest = iter(works)
    try:
        while True:
            for name, work in itertools.islice(rest, jobs - len(running)):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_send, args=(work, sender), daemon=True)
                process.start()
                sender.close()
                running[receiver] = name, process
            if not running:
                return
            for receiver in wait(list(running)):
                assert isinstance(receiver, Connection)
                name, process = running.pop(receiver)
                yield name, _received(receiver, process)
    finally:
        for _, process in running.values():
            process.kill()


def _received(receiver: Connection, process: Any) -> Result | EndedError:
    try:
        result: Result | EndedError = receiver.recv()
    except EOFError:
        process.join()
        return EndedError(f"the process ended with {process.exitcode}; -9 is a lack of memory")
    process.join()
    return result


def _send(work: Callable[[], Result], sender: Connection) -> None:
    """What a process does. Its parent alone listens to interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sender.send(work())
