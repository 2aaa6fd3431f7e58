"""3D segmentation: a UNETR that is adapted from a few volumes, its decoder trained or frozen."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import markers
from .base import BadDataError, DivergedError, Part, Sources, Task, example, wrong
from .marker_base import Course, pretrained_on_markers

#: Where the pretrained UNETR is kept between runs.
FOLDER = Path("runs/comparison")
#: Volumes of the new scanner: a pool to draw trainings from, and others. "old" are of the old one.
COUNTS = {"training": 24, "validation": 8, "test": 32, "old": 16}
QUICK = {"training": 10, "validation": 1, "test": 2, "old": 1}


@dataclass(frozen=True)
class Case:
    """A test volume, and what a model found in it.

    Attributes:
        image: its first channel ``[x, y, z]``.
        truth: classes ``[x, y, z]``.
        found: the same, of the model.
        dice: the mean over the classes.
        spacing: mm per voxel.
    """

    image: Tensor
    truth: Tensor
    found: Tensor
    dice: float
    spacing: tuple[float, ...]


class Volumes(Task):
    """A UNETR whose decoder every method trains, on the volumes of `markers` or a user's.

    ``size`` volumes are drawn by the seed; validation and test are the same for all seeds. What is
    kept is the segmentation of the old scanner's volumes.
    """

    sizes: ClassVar = (1, 2, 5, 10)
    searched: ClassVar = 10
    measure: ClassVar = "Dice"
    kept_measure: ClassVar = "Dice of the old scanner"
    details_measured: ClassVar = ("hd95", "iou", "sensitivity", "specificity")
    own: ClassVar = ("volumes", "unetr", "volume_options")
    rate_scale: ClassVar = 10.0
    head: Sequence[str] = ("decoder*", "out.*")
    head_rate, steps = 2e-3, 400
    layers: Sequence[str] = ("vit.blocks.*.attn.*", "vit.blocks.*.mlp.*")
    norms: Sequence[str] = ("vit.blocks.*.norm1", "vit.blocks.*.norm2", "vit.norm")

    def __init__(self, sources: Sources, size: int, seed: int) -> None:
        if (sources.volumes is None) != (sources.unetr is None):
            option, other = ("volumes", "unetr") if sources.unetr is None else ("unetr", "volumes")
            raise wrong(option, f"--{other} beside it", "none")
        self._evaluation = example("segmentation.evaluation")
        made = _made(sources)
        # Convolutions are most of a step, and take less time so.
        self._recipe, self.base = made.recipe, made.model.to(memory_format=torch.channels_last_3d)
        self.new_head = made.recipe.new_head
        self.steps = 3 if sources.quick else type(self).steps
        pool = made.volumes["training"]
        if len(pool) < size:
            raise wrong("volumes", f"at least {size} training volumes", len(pool))
        chosen = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:size]
        self._training = [pool[i] for i in chosen]
        self._parts = {part: made.volumes[part] for part in ("validation", "test", "old")}
        self._augment, self._mirrors = made.augment, made.mirrors
        self._loss = example("segmentation.training").segmentation_loss()

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """The loss of a random volume, at random poses and intensities."""
        tops = len(self._training), 2**31
        at, seed = (int(torch.randint(top, (), generator=generator)) for top in tops)
        self._augment.set_random_state(seed)
        volume = self._training[at]
        batch = self._augment({key: volume[key].clone() for key in ("image", "label")})
        image, label = (batch[key].as_tensor()[None] for key in ("image", "label"))
        if self._mirrors:
            image, label = (torch.cat([each, each.flip(2)]) for each in (image, label))
        return self._loss(model(image), label)

    def score(self, model: nn.Module, part: Part) -> float:
        """The mean Dice over volumes and classes."""
        return self._scores(model, part, ("dice",))["dice"]

    def tested(self, model: nn.Module) -> tuple[float, dict[str, float]]:
        """Dice of the test volumes, and more; HD95 in mm, over the volumes that have one."""
        details = self._scores(model, "test", ("dice", *self.details_measured))
        return details.pop("dice"), details

    def cases(self, model: nn.Module) -> list[Case]:
        """What the model finds in every test volume."""
        test = self._parts["test"]
        dice = self._evaluation.evaluate(self._recipe, model, test, ("dice",))["dice"]
        found = []
        for volume, own in zip(test, dice, strict=True):
            image = volume["image"].as_tensor()
            classes = self._evaluation.predict(self._recipe, model, image).argmax(1)[0]
            truth = volume["label"].as_tensor()[0].long()
            found.append(Case(image[0], truth, classes, own, self._recipe.spacing))
        return found

    def kept(self, model: nn.Module) -> float:
        """The mean Dice on volumes of the source domain; nan for a user's own."""
        if not self._parts["old"]:
            return float("nan")
        return self._scores(model, "old", ("dice",))["dice"]

    def _scores(self, model: nn.Module, part: str, measures: Sequence[str]) -> dict[str, float]:
        try:
            found = self._evaluation.evaluate(self._recipe, model, self._parts[part], measures)
        except self._evaluation.NotFiniteError as error:
            raise DivergedError(f"{error} is not finite") from error
        return {name: self._evaluation.mean(found[name]) for name in measures}


class FrozenVolumes(Volumes):
    """The same with a frozen decoder: every method trains the output layer alone."""

    head: Sequence[str] = ("out.*",)


@dataclass(frozen=True)
class _Made:
    """What does not depend on the seed.

    Attributes:
        recipe: preparation and network.
        model: with the pretrained weights.
        volumes: "training" (a pool), "validation", "test" and "old" -> prepared volumes.
        augment: what changes a training volume at random.
        mirrors: every training volume comes with its mirror image.
    """

    recipe: Any
    model: nn.Module
    volumes: dict[str, list[dict[str, Any]]]
    augment: Any
    mirrors: bool


@cache
def _made(sources: Sources) -> _Made:
    """Reads a user's files, or makes volumes and pretrains a UNETR."""
    return _marked(sources.quick) if sources.volumes is None else _own(sources)


def _marked(quick: bool) -> _Made:
    """The volumes of `markers`, and a UNETR of the demo's size for them."""
    preparation, unetr = example("segmentation.preparation"), example("segmentation.unetr")
    sizes = {"feature_size": 4, "hidden_size": 192, "mlp_dim": 384, "num_heads": 6}
    course, counts = Course(), COUNTS
    if quick:
        sizes = {**sizes, "hidden_size": 24, "mlp_dim": 48, "num_heads": 3}
        course, counts = Course(volumes=1, side_steps=2, steps=2), QUICK
    architecture = unetr.Architecture(1, 2, markers.WINDOW, **sizes)
    recipe = preparation.Recipe(architecture, markers.SPACING)
    model = pretrained_on_markers(recipe, course, FOLDER)
    volumes = {
        name: markers.volumes(markers.OLD if name == "old" else markers.NEW, count, f"of {name}")
        for name, count in counts.items()
    }
    return _Made(recipe, model, volumes, markers.augmentation(), mirrors=True)


def _own(sources: Sources) -> _Made:
    options, task = example("segmentation.options"), example("segmentation.task")
    preparation = example("segmentation.preparation")
    with _named():
        given = [f"--data={sources.volumes}", f"--pretrained={sources.unetr}"]
        args = options.parse_args([*given, *shlex.split(sources.volume_options or "")])
        made = task.own_task(args)
    sections = {**made.sections, "test": made.scored, "old": []}
    checkpoint = example("segmentation.checkpoints").read_checkpoint(made.base, made.recipe.entry)
    torch.manual_seed(0)  # a new head is the same in every run
    load = example("segmentation.unetr").load_unetr
    model, _ = load(made.recipe.architecture, checkpoint, made.recipe.new_head)
    volumes = {
        name: preparation.load_volumes(made.recipe, entries) for name, entries in sections.items()
    }
    augment = preparation.augmentation(made.recipe, args.mirror)
    return _Made(made.recipe, model.eval(), volumes, augment, mirrors=False)


@contextmanager
def _named() -> Iterator[None]:
    """Turns what ends the example's program into an error about the options of this one."""
    try:
        yield
    except SystemExit as end:
        text = str(end).replace("--data", "--volumes").replace("--pretrained", "--unetr")
        raise BadDataError(text) from end
