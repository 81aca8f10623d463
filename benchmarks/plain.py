"""The loss the published way, written plainly from docs/method.md: what benchmarks/loss.py compares with.

Axes: B images, K item slots, T queries per image, L image tokens, D joint width, N = B·K.

Every set of items, this rank's and each other rank's in turn, meets the images in passes of torch's own
nn.MultiheadAttention with its zero token, and each pass projects queries, keys and values: one pass for ILA, one that
returns the weights for KTA's choice, one for KTA. The two that carry gradients are checkpointed, so they run again in
the backward pass: five projections a set. Nothing of the package is used but the pairs, which are data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from itemizedclip.objectives.loss import ObjectiveOptions
from itemizedclip.objectives.pairing import ItemRows, global_pairs, local_pairs, separation_pairs


class PlainHead(nn.Module):
    """nn.MultiheadAttention behind three LayerNorms; loads the state dict of ItemAttention."""

    def __init__(self, width: int, num_heads: int = 8) -> None:
        super().__init__()
        self.ln_q, self.ln_k, self.ln_v = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads, add_zero_attn=True, batch_first=True)

    def forward(self, items_BTD: Tensor, tokens_BLD: Tensor, drop: Tensor | None) -> Tensor:
        """Pooled (B, T, D); `drop` is bool (B·H, T, L), True = drop."""
        q, k, v = self.ln_q(items_BTD), self.ln_k(tokens_BLD), self.ln_v(tokens_BLD)
        pooled: Tensor = self.attn(q, k, v, attn_mask=drop, need_weights=False)[0]
        return pooled

    @torch.no_grad()
    def weights(self, items_BTD: Tensor, tokens_BLD: Tensor, drop: Tensor | None) -> Tensor:
        """Head-averaged weights (B, T, L), the zero token's left out."""
        q, k, v = self.ln_q(items_BTD), self.ln_k(tokens_BLD), self.ln_v(tokens_BLD)
        averaged: Tensor = self.attn(q, k, v, attn_mask=drop)[1]
        return averaged[..., :-1]


@dataclass(frozen=True)
class PlainSet:
    """One rank's items: features (N, D), their rows, and index (B, T) of the queries it sampled."""

    items_ND: Tensor
    rows: ItemRows
    index_BT: Tensor


def _logits(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return scale * F.cosine_similarity(a, b, dim=-1) + bias


def _sum(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return -(weights * F.logsigmoid(labels * logits)).sum()


def plain_losses(
    head: PlainHead,
    image_global_BD: Tensor,
    tokens_BLD: Tensor,
    sets: list[PlainSet],
    scale: Tensor,
    bias: Tensor,
    options: ObjectiveOptions,
    keep_BHTL: Tensor | None = None,
) -> dict[str, Tensor]:
    """Total and unweighted terms; the first of `sets` is this rank's own. A given `keep_BHTL` stands for drawn ones."""
    (B, L, _), K, H = tokens_BLD.shape, sets[0].rows.mask_BK.shape[1], head.attn.num_heads
    own_rows = sets[0].rows
    sums = {name: tokens_BLD.new_zeros(()) for name in ("ila", "kta", "mps", "iis")}
    for number, items in enumerate(sets):
        own = number == 0
        pairs = local_pairs(own_rows, items.rows, items.index_BT, options.checks, own=own)
        queries = items.items_ND[items.index_BT]
        T = queries.shape[1]
        drop = None if keep_BHTL is None else ~keep_BHTL.flatten(0, 1)
        if drop is None and options.ila_keep_rate < 1:
            drop = torch.rand(B * H, T, L) >= options.ila_keep_rate
        pooled = checkpoint(head, queries, tokens_BLD, drop, use_reentrant=False)
        logits = _logits(pooled, queries, scale, bias)
        weights = pairs.weights_BT
        if own:
            columns = pairs.own_columns_BK
            lowest = logits.detach().gather(1, columns).masked_fill(~own_rows.mask_BK, float("inf")).argmin(1)
            factor = torch.ones_like(weights)
            factor[torch.arange(B), columns[torch.arange(B), lowest]] = options.worst_positive_factor
            weights = weights * factor
            own_pooled = pooled.gather(1, columns[..., None].expand(-1, -1, pooled.shape[-1]))
            separation = separation_pairs(own_rows, options.checks)
            own_logits = _logits(own_pooled[:, :, None], items.items_ND.view(B, 1, K, -1), scale, bias)
            sums["iis"] = _sum(own_logits, separation.labels, separation.weights) / (B * K)
        sums["ila"] = sums["ila"] + _sum(logits, pairs.labels_BT, weights) / B
        if options.kta_weight:
            chosen = head.weights(queries, tokens_BLD, drop).topk(max(1, int(options.key_token_fraction * L)), dim=-1)
            others = torch.ones(B, T, L, dtype=torch.bool).scatter_(-1, chosen.indices, False)
            only = others[:, None].expand(-1, H, -1, -1).reshape(B * H, T, L)
            key_pooled = checkpoint(head, queries, tokens_BLD, only, use_reentrant=False)
            sums["kta"] = sums["kta"] + _sum(_logits(key_pooled, queries, scale, bias), pairs.labels_BT, weights) / B
        everyone = global_pairs(own_rows, items.rows, options.checks, own=own)
        images, texts = F.normalize(image_global_BD, dim=-1), F.normalize(items.items_ND, dim=-1)
        sums["mps"] = sums["mps"] + _sum(scale * images @ texts.T + bias, everyone.labels, everyone.weights) / (B * K)
    total = sum((getattr(options, f"{name}_weight") * value for name, value in sums.items()), tokens_BLD.new_zeros(()))
    return {"loss": total, **sums}
