"""Loads a trained network from its base and the file of what was trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

import tcur_kernels as tcur
from segmentation.checkpoints import read_checkpoint
from segmentation.methods import load_trained, read_recipe
from segmentation.preparation import Recipe
from segmentation.unetr import load_unetr


@dataclass(frozen=True)
class Adapted:
    """A trained network.

    Attributes:
        recipe: its preparation, window and classes.
        model: the network.
        adapter: of the methods with cores.
    """

    recipe: Recipe
    model: nn.Module
    adapter: tcur.Adapter | None

    def merged(self) -> nn.Module:
        """A plain UNETR that computes the same; needs nothing of tcur_kernels."""
        return self.model if self.adapter is None else self.adapter.merge(inplace=False)


def load_adapted(pretrained: Path, trained: Path) -> Adapted:
    """Loads the base and puts what was trained on it.

    Args:
        pretrained: the checkpoint that the training began with.
        trained: a file that examples/unetr_segmentation.py wrote.
    """
    recipe = read_recipe(trained)
    checkpoint = read_checkpoint(pretrained, recipe.entry)
    model, _ = load_unetr(recipe.architecture, checkpoint, recipe.new_head)
    adapter = load_trained(model, trained)
    return Adapted(recipe, model.eval(), adapter)
