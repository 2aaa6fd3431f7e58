"""A vision transformer that is adapted to other images: inverted digits, or a MedMNIST file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Part, Sources, Task, example, pretrained, wrong

#: Images of a file's test and validation, at most.
TEST, VALIDATION = 1500, 500
_PARTS = {"training": "train", "validation": "val", "test": "test"}


class Digits(Task):
    """The vision transformer of examples/vit_classifier.py: from the digits 0-4 to 5-9, inverted.

    There are ``size`` images of each new digit for training, and ten for validation. What is kept
    is the classification of the digits 0 to 4, by the head of the pretraining.

    A file in MedMNIST's layout takes the place of the new digits. Then the transformer is
    pretrained on the digits 0 to 4 in the size of the file's images, or it is the user's.
    """

    sizes: ClassVar = (10,)
    searched: ClassVar = 10
    measure: ClassVar = "accuracy"
    kept_measure: ClassVar = "accuracy of the old digits"
    own: ClassVar = ("vit", "images")
    rate_scale: ClassVar = 3.0
    head, new_head, head_rate, steps = ("classifier",), True, 1e-2, 100

    def __init__(self, sources: Sources, size: int, seed: int) -> None:
        if sources.vit is not None and sources.images is None:
            raise wrong("vit", "--images beside it", "none: the digits are for the ViT made here")
        module = example("vit_classifier")
        smoke = ["--smoke"] if sources.quick else []
        args = module.parse_args([*smoke, f"--images={size}", f"--seed={seed}"])
        self.steps = 3 if sources.quick else type(self).steps
        if sources.vit is None:
            shape = (1, 8, 8) if sources.images is None else _shape(sources.images)
            digits = module.old_digits()
            self._old = module.Images(_resized(digits.pixels, shape), digits.labels)

            def pretrain() -> nn.Module:
                settings = module.parse_args(smoke)
                return module.pretrained_vit(settings, self._old, _patch(shape[1]))

            self.base = pretrained(("digits", sources), pretrain)
            self._head = self.base.classifier
        else:
            self.base, self._head = module.load_base(sources.vit).eval(), None
            config = self.base.config
            shape = (config.num_channels, config.image_size, config.image_size)
        training, validation, test = (
            module.new_digits(args) if sources.images is None else _read(sources, shape, size, seed)
        )
        torch.manual_seed(seed)
        classes = int(max(part.labels.max() for part in (training, validation, test))) + 1
        self.base.num_labels = self.base.config.num_labels = classes
        self.base.classifier = nn.Linear(self.base.config.hidden_size, classes)
        self._parts = {"training": training, "validation": validation, "test": test}
        self._accuracy = module.accuracy

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """The loss of 32 images."""
        images = self._parts["training"]
        batch = images[torch.randint(len(images), (32,), generator=generator)]
        return F.cross_entropy(model(pixel_values=batch.pixels).logits, batch.labels)

    def score(self, model: nn.Module, part: Part) -> float:
        """The fraction of images that are classified correctly."""
        return float(self._accuracy(model, self._parts[part]))

    def kept(self, model: nn.Module) -> float:
        """The accuracy on the old digits, with the head of the pretraining."""
        if self._head is None:
            return float("nan")
        new = model.classifier
        model.classifier = self._head
        try:
            return float(self._accuracy(model, self._old))
        finally:
            model.classifier = new


def _patch(side: int) -> int:
    """The smallest side of patches of which seven or fewer make the side of an image."""
    return next(patch for patch in range(1, side + 1) if side % patch == 0 and side // patch <= 7)


def _resized(pixels: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images ``[n, 1 or 3, ...]`` with the channels and sides of ``shape``."""
    channels, *sides = shape
    if pixels.shape[2:] != tuple(sides):
        pixels = F.interpolate(pixels, sides, mode="bilinear", antialias=True)
    if channels == 1 and pixels.shape[1] == 3:
        return pixels.mean(1, keepdim=True)
    return pixels.expand(-1, channels, -1, -1)


def _shape(path: Path) -> tuple[int, int, int]:
    """Channels and sides of the images in a file."""
    images, _ = _arrays(path, "train")
    return (3 if images.ndim == 4 else 1, *images.shape[1:3])


def _read(sources: Sources, shape: tuple[int, int, int], size: int, seed: int) -> list[Any]:
    """Training (``size`` of each class, drawn by the seed), validation and test of a file."""
    assert sources.images is not None
    images = example("vit_classifier").Images
    found = []
    for part, name in _PARTS.items():
        array, labels = _arrays(sources.images, name)
        random = np.random.RandomState(seed if part == "training" else 0)
        order = random.permutation(len(labels))
        if part == "training":
            rows = np.concatenate([order[labels[order] == c][:size] for c in np.unique(labels)])
        else:
            rows = order[: TEST if part == "test" else VALIDATION]
        pixels = torch.from_numpy(array[rows].astype(np.float32) / 127.5 - 1)
        pixels = pixels.movedim(-1, 1) if array.ndim == 4 else pixels[:, None]
        chosen = torch.from_numpy(labels[rows].astype(np.int64))
        found.append(images(_resized(pixels, shape).contiguous(), chosen))
    classes = found[0].labels.unique()
    if len(classes) < 2:
        few = classes.tolist()
        raise wrong("images", f"at least two classes in train_labels of {sources.images}", few)
    return found


def _arrays(path: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[n, side, side]`` or ``[n, side, side, 3]`` of bytes, and their classes ``[n]``."""
    try:
        with np.load(path) as file:
            names = (f"{part}_images", f"{part}_labels")
            missing = [name for name in names if name not in file]
            if missing:
                kept = ", ".join(file.files)
                raise wrong("images", f"{' and '.join(missing)} in {path}", kept or "nothing")
            images, labels = (file[name] for name in names)
    except (OSError, ValueError) as error:
        raise wrong("images", "an .npz file in MedMNIST's layout", error) from error
    is_square = images.ndim in (3, 4) and images.shape[1] == images.shape[2]
    if not is_square or images.dtype != np.uint8 or images.shape[3:] not in ((), (3,)):
        wanted = f"bytes [n, side, side] or [n, side, side, 3] as {part}_images of {path}"
        raise wrong("images", wanted, f"{images.dtype} {list(images.shape)}")
    if labels.shape not in ((len(images),), (len(images), 1)):
        wanted = f"one class for each of {len(images)} images as {part}_labels of {path}"
        raise wrong("images", wanted, f"shape {list(labels.shape)}")
    if len(images) == 0:
        raise wrong("images", f"images as {part}_images of {path}", "none")
    return images, labels.reshape(-1)
