"""Predicts whole volumes by a sliding window, and scores predictions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from monai.inferers import SlidingWindowInferer
from monai.metrics import (
    ConfusionMatrixMetric,
    DiceMetric,
    HausdorffDistanceMetric,
    MeanIoU,
)
from monai.networks.utils import one_hot
from torch import Tensor, nn

from segmentation.preparation import Recipe


class NotFiniteError(Exception):
    """A network computed NaN or Inf; the message names the volume."""


_COUNTED = ("sensitivity", "specificity")
#: The measures of a prediction, each without the background.
MEASURES: dict[str, Callable[[], Any]] = {
    "dice": partial(DiceMetric, include_background=False),
    "hd95": partial(HausdorffDistanceMetric, include_background=False, percentile=95),
    "iou": partial(MeanIoU, include_background=False),
    **{name: partial(ConfusionMatrixMetric, include_background=False) for name in _COUNTED},
}


@torch.no_grad()
def predict(recipe: Recipe, model: nn.Module, image: Tensor) -> Tensor:
    """Logits ``[1, classes, ...]`` of a whole prepared volume ``[channels, ...]``."""
    device = next(model.parameters()).device
    model.eval()
    inferer = SlidingWindowInferer(recipe.window, sw_batch_size=1, overlap=recipe.overlap)
    logits: Tensor = inferer(torch.as_tensor(image)[None].to(device), model)
    return logits


def evaluate(
    recipe: Recipe,
    model: nn.Module,
    volumes: Sequence[Mapping[str, Any]],
    measures: Sequence[str] = ("dice", "hd95"),
) -> dict[str, Any]:
    """Scores every volume, see `DEFINITIONS`.

    Args:
        recipe: how the volumes were prepared.
        model: the network.
        volumes: prepared volumes with labels.
        measures: keys of `MEASURES`.

    Returns:
        Each measure -> a number for every volume, the mean over its classes; and "by_class": the
        same names -> a number for every volume and foreground class.

    Raises:
        NotFiniteError: the network computed NaN or Inf.
    """
    metrics = {name: MEASURES[name]() for name in measures}
    for volume in volumes:
        logits = predict(recipe, model, volume["image"]).cpu()
        if not torch.isfinite(logits).all():
            raise NotFiniteError(f"the prediction of {volume['entry']['image']}")
        truth = one_hot(volume["label"].as_tensor()[None], recipe.classes)
        predicted = one_hot(logits.argmax(1, keepdim=True), recipe.classes)
        with warnings.catch_warnings():
            # MONAI's HD95 passes an argument that MONAI deprecated. It also warns of empty
            # predictions, which are reported as nan.
            warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
            warnings.filterwarnings("ignore", "the (prediction|ground truth) of class", UserWarning)
            for name, metric in metrics.items():
                metric(predicted, truth, **({"spacing": recipe.spacing} if name == "hd95" else {}))
    scores: dict[str, Any] = {"by_class": {}}
    for name, metric in metrics.items():
        values = metric.get_buffer()
        if name in _COUNTED:
            values = _of_counts(name, values)
        values = values.masked_fill(values.isinf(), float("nan"))
        scores["by_class"][name] = values.tolist()
        scores[name] = values.nanmean(1).tolist()
    return scores


def _of_counts(name: str, counts: Tensor) -> Tensor:
    """A measure of the numbers of true and false positives and negatives ``[n, classes, 4]``."""
    hit, false, right, missed = counts.unbind(-1)
    return hit / (hit + missed) if name == "sensitivity" else right / (right + false)


def mean(values: Sequence[float]) -> float:
    """Mean of the values that are not nan."""
    return torch.tensor(values).nanmean().item()


#: Stands under every table of scores.
DEFINITIONS = """\
Dice: 2 |P ∩ T| / (|P| + |T|) of predicted voxels P and true voxels T, from 0 to 1 (best), for every
  volume and class but the background. HD95: the 95th percentile of the distances from each surface
  to the other, the larger of both directions, in mm. Both are taken on volumes that are resampled
  to {spacing} mm, averaged over the classes of a volume, then over volumes. A class that a volume
  does not have counts in neither, even if it is predicted there. Nothing predicted where there is
  something: Dice 0 and no HD95."""
