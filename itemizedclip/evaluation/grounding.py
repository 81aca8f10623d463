"""Grounding: does the map of an item lie on its region, measured in the input's own pixels or voxels?

Beside every measure stands what chance reaches and what the patch grid allows: a map of 14 × 14 × 14 patches cannot
draw a nodule, whatever it knows.

Axes: N images, K items of one, T thresholds, *grid token axes, *input pixels or voxels of the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from itemizedclip.evaluation.attention import ItemMaps
from itemizedclip.evaluation.explanation import THRESHOLDS, ExplainEvaluator, mean_map_similarity
from itemizedclip.evaluation.intervals import Array, Resampling, weighted_mean
from itemizedclip.evaluation.lattice import Lattice, bounding_box, box_iou
from itemizedclip.runtime.errors import UserError

HIT_DICE = 0.1
"""A finding is hit from this Dice on (ReXGroundingCT)."""

INSTANCE_DICE = 0.2
"""A predicted component is right from this Dice with a true instance on (ReXGroundingCT)."""

BOX_IOU = 0.5
"""A box is right from this IoU on (Flickr30k Entities, DIOR-RSVG)."""

Box = tuple[int, int, int, int]
"""Top, left, bottom, right in pixels, the last two beyond the box."""

Mask = NDArray[Any]
"""Integers or bool (*input): 0 is nothing, every other value an instance."""


@dataclass(frozen=True)
class Truth:
    """What is known of one image.

    Attributes:
        lattice: how the model's tokens lie over it.
        masks: of the K items; empty where nobody says (a test set): then only predictions are made.
        boxes: of the K items, where masks are made of boxes: a box is predicted and measured too.
    """

    lattice: Lattice
    masks: Sequence[Mask] = ()
    boxes: Sequence[Sequence[Box]] = ()


def dice_by_threshold(values: NDArray[np.float32], mask: Mask) -> tuple[Array, Array]:
    """Dice and IoU (T,) of a mask with the pixels above each of `THRESHOLDS`, fractions of the map's maximum.

    Args:
        values: (*input), not negative.
        mask: of the same shape.
    """
    top = float(values.max())
    edges = np.asarray(THRESHOLDS) * top
    truth = mask != 0
    # How many thresholds each pixel exceeds; one pass for all.
    level = np.searchsorted(edges, values.ravel(), side="left")
    found = _above(level)
    inside = _above(level[truth.ravel()])
    size = int(truth.sum())
    dice = 2 * inside / np.maximum(found + size, 1)
    return dice, inside / np.maximum(found + size - inside, 1)


def _above(level: NDArray[np.int64]) -> Array:
    counts = np.bincount(level, minlength=len(THRESHOLDS) + 1)
    rising: Array = counts[::-1].cumsum()[::-1][1:].astype(np.float64)
    return rising


def instance_counts(predicted: NDArray[np.bool_], mask: Mask) -> tuple[int, int, int]:
    """True positives, false positives and false negatives among connected components (faces touching).

    A component is right when its Dice with a true instance, not yet taken by a better one, is at least `INSTANCE_DICE`.
    True instances are the values of a mask that has several, else its components.

    Args:
        predicted: (*input).
        mask: of the same shape.
    """
    found, num_found = ndimage.label(predicted)
    values = np.unique(mask[mask != 0])
    if len(values) > 1:
        true = np.searchsorted(values, mask) + 1
        true[mask == 0] = 0
        num_true = len(values)
    else:
        true, num_true = ndimage.label(mask != 0)
    sizes_found = np.bincount(found.ravel(), minlength=num_found + 1)
    sizes_true = np.bincount(true.ravel(), minlength=num_true + 1)
    both = (found > 0) & (true > 0)
    pairs, shared = np.unique(np.stack([found[both], true[both]]), axis=1, return_counts=True)
    dices = [2 * n / (sizes_found[f] + sizes_true[t]) for (f, t), n in zip(pairs.T, shared)]
    taken_found: set[int] = set()
    taken_true: set[int] = set()
    for at in np.argsort(dices, kind="stable")[::-1]:
        f, t = (int(value) for value in pairs[:, at])
        if dices[at] >= INSTANCE_DICE and f not in taken_found and t not in taken_true:
            taken_found.add(f)
            taken_true.add(t)
    return len(taken_found), num_found - len(taken_found), num_true - len(taken_true)


_SUMS = (
    "items", "nowhere", "masks", "dice", "iou", "hit", "pointing", "chance_pointing", "chance_dice", "ceiling_dice",
    "ceiling_hit", "true_instances", "false_instances", "missed_instances", "boxes", "box",
)  # fmt: skip
"""Sums over an image's items; behind them the Dice at each threshold."""

_COLUMNS = ("lowest", "similarity", *_SUMS, *(f"dice@{threshold:.2f}" for threshold in THRESHOLDS))


@dataclass
class GroundingEvaluator(ExplainEvaluator):
    """Dice, hit rate, IoU, instances, pointing game and boxes, with chance and the ceiling of the patch grid.

    The dataset's `truth(row, grid)` says what is known of an image. Measures, means over items whose mask is not empty:
        dice, hit_rate, miou: of the pixels above `threshold` of the map's maximum; a hit is a Dice of at least 0.1.
        dice_best, threshold_best: at the threshold that is best on this very set; an upper bound, and what a run on
            training data chooses the threshold by.
        instance_precision, instance_recall, instance_f1: of connected components, over all items together.
        pointing_game: share of items whose map peaks inside the mask.
        box_accuracy: where masks are boxes: share whose predicted box (around what lies above the threshold and is
            connected with the peak) has an IoU of at least 0.5.
        chance_pointing: share of the image that the mask covers: what pointing anywhere hits.
        chance_dice: Dice of calling everything the item.
        ceiling_dice, ceiling_hit_rate: of the mask itself, brought down to patches and back, at its best threshold.
        mll, mams, nowhere_share: as `ExplainEvaluator`.

    Attributes:
        threshold: fraction of each map's maximum; chosen on training data, never here.
        predict: called with (row, K predictions bool (*input)), such as to write them; None: nothing.
    """

    threshold: float = 0.5
    predict: Callable[[int, list[NDArray[np.bool_]]], None] | None = None
    by_threshold: dict[str, float] = field(default_factory=dict, init=False)

    num_columns = len(_COLUMNS)

    def __post_init__(self) -> None:
        if not any(math.isclose(self.threshold, known) for known in THRESHOLDS):
            raise UserError(f"threshold is {self.threshold}; expected one of 0.05, 0.10, … 0.95")

    def findings_of(self, row: int, maps: ItemMaps) -> Tensor:
        """One row of sums about image `row`."""
        truth: Truth = self.dataset.truth(row, maps.grid)  # type: ignore[attr-defined]
        sums = dict.fromkeys(_COLUMNS, 0.0)
        sums["lowest"] = float(maps.scores.min())
        sums["similarity"] = mean_map_similarity(maps.weights.flatten(1))
        sums["items"], sums["nowhere"] = float(len(maps)), float(maps.nowhere.double().sum())
        if truth.masks and len(truth.masks) != len(maps):
            raise UserError(f"{self.name}: {len(truth.masks)} masks for {len(maps)} items of image {row}")
        predictions = []
        for k in range(len(maps)):
            weights = maps.weights[k].numpy()
            # Series of a study share their place: their maps add up.
            grid = weights.sum(0) if weights.ndim == len(truth.lattice.grid) + 1 else weights
            values = truth.lattice.enlarge(grid)
            predicted = values > self.threshold * values.max()
            if self.predict is not None:
                predictions.append(predicted)
            if truth.masks and (truth.masks[k] != 0).any():
                self._add(sums, truth, k, values, predicted)
        if self.predict is not None:
            self.predict(row, predictions)
        return torch.tensor([[sums[name] for name in _COLUMNS]], dtype=torch.float64)

    def _add(
        self,
        sums: dict[str, float],
        truth: Truth,
        k: int,
        values: NDArray[np.float32],
        predicted: NDArray[np.bool_],
    ) -> None:
        mask = truth.masks[k]
        inside = mask != 0
        dice_T, iou_T = dice_by_threshold(values, mask)
        at = int(np.argmin(np.abs(np.asarray(THRESHOLDS) - self.threshold)))
        peak = np.unravel_index(int(values.argmax()), values.shape)
        covered = float(inside.mean())
        coarse = truth.lattice.enlarge(truth.lattice.reduce(inside))
        ceiling = float(dice_by_threshold(coarse, mask)[0].max()) if coarse.max() > 0 else 0.0
        right, wrong, missed = instance_counts(predicted, mask)
        sums["masks"] += 1
        sums["dice"] += dice_T[at]
        sums["iou"] += iou_T[at]
        sums["hit"] += float(dice_T[at] >= HIT_DICE)
        sums["pointing"] += float(inside[peak])
        sums["chance_pointing"] += covered
        sums["chance_dice"] += 2 * covered / (1 + covered)
        sums["ceiling_dice"] += ceiling
        sums["ceiling_hit"] += float(ceiling >= HIT_DICE)
        sums["true_instances"] += right
        sums["false_instances"] += wrong
        sums["missed_instances"] += missed
        for threshold, dice in zip(THRESHOLDS, dice_T):
            sums[f"dice@{threshold:.2f}"] += float(dice)
        if truth.boxes:
            components, _ = ndimage.label(predicted)
            box = bounding_box(components == components[peak])
            sums["boxes"] += 1
            sums["box"] += float(box is not None and max(_ious(box, truth.boxes[k])) >= BOX_IOU)

    def measured(self, findings_N: Tensor) -> dict[str, float]:
        """See the class."""
        whole = np.ones((1, len(findings_N)))
        table = {name: float(values[0]) for name, values in _measures(findings_N.numpy(), whole).items()}
        table = {name: value for name, value in table.items() if not math.isnan(value)}
        totals = dict(zip(_COLUMNS, findings_N.sum(0).tolist()))
        self.facts |= {"num_masks": int(totals["masks"]), "threshold": self.threshold}
        if totals["masks"]:
            dices = {f"{t:.2f}": totals[f"dice@{t:.2f}"] / totals["masks"] for t in THRESHOLDS}
            best = max(dices, key=lambda name: dices[name])
            table |= {"dice_best": dices[best], "threshold_best": float(best)}
            self.facts["dice_by_threshold"] = dices
        return table

    def resampled(self, findings_N: Tensor, patients_N: Sequence[str]) -> Resampling:
        """See `ExplainEvaluator`."""
        columns = findings_N.numpy()
        return Resampling(patients_N, lambda weights_RN: _measures(columns, weights_RN))


def _ious(box: Box, true: Sequence[Box]) -> list[float]:
    """IoU with each true box, and with the box around all of them."""
    around = tuple(choose(own[at] for own in true) for at, choose in enumerate((min, min, max, max)))
    return [box_iou(box, own) for own in (*true, around)]


def _measures(columns: Array, weights_RN: Array) -> Mapping[str, Array]:
    at = {name: number for number, name in enumerate(_COLUMNS)}
    totals = {name: weights_RN @ columns[:, at[name]] for name in _SUMS}

    def ratio(part: Array, whole: Array) -> Array:
        shares: Array = np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
        return shares

    masks, right = totals["masks"], totals["true_instances"]
    per_mask = {
        "dice": "dice", "hit_rate": "hit", "miou": "iou", "pointing_game": "pointing", "chance_pointing":
        "chance_pointing", "chance_dice": "chance_dice", "ceiling_dice": "ceiling_dice",
        "ceiling_hit_rate": "ceiling_hit",
    }  # fmt: skip
    wrong, missed = totals["false_instances"], totals["missed_instances"]
    return {name: ratio(totals[column], masks) for name, column in per_mask.items()} | {
        "instance_precision": ratio(right, right + wrong),
        "instance_recall": ratio(right, right + missed),
        "instance_f1": ratio(2 * right, 2 * right + wrong + missed),
        "box_accuracy": ratio(totals["box"], totals["boxes"]),
        "mll": weighted_mean(columns[:, at["lowest"]], weights_RN),
        "mams": weighted_mean(columns[:, at["similarity"]], weights_RN),
        "nowhere_share": ratio(totals["nowhere"], totals["items"]),
    }
