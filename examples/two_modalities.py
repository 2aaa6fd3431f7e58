"""Adapts two encoders, one per modality: what does it give if they share one stack?

A model sees a T1 and a T2 volume of the same brain (`two_modalities_volumes`). Each goes through a
3D vision transformer of its own, both of one architecture. Their tokens meet in a linear head,
which draws structures. The model is pretrained here on one scanner. It is then adapted, with five
brains, to a scanner with more noise, more bias and coarser voxels, and to another structure:

* head: the encoders are frozen, and a new head is trained;
* shared: a new head, and cores whose stacks hold the layers of both encoders, as `tcur.adapt` makes
  them by default;
* apart: a new head, and cores whose stacks hold the layers of one encoder each. There are twice as
  many stacks of half as many slices, so at one rank as many numbers are trained;
* full: everything is trained.

All methods try the same learning rates and keep the one with the best Dice on validation volumes.
Every seed has its own brains and its own pretraining. The table shows the Dice on test volumes, by
which nothing was chosen, and the difference of shared and apart, paired by seed. The adapter of
"shared" is then saved, loaded into a fresh model and merged, and the logits are compared.

    python examples/two_modalities.py --seeds 0 1 2 3 4 --rank 8
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn

import tcur_kernels as tcur
from plain_table import lay_out
from progress import Whole
from tcur_kernels.files.whole import replacing
from two_modalities_model import HEADS, TwoEncoders
from two_modalities_volumes import MODALITIES, SIZE, SOURCE, TARGET, Volumes, take

#: The layers of a transformer block by their shape, which is what makes a stack by default.
PARTS = {"attention": "attn.*", "widening": "mlp.linear1", "narrowing": "mlp.linear2"}

#: A stack for every shape and every encoder.
APART = {
    f"{modality}_{part}": [f"{modality}.blocks.*.{layers}"]
    for modality in MODALITIES
    for part, layers in PARTS.items()
}

BATCH = 4  # volumes

#: Approximate seconds on one core, for the progress: of a volume, of a step of each training.
SECONDS = {"brain": 0.25, "full": 0.04, "head": 0.013, "shared": 0.04, "apart": 0.04}


def head_only(model: TwoEncoders, rank: int) -> None:
    """Freezes the encoders."""
    model.requires_grad_(False).head.requires_grad_(True)


def shared(model: TwoEncoders, rank: int) -> tcur.Adapter:
    """Adapts with one stack for each shape, over both encoders."""
    return tcur.adapt(model, rank=rank, train_also="head")


def apart(model: TwoEncoders, rank: int) -> tcur.Adapter:
    """Adapts with one stack for each shape and each encoder."""
    return tcur.adapt(model, targets=APART, rank=rank, train_also="head")


def full(model: TwoEncoders, rank: int) -> None:
    """Trains every parameter."""
    model.requires_grad_(True)


METHODS: dict[str, Callable[[TwoEncoders, int], tcur.Adapter | None]] = {
    "head": head_only,
    "shared": shared,
    "apart": apart,
    "full": full,
}


class Stage(NamedTuple):
    """A part of a run: so many brains or steps, each of which takes so many seconds."""

    label: str
    count: int
    seconds: float


@dataclass(frozen=True)
class Course:
    """The options, the seed that is run, and the progress of all seeds."""

    args: argparse.Namespace
    seed: int
    whole: Whole

    def track(self, stage: Stage, items: Iterable[int]) -> Iterator[int]:
        """Yields the items of a stage and shows the progress."""
        label, count, seconds = stage
        return self.whole.track(f"seed {self.seed}, {label}", items, count, count * seconds)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every seed, writes results.json and prints the table."""
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    show_stacks(args)
    whole = Whole(work(args) * len(args.seeds))
    runs = [run_seed(Course(args, seed, whole)) for seed in args.seeds]
    summary = {
        "settings": {k: v for k, v in vars(args).items() if k != "output"},
        "structures": {"pretraining": SOURCE.structures, "adaptation": TARGET.structures},
        **summarise(runs),
        "runs": runs,
        "seconds": time.perf_counter() - started,
    }
    with replacing(args.output / "results.json") as fresh:
        fresh.write_text(json.dumps(summary, indent=1) + "\n")
    print(report(summary))


def show_stacks(args: argparse.Namespace) -> None:
    """Prints the stacks of both ways to adapt; the others have none."""
    for name in ("shared", "apart"):
        adapter = METHODS[name](new_model(args, len(TARGET.structures)), args.rank)
        assert adapter is not None
        print(f"{name}:")
        for stack in adapter.plan.stacks:
            print(f"  {stack.name}: {stack.n3} slices of {stack.n1} x {stack.n2}")


def new_model(args: argparse.Namespace, structures: int) -> TwoEncoders:
    """A model with random weights."""
    return TwoEncoders(structures, args.width, args.layers, args.patch)


def work(args: argparse.Namespace) -> float:
    """The approximate seconds of a seed, summed over its stages; only ratios matter."""
    brains = args.pretrain_volumes + args.volumes + 2 * args.validation_volumes + args.test_volumes
    adapting = args.steps * len(args.rates) * sum(SECONDS[name] for name in METHODS)
    return SECONDS["brain"] * brains + SECONDS["full"] * args.pretrain_steps + adapting


def run_seed(course: Course) -> dict[str, Any]:
    """Pretrains a model on brains of its own, and adapts it by every method.

    Returns:
        "seed"; "pretrained": the Dice on brains of the source that were held out; "methods": name
        -> the results of `adapt`; "round_trip": what `round_trip` returned for "shared".
    """
    args, seed = course.args, course.seed
    torch.manual_seed(seed)

    def track(scanner: str, seeds: Sequence[int]) -> Iterator[int]:
        return course.track(Stage(scanner, len(seeds), SECONDS["brain"]), seeds)

    counts = (args.pretrain_volumes, args.validation_volumes)
    old, held_out = take(SOURCE, seed, counts, track)
    base = new_model(args, len(SOURCE.structures))
    stage = Stage("pretraining", args.pretrain_steps, SECONDS["full"])
    optimise(course, base, old, args.pretrain_rate, stage)
    pretrained = dice(base, held_out)
    base.new_head(len(TARGET.structures))
    base.requires_grad_(False)

    counts = (args.volumes, args.validation_volumes, args.test_volumes)
    parts = take(TARGET, seed, counts, track)
    methods, trip = {}, {}
    for name in METHODS:
        model, adapter, methods[name] = adapt(course, name, base, parts)
        if name == "shared":
            assert adapter is not None
            file = args.output / f"shared_seed{seed}.safetensors"
            trip = round_trip(model, adapter, base, file, parts[-1].images[:BATCH])
    return {"seed": seed, "pretrained": pretrained, "methods": methods, "round_trip": trip}


def adapt(
    course: Course, name: str, base: TwoEncoders, parts: Sequence[Volumes]
) -> tuple[TwoEncoders, tcur.Adapter | None, dict[str, Any]]:
    """Adapts copies of the pretrained base by one method, at every learning rate.

    ``parts`` are the training, the validation and the test volumes.

    Returns:
        The best model by the validation volumes, the lower rate where two do equally well; its
        adapter, if the method has one; and the results: "dice" on the test volumes, "trained"
        numbers, "rate", "validation" by rate, and "seconds_per_step".
    """
    training, validation, test = parts
    args, tried = course.args, {}
    best: tuple[TwoEncoders, tcur.Adapter | None] | None = None
    seconds = chosen = 0.0
    for rate in args.rates:
        model = copy.deepcopy(base)
        adapter = METHODS[name](model, args.rank)
        stage = Stage(f"{name} {rate:g}", args.steps, SECONDS[name])
        seconds += optimise(course, model, training, rate, stage)
        tried[rate] = dice(model, validation)
        if best is None or tried[rate] > tried[chosen]:
            best, chosen = (model, adapter), rate
    assert best is not None
    model, adapter = best
    result = {
        "dice": dice(model, test),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "rate": chosen,
        "validation": {f"{rate:g}": value for rate, value in tried.items()},
        "seconds_per_step": seconds / (len(args.rates) * args.steps),
    }
    return model, adapter, result


def optimise(
    course: Course, model: nn.Module, volumes: Volumes, rate: float, stage: Stage
) -> float:
    """Trains with AdamW and a cosine decay; returns the seconds it took."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, stage.count)
    loss_of = DiceCELoss(sigmoid=True)
    generator = torch.Generator().manual_seed(course.seed)
    started = time.perf_counter()
    for _ in course.track(stage, range(stage.count)):
        batch = volumes[torch.randperm(len(volumes), generator=generator)[:BATCH]]
        loss = loss_of(model(batch.images), batch.masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - started


@torch.no_grad()
def dice(model: nn.Module, volumes: Volumes) -> float:
    """The mean of 2 |P and T| / (|P| + |T|) over volumes and structures; one nobody drew counts 1.

    P are the predicted voxels, and T the true ones.
    """
    logits = torch.cat([model(images) for images in volumes.images.split(BATCH)])
    predicted, true = logits > 0, volumes.masks > 0
    both = (predicted & true).sum(dim=(2, 3, 4))
    either = predicted.sum(dim=(2, 3, 4)) + true.sum(dim=(2, 3, 4))
    return torch.where(either > 0, 2 * both / either, 1.0).mean().item()


@torch.no_grad()
def round_trip(
    model: TwoEncoders, adapter: tcur.Adapter, base: TwoEncoders, file: Path, images: Tensor
) -> dict[str, float]:
    """Saves the adapter, loads it into a fresh base, and merges it.

    Returns:
        "loaded" and "merged": the largest differences from the logits of ``model``; "kilobytes":
        the size of the file.

    Raises:
        RuntimeError: the loaded or merged model predicts something else than ``model``.
    """
    adapter.save(file)
    fresh = copy.deepcopy(base)
    loaded = tcur.load_adapter(fresh, file)
    trained, differences = model(images), {}
    for state in ("loaded", "merged"):
        if state == "merged":
            loaded.merge()
        logits = fresh(images)
        differences[state] = (logits - trained).abs().max().item()
        if not torch.allclose(logits, trained, rtol=1e-3, atol=1e-3 * trained.abs().max().item()):
            raise RuntimeError(
                f"the {state} adapter predicts something else than the trained one: "
                f"logits differ by {differences[state]:.2g}"
            )
    return {**differences, "kilobytes": file.stat().st_size / 1024}


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over the seeds.

    Returns:
        "dice": method -> [mean, standard deviation]; "shared - apart": "each" difference, paired by
        seed, their "mean", and its "standard error". What needs two seeds is None for one.
    """
    scores = {name: [run["methods"][name]["dice"] for run in runs] for name in METHODS}
    each = [one - other for one, other in zip(scores["shared"], scores["apart"], strict=True)]
    mean, deviation = mean_and_deviation(each)
    error = None if deviation is None else deviation / math.sqrt(len(each))
    return {
        "dice": {name: mean_and_deviation(values) for name, values in scores.items()},
        "shared - apart": {"each": each, "mean": mean, "standard error": error},
    }


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the standard deviation of a sample; None for a sample of one."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def report(summary: dict[str, Any]) -> str:
    """The table, the paired difference, and what loading and merging changed."""
    runs = summary["runs"]
    rows = [("", "Dice", "trained", "rates chosen", "s/step")]
    for name, (mean, deviation) in summary["dice"].items():
        results = [run["methods"][name] for run in runs]
        rates = " ".join(f"{result['rate']:g}" for result in results)
        seconds = statistics.mean(result["seconds_per_step"] for result in results)
        trained = f"{results[0]['trained']:,}"
        rows.append((name, with_error(mean, deviation), trained, rates, f"{seconds:.3f}"))
    difference = summary["shared - apart"]
    each = ", ".join(f"{value:+.3f}" for value in difference["each"])
    worst = {state: max(run["round_trip"][state] for run in runs) for state in ("loaded", "merged")}
    pretrained = mean_and_deviation([run["pretrained"] for run in runs])
    return "\n".join(
        [
            f"\npretrained: Dice {with_error(*pretrained)} on the scanner and structures of the "
            "pretraining",
            f"adapted, Dice of {' and '.join(TARGET.structures)} on test volumes:",
            "",
            *lay_out(rows),
            "",
            f"shared - apart: {with_error(difference['mean'], difference['standard error'], '+')}"
            f"{'' if len(runs) == 1 else ' (mean ± its standard error)'}, by seed {each}",
            f"adapter of shared: logits differ by {worst['loaded']:.2g} at most when loaded, "
            f"by {worst['merged']:.2g} when merged; "
            f"{runs[0]['round_trip']['kilobytes']:.1f} KB in a file",
            f"{summary['seconds']:.0f} s in all",
        ]
    )


def with_error(value: float, error: float | None, sign: str = "") -> str:
    """A number with what stands behind its ±, if there is one."""
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--rank", type=int, default=8)
    add("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2, 1e-1], help="to try")
    add("--volumes", type=int, default=5, help="to adapt with")
    add("--validation-volumes", type=int, default=5, help="to choose the rate by")
    add("--test-volumes", type=int, default=16)
    add("--steps", type=int, default=120, help="of adaptation")
    add("--pretrain-volumes", type=int, default=48)
    add("--pretrain-steps", type=int, default=500)
    add("--pretrain-rate", type=float, default=2e-3)
    add("--width", type=int, default=64, help="of a token")
    add("--layers", type=int, default=4, help="of each encoder")
    add("--patch", type=int, nargs=3, default=[8, 8, 4], help="voxels, divisors of 48 48 16")
    add("--output", type=Path, default=Path("runs/two_modalities"))
    add("--smoke", action="store_true", help="a few steps of a tiny model, to see that it runs")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        numbers = value if isinstance(value, list) else [value]
        if name not in ("seeds", "output", "smoke") and not all(0 < n < math.inf for n in numbers):
            option = name.replace("_", "-")
            parser.error(f"--{option}: expected a finite number above 0, got {value}")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds: expected different numbers of at least 0, got {args.seeds}")
    if any(size % side for size, side in zip(SIZE, args.patch, strict=True)):
        parser.error(f"--patch: expected divisors of {SIZE}, got {args.patch}")
    if args.width % HEADS:
        parser.error(f"--width: expected a multiple of {HEADS}, got {args.width}")
    if args.rank > args.width:
        parser.error(f"--rank: expected at most --width {args.width}, got {args.rank}")
    if args.smoke:
        args.pretrain_steps, args.steps, args.rates = 3, 3, [1e-2]
        args.pretrain_volumes, args.volumes = 1, 2
        args.validation_volumes = args.test_volumes = 1
        args.width, args.layers, args.patch, args.rank = 16, 2, [16, 16, 8], 2
    return args


if __name__ == "__main__":
    main()
