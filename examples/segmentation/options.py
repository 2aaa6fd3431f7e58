"""The command line of examples/unetr_segmentation.py, and what others share of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from segmentation.methods import METHODS, Settings
from segmentation.unetr import NORMS, PATCH
from tcur_kernels.decompose import RULES

#: The UNETR of the demo. With --pretrained these are read from the weights.
DEMO = {
    "img_size": [96, 96, 16],
    "feature_size": 4,
    "hidden_size": 192,
    "mlp_dim": 384,
    "num_heads": 6,
    "in_channels": 1,
    "out_channels": 2,
    "norm_name": "instance",
}
SMOKE = {**DEMO, "img_size": [32, 32, 16], "hidden_size": 24, "mlp_dim": 48, "num_heads": 3}

EPILOG = """\
how to choose:
  --check      first, always: it looks at every volume and at the weights, and trains nothing.
  --spacing    what the UNETR was pretrained with; --intensity-range, too.
  --methods    tcurlora. Take decoder beside it to see whether the cores help on your data; core if
               the decoder must stay as it is.
  --rank       8. A core has rank x rank numbers for each matrix. More is worth a try with more than
               a few dozen volumes; --core-lr stays.
  --core-lr    1e-2, at every rank. Look at ||U|| and at the loss in curves.png: if ||U|| stays near
               0, take 3 times as much; if the loss jumps, a third.
  --steps      20 to 100 for each training volume. The learning rate falls to 0 at the last step, so
               a longer training is another training: --patience ends it early.
  --targets    all linear layers. Fewer, such as attn.qkv, train fewer numbers.
docs/segmentation.md walks the whole way, from five scans to label maps."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Adapts a 3D segmentation transformer (MONAI's UNETR) to a new scanner or a "
        "new structure from a few volumes. Without arguments: a demo on made data.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, help="folder for results; default runs/unetr, demo runs/unetr_demo")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="one run each; a seed orders the training and, in the demo, makes subjects and "
        "pretraining; default 0",
    )
    add("--resume", action="store_true", help="go on with the run in --output where it stopped")
    add("--overwrite", action="store_true", help="replace results of your data in --output")
    add("--verbose", action="store_true", help="list every layer of the plan")
    add("--smoke", action="store_true", help="everything once, tiny and fast, to try the set-up")
    add_device(parser)

    add = parser.add_argument_group("your data").add_argument
    add(
        "--data",
        type=Path,
        help='datalist in JSON: {"training": [{"image": file, "label": file}, ...], "validation": '
        '[...], "test": [...]}, with paths relative to it. "validation" chooses the best step, '
        '"test" is scored; without it "validation" is',
    )
    add("--check", action="store_true", help="check weights and all volumes, and train nothing")
    add("--volumes", type=int, help="training volumes to adapt with; default all, demo 5")
    add(
        "--spacing",
        type=float,
        nargs=3,
        metavar="MM",
        help="mm per voxel along R, A, S to resample to; default: median of the training volumes, "
        "demo 2 2 4",
    )
    add(
        "--intensity-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="intensities that become 0 and 1, such as -175 250 for CT; default: every channel "
        "gets mean 0 and standard deviation 1",
    )
    add(
        "--labels",
        nargs="+",
        default=[],
        metavar="VALUE=CLASS",
        help="classes of values in label files, such as 2=1 4=0; default: values are classes",
    )
    add("--allow-empty", action="store_true", help="accept labels that are background everywhere")
    add(
        "--mirror",
        type=int,
        nargs="*",
        default=[],
        choices=(0, 1, 2),
        help="axes that training may mirror, 0 for left-right; default none, for structures have a "
        "side",
    )

    add = parser.add_argument_group("your UNETR").add_argument
    add(
        "--pretrained",
        type=Path,
        help="weights: a checkpoint (.pt, .pth, .ckpt, .safetensors) or the folder of a MONAI "
        "bundle. Sizes are read from it",
    )
    add("--entry", help="which network of the file to take if it holds several")
    add("--new-head", action="store_true", help="start a new output layer, for other structures")
    add(
        "--out-channels",
        type=int,
        help="classes with background; default: as the weights have, with --new-head as the labels "
        "have",
    )
    add(
        "--img-size",
        type=int,
        nargs=3,
        metavar="VOXELS",
        help=f"window, multiples of {PATCH}; the weights tell only the product, from which a cube "
        "is guessed",
    )
    add("--num-heads", type=int, help="attention heads; 12 is guessed for hidden size 768")
    add("--norm-name", choices=NORMS, help="where the weights do not tell")
    for name in ("feature-size", "hidden-size", "mlp-dim", "in-channels"):
        default = DEMO[name.replace("-", "_")]
        add(f"--{name}", type=int, help=f"default: as the weights have, demo {default}")

    add = parser.add_argument_group("training").add_argument
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["decoder", "tcurlora", "head", "core"],
        help="what to train, one after the other: "
        + "; ".join(f"{name}: {method.label}" for name, method in METHODS.items())
        + "; default decoder tcurlora head core",
    )
    add("--steps", type=int, default=120, help="of one volume each; default %(default)s")
    add(
        "--validate-every",
        type=int,
        metavar="STEPS",
        help="steps between checks on the validation volumes; default a fifth of --steps",
    )
    add(
        "--patience",
        type=int,
        default=0,
        metavar="CHECKS",
        help="stop after so many checks without a better Dice; default 0, never",
    )
    add("--rank", type=int, default=8, help="of the cores; default %(default)s")
    add(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="layers that get cores, by names or patterns such as attn.qkv or '*.mlp.*'; default: "
        "all linear layers of the transformer",
    )
    add("--core-lr", type=float, default=1e-2, help="of the cores; default %(default)s")
    add(
        "--decoder-lr",
        type=float,
        default=5e-3,
        help="of decoder and output layer, in every method; default %(default)s",
    )
    add(
        "--vit-lr",
        type=float,
        default=1e-3,
        help="where the ViT itself trains; default %(default)s",
    )
    add(
        "--basis",
        choices=("orthonormal", "slices"),
        default="orthonormal",
        help="orthonormal: one --core-lr for all ranks; slices: the published form; "
        "default %(default)s",
    )
    add("--alpha", type=float, default=1.0, help="scale of the update; default %(default)s")
    add(
        "--selection",
        choices=RULES,
        default="norm",
        help="how slices of the weights are chosen for C and R; default %(default)s",
    )

    add = parser.add_argument_group("demo").add_argument
    add("--pretrain-steps", type=int, default=250, help="default %(default)s")
    add("--pretrain-lr", type=float, default=2e-3, help="default %(default)s")
    add(
        "--keep",
        type=Path,
        default=Path("runs/pretrained"),
        help="folder where pretrained UNETRs are kept for the next run; default %(default)s",
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line; an error ends the program with a message."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.data is None) != (args.pretrained is None):
        given, missing = ("--data", "--pretrained") if args.data else ("--pretrained", "--data")
        parser.error(f"{given} expects {missing} beside it, which is missing")
    if args.data is not None and not args.data.is_file():
        parser.error(f"--data: expected a file, got {args.data}, which does not exist")
    if args.data is None:
        for name in ("check", "new_head", "labels", "entry", "intensity_range", "allow_empty"):
            if getattr(args, name):
                parser.error(
                    f"--{name.replace('_', '-')} expects --data beside it, which is missing"
                )
    check_device(args.device, parser.error)
    try:
        args.labels = dict(_pair(text) for text in args.labels)
    except ValueError as error:
        parser.error(f"--labels: expected VALUE=CLASS such as 2=1, got {error}")
    if args.targets and not any(METHODS[method].cores for method in args.methods):
        parser.error(f"--targets: expected a method with cores, got {' '.join(args.methods)}")
    if args.smoke:
        args.pretrain_steps, args.steps, args.volumes = 3, 3, 2
    if args.data is None:
        _fill_in_demo(args)
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        parser.error(f"--output: expected a folder, got {args.output}, which is none")
    args.output = args.output or Path("runs/unetr_demo" if args.data is None else "runs/unetr")
    args.validate_every = args.validate_every or max(1, round(args.steps / 5))
    _check_numbers(parser, args)
    return args


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device``."""
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="as torch names it; default: the GPU if there is one, here %(default)s",
    )


def add_trained(parser: argparse.ArgumentParser) -> None:
    """Adds the two files that make a trained network."""
    add = parser.add_argument
    add("--pretrained", type=Path, required=True, help="the weights that the training began with")
    add(
        "--adapter",
        type=Path,
        required=True,
        help="a .safetensors file that unetr_segmentation.py wrote, of any method",
    )


def check_device(device: str, refuse: Any) -> None:
    """Refuses a device that torch does not have, by calling ``refuse`` with a message."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        refuse(f"--device: expected one torch has here, got {device} ({reason})")


def _pair(text: str) -> tuple[int, int]:
    value, _, number = text.partition("=")
    if not (value.removeprefix("-").isdecimal() and number.isdecimal()):
        raise ValueError(repr(text))
    return int(value), int(number)


def _fill_in_demo(args: argparse.Namespace) -> None:
    for name, value in (SMOKE if args.smoke else DEMO).items():
        if getattr(args, name) is None or args.smoke:
            setattr(args, name, value)
    args.volumes = args.volumes or 5
    if args.smoke:
        args.spacing = [6.0, 6.0, 4.0]
    args.spacing = args.spacing or [2.0, 2.0, 4.0]


def _check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses numbers outside of their range."""
    positive = ["volumes", "pretrain_steps", "steps", "validate_every", "rank", "spacing"]
    positive += ["core_lr", "decoder_lr", "vit_lr", "pretrain_lr", "img_size", "num_heads"]
    positive += ["feature_size", "hidden_size", "mlp_dim", "in_channels"]
    for name in positive:
        values = getattr(args, name)
        listed = values if isinstance(values, list) else [] if values is None else [values]
        if not all(0 < value < float("inf") for value in listed):
            parser.error(f"--{name.replace('_', '-')}: expected more than 0, got {values}")
    if args.patience < 0:
        parser.error(f"--patience: expected 0 or more, got {args.patience}")
    if args.out_channels is not None and args.out_channels < 2:
        wanted = "at least 2, background and a structure"
        parser.error(f"--out-channels: expected {wanted}, got {args.out_channels}")
    if args.intensity_range and not args.intensity_range[0] < args.intensity_range[1]:
        low, high = args.intensity_range
        parser.error(f"--intensity-range: expected the lower one first, got {low:g} {high:g}")
    if args.img_size is not None and any(size % PATCH for size in args.img_size):
        parser.error(
            f"--img-size: expected multiples of UNETR's patch {PATCH}, got {args.img_size}"
        )
    if args.data is None:
        if args.hidden_size % args.num_heads:
            wanted = f"a divisor of --hidden-size {args.hidden_size}"
            parser.error(f"--num-heads: expected {wanted}, got {args.num_heads}")
        check_rank(args.rank, args.hidden_size, args.mlp_dim, parser.error)


def check_rank(rank: int, hidden_size: int, mlp_dim: int, refuse: Any) -> None:
    """Refuses a rank that is larger than a layer, by calling ``refuse`` with a message."""
    narrowest = min(hidden_size, mlp_dim)
    if rank > narrowest:
        refuse(f"--rank: expected at most {narrowest}, the narrowest layer, got {rank}")


def training_settings(args: argparse.Namespace) -> Settings:
    """The settings of the methods."""
    return Settings(
        steps=args.steps,
        validate_every=args.validate_every,
        patience=args.patience,
        decoder_lr=args.decoder_lr,
        core_lr=args.core_lr,
        vit_lr=args.vit_lr,
        rank=args.rank,
        alpha=args.alpha,
        basis=args.basis,
        selection=args.selection,
        targets=None if args.targets is None else tuple(args.targets),
        mirror=tuple(args.mirror),
        device=args.device,
        # For tiny work, synchronising threads costs more than it saves.
        threads=1 if args.smoke else None,
    )
