"""Times a training step beside a neighbour: a process that keeps one core busy, or the same step.

What a neighbour costs our step is compared with what it costs the frozen model's, in which only
torch's own products and their threads run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from . import methods
from .methods import build, prepared, step_of
from .timing import Timing, interleave

METHODS = ("frozen", "tcur", "lora")
#: name -> (tokens, whether the neighbour takes the same step)
CASES = {"busy_core_216_tokens": (216, False), "same_step_216_tokens": (216, True)}
YARDSTICK = "frozen"
#: The neighbour says so when it has begun.
READY = "ready"


def measure(case: str, rounds: int) -> dict[str, Timing]:
    """Times every method alone and ("_beside") with its neighbour running."""
    tokens, is_same = CASES[case]
    base = build()
    neighbours: list[subprocess.Popen[str]] = []
    contenders: dict[str, Callable[[], object]] = {}
    try:
        for name in METHODS:
            step = step_of(prepared(name, base), tokens)
            arguments = [name, str(tokens), str(methods.WIDTH)] if is_same else []
            neighbour = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.neighbour", *arguments],
                cwd=Path(__file__).parent.parent,
                stdout=subprocess.PIPE,
                text=True,
            )
            neighbours.append(neighbour)
            assert neighbour.stdout is not None
            if neighbour.stdout.readline().strip() != READY:
                raise RuntimeError(f"the neighbour of {name} did not start")
            _stop(neighbour)
            contenders[name] = step
            contenders[f"{name}_beside"] = _beside(step, neighbour)
        return interleave(contenders, YARDSTICK, rounds)
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.communicate()


def _beside(step: Callable[[], object], neighbour: subprocess.Popen[str]) -> Callable[[], object]:
    def run() -> None:
        neighbour.send_signal(signal.SIGCONT)
        try:
            step()
        finally:
            _stop(neighbour)

    return run


def _stop(neighbour: subprocess.Popen[str]) -> None:
    """Stops it, and returns once it has stopped."""
    neighbour.send_signal(signal.SIGSTOP)
    os.waitpid(neighbour.pid, os.WUNTRACED)


def main() -> None:
    """Runs as the neighbour, until it is killed: the step of a method, or a loop on one core."""
    if len(sys.argv) > 1:
        methods.WIDTH = int(sys.argv[3])
        step = step_of(prepared(sys.argv[1], build()), int(sys.argv[2]))
        step()
    else:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        numbers = torch.zeros(1000)
        step = numbers.sin_
    print(READY, flush=True)
    while True:
        step()


if __name__ == "__main__":
    main()
