"""Trainings in processes of their own: some at once, each on one thread.

A process is forked once data and pretrained model are loaded. So it starts at once, its peak memory
is its own, and nothing that goes wrong in it reaches the others.
"""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS = 0.2  # between two looks for a signal

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


class _Interrupts:
    """Takes note of signals, to be acted on where nothing is half done.

    Python can raise an error from a signal in any line, also in one of its own whose errors are
    lost. A second signal acts as it does without this.
    """

    def __init__(self) -> None:
        self._asked = False
        self._kept = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def _note(self, number: int, frame: object) -> None:
        self._asked = True
        signal.signal(number, signal.default_int_handler)

    def check(self) -> None:
        """Raises KeyboardInterrupt if there was a signal."""
        if self._asked:
            raise KeyboardInterrupt

    def end(self) -> None:
        """Lets signals act as before."""
        for number, handler in self._kept.items():
            signal.signal(number, handler)


def run(
    works: Iterable[tuple[Any, Callable[[], Result]]], jobs: int
) -> Iterator[tuple[Any, Result | EndedError]]:
    """Runs works in forked processes, at most ``jobs`` at once.

    ``works`` is read as processes become free, in this process. Closing the iterator stops all
    processes.

    Yields:
        What names a work, and its result, in the order in which they end.

    Raises:
        KeyboardInterrupt: there was an interrupt, or a signal to terminate.
    """
    context = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[Any, Any]] = {}
    rest, interrupts = iter(works), _Interrupts()
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
            for receiver in wait(list(running), _SECONDS):
                assert isinstance(receiver, Connection)
                name, process = running.pop(receiver)
                yield name, _received(receiver, process)
            interrupts.check()
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
        interrupts.end()


def _received(receiver: Connection, process: Any) -> Result | EndedError:
    try:
        result: Result | EndedError = receiver.recv()
    except EOFError:
        process.join()
        return EndedError(f"the process ended with {process.exitcode}; -9 is a lack of memory")
    process.join()
    return result


def _send(work: Callable[[], Result], sender: Connection) -> None:
    """What a process does. Its parent alone is interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        result: Result | EndedError = work()
    except Exception as error:
        traceback.print_exc()
        result = EndedError(f"{type(error).__name__}: {error}")
    sender.send(result)
