"""The objectives as pure functions of logits, labels and weights (paper: ILA, KTA, MPS, IIS, UWP).

Axes: B images, K item slots, T queries. Every logit is τ·cos + β; every sum runs over this rank's images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_logits(a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """τ·cos(a, b) + β along the last axis, in float32; `a` and `b` broadcast."""
    return logit_scale * (F.normalize(a.float(), dim=-1) * F.normalize(b.float(), dim=-1)).sum(-1) + logit_bias


def pair_loss(logits: Tensor, labels: Tensor | float, weights: Tensor) -> Tensor:
    """−Σ w·log σ(y·logit), a scalar; divide by B (ILA, KTA) or B·K (MPS, IIS)."""
    return -(weights * F.logsigmoid(labels * logits)).sum()


def separation_loss(logits_BKK: Tensor, item_mask_BK: Tensor, item_ids_BK: Tensor | None = None) -> Tensor:
    """IIS before its division by B·K: item k's embedding matches item k's text and no other of the same image.

    Args:
        logits_BKK: τ·cos(head(t_k), t_j) + β.
        item_mask_BK: 1 = real item.
        item_ids_BK: equal numbers for equal texts; two items that read alike are then no negatives of each other.
    """
    K = item_mask_BK.shape[1]
    labels = 2 * torch.eye(K, device=logits_BKK.device) - 1
    mask = item_mask_BK.float()
    weights = mask[:, :, None] * mask[:, None, :]
    if item_ids_BK is not None:
        alike = (item_ids_BK[:, :, None] == item_ids_BK[:, None, :]) & (labels < 0)
        weights = weights * ~alike
    return pair_loss(logits_BKK, labels, weights)


def text_ids(item_tokens_NC: Tensor) -> Tensor:
    """int64 (N,): equal for equal texts whatever their padding (0), different for different ones but for a chance of
    about N² / 2⁶³."""
    powers = torch.ones(item_tokens_NC.shape[1], dtype=torch.int64, device=item_tokens_NC.device)
    powers[1:] = 6364136223846793005
    return (item_tokens_NC * powers.cumprod(0)).sum(1)


def drop_duplicates(
    weights: Tensor, item_ids: Tensor, own_ids_BK: Tensor, own_mask_BK: Tensor, is_own: Tensor
) -> Tensor:
    """A negative pair whose item reads like one of the image's own real items carries no loss: it is no negative.

    Args:
        weights: (B, T) pair weights.
        item_ids: int64 (B, T) or (1, T), from `text_ids`.
        own_ids_BK: the image's own items.
        own_mask_BK: bool, which of them are real.
        is_own: bool, broadcastable to (B, T), pairs that are positives.
    """
    alike = (item_ids[:, :, None] == own_ids_BK[:, None, :]) & own_mask_BK.bool()[:, None, :]
    return weights * ~(alike.any(-1) & ~is_own)


def drop_normal_pairs(weights: Tensor, image_is_normal: Tensor, item_is_normal: Tensor, is_own: Tensor) -> Tensor:
    """Normal check: a negative pair whose image and item both come from normal studies carries no loss.

    Args:
        weights: (B, T) pair weights.
        image_is_normal: (B, 1) or broadcastable bool.
        item_is_normal: (B, T) or broadcastable bool, whether the item's own study is normal.
        is_own: (B, T) or broadcastable bool, pairs that are positives.
    """
    return weights * ~(image_is_normal & item_is_normal & ~is_own)


def upweight_worst_positive(
    weights_BT: Tensor, logits_BT: Tensor, own_columns_BK: Tensor, item_mask_BK: Tensor, factor: float
) -> Tensor:
    """UWP: multiply the weight of each image's lowest-logit real own item by `factor`."""
    if factor == 1.0:
        return weights_BT
    own = logits_BT.detach().gather(1, own_columns_BK).masked_fill(~item_mask_BK.bool(), float("inf"))
    worst = own_columns_BK.gather(1, own.argmin(1, keepdim=True))
    # An image without a real item has weight 0 in every own slot, so the choice there is without effect.
    return weights_BT.scatter(1, worst, weights_BT.gather(1, worst) * factor)
