"""The paper's two properties of item attention, and how well attention finds what an item names.

Axes: N images or studies, B of a batch, K item slots, L = h·w or S·d·h·w tokens, H heads, S series; D joint width and,
of masks, slices; Y, X pixel rows and columns of the image as the model sees it.

All maps are the head's softmax weights without the zero token, averaged over heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from itemizedclip.data.batch import Tokenizer
from itemizedclip.evaluation.attention import ItemMaps, maps_of_features
from itemizedclip.evaluation.encoding import (
    EncodingOptions,
    encode_images,
    encode_texts,
    evaluation_mode,
    in_order_of_rows,
    model_device,
    number_texts,
    read_items,
)
from itemizedclip.evaluation.evaluator import ItemDataset, facts_of_unusable, joined_unusable, sample_id_of
from itemizedclip.evaluation.intervals import Array, Resampling, weighted_mean
from itemizedclip.evaluation.tcsim import float_head
from itemizedclip.models.dual_encoder import DualEncoder, ImageFeatures
from itemizedclip.models.item_attention import ItemAttention
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.logs import OnProgress

FIXED_THRESHOLD = 0.5
"""Pixels above this fraction of their map's maximum count as the item, in `miou`."""

THRESHOLDS = tuple(step / 20 for step in range(1, 20))
"""Fractions of the maximum tried for `miou_best`: 0.05 … 0.95, the fixed one among them."""


def mean_map_similarity(maps_KL: Tensor) -> float:
    """Mean cosine over all pairs of maps of one image; NaN with fewer than two maps (paper: mAMS)."""
    K = len(maps_KL)
    if K < 2:
        return math.nan
    unit_KL = F.normalize(maps_KL.double(), dim=-1)
    first, second = torch.triu_indices(K, K, 1)
    return (unit_KL[first] * unit_KL[second]).sum(-1).mean().item()


def upsample_maps(maps_KL: Tensor, grid: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """Maps over a token grid → pixels, linear between patch centres.

    A grid (h, w) becomes (K, Y, X). A study's (S, d, h, w) becomes (K, S, D, Y, X): series stay apart.
    """
    if len(grid) == 2:
        maps_K1hw = maps_KL.reshape(len(maps_KL), 1, *grid)
        return F.interpolate(maps_K1hw, size=size, mode="bilinear", align_corners=False)[:, 0]
    return F.interpolate(maps_KL.reshape(len(maps_KL), *grid), size=size[1:], mode="trilinear", align_corners=False)


def pointing_hits(maps_K: Tensor, masks_K: Tensor, *, tolerance_px: float | Sequence[float] = 0.0) -> Tensor:
    """bool (K,): the map's largest value lies inside the mask, or near one of its pixels.

    An empty mask is never hit.

    Args:
        maps_K: (K, Y, X), or any other number of axes.
        masks_K: bool, of the same shape.
        tolerance_px: how far the peak may lie from a pixel of the mask, between pixel centres: one number, or one per
            axis (half axes of an ellipsoid; 0 along an axis allows no step along it).
    """
    axes = maps_K.shape[1:]
    given = [tolerance_px] * len(axes) if isinstance(tolerance_px, (int, float)) else list(tolerance_px)
    tolerance = torch.tensor(given, dtype=torch.float64)
    peaks = maps_K.flatten(1).argmax(1)
    hits = torch.zeros(len(maps_K), dtype=torch.bool)
    for k, mask in enumerate(masks_K):
        peak = torch.stack(torch.unravel_index(peaks[k], axes))
        steps = (mask.nonzero() - peak).double()
        # No step at all is within any tolerance, 0 included.
        shares = torch.where(steps == 0, 0.0, steps / tolerance)
        hits[k] = bool((shares.square().sum(-1) <= 1 + 1e-9).any())
    return hits


def mask_ious(maps_K: Tensor, masks_K: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """Intersection over union (K, thresholds), float64, of the mask with pixels above each fraction of the maximum.

    Args:
        maps_K: (K, Y, X), or any other number of axes, not negative.
        masks_K: bool, of the same shape.
        thresholds: fractions of each map's maximum.
    """
    rising, order = torch.tensor(thresholds, dtype=maps_K.dtype).sort()
    table = torch.empty((len(maps_K), len(thresholds)), dtype=torch.float64)
    for k, (values, mask) in enumerate(zip(maps_K.flatten(1), masks_K.flatten(1))):
        relative = values / values.amax().clamp_min(torch.finfo(values.dtype).tiny)
        # How many thresholds each pixel exceeds; one pass for all thresholds, as volumes have millions of voxels.
        level = torch.bucketize(relative, rising, out_int32=True)
        found = _above(level, len(thresholds))
        intersection = _above(level[mask], len(thresholds))
        union = found + mask.sum() - intersection
        table[k, order] = intersection.double() / union.clamp_min(1)
    return table


def _above(level: Tensor, count: int) -> Tensor:
    """int64 (count,): how many entries exceed 0, 1, … count − 1."""
    return level.bincount(minlength=count + 1).flip(0).cumsum(0).flip(0)[1:]


@dataclass
class ExplainEvaluator:
    """MLL, mAMS and, where item masks are known, pointing game and mIoU.

    Measures, each a mean over images or items on all ranks:
        mll: lowest TCSim over an image's own items (paper: mean lowest logit; completeness).
        mams: mean pairwise cosine of the attention maps of an image's own items (paper: mean attention-map similarity;
            independence; lower is better). Images with one item have no pair and are left out.
        nowhere_share: attention on the zero token, mean over items.
        pointing_game: share of items whose map, enlarged linearly to the image, peaks inside the item's mask; of a
            study in a series that shows the item.
        miou: mean IoU of the mask and the pixels above 0.5 of the map's maximum.
        miou_best, miou_best_threshold: the same at the one threshold of 0.05, 0.10 … 0.95 that is best on this very
            set; an upper bound, not a fair score.
    Items whose mask is empty (absent, or cropped away) are left out of the last three. Where there are any, also:
        nowhere_share_absent: attention of those on the zero token, where they should look.
        nowhere_share_present: that of items with a mask that is not empty.

    Attributes:
        dataset: images with atomic items. Masks come from its `masks(index)`, bool (K, Y, X), of studies
            (K, S, D, Y, X), in the order of the items and in the frame of the transformed image; None for an image
            without masks. Without that method only the first three measures exist.
        tokenizer: texts → int64 (M, C).
        name: prefix for logs.
        normalise_tokens: L2-normalise image tokens before the head.
        tolerance_px: a peak this near to the mask still hits, in pixels or voxels, one number or one per axis (Y, X) or
            (D, Y, X); 0 asks for a pixel of the mask itself. Another series of a study is never near.
        encoding: batch sizes, workers, precision of the towers, what to do about images that cannot be used.
        unit: what the images are called in messages.
        patients: whose each image of the data set is; None: each stands for itself. Intervals are taken by patient.
        on_progress: called after each batch.
        resampling: after `run`: how the measures, but for `miou_best`, follow from the images.
        facts: after `run`: numbers of images, items and masks, rules.
        unusable: after `run`: row → why an image was left out.
    """

    dataset: ItemDataset
    tokenizer: Tokenizer
    name: str = "explain"
    normalise_tokens: bool = False
    tolerance_px: float | tuple[float, ...] = 0.0
    encoding: EncodingOptions = field(default_factory=EncodingOptions)
    unit: str = "images"
    patients: Sequence[str] | None = None
    on_progress: OnProgress | None = None
    resampling: Resampling | None = field(default=None, init=False)
    facts: dict[str, Any] = field(default_factory=dict, init=False)
    unusable: dict[int, str] = field(default_factory=dict, init=False)

    @torch.no_grad()
    def run(self, model: DualEncoder) -> dict[str, float]:
        """The measures, the same on every rank; all ranks must call it.

        Raises:
            BadSampleError: an image without an item, or images of one batch that differ in shape.
            ValueError: an empty data set, masks that do not fit the items or the image, or scores that are not finite.
        """
        if not len(self.dataset):
            raise UserError(f"{self.name}: the data set is empty")
        device = model_device(model)
        get_masks = getattr(self.dataset, "masks", None)
        unusable: dict[int, str] = {}
        with evaluation_mode(model):
            items = read_items(self.dataset, self.encoding, unusable)
            self.unusable = joined_unusable(self, unusable, len(self.dataset))
            texts, number_M = number_texts([text for own in items.values() for text in own])
            features_UD = encode_texts(model, self.tokenizer, texts, self.encoding)
            numbers_of = dict(zip(items, number_M.to(device).split([len(own) for own in items.values()])))
            rows = [torch.empty(0, dtype=torch.int64)]
            findings = [torch.empty((0, _COLUMNS), dtype=torch.float64)]
            for batch in encode_images(
                model, self.dataset, self.encoding, rows=list(items), unusable=unusable, on_progress=self.on_progress
            ):
                own = [numbers_of[row] for row in batch.rows_B.tolist()]
                maps_B = self._maps(model.head, features_UD, own, batch.features)
                for row, maps in zip(batch.rows_B.tolist(), maps_B):
                    masks = get_masks(row) if callable(get_masks) else None
                    findings.append(self._findings(row, maps, masks))
                rows.append(batch.rows_B.cpu())
        self.unusable = joined_unusable(self, unusable, len(self.dataset))
        findings_N = in_order_of_rows(torch.cat(rows), torch.cat(findings))
        names = self.patients or [sample_id_of(self.dataset, row) for row in range(len(self.dataset))]
        self.resampling = _resampling(findings_N, [names[row] for row in items if row not in self.unusable])
        self.facts = {
            "num_images": len(findings_N),
            "num_items": sum(len(own) for row, own in items.items() if row not in self.unusable),
            "num_masks": int(findings_N[:, _NUM_MASKS].sum()),
            "normalise_tokens": self.normalise_tokens,
            "pointing_tolerance_px": list(given) if isinstance(given := self.tolerance_px, tuple) else given,
            "miou_threshold": FIXED_THRESHOLD,
            **facts_of_unusable(self.dataset, self.unusable),
        }
        return _measures(findings_N)

    def _maps(
        self, head: ItemAttention, features_UD: Tensor, own: list[Tensor], features: ImageFeatures
    ) -> list[ItemMaps]:
        """Maps of each image's own items, float32; slots beyond an image's items repeat its last item and are cut."""
        K = max(map(len, own))
        numbers_BK = torch.stack([torch.cat([n, n[-1:].expand(K - len(n))]) for n in own])
        exact = ImageFeatures(features.global_BD, features.tokens_BLD.float(), features.grid)
        maps_B = maps_of_features(
            float_head(head), exact, features_UD[numbers_BK], normalise_tokens=self.normalise_tokens
        )
        return [maps.first(len(n)) for maps, n in zip(maps_B, own)]

    def _findings(self, row: int, maps: ItemMaps, masks_K: Tensor | None) -> Tensor:
        """One row of float64 (1, _COLUMNS) about image `row`."""
        K, grid, maps_KL = len(maps), maps.grid, maps.weights.flatten(1)
        if not (torch.isfinite(maps.scores).all() and torch.isfinite(maps_KL).all()):
            raise UserError(f"{self.name}: scores of image {row} are not finite: check the weights and the precision")
        findings = torch.zeros((1, _COLUMNS), dtype=torch.float64)
        findings[0, _LOWEST] = maps.scores.min().double()
        findings[0, _SIMILARITY] = mean_map_similarity(maps_KL)
        findings[0, _NOWHERE] = maps.nowhere.double().sum()
        findings[0, _NUM_ITEMS] = K
        if masks_K is None:
            return findings
        masks_K = torch.as_tensor(masks_K)
        fits = masks_K.dtype == torch.bool and len(masks_K) == K and masks_K.dim() == 1 + len(grid)
        if not fits or (len(grid) == 4 and masks_K.shape[1] != grid[0]):
            axes = "rows, columns" if len(grid) == 2 else f"{grid[0]} series, slices, rows, columns"
            raise UserError(
                f"{self.name}: masks of image {row} are {masks_K.dtype} {tuple(masks_K.shape)} for {K} items on a "
                f"token grid {tuple(grid)}; expected bool ({K}, {axes})"
            )
        size = tuple(masks_K.shape[1:])
        is_empty_K = ~masks_K.flatten(1).any(1)
        findings[0, _NUM_EMPTY] = is_empty_K.sum()
        findings[0, _NOWHERE_EMPTY] = maps.nowhere.double().cpu()[is_empty_K.cpu()].sum()
        findings[0, _NOWHERE_MASKED] = maps.nowhere.double().cpu()[~is_empty_K.cpu()].sum()
        # One at a time: a study's map at voxel size takes 100 MB.
        for k in masks_K.flatten(1).any(1).nonzero()[:, 0].tolist():
            enlarged, mask = upsample_maps(maps_KL[k : k + 1], grid, size), masks_K[k : k + 1]
            findings[0, _NUM_MASKS] += 1
            findings[0, _HITS] += float(pointing_hits(enlarged, mask, tolerance_px=self._tolerance(len(grid))))
            findings[0, _IOUS:] += mask_ious(enlarged, mask, THRESHOLDS)[0]
        return findings

    def _tolerance(self, num_axes: int) -> tuple[float, ...]:
        """One number per axis of a mask; a study's first axis are its series."""
        pixel_axes = min(num_axes, 3)
        given = self.tolerance_px
        per_axis = (float(given),) * pixel_axes if isinstance(given, (int, float)) else tuple(given)
        if len(per_axis) != pixel_axes:
            raise UserError(f"{self.name}: tolerance_px is {given}; expected one number or {pixel_axes}, one per axis")
        return per_axis if num_axes == 2 else (0.0, *per_axis)


# Columns of what is kept of an image; sums over its items except for the first two.
(
    _LOWEST, _SIMILARITY, _NOWHERE, _NUM_ITEMS, _NUM_EMPTY, _NOWHERE_EMPTY, _NOWHERE_MASKED, _NUM_MASKS, _HITS, _IOUS,
) = range(10)  # fmt: skip
_COLUMNS = _IOUS + len(THRESHOLDS)


def _resampling(findings_N: Tensor, patients_N: Sequence[str]) -> Resampling:
    """How the measures follow from the images; `_measures` of repeated rows, many times at once."""
    columns = findings_N.numpy()

    def ratio(totals: Array, whole: Array) -> Array:
        shares: Array = np.divide(totals, whole, out=np.full(len(whole), np.nan), where=whole > 0)
        return shares

    def measure(weights_RN: Array) -> dict[str, Array]:
        totals = {name: weights_RN @ columns[:, name] for name in range(_COLUMNS) if name != _SIMILARITY}
        return {
            "mll": weighted_mean(columns[:, _LOWEST], weights_RN),
            "mams": weighted_mean(columns[:, _SIMILARITY], weights_RN),
            "nowhere_share": ratio(totals[_NOWHERE], totals[_NUM_ITEMS]),
            "nowhere_share_absent": ratio(totals[_NOWHERE_EMPTY], totals[_NUM_EMPTY]),
            "nowhere_share_present": ratio(totals[_NOWHERE_MASKED], totals[_NUM_MASKS]),
            "pointing_game": ratio(totals[_HITS], totals[_NUM_MASKS]),
            "miou": ratio(totals[_IOUS + THRESHOLDS.index(FIXED_THRESHOLD)], totals[_NUM_MASKS]),
        }

    return Resampling(patients_N, measure)


def _measures(findings_N: Tensor) -> dict[str, float]:
    """Means over images or items; a measure that nothing contributes to is left out."""
    totals = findings_N.sum(0)
    table = {
        "mll": findings_N[:, _LOWEST].mean().item(),
        "nowhere_share": (totals[_NOWHERE] / totals[_NUM_ITEMS]).item(),
    }
    similarities = findings_N[:, _SIMILARITY]
    if not similarities.isnan().all():
        table["mams"] = similarities.nanmean().item()
    if totals[_NUM_EMPTY]:
        table["nowhere_share_absent"] = (totals[_NOWHERE_EMPTY] / totals[_NUM_EMPTY]).item()
        if totals[_NUM_MASKS]:
            table["nowhere_share_present"] = (totals[_NOWHERE_MASKED] / totals[_NUM_MASKS]).item()
    if totals[_NUM_MASKS]:
        ious = totals[_IOUS:] / totals[_NUM_MASKS]
        best = int(ious.argmax())
        table |= {
            "pointing_game": (totals[_HITS] / totals[_NUM_MASKS]).item(),
            "miou": ious[THRESHOLDS.index(FIXED_THRESHOLD)].item(),
            "miou_best": ious[best].item(),
            "miou_best_threshold": THRESHOLDS[best],
        }
    return table
