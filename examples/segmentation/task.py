"""Puts together what a run works on: a user's own volumes and weights, or the demo's."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

import brain_domains
from progress import Whole
from segmentation import kept_pretraining
from segmentation.checkpoints import read_checkpoint
from segmentation.datalist import class_names, read_datalist
from segmentation.files import fail
from segmentation.methods import METHODS, PRETRAINING, Settings, Trainee
from segmentation.options import check_rank, training_settings
from segmentation.preparation import Entry, Recipe
from segmentation.training import Job, Report, in_own_process
from segmentation.unetr import Architecture, load_unetr, read_architecture
from segmentation.volumes import check_volumes, highest_class, median_spacing

VOLUME_SECONDS = 0.2  # to make one of the demo on two cores, for the progress


@dataclass(frozen=True)
class Task:
    """Volumes, weights and preparation of a run.

    Attributes:
        recipe: preparation and network.
        base: file of the weights.
        sections: "training", "validation" and perhaps "test" -> volumes.
        pretraining: its report, in the demo.
    """

    recipe: Recipe
    base: Path
    sections: dict[str, list[Entry]]
    pretraining: Report | None = None

    @property
    def scored(self) -> list[Entry]:
        """The volumes that the report is about."""
        return self.sections.get("test", self.sections["validation"])


def own_task(args: argparse.Namespace) -> Task:
    """Reads and checks weights and volumes of a user, and says what was found.

    Everything that can be wrong with them ends the program here, before anything is trained.
    """
    checkpoint = read_checkpoint(args.pretrained, args.entry)
    sections = read_datalist(args.data)
    if args.volumes is not None:
        count = len(sections["training"])
        if count < args.volumes:
            fail("--volumes", f"at most the {count} training volumes", args.volumes)
        sections["training"] = sections["training"][: args.volumes]
    flags = {
        name: getattr(args, name) for name in Architecture.__dataclass_fields__ if name in args
    }
    if args.new_head and flags["out_channels"] is None:
        flags["out_channels"] = max(2, 1 + highest_class(args.labels, sections))
    architecture, guesses = read_architecture(checkpoint, flags, args.new_head)
    check_rank(args.rank, architecture.hidden_size, architecture.mlp_dim, _refuse)
    for value, number in args.labels.items():
        if number >= architecture.out_channels:
            fail("--labels", f"classes below {architecture.out_channels}", f"{value}={number}")
    named = class_names(args.data).items()
    limits = args.intensity_range
    recipe = Recipe(
        architecture,
        tuple(args.spacing or median_spacing(sections["training"])),
        args.entry,
        args.new_head,
        None if limits is None else tuple(limits),
        args.labels,
        {args.labels.get(value, value): name for value, name in reversed(list(named))},
    )
    model, notes = load_unetr(architecture, checkpoint, args.new_head)
    for line in (*checkpoint.notes, str(architecture), *guesses, *notes, *_in_words(args, recipe)):
        print(line)
    show_plan(args, recipe, model)

    def watch(volumes: list[Any]) -> Iterable[Any]:
        return tqdm(volumes, desc="checking volumes", ncols=100)

    check_volumes(recipe, sections, args.allow_empty, watch).tell("--data", args.data)
    return Task(recipe, checkpoint.file, sections)


def _in_words(args: argparse.Namespace, recipe: Recipe) -> list[str]:
    """What the recipe does, for the user to look at."""
    spacing = " x ".join(f"{size:g}" for size in recipe.spacing)
    how = "--spacing" if args.spacing else "median of the training volumes; else --spacing"
    scaled = "scaled to mean 0, deviation 1"
    if recipe.intensity_range is not None:
        low, high = recipe.intensity_range
        scaled = f"of {low:g} to {high:g} scaled to 0 to 1"
    lines = [f"output layer: new, {recipe.classes} classes"] if recipe.new_head else []
    return [
        *lines,
        f"volumes: resampled to {spacing} mm ({how}), axes turned to RAS, intensities {scaled}",
    ]


def _refuse(message: str) -> None:
    raise SystemExit(message)


def show_plan(args: argparse.Namespace, recipe: Recipe, model: nn.Module) -> None:
    """Prints which layers share which core, if a method has cores."""
    method = next((name for name in args.methods if METHODS[name].cores), None)
    if method is None:
        return
    try:
        adapter = Trainee(model, METHODS[method], training_settings(args), recipe).adapter
    except (ValueError, TypeError) as error:
        raise SystemExit(f"--{error}") from error
    assert adapter is not None
    print(adapter.plan.describe() if args.verbose else f"{adapter.plan}\n(every layer: --verbose)")


def demo_counts(args: argparse.Namespace) -> tuple[dict[str, int], dict[str, int]]:
    """Volumes per section of the source and of the target domain."""
    source = {"training": 2 if args.smoke else 24, "validation": 2}
    target = {"training": args.volumes, "validation": 1 if args.smoke else 3}
    return source, {**target, "test": 2 if args.smoke else 8}


def demo_recipe(args: argparse.Namespace) -> Recipe:
    """The preparation and network of the demo."""
    fields = [name for name in Architecture.__dataclass_fields__ if name in args]
    sizes = {**{name: getattr(args, name) for name in fields}, "img_size": tuple(args.img_size)}
    return Recipe(Architecture(**sizes), tuple(args.spacing))


def demo_key(args: argparse.Namespace, seed: int) -> str:
    """The name under which the pretraining of the demo is kept."""
    settings = asdict(_pretraining_settings(args))
    facts = {**settings, **demo_recipe(args).as_metadata(), "seed": seed, "smoke": args.smoke}
    return kept_pretraining.key(facts, args.device)


def _pretraining_settings(args: argparse.Namespace) -> Settings:
    """The settings of the pretraining; those of the methods do not matter to it."""
    rate = args.pretrain_lr
    return replace(
        training_settings(args),
        steps=args.pretrain_steps,
        validate_every=args.pretrain_steps,
        patience=0,
        decoder_lr=rate,
        core_lr=rate,
        vit_lr=rate,
        rank=1,
        alpha=1.0,
        selection="norm",
        basis="orthonormal",
        targets=None,
    )


def demo_task(args: argparse.Namespace, seed: int, folder: Path, whole: Whole) -> Task:
    """Writes both domains of the demo and pretrains a UNETR, if none was kept."""
    in_source, in_target = demo_counts(args)
    recipe = demo_recipe(args)

    def write(domain: brain_domains.Domain, counts: dict[str, int]) -> dict[str, list[Entry]]:
        def track(
            label: str, subjects: Sequence[brain_domains.Subject], count: int
        ) -> Iterable[brain_domains.Subject]:
            return whole.track(label, subjects, count, VOLUME_SECONDS * count)

        return read_datalist(
            brain_domains.write_domain(folder / domain.name, domain, counts, seed, track)
        )

    def pretrain(temporary: Path) -> tuple[Path, Report]:
        source = write(brain_domains.SOURCE, in_source)
        job = Job(
            "pretraining",
            seed,
            recipe,
            _pretraining_settings(args),
            source["training"],
            source["validation"],
            None,
            temporary,
            whole,
        )
        return job.last, in_own_process(job)

    target = write(brain_domains.TARGET, in_target)
    name = demo_key(args, seed)
    kept = kept_pretraining.find(args.keep, name)
    if kept is None:
        base, report = kept_pretraining.keep(args.keep, name, pretrain)
    else:
        base, report = kept
        print(f"pretraining: kept from an earlier run, {base}")
    return Task(recipe, base, target, report)


def demo_seconds(args: argparse.Namespace, seed: int) -> float:
    """The approximate seconds of `demo_task`; only ratios matter."""
    source, target = demo_counts(args)
    seconds = VOLUME_SECONDS * sum(target.values())
    if kept_pretraining.find(args.keep, demo_key(args, seed)) is None:
        seconds += VOLUME_SECONDS * sum(source.values())
        seconds += args.pretrain_steps * PRETRAINING.seconds
    return seconds
