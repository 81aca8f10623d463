"""The method written slowly, one image and one item at a time: the oracle of the objectives' tests.

Nothing here is shared with the package: attention is torch's own nn.MultiheadAttention with `add_zero_attn`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainHead(nn.Module):
    """The head through nn.MultiheadAttention; loads the state dict of ItemAttention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_q, self.ln_k, self.ln_v = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads, add_zero_attn=True, batch_first=True)

    def forward(self, item_D: Tensor, tokens_LD: Tensor, keep_HL: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pooled (D,) and weights (H, L + 1) of one item in one image."""
        q, k, v = self.ln_q(item_D)[None, None], self.ln_k(tokens_LD)[None], self.ln_v(tokens_LD)[None]
        drop = None if keep_HL is None else ~keep_HL[:, None]
        pooled, weights = self.attn(q, k, v, attn_mask=drop, need_weights=True, average_attn_weights=False)
        return pooled[0, 0], weights[0, :, 0]


def logit(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return scale * torch.dot(a / a.norm(), b / b.norm()) + bias


def reads_like_own(mine: dict, i: int, text: Tensor) -> bool:
    return any(bool(m) and bool(own == text) for m, own in zip(mine["mask"][i], mine["ids"][i]))


def plain_losses(head, ranks: list[dict], rank: int, scale, bias, options) -> dict[str, Tensor]:
    """Losses of `rank`, every rank's inputs given.

    Each entry of `ranks`: image_global (B, D), image_tokens (B, L, D), items (B, K, D), mask (B, K), normal (B,),
    ids (B, K) numbers of the texts, index (B, T) into the flat item table, keep (B, H, T, L) or None.
    """
    mine = ranks[rank]
    B, K = mine["mask"].shape
    L = mine["image_tokens"].shape[1]
    num_key_tokens = max(1, int(options.key_token_fraction * L))
    total = {name: torch.zeros(()) for name in ("ila", "kta", "mps", "iis")}
    for other, theirs in enumerate(ranks):
        for i in range(B):
            rows = []
            for column, flat in enumerate(theirs["index"][i].tolist()):
                j, k = divmod(flat, K)
                own = other == rank and j == i and i <= column < i + K
                weight = 1.0
                if i <= column < i + K:
                    weight = float(theirs["mask"][j, k])
                if options.normal_check and not own and bool(mine["normal"][i]) and bool(theirs["normal"][j]):
                    weight = 0.0
                if options.mask_duplicates and not own and reads_like_own(mine, i, theirs["ids"][j, k]):
                    weight = 0.0
                item = theirs["items"][j, k]
                keep = None if mine["keep"] is None else mine["keep"][i, :, column]
                pooled, weights = head(item, mine["image_tokens"][i], keep)
                top = weights[:, :-1].mean(0).topk(num_key_tokens).indices
                only = torch.zeros(weights.shape[0], L, dtype=torch.bool)
                only[:, top] = True
                key_pooled, _ = head(item, mine["image_tokens"][i], only)
                ila, kta = logit(pooled, item, scale, bias), logit(key_pooled, item, scale, bias)
                rows.append((own, weight, k, pooled, ila, kta))
            worst = None
            if other == rank:
                own_columns = [c for c, row in enumerate(rows) if row[0] and bool(mine["mask"][i, row[2]])]
                worst = min(own_columns, key=lambda c: float(rows[c][4].detach()), default=None)
            for column, (own, weight, _, _, ila, kta) in enumerate(rows):
                w = weight * (options.worst_positive_factor if column == worst else 1.0)
                sign = 1.0 if own else -1.0
                total["ila"] = total["ila"] - w * F.logsigmoid(sign * ila) / B
                total["kta"] = total["kta"] - w * F.logsigmoid(sign * kta) / B
            if other == rank:
                own_rows = [row for row in rows if row[0]]
                for k, row in enumerate(own_rows):
                    for j in range(K):
                        w = float(mine["mask"][i, k]) * float(mine["mask"][i, j])
                        if options.mask_duplicates and j != k and mine["ids"][i, j] == mine["ids"][i, k]:
                            w = 0.0
                        sign = 1.0 if j == k else -1.0
                        term = F.logsigmoid(sign * logit(row[3], mine["items"][i, j], scale, bias))
                        total["iis"] = total["iis"] - w * term / (B * K)
            for j in range(B):
                for k in range(K):
                    own = other == rank and i == j
                    w = float(theirs["mask"][j, k])
                    if options.normal_check and not own and bool(mine["normal"][i]) and bool(theirs["normal"][j]):
                        w = 0.0
                    if options.mask_duplicates and not own and reads_like_own(mine, i, theirs["ids"][j, k]):
                        w = 0.0
                    sign = 1.0 if own else -1.0
                    term = F.logsigmoid(sign * logit(mine["image_global"][i], theirs["items"][j, k], scale, bias))
                    total["mps"] = total["mps"] - w * term / (B * K)
    weights = {name: getattr(options, f"{name}_weight") for name in total}
    return total | {"loss": sum(weights[name] * total[name] for name in total)}
