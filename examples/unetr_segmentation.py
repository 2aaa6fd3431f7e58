"""Adapts a 3D segmentation transformer to a new scanner and a new structure from five volumes.

A UNETR is trained on a source domain. It is then adapted to a target domain in several ways, with
the same volumes, steps, order and decoder learning rate:

* decoder-only: the transformer is frozen, and the convolutional decoder is trained;
* tCURLoRA: the decoder is trained, and so are the small cores U of W + alpha * (C * U * R);
* output layer only, core + output layer: the same pair, but only the last layer of the decoder is
  trained. This shows the effect of the cores by itself.

The report has Dice and HD95 on held-out target volumes, trained parameters, seconds per step, peak
memory, and the norms of the cores and of their gradients over the training. Then the adapter is
loaded into a fresh base model and merged, and the predictions are compared.

Without arguments the data come from `brain_domains` (real anatomy, nothing is downloaded) and the
UNETR is pretrained here, all within a few minutes on a CPU. The pretrained UNETR is kept for the
next run. With your own data and your own UNETR::

    python examples/unetr_segmentation.py --data dataset.json --pretrained unetr.pt \\
        --img-size 96 96 96 --feature-size 16 --hidden-size 768 --mlp-dim 3072 --num-heads 12 \\
        --in-channels 1 --out-channels 14 --spacing 1.5 1.5 2.0

``dataset.json`` is a Decathlon-style list: "training" is for adapting, "validation" for the report.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import brain_domains
import kept_pretraining
import tcur_kernels as tcur
from progress import Whole
from segmentation_data import build_unetr, fail, load_volumes, read_section
from segmentation_report import draw_curves, draw_slices, table
from segmentation_training import (
    METHODS,
    PRETRAINING,
    PROBE,
    Job,
    Report,
    evaluate,
    in_own_process,
    predict,
    settle,
)

VOLUME_SECONDS, EVALUATION_SECONDS = 0.2, 0.1  # per volume on two cores, for the progress


def main() -> None:
    """Runs every seed, then writes results.json and prints the table."""
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    print(f"UNETR segmentation: zero-shot, {', '.join(METHODS[m].label for m in args.methods)}")
    print(f"seeds {' '.join(map(str, args.seeds))}, device {args.device}, output {args.output}\n")
    settle(args)
    whole = Whole(sum(work(args, seed) for seed in args.seeds))
    runs = [run_seed(args, seed, whole) for seed in args.seeds]
    seconds = time.perf_counter() - started
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    results = {"settings": settings, "seconds": seconds, "runs": runs}
    finite = json.loads(json.dumps(results), parse_constant=lambda _: None)  # JSON has no nan
    (args.output / "results.json").write_text(json.dumps(finite, indent=1))
    print("\n" + table(runs))
    for run in runs:
        for state, difference in run.get("round_trip", {}).items():
            print(f"seed {run['seed']}, adapter {state}: logits differ by {difference:.2g} at most")
    print(f"\n{seconds:.0f} s in all; results.json, slices.png and curves.png are in {args.output}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line; an error ends the program with a message."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/unetr_demo"))
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="each has its own training order and, in the demo, subjects and pretraining",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        default=Path("runs/pretrained"),
        help="folder where the UNETRs that the demo pretrains are kept for the next run",
    )
    parser.add_argument("--smoke", action="store_true", help="everything once, tiny and fast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    data = parser.add_argument_group("your data and model")
    data.add_argument("--data", type=Path, help="Decathlon-style datalist JSON of the target")
    data.add_argument("--pretrained", type=Path, help="state dict of a UNETR")
    data.add_argument("--volumes", type=int, default=5, help="training volumes to adapt with")
    data.add_argument("--spacing", type=float, nargs=3, default=[2.0, 2.0, 4.0], metavar="MM")
    data.add_argument(
        "--mirror",
        type=int,
        nargs="*",
        default=[],
        choices=(0, 1, 2),
        help="axes that training may mirror; the demo's structures have a side, so none",
    )

    size = parser.add_argument_group("UNETR")
    size.add_argument("--img-size", type=int, nargs=3, default=[96, 96, 16], metavar="VOXELS")
    size.add_argument("--feature-size", type=int, default=4)
    size.add_argument("--hidden-size", type=int, default=192)
    size.add_argument("--mlp-dim", type=int, default=384)
    size.add_argument("--num-heads", type=int, default=6)
    size.add_argument("--in-channels", type=int, default=1)
    size.add_argument("--out-channels", type=int, default=2)

    train = parser.add_argument_group("training")
    methods = ["decoder", "tcurlora", "head", "core"]
    train.add_argument("--methods", nargs="+", choices=METHODS, default=methods)
    train.add_argument("--pretrain-steps", type=int, default=250)
    train.add_argument("--pretrain-lr", type=float, default=2e-3)
    train.add_argument("--steps", type=int, default=120)
    train.add_argument("--decoder-lr", type=float, default=5e-3)
    train.add_argument("--core-lr", type=float, default=1e-2)
    train.add_argument("--vit-lr", type=float, default=1e-3, help="where the ViT itself trains")
    train.add_argument("--rank", type=int, default=8)
    train.add_argument("--selection", choices=("norm", "uniform"), default="norm")
    train.add_argument("--alpha", type=float, default=1.0)
    args = parser.parse_args(argv)

    if (args.data is None) != (args.pretrained is None):
        given, missing = ("--data", "--pretrained") if args.data else ("--pretrained", "--data")
        parser.error(f"{given} expects {missing} beside it, which is missing")
    for name in ("data", "pretrained"):
        path = getattr(args, name)
        if path is not None and not path.is_file():
            parser.error(f"--{name}: expected a file, got {path}, which does not exist")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        parser.error(f"--device: expected one torch has here, got {args.device} ({reason})")
    if any(size % 16 or size <= 0 for size in args.img_size):
        parser.error(f"--img-size: expected multiples of UNETR's patch 16, got {args.img_size}")
    if args.hidden_size % args.num_heads:
        parser.error(
            f"--num-heads: expected a divisor of --hidden-size {args.hidden_size}, "
            f"got {args.num_heads}"
        )
    for name in ("volumes", "pretrain_steps", "steps", "rank", "spacing"):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) <= 0:
            parser.error(f"--{name.replace('_', '-')}: expected more than 0, got {values}")
    if args.smoke:
        args.pretrain_steps, args.steps, args.volumes = 3, 3, 2
        if args.data is None:
            args.img_size, args.spacing = [32, 32, 16], [6.0, 6.0, 4.0]
            args.hidden_size, args.mlp_dim, args.num_heads = 24, 48, 3
    if args.rank > min(args.hidden_size, args.mlp_dim):
        narrowest = min(args.hidden_size, args.mlp_dim)
        parser.error(f"--rank: expected at most {narrowest}, the narrowest layer, got {args.rank}")
    return args


def work(args: argparse.Namespace, seed: int) -> float:
    """The approximate seconds of `run_seed`, summed over its stages; only ratios matter."""
    seconds = args.steps * sum(METHODS[method].seconds for method in args.methods)
    if args.data is not None:
        volumes = len(read_section(args.data, "validation"))
    else:
        source, target = demo_counts(args)
        volumes = target["validation"]
        seconds += VOLUME_SECONDS * sum(target.values())
        if kept_pretraining.find(args, seed) is None:
            seconds += VOLUME_SECONDS * sum(source.values())
            seconds += args.pretrain_steps * PRETRAINING.seconds
    return seconds + (len(args.methods) + 1) * volumes * EVALUATION_SECONDS


def run_seed(args: argparse.Namespace, seed: int, whole: Whole) -> dict[str, Any]:
    """Runs one seed: data, base model, every method, evaluation, round trip and pictures."""
    folder = args.output / f"seed{seed}" if len(args.seeds) > 1 else args.output
    folder.mkdir(parents=True, exist_ok=True)
    if args.data is None:
        datalist, base, pretraining = make_demo(args, seed, folder, whole)
    else:
        datalist, base, pretraining = args.data, args.pretrained, None
    entries = read_section(datalist, "training")
    if len(entries) < args.volumes:
        fail("--volumes", f"at most the {len(entries)} training volumes", args.volumes)
    entries, held_out = entries[: args.volumes], read_section(datalist, "validation")

    reports: dict[str, Report] = {}
    adapters: dict[str, tcur.Adapter] = {}
    models = {"zero-shot": build_unetr(args, base)}
    for method in args.methods:
        file = folder / f"{method}.safetensors"
        job = Job(method, seed, entries, held_out, base, file, whole)
        label = METHODS[method].label
        reports[label] = in_own_process(args, job)
        model = build_unetr(args, base)
        if METHODS[method].cores:
            adapters[method] = tcur.load_adapter(model, file)
        else:
            model.load_state_dict(load_file(file), strict=False)
        models[label] = model

    volumes = load_volumes(args, held_out, augment=False)
    evaluations = len(models) * len(held_out) * EVALUATION_SECONDS
    scores = {
        name: evaluate(args, model, volumes)
        for name, model in whole.track("evaluation", models.items(), len(models), evaluations)
    }
    run: dict[str, Any] = {"seed": seed, "scores": scores}
    run["reports"] = {name: asdict(report) for name, report in reports.items()}
    run["pretraining"] = asdict(pretraining) if pretraining else None
    if "tcurlora" in args.methods:
        trained = load_file(folder / PROBE)["logits"]
        run["round_trip"] = round_trip(args, adapters["tcurlora"], volumes[0]["image"], trained)
        draw_curves(reports, folder / "curves.png")
    draw_slices(args, models, volumes, folder / "slices.png")
    return run


def demo_counts(args: argparse.Namespace) -> tuple[dict[str, int], dict[str, int]]:
    """Volumes per section of the source and of the target domain."""
    source = {"training": 2 if args.smoke else 24, "validation": 2}
    return source, {"training": args.volumes, "validation": 2 if args.smoke else 8}


def make_demo(
    args: argparse.Namespace, seed: int, folder: Path, whole: Whole
) -> tuple[Path, Path, Report]:
    """Writes both domains and pretrains a UNETR; returns the target datalist and the weights."""
    in_source, in_target = demo_counts(args)

    def write(domain: brain_domains.Domain, counts: dict[str, int]) -> Path:
        def track(
            label: str, subjects: Sequence[brain_domains.Subject], count: int
        ) -> Iterable[brain_domains.Subject]:
            return whole.track(label, subjects, count, VOLUME_SECONDS * count)

        return brain_domains.write_domain(folder / domain.name, domain, counts, seed, track)

    def pretrain(weights: Path) -> Report:
        source = write(brain_domains.SOURCE, in_source)
        sections = [read_section(source, section) for section in ("training", "validation")]
        return in_own_process(args, Job("pretrain", seed, *sections, None, weights, whole))

    target = write(brain_domains.TARGET, in_target)
    kept = kept_pretraining.find(args, seed)
    if kept is None:
        return target, *kept_pretraining.keep(args, seed, pretrain)
    print(f"pretraining: kept from an earlier run, {kept[0]}")
    return target, *kept


def round_trip(
    args: argparse.Namespace, adapter: tcur.Adapter, image: Tensor, trained: Tensor
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
        logits = predict(args, model, image).cpu()
        differences[name] = (logits - trained).abs().max().item()
        if not torch.allclose(logits, trained, rtol=1e-3, atol=1e-3 * trained.abs().max().item()):
            raise RuntimeError(
                f"the {name} adapter predicts something else than the trained one: "
                f"logits differ by {differences[name]:.2g}"
            )
    return differences


if __name__ == "__main__":
    main()
