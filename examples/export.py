"""Writes what examples/unetr_segmentation.py trained as a plain MONAI checkpoint, or as a bundle.

The update is folded into the weights, so that neither needs tcur_kernels::

    python examples/export.py --pretrained unetr.pt --adapter runs/unetr/tcurlora.safetensors \\
        --checkpoint adapted.pt --bundle adapted_bundle

The checkpoint is the state dict of a UNETR. The bundle has it too, beside configs that prepare,
segment and write volumes as examples/predict.py does, by MONAI alone::

    python -m monai.bundle run --config_file adapted_bundle/configs/inference.json \\
        --bundle_root adapted_bundle --dataset_dir scans/new --output_dir scans/found
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from segmentation.adapted import Adapted, load_adapted
from segmentation.bundle import write_bundle
from segmentation.files import fail, plain_ends, save_state, whole_file
from segmentation.options import add_trained
from tcur_kernels.files.whole import new_directory


def main(argv: Sequence[str] | None = None) -> None:
    """Merges, compares, and writes."""
    args = parse_args(argv)
    with plain_ends("interrupted; nothing half-written is left"):
        run(args)


def run(args: argparse.Namespace) -> None:
    """Runs a command line that was parsed."""
    for name in ("checkpoint", "bundle"):
        path = getattr(args, name)
        if path is not None and path.exists():
            fail(f"--{name}", "a path that is free", f"{path}, which exists")
    adapted = load_adapted(args.pretrained, args.adapter)
    model = merge(adapted)
    arguments = ", ".join(f"{k}={v!r}" for k, v in adapted.recipe.architecture.arguments().items())
    if args.checkpoint is not None:
        with whole_file(args.checkpoint) as fresh:
            save_state(model.state_dict(), fresh)
        print(f"{args.checkpoint}: the state dict of a plain UNETR, for")
        print(f"  model = monai.networks.nets.UNETR({arguments})")
        print(f"  model.load_state_dict(torch.load({str(args.checkpoint)!r}, weights_only=True))")
    if args.bundle is not None:
        with new_directory(args.bundle) as fresh:
            write_bundle(adapted.recipe, model.state_dict(), fresh)
        print(f"{args.bundle}: a MONAI bundle; docs/README.md in it says how to run it")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line; an error ends the program with a message."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add_trained(parser)
    add("--checkpoint", type=Path, help="a new .pt file: the state dict of a plain UNETR")
    add("--bundle", type=Path, help="a new folder: a MONAI bundle")
    args = parser.parse_args(argv)
    if args.checkpoint is None and args.bundle is None:
        parser.error("--checkpoint, --bundle: expected at least one of them, got none")
    return args


@torch.no_grad()
def merge(adapted: Adapted) -> torch.nn.Module:
    """A plain UNETR with the update in its weights; it must compute what the adapted one does."""
    plain = adapted.recipe.architecture.build().eval()
    plain.load_state_dict(adapted.merged().state_dict())
    channels, window = adapted.recipe.architecture.in_channels, adapted.recipe.window
    noise = torch.randn(1, channels, *window, generator=torch.Generator().manual_seed(0))
    wanted, came = adapted.model(noise), plain(noise)
    apart = (came - wanted).abs().max().item()
    if not apart <= 1e-3 * wanted.abs().max().item():
        raise RuntimeError(f"the merged network computes something else: logits differ by {apart}")
    return plain


if __name__ == "__main__":
    main()
