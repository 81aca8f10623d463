"""The paper's two properties of item attention, and how well attention finds what an item names.

Axes: N images, B images of a batch, K item slots, L = h·w image tokens, H heads, D joint width; Y, X pixel rows and
columns of the image as the model sees it.

All maps are the head's softmax weights without the zero token, averaged over heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from itemizedclip.data.batch import Tokenizer
from itemizedclip.evaluation.encoding import (
    EncodingOptions,
    ItemDataset,
    Progress,
    encode_images,
    encode_texts,
    evaluation_mode,
    in_order_of_rows,
    model_device,
    number_texts,
    read_items,
)
from itemizedclip.evaluation.tcsim import float_head
from itemizedclip.models.dual_encoder import DualEncoder, ImageFeatures
from itemizedclip.models.item_attention import ItemAttention

FIXED_THRESHOLD = 0.5
"""Pixels above this fraction of their map's maximum count as the item, in `miou`."""

THRESHOLDS = tuple(step / 20 for step in range(1, 20))
"""Fractions of the maximum tried for `miou_best`: 0.05 … 0.95, the fixed one among them."""


@dataclass(frozen=True)
class ItemMaps:
    """What the head says about the items of B images.

    Attributes:
        tcsim_BK: TCSim of each item with its image.
        maps_BKL: attention over image tokens, mean over heads.
        nowhere_BK: share of attention on the zero token, mean over heads; `maps.sum(-1) + nowhere == 1`.
    """

    tcsim_BK: Tensor
    maps_BKL: Tensor
    nowhere_BK: Tensor


@torch.no_grad()
def item_maps(head: ItemAttention, items_BKD: Tensor, tokens_BLD: Tensor) -> ItemMaps:
    """TCSim and attention of items with their own images, float32."""
    head, items_BKD = float_head(head), items_BKD.float()
    projected = head.project(tokens_BLD.float())
    attention = head.attention_weights(items_BKD, projected)
    return ItemMaps(
        tcsim_BK=F.cosine_similarity(items_BKD, head.attend(items_BKD, projected), dim=-1),
        maps_BKL=attention.tokens.mean(1),
        nowhere_BK=attention.nowhere.mean(1),
    )


def mean_map_similarity(maps_KL: Tensor) -> float:
    """Mean cosine over all pairs of maps of one image; NaN with fewer than two maps (paper: mAMS)."""
    K = len(maps_KL)
    if K < 2:
        return math.nan
    unit_KL = F.normalize(maps_KL.double(), dim=-1)
    first, second = torch.triu_indices(K, K, 1)
    return (unit_KL[first] * unit_KL[second]).sum(-1).mean().item()


def upsample_maps(maps_KL: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Maps over h·w tokens → (K, Y, X) pixels, bilinear."""
    maps_K1hw = maps_KL.reshape(len(maps_KL), 1, *grid)
    return F.interpolate(maps_K1hw, size=size, mode="bilinear", align_corners=False)[:, 0]


def pointing_hits(maps_KYX: Tensor, masks_KYX: Tensor, *, tolerance_px: float = 0.0) -> Tensor:
    """bool (K,): the map's largest value lies inside the mask, or within `tolerance_px` of one of its pixels.

    Distances are between pixel centres. An empty mask is never hit.
    """
    X = maps_KYX.shape[-1]
    peaks = maps_KYX.flatten(1).argmax(1)
    hits = torch.zeros(len(maps_KYX), dtype=torch.bool)
    for k, mask in enumerate(masks_KYX):
        peak = torch.stack([peaks[k] // X, peaks[k] % X])
        distances = (mask.nonzero() - peak).double().norm(dim=-1)
        hits[k] = bool((distances <= tolerance_px).any())
    return hits


def mask_ious(maps_KYX: Tensor, masks_KYX: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """Intersection over union (K, thresholds), float64, of the mask with pixels above each fraction of the maximum."""
    relative_KYX = maps_KYX / maps_KYX.flatten(1).amax(1).clamp_min(torch.finfo(maps_KYX.dtype).tiny)[:, None, None]
    columns = []
    for threshold in thresholds:
        found = relative_KYX > threshold
        intersection = (found & masks_KYX).flatten(1).sum(1)
        union = (found | masks_KYX).flatten(1).sum(1)
        columns.append(intersection.double() / union.clamp_min(1))
    return torch.stack(columns, dim=1)


@dataclass
class ExplainEvaluator:
    """MLL, mAMS and, where item masks are known, pointing game and mIoU.

    Measures, each a mean over images or items on all ranks:
        mll: lowest TCSim over an image's own items (paper: mean lowest logit; completeness).
        mams: mean pairwise cosine of the attention maps of an image's own items (paper: mean attention-map similarity;
            independence; lower is better). Images with one item have no pair and are left out.
        nowhere_share: attention on the zero token, mean over items.
        pointing_game: share of items whose map, enlarged bilinearly to the image, peaks inside the item's mask.
        miou: mean IoU of the mask and the pixels above 0.5 of the map's maximum.
        miou_best, miou_best_threshold: the same at the one threshold of 0.05, 0.10 … 0.95 that is best on this very
            set; an upper bound, not a fair score.
    Items whose mask is empty (cropped away) are left out of the last three.

    Attributes:
        dataset: images with atomic items. Masks come from its `masks(index)`, bool (K, Y, X) in the order of the items
            and in the frame of the transformed image; without that method only the first three measures exist.
        tokenizer: texts → int64 (M, C).
        name: prefix for logs.
        normalise_tokens: L2-normalise image tokens before the head.
        tolerance_px: a peak this near to the mask still hits, in pixels; 0 asks for a pixel of the mask itself.
        encoding: batch sizes, workers, precision of the towers.
        on_progress: called after each batch.
        facts: after `run`: numbers of images, items and masks, rules.
    """

    dataset: ItemDataset
    tokenizer: Tokenizer
    name: str = "explain"
    normalise_tokens: bool = False
    tolerance_px: float = 0.0
    encoding: EncodingOptions = field(default_factory=EncodingOptions)
    on_progress: Progress | None = None
    facts: dict[str, Any] = field(default_factory=dict, init=False)

    @torch.no_grad()
    def run(self, model: DualEncoder) -> dict[str, float]:
        """The measures, the same on every rank; all ranks must call it.

        Raises:
            BadSampleError: an image without an item, or images of one batch that differ in shape.
            ValueError: an empty data set, masks that do not fit the items or the image, or scores that are not finite.
        """
        if not len(self.dataset):
            raise ValueError(f"{self.name}: the data set is empty")
        device = model_device(model)
        get_masks = getattr(self.dataset, "masks", None)
        with evaluation_mode(model):
            items = read_items(self.dataset, self.encoding.batch_size)
            texts, number_M = number_texts([text for own in items for text in own])
            features_UD = encode_texts(model, self.tokenizer, texts, self.encoding)
            numbers_of = number_M.to(device).split([len(own) for own in items])
            rows = [torch.empty(0, dtype=torch.int64)]
            findings = [torch.empty((0, _COLUMNS), dtype=torch.float64)]
            for batch in encode_images(model, self.dataset, self.encoding, on_progress=self.on_progress):
                own = [numbers_of[row] for row in batch.rows_B.tolist()]
                maps = self._maps(model.head, features_UD, own, batch.features)
                for i, row in enumerate(batch.rows_B.tolist()):
                    masks = get_masks(row) if callable(get_masks) else None
                    findings.append(self._findings(row, maps, i, len(own[i]), batch.features.grid, masks))
                rows.append(batch.rows_B.cpu())
        findings_N = in_order_of_rows(torch.cat(rows), torch.cat(findings))
        self.facts = {
            "num_images": len(items),
            "num_items": sum(map(len, items)),
            "num_masks": int(findings_N[:, _NUM_MASKS].sum()),
            "normalise_tokens": self.normalise_tokens,
            "pointing_tolerance_px": self.tolerance_px,
            "miou_threshold": FIXED_THRESHOLD,
        }
        return _measures(findings_N)

    def _maps(
        self, head: ItemAttention, features_UD: Tensor, own: list[Tensor], features: ImageFeatures
    ) -> ItemMaps:
        """Maps of each image's own items; slots beyond an image's items repeat its last item."""
        K = max(map(len, own))
        numbers_BK = torch.stack([torch.cat([n, n[-1:].expand(K - len(n))]) for n in own])
        tokens_BLD = features.tokens_BLD
        if self.normalise_tokens:
            tokens_BLD = F.normalize(tokens_BLD.float(), dim=-1)
        return item_maps(head, features_UD[numbers_BK], tokens_BLD)

    def _findings(
        self, row: int, maps: ItemMaps, i: int, K: int, grid: tuple[int, ...], masks_KYX: Tensor | None
    ) -> Tensor:
        """One row of float64 (1, _COLUMNS) about image `row`, entry i of its batch."""
        tcsim_K, maps_KL = maps.tcsim_BK[i, :K].cpu(), maps.maps_BKL[i, :K].float().cpu()
        if not (torch.isfinite(tcsim_K).all() and torch.isfinite(maps_KL).all()):
            raise ValueError(f"{self.name}: scores of image {row} are not finite: check the weights and the precision")
        findings = torch.zeros((1, _COLUMNS), dtype=torch.float64)
        findings[0, _LOWEST] = tcsim_K.min().double()
        findings[0, _SIMILARITY] = mean_map_similarity(maps_KL)
        findings[0, _NOWHERE] = maps.nowhere_BK[i, :K].double().sum().cpu()
        findings[0, _NUM_ITEMS] = K
        if masks_KYX is None:
            return findings
        masks_KYX = torch.as_tensor(masks_KYX)
        if len(grid) != 2 or masks_KYX.dim() != 3 or len(masks_KYX) != K or masks_KYX.dtype != torch.bool:
            raise ValueError(
                f"{self.name}: masks of image {row} are {masks_KYX.dtype} {tuple(masks_KYX.shape)} for {K} items on a "
                f"token grid {tuple(grid)}; expected bool ({K}, rows, columns) and a grid of two axes"
            )
        seen = masks_KYX.flatten(1).any(1)
        masks_KYX, maps_KL = masks_KYX[seen], maps_KL[seen]
        if len(masks_KYX):
            enlarged = upsample_maps(maps_KL, (grid[0], grid[1]), (masks_KYX.shape[1], masks_KYX.shape[2]))
            findings[0, _NUM_MASKS] = len(masks_KYX)
            findings[0, _HITS] = pointing_hits(enlarged, masks_KYX, tolerance_px=self.tolerance_px).double().sum()
            findings[0, _IOUS:] = mask_ious(enlarged, masks_KYX, THRESHOLDS).sum(0)
        return findings


# Columns of what is kept of an image; sums over its items except for the first two.
_LOWEST, _SIMILARITY, _NOWHERE, _NUM_ITEMS, _NUM_MASKS, _HITS, _IOUS = range(7)
_COLUMNS = _IOUS + len(THRESHOLDS)


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
