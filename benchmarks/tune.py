"""``python -m benchmarks.tune``: times launch parameters on this GPU, rewrites the launch table.

For each kernel whose time matters, candidates around its row are checked against plain torch, timed
in turn, and the fastest takes the row's place, with the measurement as its reason. Rows are written
for this device's architecture; those of other architectures stay as they are. ``--list`` shows the
candidates, and needs no GPU.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from unittest import mock

import torch

import tcur_kernels as tcur
from tcur_kernels.triton import launch

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


def candidates(row: launch.Row) -> Iterator[launch.Row]:
    """The row itself first, then its neighbours: other tiles, warps and stages."""
    yield row
    choices: dict[str, set[int]] = {"warps": {4, 8, 16}, "stages": {1, 2, 3}}
    for name, least in (("rows", 16), ("cols", 16), ("bins", 8), ("slices", 16), ("span", 32)):
        value = getattr(row, name)
        if value >= least:
            choices[name] = {max(least, value // 2), value, value * 2}
    for values in itertools.product(*(sorted(c) for c in choices.values())):
        changed = replace(row, **dict(zip(choices, values, strict=True)))
        if changed != row and changed.rows * max(1, changed.cols) <= 16384:
            yield changed


def shape_of(row: launch.Row) -> tuple[int, int, int, int]:
    """The case to tune a row on."""
    long = LONG.get(row.kernel, OTHERWISE)
    return SHAPES[row.kernel].get(row.n3_max, long)


def workload(row: launch.Row, device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """What runs the kernel of a row, and the same in plain torch."""
    n3, n1, n2, rank = shape_of(row)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device) / rank**0.5

    factors = tcur.CURFactors(normal(n3, n1, rank), normal(n3, rank, n2))
    core, weight = normal(n3, rank, rank), normal(n3, n1, n2)
    if row.kernel == "materialize":
        out = torch.empty_like(weight)

        def run(backend: str) -> object:
            return tcur.materialize(weight, factors, core, out=out, backend=backend).clone()
    elif row.kernel == "core_grad_dense":

        def run(backend: str) -> object:
            op = getattr(torch.ops.tcur, f"core_grad_dense_{backend}")
            return op(weight, *factors.packed())
    else:
        x, grad_y = normal(TOKENS, n2), normal(TOKENS, n1)

        def run(backend: str) -> object:
            if row.kernel == "diagonal_blocks":
                op = getattr(torch.ops.tcur, f"core_grad_tokens_{backend}")
                return op(x, grad_y, *factors.packed(), n3, 0, 1)
            return tcur.cur_linear(x, weight[0], None, factors, core, 0, backend=backend)

    return lambda: run("triton"), lambda: run("reference")


def median_ms(run: Callable[[], object], rounds: int) -> float:
    """Median time by device events, after a warm-up."""
    times = []
    for round_ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if round_ >= 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def tune(row: launch.Row, arch: str, rounds: int) -> launch.Row:
    """The fastest of the candidates that are right, for this architecture."""
    run, plain = workload(row, "cuda")
    exact = plain()
    best, best_ms, before_ms = row, float("inf"), float("inf")
    for candidate in candidates(row):
        rows = tuple(candidate if other is row else other for other in launch.table())
        with mock.patch.object(launch, "table", return_value=rows):
            try:
                result = run()
            except Exception as error:  # out of shared memory, or a tile that cannot be compiled
                print(f"  {candidate.kernel}: {type(error).__name__}")
                continue
            difference = float((result - exact).norm() / exact.norm())  # type: ignore[operator]
            if not difference < 1e-5:
                raise RuntimeError(f"{candidate} is wrong by {difference:.2g}")
            ms = median_ms(run, rounds)
        before_ms = ms if candidate is row else before_ms
        if ms < best_ms:
            best, best_ms = candidate, ms
    reason = f"tuned on {torch.cuda.get_device_name()}: {best_ms:.3g} ms against {before_ms:.3g}"
    return replace(best, arch=arch, reason=reason)


def write(rows: list[launch.Row], path: Path = TABLE) -> None:
    """Writes a table, beside its place first."""
    part = path.with_suffix(".part")
    with open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(launch.Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row)
            writer.writerow({name: "" if value == 0 else value for name, value in values.items()})
    part.replace(path)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--kernel", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=20, help="timed runs per candidate")
    parser.add_argument("--list", action="store_true", help="show the candidates and stop")
    args = parser.parse_args()
    if not args.list and not torch.cuda.is_available():
        raise SystemExit("benchmarks.tune: no GPU to time on; --list shows the candidates")
    arch = launch.arch_of(torch.device("cpu" if args.list else "cuda"))
    used = {launch.row(row.kernel, arch, row.n3_max or 1 << 20) for row in launch.table()}
    chosen = [row for row in launch.table() if row in used and row.kernel in SHAPES]
    chosen = [row for row in chosen if not args.kernel or row.kernel in args.kernel]
    if args.list:
        for row in chosen:
            print(row.kernel, shape_of(row), len(list(candidates(row))), "candidates")
        return
    tuned = {row: tune(row, arch, args.rounds) for row in chosen}
    kept = [row for row in launch.table() if row not in tuned or row.arch != arch]
    write([*kept, *tuned.values()])
    for row in tuned.values():
        print(row.kernel, row.reason)


if __name__ == "__main__":
    main()
