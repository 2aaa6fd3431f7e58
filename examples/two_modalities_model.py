"""A model of brains in two modalities: a vision transformer for each, and a head for both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.networks.nets import ViT
from torch import Tensor, nn

from two_modalities_volumes import MODALITIES, SIZE

HEADS = 4  # of the attention


class TwoEncoders(nn.Module):
    """A transformer for each modality, and a head that draws each patch from both tokens.

    Args:
        structures: how many structures the head draws.
        width: of a token; the hidden layers of the transformers are twice as wide.
        layers: blocks of each transformer.
        patch: voxels of a patch along each axis.
    """

    def __init__(self, structures: int, width: int, layers: int, patch: Sequence[int]) -> None:
        super().__init__()
        for modality in MODALITIES:
            encoder = ViT(1, SIZE, patch, width, 2 * width, layers, num_heads=HEADS)
            self.add_module(modality, encoder)
        self.width, self.patch = width, tuple(patch)
        self.new_head(structures)

    def new_head(self, structures: int) -> None:
        """Replaces the head by a random one."""
        tokens, voxels = len(MODALITIES) * self.width, math.prod(self.patch)
        self.head = nn.Linear(tokens, structures * voxels)
        self.structures = structures

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[n, structures, *SIZE]`` of images ``[n, 2, *SIZE]``."""
        encoders = [self.get_submodule(modality) for modality in MODALITIES]
        seen = images.split(1, dim=1)
        tokens = [encoder(image)[0] for encoder, image in zip(encoders, seen, strict=True)]
        drawn = self.head(torch.cat(tokens, dim=-1))  # [n, patches, structures * voxels]
        grid = [voxels // side for voxels, side in zip(SIZE, self.patch, strict=True)]
        parts = drawn.reshape(len(images), *grid, self.structures, *self.patch)
        return parts.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(len(images), self.structures, *SIZE)
