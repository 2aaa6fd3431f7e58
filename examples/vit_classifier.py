"""Adapts a vision transformer from one set of digits to another through peft.

A small ViT is pretrained to classify the handwritten digits 0 to 4. It is then adapted, with a few
images of each class, to the digits 5 to 9 in inverted contrast:

* head only: a new classifier on the frozen transformer;
* tCURLoRA (`tcur_kernels.peft`) and LoRA (`peft`): a new classifier and the adapter
  (``modules_to_save=["classifier"]``);
* full fine-tuning: everything.

The images are the 1,797 UCI digits that come with scikit-learn, so nothing is downloaded. You can
use your own model, a directory with a ``ViTForImageClassification``, and your own images, a folder
with ``train`` and ``test``, each with a folder of images per class. Then there is no pretraining::

    python examples/vit_classifier.py --model DIR --data IMAGES --rank 8 --rates 1e-3
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification

from peft_adapters import adaptable, round_trip, round_trip_note
from plain_table import lay_out
from tcur_kernels.files.whole import replacing
from tcur_kernels.peft import TCURConfig

HEAD = ["classifier"]

#: Name -> peft config, or None to train every parameter. "head" trains only the classifier.
METHODS: dict[str, Callable[[argparse.Namespace], Any] | None] = {
    "head": None,
    "tcurlora": lambda args: TCURConfig(rank=args.rank, modules_to_save=HEAD),
    "lora": lambda args: LoraConfig(
        r=args.lora_rank, target_modules="all-linear", modules_to_save=HEAD
    ),
    "full": None,
}

#: Learning rates that a method tries; it keeps the best one on images set aside.
RATES = {
    "head": (1e-2, 3e-2, 1e-1),
    "tcurlora": (3e-3, 1e-2, 3e-2),
    "lora": (3e-3, 1e-2, 3e-2),
    "full": (1e-3, 3e-3, 1e-2),
}


@dataclass(frozen=True)
class Images:
    """Images ``[n, channels, height, width]`` with their classes ``[n]``."""

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, index: Any) -> Images:
        return Images(self.pixels[index], self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


def main() -> None:
    """Pretrains or loads the base, adapts it by every method, prints the table."""
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    base = new_base(args) if args.model is None else load_base(args.model)
    if args.data is None:
        training, validation, test = new_digits(args)
    else:
        training, validation, test = read_folders(args.data, base)
    classes = int(max(training.labels.max(), test.labels.max())) + 1
    base.num_labels = base.config.num_labels = classes
    base.classifier = nn.Linear(base.config.hidden_size, classes)
    base.requires_grad_(False).eval()

    results = []
    for name in args.methods:
        results.append(adapt(args, name, base, training, validation, test))
    summary = {
        "settings": {k: v for k, v in vars(args).items() if isinstance(v, int | float | list)},
        "images": {"training": len(training), "validation": len(validation), "test": len(test)},
        "parameters": sum(p.numel() for p in base.parameters()),
        "results": results,
        "seconds": time.perf_counter() - started,
    }
    with replacing(args.output / "results.json") as fresh:
        fresh.write_text(json.dumps(summary, indent=1) + "\n")
    print(report(summary))


def adapt(
    args: argparse.Namespace,
    name: str,
    base: ViTForImageClassification,
    training: Images,
    validation: Images,
    test: Images,
) -> dict[str, Any]:
    """Adapts a copy of the base with one method, at its best learning rate."""
    tried: dict[float, float] = {}
    best: nn.Module | None = None
    seconds = chosen = 0.0
    for rate in RATES[name] if args.rates is None else args.rates:
        torch.manual_seed(args.seed)
        config = METHODS[name]
        model = adaptable(base, None if config is None else config(args))
        if name == "head":
            model.requires_grad_(False).classifier.requires_grad_(True)
        seconds = optimise(args, model, training, rate, args.steps, f"{name}, rate {rate:g}")
        tried[rate] = accuracy(model, validation)
        if best is None or tried[rate] > tried[chosen]:  # the lower rate where two do equally well
            best, chosen = model, rate
    assert best is not None
    result = {
        "method": name,
        "accuracy": accuracy(best, test),
        "trained": sum(p.numel() for p in best.parameters() if p.requires_grad),
        "rate": chosen,
        "validation": {f"{rate:g}": value for rate, value in tried.items()},
        "seconds_per_step": seconds / args.steps,
    }
    if isinstance(best, PeftModel):
        inputs = {"pixel_values": test.pixels[:16]}
        result |= round_trip(best, base, args.output / name, inputs)
    return result


def optimise(
    args: argparse.Namespace, model: nn.Module, images: Images, rate: float, steps: int, label: str
) -> float:
    """Trains with AdamW and a cosine decay; returns the seconds it took."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(args.seed)
    model.train()
    started = time.perf_counter()
    bar = tqdm(range(steps), desc=f"{label:<24}", ncols=100)
    for _ in bar:
        batch = images[torch.randint(len(images), (args.batch,), generator=generator)]
        loss = F.cross_entropy(model(pixel_values=batch.pixels).logits, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    return time.perf_counter() - started


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """The fraction of images that are classified correctly."""
    parts = images.pixels.split(256)
    guesses = torch.cat([model(pixel_values=part).logits.argmax(-1) for part in parts])
    return (guesses == images.labels).float().mean().item()


def new_base(args: argparse.Namespace) -> ViTForImageClassification:
    """A ViT pretrained here on the digits 0 to 4."""
    return pretrained_vit(args, old_digits(), patch=2)


def pretrained_vit(
    args: argparse.Namespace, images: Images, patch: int
) -> ViTForImageClassification:
    """A small ViT pretrained here on square images of five classes, in patches of that side."""
    config = ViTConfig(
        image_size=images.pixels.shape[-1],
        patch_size=patch,
        num_channels=images.pixels.shape[1],
        hidden_size=args.width,
        intermediate_size=2 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_labels=5,
    )
    model = ViTForImageClassification(config)
    optimise(args, model, images, 1e-3, args.pretrain_steps, "pretraining")
    return model


def old_digits() -> Images:
    """The digits 0 to 4."""
    pixels, digits = _digits()
    return Images(pixels[digits < 5], digits[digits < 5])


def new_digits(args: argparse.Namespace) -> tuple[Images, Images, Images]:
    """5 to 9 in inverted contrast: some of each for training, as many for validation, the rest."""
    pixels, digits = _digits()
    new = Images(-pixels[digits >= 5], digits[digits >= 5] - 5)
    order = torch.randperm(len(new), generator=torch.Generator().manual_seed(args.seed))
    by_class = [order[new.labels[order] == label] for label in range(5)]
    first, second = args.images, 2 * args.images
    chosen = [
        torch.cat([rows[part] for rows in by_class])
        for part in (slice(first), slice(first, second), slice(second, None))
    ]
    training, validation, test = (new[rows] for rows in chosen)
    return training, validation, test


def _digits() -> tuple[Tensor, Tensor]:
    """The UCI digits: ``[1797, 1, 8, 8]`` from -1 to 1, and which digit each is."""
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return pixels, torch.tensor(data.target)


def load_base(folder: Path) -> ViTForImageClassification:
    """Loads the model of a directory."""
    if not (folder / "config.json").is_file():
        raise SystemExit(f"--model: expected a directory with config.json, got {folder}")
    return ViTForImageClassification.from_pretrained(folder, local_files_only=True)


def read_folders(folder: Path, model: ViTForImageClassification) -> tuple[Images, Images, Images]:
    """Images by class; every fifth one of ``train`` is set aside to choose learning rates."""
    classes = sorted(p.name for p in (folder / "train").glob("*") if p.is_dir())
    if len(classes) < 2:
        raise SystemExit(f"--data: expected a folder for each class in {folder}/train, got none")
    size, channels = model.config.image_size, model.config.num_channels

    def read(part: str) -> Images:
        pixels, labels = [], []
        for label, name in enumerate(classes):
            for file in sorted((folder / part / name).glob("*")):
                image = Image.open(file).convert("L" if channels == 1 else "RGB")
                array = np.asarray(image.resize((size, size)), np.float32) / 127.5 - 1
                pixels.append(torch.from_numpy(array).reshape(size, size, channels).movedim(-1, 0))
                labels.append(label)
        if not pixels:
            raise SystemExit(f"--data: expected images in {folder}/{part}, got none")
        return Images(torch.stack(pixels), torch.tensor(labels))

    images, test = read("train"), read("test")
    aside = torch.arange(len(images)) % 5 == 4
    return images[~aside], images[aside], test


def report(summary: dict[str, Any]) -> str:
    """The table, and how much loading and merging changed the logits."""
    rows = [("", "accuracy", "trained", "file KB", "rate", "s/step")]
    for result in summary["results"]:
        size = f"{result['kilobytes']:.1f}" if "kilobytes" in result else "-"
        row = (result["method"], f"{result['accuracy']:.3f}", f"{result['trained']:,}", size)
        rows.append((*row, f"{result['rate']:g}", f"{result['seconds_per_step']:.3f}"))
    counts = ", ".join(f"{count} {part}" for part, count in summary["images"].items())
    head = f"{summary['parameters']:,} parameters; images: {counts}"
    notes = [round_trip_note(r) for r in summary["results"] if "loaded" in r]
    return "\n".join([head, "", *lay_out(rows), *notes, "", f"{summary['seconds']:.0f} s in all"])


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, help="directory of a ViT; default: pretrain one here")
    add("--data", type=Path, help="folder with train/CLASS/* and test/CLASS/*; default: digits")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--rank", type=int, default=8, help="of tCURLoRA")
    add("--lora-rank", type=int, default=8)
    add("--rates", type=float, nargs="+", help="learning rates to try; default: by method")
    add("--images", type=int, default=10, help="of each new digit to train on")
    add("--steps", type=int, default=100, help="of adaptation")
    add("--pretrain-steps", type=int, default=600)
    add("--batch", type=int, default=32)
    add("--width", type=int, default=64)
    add("--layers", type=int, default=6)
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("runs/vit_classifier"))
    add("--smoke", action="store_true", help="a few steps of a tiny model, to see that it runs")
    args = parser.parse_args(arguments)
    for name in ("rank", "lora_rank", "images", "steps", "pretrain_steps", "batch", "layers"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option}: expected at least 1, got {getattr(args, name)}")
    if args.model is not None and args.data is None:
        parser.error("--model expects --data beside it: the digits are for the ViT made here")
    if args.smoke:
        args.pretrain_steps, args.steps, args.rates = 3, 3, [1e-2]
        args.width, args.layers, args.rank = 16, 2, 2
    return args


if __name__ == "__main__":
    main()
