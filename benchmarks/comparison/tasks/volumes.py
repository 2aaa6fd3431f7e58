"""3D segmentation: a UNETR that is adapted from a few volumes, its decoder trained or frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import BadDataError, DivergedError, Part, Sources, Task, example, wrong

#: Where the demo's volumes and its pretrained UNETR are kept between runs.
FOLDER = Path("runs/comparison")
#: Volumes of the target to draw trainings from, and of the source to tell what was forgotten.
POOL, OLD = 12, 4


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
    """The UNETR of examples/unetr_segmentation.py, whose decoder every method trains.

    ``size`` volumes are drawn by the seed; validation and test are the same for all seeds. What is
    kept is the segmentation of the source domain.
    """

    sizes: ClassVar = (1, 2, 5, 10)
    searched: ClassVar = 5
    search: ClassVar = (100,)  # a training takes long
    measure: ClassVar = "Dice"
    kept_measure: ClassVar = "Dice of the source domain"
    details_measured: ClassVar = ("hd95", "iou", "sensitivity", "specificity")
    own: ClassVar = ("volumes", "unetr")
    rate_scale: ClassVar = 10.0
    head: Sequence[str] = ("decoder*", "out.*")
    head_rate, steps = 3e-3, 120
    layers: Sequence[str] = ("vit.blocks.*.attn.*", "vit.blocks.*.mlp.*")
    norms: Sequence[str] = ("vit.blocks.*.norm1", "vit.blocks.*.norm2", "vit.norm")

    def __init__(self, sources: Sources, size: int, seed: int) -> None:
        if (sources.volumes is None) != (sources.unetr is None):
            option, other = ("volumes", "unetr") if sources.unetr is None else ("unetr", "volumes")
            raise wrong(option, f"--{other} beside it", "none")
        self._evaluation = example("segmentation.evaluation")
        made = _made(sources)
        self._recipe, self.base = made.recipe, made.model
        self.steps = 3 if sources.quick else type(self).steps
        pool = made.volumes["training"]
        if len(pool) < size:
            raise wrong("volumes", f"at least {size} training volumes", len(pool))
        chosen = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:size]
        self._training = [pool[i] for i in chosen]
        self._parts = {part: made.volumes[part] for part in ("validation", "test", "old")}
        preparation = example("segmentation.preparation")
        self._augment = preparation.augmentation(self._recipe, made.mirror)
        self._loss = example("segmentation.training").segmentation_loss()

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """The loss of a random volume, at random poses and intensities."""
        tops = len(self._training), 2**31
        at, seed = (int(torch.randint(top, (), generator=generator)) for top in tops)
        self._augment.set_random_state(seed)
        volume = self._training[at]
        batch = self._augment({key: volume[key].clone() for key in ("image", "label")})
        image, label = (batch[key].as_tensor()[None] for key in ("image", "label"))
        return self._loss(model(image), label)

    def score(self, model: nn.Module, part: Part) -> float:
        """The mean Dice over volumes and classes."""
        return self._scores(model, part, ("dice",))["dice"]

    def details(self, model: nn.Module) -> dict[str, float]:
        """More measures of the test volumes; HD95 in mm, over the volumes that have one."""
        return self._scores(model, "test", self.details_measured)

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

    sizes: ClassVar = (5,)
    head: Sequence[str] = ("out.*",)
    head_rate = 3e-3


@dataclass(frozen=True)
class _Made:
    """What does not depend on the seed.

    Attributes:
        recipe: preparation and network.
        model: with the pretrained weights.
        volumes: "training" (a pool), "validation", "test" and "old" -> prepared volumes.
        mirror: axes along which training volumes are mirrored.
    """

    recipe: Any
    model: nn.Module
    volumes: dict[str, list[dict[str, Any]]]
    mirror: Sequence[int]


@cache
def _made(sources: Sources) -> _Made:
    """Reads a user's files, or makes the demo's volumes and pretrains its UNETR."""
    options, task = example("segmentation.options"), example("segmentation.task")
    smoke = ["--smoke"] if sources.quick else []
    with _named():
        if sources.volumes is None:
            args = options.parse_args(smoke)
            args.volumes, args.keep = POOL, FOLDER / "pretrained"
            folder = FOLDER / ("quick" if sources.quick else "demo")
            whole = example("progress").Whole(task.demo_seconds(args, 0))
            made = task.demo_task(args, 0, folder, whole)
            old = task.old_volumes(folder / "old", OLD)
        else:
            own = [f"--data={sources.volumes}", f"--pretrained={sources.unetr}"]
            args = options.parse_args([*smoke, *own])
            made, old = task.own_task(args), []
    load = partial(example("segmentation.preparation").load_volumes, made.recipe)
    sections = {**made.sections, "test": made.scored, "old": old}
    checkpoint = example("segmentation.checkpoints").read_checkpoint(made.base, made.recipe.entry)
    model, _ = example("segmentation.unetr").load_unetr(made.recipe.architecture, checkpoint)
    volumes = {name: load(entries) for name, entries in sections.items()}
    return _Made(made.recipe, model.eval(), volumes, args.mirror)


@contextmanager
def _named() -> Iterator[None]:
    """Turns what ends the example's program into an error about the options of this one."""
    try:
        yield
    except SystemExit as end:
        text = str(end).replace("--data", "--volumes").replace("--pretrained", "--unetr")
        raise BadDataError(text) from end
