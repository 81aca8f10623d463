"""The objectives as pure functions of logits, labels and weights (paper: ILA, KTA, MPS, IIS, UWP).

Axes: B images, K item slots, T queries. Every logit is τ·cos + β; every sum runs over this rank's images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from itemizedclip.models.item_attention import at_least_float32


def cosine_logits(a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """τ·cos(a, b) + β along the last axis, in float32; `a` and `b` broadcast."""
    a, b = F.normalize(at_least_float32(a), dim=-1), F.normalize(at_least_float32(b), dim=-1)
    return logit_scale * (a * b).sum(-1) + logit_bias


def pair_loss(logits: Tensor, labels: Tensor | float, weights: Tensor) -> Tensor:
    """−Σ w·log σ(y·logit), a scalar; divide by B (ILA, KTA) or B·K (MPS, IIS)."""
    return -(weights * F.logsigmoid(labels * logits)).sum()


def text_ids(item_tokens_NC: Tensor) -> Tensor:
    """int64 (N,): equal for equal texts whatever their padding (0), different for different ones but for a chance of
    about N² / 2⁶³."""
    powers = torch.ones(item_tokens_NC.shape[1], dtype=torch.int64, device=item_tokens_NC.device)
    powers[1:] = 6364136223846793005
    return (item_tokens_NC * powers.cumprod(0)).sum(1)


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
