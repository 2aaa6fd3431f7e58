"""Adapts a 3D segmentation transformer to a new scanner and a new structure from five volumes.

A UNETR is trained on a source domain. It is then adapted to a target domain in several ways, with
the same volumes, steps, order and decoder learning rate:

* decoder-only: the transformer is frozen, and the convolutional decoder is trained;
* tCURLoRA: the decoder is trained, and so are the small cores U of W + s * (C * U * R);
* output layer only, core + output layer: the same pair, but only the last layer of the decoder is
  trained. This shows the effect of the cores by itself.

Validation volumes choose the best step of every training. The report has Dice and HD95 on test
volumes, trained parameters, seconds per step, peak memory, and the norms of the cores and of their
gradients over the training. Then the adapter is loaded into a fresh base model and merged, and the
predictions are compared.

Without arguments the data come from `brain_domains` (real anatomy, nothing is downloaded) and the
UNETR is pretrained here, all within a few minutes on a CPU. The pretrained UNETR is kept for the
next run. With your own scans and your own UNETR::

    python examples/unetr_segmentation.py --data dataset.json --pretrained unetr.pt --check
    python examples/unetr_segmentation.py --data dataset.json --pretrained unetr.pt

docs/segmentation.md walks the whole way.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tcur_kernels as tcur
from progress import Whole
from segmentation.checkpoints import read_checkpoint
from segmentation.evaluation import NotFiniteError, evaluate, predict
from segmentation.files import fail, plain_ends, write_json
from segmentation.methods import METHODS, load_trained
from segmentation.options import parse_args, training_settings
from segmentation.preparation import Recipe, load_volumes
from segmentation.report import draw_curves, draw_slices, files_written, table
from segmentation.task import (
    Task,
    demo_counts,
    demo_recipe,
    demo_seconds,
    demo_task,
    own_task,
    show_plan,
)
from segmentation.training import PROBE, Job, Report, in_own_process
from segmentation.unetr import load_unetr

EVALUATION_SECONDS = 0.1  # per volume on two cores, for the progress


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every seed, then writes results.json and prints the table."""
    args = parse_args(argv)
    with plain_ends("interrupted; the same command with --resume goes on"):
        try:
            run(args)
        except NotFiniteError as error:
            raise SystemExit(f"expected finite numbers, got NaN or Inf in {error}") from error


def run(args: argparse.Namespace) -> None:
    """Runs a command line that was parsed."""
    if args.data is not None and not args.check:
        refuse_overwriting(args)
    own = None if args.data is None else own_task(args)
    if args.check:
        print(f"\nAll volumes of {args.data} and the weights are fit for training.")
        return
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    print(f"UNETR segmentation: {', '.join(METHODS[m].label for m in args.methods)}")
    print(f"seeds {' '.join(map(str, args.seeds))}, device {args.device}, output {args.output}\n")
    if own is None:
        show_plan(args, demo_recipe(args), demo_recipe(args).architecture.build())
    if args.smoke:
        torch.set_num_threads(1)
    whole = Whole(sum(work(args, seed, own) for seed in args.seeds))
    runs, recipe = [], None
    for seed in args.seeds:
        folder = args.output / f"seed{seed}" if len(args.seeds) > 1 else args.output
        folder.mkdir(parents=True, exist_ok=True)
        task = own or demo_task(args, seed, folder, whole)
        runs.append(run_seed(args, seed, task, folder, whole))
        recipe = task.recipe
    assert recipe is not None
    seconds = time.perf_counter() - started
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    results = {"settings": settings, **recipe.as_metadata(), "seconds": seconds, "runs": runs}
    write_json(args.output / "results.json", results)
    print(f"\n{table(runs, recipe)}\n")
    for one in runs:
        for state, difference in one.get("round_trip", {}).items():
            print(f"seed {one['seed']}, adapter {state}: logits differ by {difference:.2g} at most")
    print(f"\n{seconds:.0f} s in all; {files_written(args.output, args.methods)}")
    if own is not None:
        print("next: python examples/predict.py --help, or docs/segmentation.md")


def refuse_overwriting(args: argparse.Namespace) -> None:
    """Refuses to train anew where a training left its results."""
    if args.resume or args.overwrite:
        return
    for method in args.methods:
        for ending in (".safetensors", "_last.safetensors", "_state.pt", ".json"):
            for file in (
                args.output / f"{method}{ending}",
                *args.output.glob(f"seed*/{method}{ending}"),
            ):
                if file.exists():
                    wanted = "a folder without results (--resume goes on, --overwrite starts anew)"
                    fail("--output", wanted, file)


def work(args: argparse.Namespace, seed: int, own: Task | None) -> float:
    """The approximate seconds of a seed, summed over its stages; only ratios matter."""
    seconds = args.steps * sum(METHODS[method].seconds for method in args.methods)
    if own is None:
        seconds += demo_seconds(args, seed)
        volumes = demo_counts(args)[1]["test"]
    else:
        volumes = len(own.scored)
    return seconds + (len(args.methods) + 1) * volumes * EVALUATION_SECONDS


def run_seed(
    args: argparse.Namespace, seed: int, task: Task, folder: Path, whole: Whole
) -> dict[str, Any]:
    """Runs one seed: every method, evaluation, round trip and pictures."""
    recipe, sections = task.recipe, task.sections
    checkpoint = read_checkpoint(task.base, recipe.entry)

    def fresh() -> nn.Module:
        model, _ = load_unetr(recipe.architecture, checkpoint, recipe.new_head)
        return model.to(args.device)

    reports: dict[str, Report] = {}
    adapters: dict[str, tcur.Adapter] = {}
    models = {} if recipe.new_head else {"zero-shot": fresh()}
    for method in args.methods:
        job = Job(
            method,
            seed,
            recipe,
            training_settings(args),
            sections["training"],
            sections["validation"],
            task.base,
            folder,
            whole,
            args.resume,
        )
        label = METHODS[method].label
        reports[label] = in_own_process(job)
        models[label] = fresh()
        adapter = load_trained(models[label], job.best)
        if adapter is not None:
            adapters[method] = adapter

    volumes = load_volumes(recipe, task.scored)
    evaluations = len(models) * len(volumes) * EVALUATION_SECONDS
    scores = {
        name: evaluate(recipe, model, volumes)
        for name, model in whole.track("evaluation", models.items(), len(models), evaluations)
    }
    run: dict[str, Any] = {"seed": seed, "scores": scores}
    run["reports"] = {name: asdict(report) for name, report in reports.items()}
    run["pretraining"] = asdict(task.pretraining) if task.pretraining else None
    run["scored"] = "test" if "test" in sections else "validation"
    run["volumes"] = len(volumes)
    if "tcurlora" in args.methods:
        image = load_volumes(recipe, sections["validation"][:1])[0]["image"]
        trained = load_file(folder / PROBE)["logits"]
        run["round_trip"] = round_trip(recipe, adapters["tcurlora"], image, trained)
    draw_curves(reports, folder / "curves.png")
    draw_slices(recipe, models, volumes, folder / "slices.png")
    return run


def round_trip(
    recipe: Recipe, adapter: tcur.Adapter, image: Tensor, trained: Tensor
) -> dict[str, float]:
    """Largest differences from the trained model's logits after loading, merging, unmerging."""
    model, differences = adapter.model, {}
    for name, change in (
        ("loaded", None),
        ("merged", adapter.merge),
        ("unmerged", adapter.unmerge),
    ):
        if change is not None:
            change()
        logits = predict(recipe, model, image).cpu()
        differences[name] = (logits - trained).abs().max().item()
        if not torch.allclose(logits, trained, rtol=1e-3, atol=1e-3 * trained.abs().max().item()):
            raise RuntimeError(
                f"the {name} adapter predicts something else than the trained one: "
                f"logits differ by {differences[name]:.2g}"
            )
    return differences


if __name__ == "__main__":
    main()
