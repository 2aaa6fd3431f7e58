"""Adapts MONAI's SwinUNETR to a new scanner and a new structure from five volumes.

The linear layers of the Swin transformer get cores: layers of one shape share a core U, and only
the cores are trained, in W + s * (C * U * R). The output layer is trained directly. What happens to
all other convolutions is chosen by ``--convolutions``: they are trained directly, too, or they get
cores as the linear layers do, or they stay as they are.

Without arguments the data come from `brain_domains` (real anatomy, nothing is downloaded), and a
small SwinUNETR is pretrained here, all within about two minutes on a CPU. With your own scans, and
one of MONAI's pretrained networks::

    python examples/swin_unetr_segmentation.py --data dataset.json --pretrained model_swinvit.pt

The checkpoint may hold the whole network, or its transformer alone. The program says which entries
of the file did not fit, and which parts of the network got no value from it. Those are trained
directly, whatever ``--convolutions`` says.

At the end stand the Dice before and after, and how many numbers were trained. Then the adapter is
loaded into a fresh network and merged, and the predictions are compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from tqdm import trange

import brain_domains
import tcur_kernels as tcur
from segmentation.checkpoints import SWIN_UNETR, Checkpoint, read_checkpoint
from segmentation.datalist import read_datalist
from segmentation.evaluation import evaluate, mean, predict
from segmentation.files import fail, plain_ends, save_state, whole_file, write_json
from segmentation.names import folded
from segmentation.options import add_device, check_device
from segmentation.preparation import Entry, Recipe, augmentation, load_volumes
from segmentation.swin import (
    DOWNSAMPLE,
    SwinArchitecture,
    has_head,
    load_swin,
    read_architecture,
)
from segmentation.training import segmentation_loss
from segmentation.unetr import NORMS
from segmentation.volumes import check_volumes, highest_class, median_spacing
from unetr_segmentation import round_trip

#: The SwinUNETR of the demo.
DEMO = SwinArchitecture(1, 2, (64, 64, 32), feature_size=12, window_size=4)
SMOKE = SwinArchitecture(1, 2, (64, 32, 32), feature_size=12, depths=(1,) * 4, window_size=4)
CONVOLUTIONS = {
    "train": "train them directly",
    "cores": "give them cores, like the linear layers",
    "freeze": "leave them as they are",
}
#: What gets cores with ``--convolutions cores``.
LAYERS = (nn.Linear, nn.Conv3d, nn.ConvTranspose3d)
#: The key of an adapter's metadata that says how to build the network and prepare volumes for it.
KEY = "swin_unetr"
Sections = Mapping[str, Sequence[Entry]]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/swin_unetr"), help="default %(default)s")
    add("--overwrite", action="store_true", help="replace an adapter that is in --output")
    add("--seed", type=int, default=0, help="default %(default)s")
    add("--smoke", action="store_true", help="everything once, tiny and fast, to try the set-up")
    add_device(parser)

    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, help="datalist in JSON, see docs/segmentation.md; default: the demo's")
    add("--volumes", type=int, help="training volumes to adapt with; default all, demo 5")
    add("--spacing", type=float, nargs=3, metavar="MM", help="default: median of the volumes")
    add("--intensity-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="become 0 and 1")
    add("--allow-empty", action="store_true", help="accept labels that are background everywhere")

    add = parser.add_argument_group("network").add_argument
    add("--pretrained", type=Path, help="a checkpoint of MONAI's SwinUNETR, or of its transformer")
    add("--entry", help="which network of the file to take if it holds several")
    add("--new-head", action="store_true", help="start a new output layer, for other structures")
    add("--in-channels", type=int, help="default: as the file has")
    add("--out-channels", type=int, help="classes with background; default: as file or labels have")
    add(
        "--img-size",
        type=int,
        nargs=3,
        metavar="VOXELS",
        help="window, in multiples of 32; default 96 96 96, demo 64 64 32",
    )
    add("--norm-name", choices=NORMS, help="where the weights do not tell")
    add("--downsample", choices=DOWNSAMPLE, default=DOWNSAMPLE[0], help="default %(default)s")

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, default=50, help="of one volume each; default %(default)s")
    add("--rank", type=int, default=8, help="of the cores; default %(default)s")
    add("--core-lr", type=float, default=1e-2, help="of the cores; default %(default)s")
    add("--direct-lr", type=float, default=3e-3, help="of all else; default %(default)s")
    add(
        "--convolutions",
        choices=CONVOLUTIONS,
        default="train",
        help="; ".join(f"{name}: {what}" for name, what in CONVOLUTIONS.items())
        + "; default %(default)s",
    )
    add("--pretrain-steps", type=int, default=80, help="of the demo; default %(default)s")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line; an error ends the program with a message."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_device(args.device, parser.error)
    if args.data is not None and args.pretrained is None:
        parser.error("--data expects --pretrained beside it, which is missing")
    if args.data is not None and not args.data.is_file():
        parser.error(f"--data: expected a file, got {args.data}, which does not exist")
    for name in ("volumes", "steps", "rank", "core_lr", "direct_lr", "pretrain_steps", "spacing"):
        value = getattr(args, name)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(0 < number < float("inf") for number in listed):
            parser.error(f"--{name.replace('_', '-')}: expected more than 0, got {value}")
    if args.smoke:
        args.steps = args.pretrain_steps = 3
    demo = SMOKE if args.smoke else DEMO
    if args.data is None:
        args.volumes = args.volumes or (2 if args.smoke else 5)
        args.spacing = args.spacing or ([6.0, 6.0, 4.0] if args.smoke else [3.0, 3.0, 4.0])
        args.out_channels = args.out_channels or demo.out_channels
    args.img_size = args.img_size or (demo.img_size if args.data is None else (96, 96, 96))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line."""
    args = parse_args(argv)
    with plain_ends("interrupted"):
        run(args)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs a command line that was parsed; returns what is in results.json."""
    file = args.output / "tcurlora.safetensors"
    if args.data is not None and file.exists() and not args.overwrite:
        fail("--output", "a folder without an adapter (--overwrite replaces it)", file)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.smoke:
        torch.set_num_threads(1)  # for tiny work, synchronising threads costs more than it saves
    torch.manual_seed(args.seed)
    sections = read_datalist(args.data or demo_data(args, brain_domains.TARGET))
    if args.volumes is not None:
        count = len(sections["training"])
        if count < args.volumes:
            fail("--volumes", f"at most the {count} training volumes", args.volumes)
        sections["training"] = sections["training"][: args.volumes]

    checkpoint = read_checkpoint(args.pretrained or pretrain(args), args.entry, SWIN_UNETR)
    architecture, guesses = architecture_of(args, checkpoint, sections)
    recipe = recipe_of(args, architecture, sections)
    check_volumes(recipe, sections, args.allow_empty).tell("--data", args.data)

    def base() -> tuple[nn.Module, list[str], list[str]]:
        torch.manual_seed(args.seed)
        model, notes, fresh = load_swin(architecture, checkpoint, args.new_head)
        return model.to(args.device), notes, fresh

    model, notes, fresh = base()
    for line in (*checkpoint.notes, str(architecture), *guesses, *notes):
        print(line)
    scored = load_volumes(recipe, sections.get("test", sections["validation"]))
    before = mean(evaluate(recipe, model, scored, ("dice",))["dice"])
    adapter = adapt(args, model, fresh)
    print(adapter.plan)
    adapter.metadata = metadata_of(args, recipe, architecture)
    counts = count_trained(model)
    started = time.perf_counter()
    train(args, recipe, model, load_volumes(recipe, sections["training"]), args.steps, "tCURLoRA")
    seconds = time.perf_counter() - started
    after = mean(evaluate(recipe, model, scored, ("dice",))["dice"])
    adapter.save(file)

    image = scored[0]["image"]
    again = tcur.load_adapter(base()[0], file)
    differences = round_trip(recipe, again, image, predict(recipe, model, image).cpu())
    print(f"\nDice on {len(scored)} volumes: {before:.3f} before, {after:.3f} after")
    print(
        f"trained: {counts['cores']:,} numbers in cores and {counts['direct']:,} directly, of "
        f"{counts['all']:,}"
    )
    for state, difference in differences.items():
        print(f"adapter {state}: logits differ by {difference:.2g} at most")
    print(f"{seconds / args.steps:.2f} s a step; written: {file}, {args.output / 'results.json'}")
    results = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        **adapter.metadata,
        "dice": {"before": before, "after": after},
        "trained": counts,
        "notes": [*guesses, *notes],
        "round_trip": differences,
        "seconds": seconds,
    }
    write_json(args.output / "results.json", results)
    return results


def demo_data(args: argparse.Namespace, domain: brain_domains.Domain) -> Path:
    """Writes the volumes of a domain; returns their datalist. Nothing is chosen by validation."""
    few = {"training": 2, "validation": 1}
    source = few if args.smoke else {"training": 10, "validation": 1}
    target = few if args.smoke else {"training": args.volumes, "validation": 6}
    counts = source if domain is brain_domains.SOURCE else target
    return brain_domains.write_domain(args.output / domain.name, domain, counts, args.seed)


def pretrain(args: argparse.Namespace) -> Path:
    """Pretrains the SwinUNETR of the demo on the source domain; returns its checkpoint."""
    architecture = SMOKE if args.smoke else DEMO
    recipe = recipe_of(args, architecture, {})
    entries = read_datalist(demo_data(args, brain_domains.SOURCE))["training"]
    model = architecture.build().to(args.device)
    volumes = load_volumes(recipe, entries)
    train(args, recipe, model, volumes, args.pretrain_steps, "pretraining")
    file = args.output / "pretrained.pt"
    with whole_file(file) as fresh:
        save_state({"state_dict": model.cpu().state_dict()}, fresh)
    return file


def architecture_of(
    args: argparse.Namespace, checkpoint: Checkpoint, sections: Sections
) -> tuple[SwinArchitecture, list[str]]:
    """The architecture by the checkpoint, the options, and the labels."""
    flags = {
        name: getattr(args, name)
        for name in ("in_channels", "out_channels", "img_size", "norm_name", "downsample")
    }
    if flags["out_channels"] is None and (args.new_head or not has_head(checkpoint)):
        flags["out_channels"] = max(2, 1 + highest_class({}, sections))
    return read_architecture(checkpoint, flags, args.new_head)


def recipe_of(
    args: argparse.Namespace, architecture: SwinArchitecture, sections: Sections
) -> Recipe:
    """How volumes are prepared. Of the network it needs the window and the number of classes."""
    limits = args.intensity_range
    return Recipe(
        architecture,  # type: ignore[arg-type]
        tuple(args.spacing or median_spacing(sections["training"])),
        intensity_range=None if limits is None else tuple(limits),
    )


def metadata_of(
    args: argparse.Namespace, recipe: Recipe, architecture: SwinArchitecture
) -> dict[str, Any]:
    """What travels with the adapter, in plain values."""
    facts = {
        "architecture": architecture.as_json(),
        "spacing": list(recipe.spacing),
        "intensity_range": recipe.intensity_range and list(recipe.intensity_range),
        "entry": args.entry,
        "new_head": args.new_head,
    }
    return {KEY: facts}


def adapt(args: argparse.Namespace, model: nn.Module, fresh: Sequence[str]) -> tcur.Adapter:
    """Gives cores to the layers that ``--convolutions`` says.

    Parameters that the checkpoint has no value for are trained directly.
    """
    direct = ["out.*", *fresh]
    if args.convolutions == "train":
        convolutions = (name for name, m in model.named_modules() if isinstance(m, LAYERS[1:]))
        direct += ["encoder*", "decoder*", *convolutions]  # the norms between them, too
    targets: Callable[[str, nn.Module], bool] | None = None
    if args.convolutions == "cores":
        layers = {name: m for name, m in model.named_modules() if isinstance(m, LAYERS)}
        del layers["out.conv.conv"]  # is trained directly
        small = [name for name, layer in layers.items() if most_rank(layer) < args.rank]
        if small:
            print(f"too small for cores of rank {args.rank}, so left without: {folded(small)}")

        def targets(name: str, module: nn.Module) -> bool:
            return isinstance(module, LAYERS) and name not in small

    try:
        return tcur.adapt(model, targets=targets, rank=args.rank, train_also=direct)
    except (ValueError, TypeError) as error:
        fail("--rank", "one that layers can hold", f"{args.rank} ({error})")


def most_rank(layer: nn.Module) -> int:
    """The largest rank for a layer; the kernel of a convolution is a matrix of as many rows."""
    return min(layer.weight.flatten(1).shape)


def count_trained(model: nn.Module) -> dict[str, int]:
    """How many numbers train in cores and directly, and how many the network has without cores."""
    counts = {"cores": 0, "direct": 0, "all": 0}
    for name, parameter in model.named_parameters():
        if name.startswith("tcur."):
            counts["cores"] += parameter.numel()
            continue
        counts["all"] += parameter.numel()
        counts["direct"] += parameter.numel() if parameter.requires_grad else 0
    return counts


def train(
    args: argparse.Namespace,
    recipe: Recipe,
    model: nn.Module,
    volumes: Sequence[Mapping[str, Any]],
    steps: int,
    label: str,
) -> None:
    """Adam with batch size 1 on all that requires a gradient; rates are warmed up and annealed."""
    kinds: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = args.core_lr if name.startswith("tcur.") else args.direct_lr
            kinds.setdefault(rate, []).append(parameter)
    groups = [{"params": parameters, "lr": rate} for rate, parameters in kinds.items()]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, list(kinds), total_steps=max(steps, 20), pct_start=0.1
    )
    augment, loss_of = augmentation(recipe, ()), segmentation_loss()
    augment.set_random_state(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    order = list(RandomSampler(volumes, num_samples=steps, generator=generator))
    model.train()
    bar = trange(steps, desc=label, ncols=100)
    for step in bar:
        batch = augment({key: volumes[order[step]][key].clone() for key in ("image", "label")})
        image, truth = (batch[key].as_tensor()[None].to(args.device) for key in ("image", "label"))
        optimizer.zero_grad()
        loss: Tensor = loss_of(model(image), truth)
        if not torch.isfinite(loss):
            fail("training", "a finite loss", f"{loss.item()} at step {step + 1}; lower the rates")
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
