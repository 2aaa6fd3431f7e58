"""``python -m benchmarks.tune``: times launch parameters on this GPU, rewrites the launch table.

For each kernel whose time matters, it tries candidates around the present row, the nearest first.
Candidates are compared with plain torch and timed as CUDA graphs. The best ones then take turns,
and the fastest replaces the row, with the measurement as its reason. Every row gets an equal share
of ``--seconds``, and the table is written after each row. Rows are written for this device's
architecture; those for other architectures stay. ``--list`` shows the candidates without a GPU.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import tcur_kernels as tcur
from tcur_kernels.files.whole import replacing
from tcur_kernels.operators.triton import launch

from .gpu_clock import ROUNDS, Clock, Contender, Ready, captured, first_line

TABLE = Path(launch.__file__).with_name("launch.csv")
#: kernel -> (n3, n1, n2, rank) to tune each of its rows on, by the row's n3_max.
SHAPES = {
    "materialize": {4: (2, 4096, 4096, 8), 16: (12, 3072, 768, 8), 64: (48, 768, 768, 8)},
    "core_grad_dense": {4: (2, 4096, 4096, 8)},
    "product": {},
    "apply": {},
    "diagonal_blocks": {},
}
LONG = {"materialize": (128, 4096, 4096, 8)}
OTHERWISE = (48, 768, 768, 8)
TOKENS = 4096
LIMIT = 1e-5  # largest relative error
KEPT = 4  # candidates that take turns at the end, together with the row itself
WORTH = 0.98  # a candidate must take less than this fraction of the row's time to replace it


def candidates(row: launch.Row) -> Iterator[launch.Row]:
    """The row itself, then its neighbours in tiles, warps and stages, the nearest first."""
    yield row
    found = []
    choices: dict[str, set[int]] = {"warps": {4, 8, 16}, "stages": {1, 2, 3}}
    for name, least in (("rows", 16), ("cols", 16), ("bins", 8), ("slices", 16), ("span", 32)):
        value = getattr(row, name)
        if value >= least:
            choices[name] = {max(least, value // 2), value, value * 2}
    for values in itertools.product(*(sorted(c) for c in choices.values())):
        changed = replace(row, **dict(zip(choices, values, strict=True)))
        if changed != row and changed.rows * max(1, changed.cols) <= 16384:
            found.append(changed)
    yield from sorted(
        found, key=lambda other: sum(getattr(other, name) != getattr(row, name) for name in choices)
    )


def shape_of(row: launch.Row) -> tuple[int, int, int, int]:
    """The shape on which to tune a row."""
    long = LONG.get(row.kernel, OTHERWISE)
    return SHAPES[row.kernel].get(row.n3_max, long)


def workload(
    row: launch.Row, device: torch.device
) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """A function that runs the kernel of a row, and the result of plain torch."""
    n3, n1, n2, rank = shape_of(row)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device) / rank**0.5

    factors = tcur.CURFactors(normal(n3, n1, rank), normal(n3, rank, n2))
    core, weight = normal(n3, rank, rank), normal(n3, n1, n2)
    if row.kernel == "materialize":
        out = torch.empty_like(weight)

        def run(backend: str, **how: torch.Tensor) -> torch.Tensor:
            return tcur.materialize(weight, factors, core, backend=backend, **how)

        return partial(run, "triton", out=out), run("reference")
    if row.kernel == "core_grad_dense":
        name, args = "core_grad_dense", (weight, *factors.packed())
    elif row.kernel == "diagonal_blocks":
        x, grad_y = normal(TOKENS, n2), normal(TOKENS, n1)
        name, args = "core_grad_tokens", (x, grad_y, *factors.packed(), n3, 0, 1)
    else:
        x = normal(TOKENS, n2)
        call = partial(tcur.cur_linear, x, weight[0], None, factors, core, 0)
        return partial(call, backend="triton"), call(backend="reference")
    plain = getattr(torch.ops.tcur, f"{name}_reference")(*args)
    return partial(getattr(torch.ops.tcur, f"{name}_triton"), *args), plain


class Tuner:
    """Times candidates on one device as CUDA graphs; the best ones take turns."""

    def __init__(self, clock: Clock, arch: str) -> None:
        self.clock, self.arch = clock, arch

    def tune(self, row: launch.Row, until: float) -> launch.Row:
        """The fastest correct candidate among those that were tried in time."""
        run, exact = workload(row, self.clock.device)
        ready: dict[launch.Row, Ready] = {}
        ms: dict[launch.Row, float] = {}
        for candidate in candidates(row):
            if ms and self.clock.left <= until:
                break
            one = self._prepared(candidate, row, run, exact)
            if one is not None:
                ready[candidate] = one
                ms[candidate] = min(self.clock.time(one) for _ in range(3))
                for slow in sorted(ms, key=ms.__getitem__)[KEPT:]:
                    if slow != row:
                        ready.pop(slow, None)  # frees its graph, too
        if row not in ready:
            return replace(row, reason=f"{row.reason}; it failed on this device")
        found: dict[launch.Row, list[float]] = {candidate: [] for candidate in ready}
        for _ in range(ROUNDS):
            for candidate, one in ready.items():
                found[candidate].append(self.clock.time(one))
        medians = {candidate: statistics.median(times) for candidate, times in found.items()}
        best = min(medians, key=medians.__getitem__)
        if medians[best] > WORTH * medians[row]:
            best = row  # the gain is too small
        name = torch.cuda.get_device_name() if self.clock.on_gpu else "cpu"
        reason = (
            f"{len(ms)} candidates on {name}: {medians[best]:.3g} ms against {medians[row]:.3g}"
        )
        return replace(best, arch=self.arch, reason=reason)

    def _prepared(
        self,
        candidate: launch.Row,
        row: launch.Row,
        run: Callable[[], torch.Tensor],
        exact: torch.Tensor,
    ) -> Ready | None:
        rows = tuple(candidate if other is row else other for other in launch.table())

        def check() -> str | None:
            difference = float((run() - exact).norm() / exact.norm())
            return None if difference < LIMIT else f"wrong by {difference:.2g}"

        contender = Contender(candidate.kernel, "triton", lambda: [run], check=check)
        with mock.patch.object(launch, "table", return_value=rows):
            try:
                return self.clock.prepare(contender, captured)
            except Exception as error:  # too much shared memory, a tile that cannot be compiled
                print(f"  {first_line(error)[:80]}: {candidate}"[:240])
                return None


def write(rows: list[launch.Row], path: Path = TABLE) -> None:
    """Writes a table, which replaces the old one."""
    with replacing(path) as fresh, open(fresh, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(launch.Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row)
            writer.writerow({name: "" if value == 0 else value for name, value in values.items()})


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--kernel", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--seconds", type=float, default=300.0, help="for all of it")
    parser.add_argument("--table", type=Path, default=TABLE, help="the file to be written")
    parser.add_argument("--list", action="store_true", help="show the candidates and stop")
    args = parser.parse_args()
    if not args.list and not torch.cuda.is_available():
        raise SystemExit("benchmarks.tune: no GPU to time on; --list shows the candidates")
    device = torch.device("cpu" if args.list else "cuda")
    arch = launch.arch_of(device)
    used = {launch.row(row.kernel, arch, row.n3_max or 1 << 20) for row in launch.table()}
    chosen = [row for row in launch.table() if row in used and row.kernel in SHAPES]
    chosen = [row for row in chosen if not args.kernel or row.kernel in args.kernel]
    chosen.sort(key=lambda row: list(SHAPES).index(row.kernel))
    if args.list:
        for row in chosen:
            print(row.kernel, shape_of(row), len(list(candidates(row))), "candidates")
        return
    import tcur_kernels.operators.triton  # noqa: F401  (defines its operators)

    tuner = Tuner(Clock(device, time.time() + args.seconds, tiny=False), arch)
    write_tuned(tuner, chosen, args.table)


def write_tuned(tuner: Tuner, chosen: list[launch.Row], path: Path) -> None:
    """Tunes rows one after another, each for its share of the time; writes after each."""
    tuned: dict[launch.Row, launch.Row] = {}
    for place, row in enumerate(chosen):
        left = tuner.clock.left
        tuned[row] = tuner.tune(row, left - left / (len(chosen) - place))
        print(row.kernel, row.n3_max or "", tuned[row].reason, flush=True)
        kept = [other for other in launch.table() if other not in tuned or other.arch != tuner.arch]
        write([*kept, *tuned.values()], path)


if __name__ == "__main__":
    main()
