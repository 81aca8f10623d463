"""Item-conditioned attention: a text item asks the image tokens where it is (paper: item-conditioned visual embedding).

Axes: B images, T queries (items) per image, L image tokens, H heads, D joint width, d = D / H.

Cost for one image of L tokens and T queries, in multiply-adds:
    project  2·L·D²        keys and values, once per step however often the image is asked
    attend   2·T·L·D       per pass over the queries
At MRI size (L = 11,760, T = 38, D = 512) that is 13 : 1, so everything here projects once and attends often.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeepMask = Tensor | float | None
"""Which (head, query, token) entries survive: a bool tensor (True = keep), a keep probability, or None for all."""


@dataclass(frozen=True)
class ProjectedTokens:
    """Keys and values of B images, each (B, H, L + 1, d); the last row is the zero token (logit 0, value 0)."""

    keys: Tensor
    values: Tensor

    @property
    def num_tokens(self) -> int:
        """L, the zero token not counted."""
        return self.keys.shape[2] - 1


class AttentionMaps(NamedTuple):
    """Softmax weights of the head: `tokens` (B, H, T, L) and `nowhere` (B, H, T), the zero token's share.

    For every head and query, `tokens.sum(-1) + nowhere == 1`.
    """

    tokens: Tensor
    nowhere: Tensor


class PackedProjection(nn.Module):
    """Parameters of the query, key, value and output projections under the published names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)


class ItemAttention(nn.Module):
    """Cross-attention from text items to image tokens, with a zero token an item may attend to instead.

    Three LayerNorms (`ln_q` on the queries, `ln_k` and `ln_v` on the tokens), multi-head attention with packed
    projections, and one extra token of logit 0 and value 0 that is never masked: a row whose every token is masked
    gives value 0 before the output projection, never NaN.

    Args:
        width: D, the joint width.
        num_heads: H; must divide `width`.
    """

    def __init__(self, width: int, num_heads: int = 8) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"head width {width} is not divisible by {num_heads} heads: choose heads that divide it")
        self.width = width
        self.num_heads = num_heads
        self.ln_q = nn.LayerNorm(width)
        self.ln_k = nn.LayerNorm(width)
        self.ln_v = nn.LayerNorm(width)
        self.attn = PackedProjection(width)

    # --- projecting ---------------------------------------------------------------------------------------------

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, N, D) → (B, H, N, d)."""
        B, N, _ = x.shape
        return x.view(B, N, self.num_heads, self.width // self.num_heads).transpose(1, 2)

    def _packed(self, part: int) -> tuple[Tensor, Tensor]:
        rows = slice(part * self.width, (part + 1) * self.width)
        return self.attn.in_proj_weight[rows], self.attn.in_proj_bias[rows]

    def project(self, tokens_BLD: Tensor) -> ProjectedTokens:
        """Keys and values of the image tokens (B, L, D); do this once per image and step."""
        if tokens_BLD.dim() != 3 or tokens_BLD.shape[-1] != self.width:
            raise ValueError(f"image tokens must be (B, L, {self.width}), got {tuple(tokens_BLD.shape)}")
        keys = F.linear(self.ln_k(tokens_BLD), *self._packed(1))
        values = F.linear(self.ln_v(tokens_BLD), *self._packed(2))
        # The zero token is a row of zeros: its logit q·0 and its value are 0 whatever the query.
        pad = (0, 0, 0, 1)
        return ProjectedTokens(F.pad(self._split_heads(keys), pad), F.pad(self._split_heads(values), pad))

    def project_queries(self, items: Tensor) -> Tensor:
        """Queries of text items, (..., D) → (..., D); once per text, whatever the number of images."""
        if items.shape[-1] != self.width:
            raise ValueError(f"items must be (..., {self.width}), got {tuple(items.shape)}")
        return F.linear(self.ln_q(items), *self._packed(0))

    def _project_out(self, pooled_BHTd: Tensor) -> Tensor:
        B, _, T, _ = pooled_BHTd.shape
        projected: Tensor = self.attn.out_proj(pooled_BHTd.transpose(1, 2).reshape(B, T, self.width))
        return projected

    # --- attending ----------------------------------------------------------------------------------------------

    def attend_projected(
        self, queries_BTD: Tensor, projected: ProjectedTokens, *, keep: Tensor | None = None
    ) -> Tensor:
        """Item-conditioned image embeddings (B, T, D) of projected queries, by the fused kernel.

        Args:
            queries_BTD: (B, T, D) from `project_queries`; (1, T, D) asks every image the same.
            projected: keys and values of B images.
            keep: bool, broadcastable to (B, H, T, L), True = keep; dropped tokens get no weight, nothing is rescaled.
        """
        queries = self._split_heads(queries_BTD).expand(projected.keys.shape[0], -1, -1, -1)
        mask = None if keep is None else F.pad(keep, (0, 1), value=True)
        pooled = F.scaled_dot_product_attention(
            queries.to(projected.keys.dtype), projected.keys, projected.values, attn_mask=mask
        )
        return self._project_out(pooled)

    def attend(self, items_BTD: Tensor, projected: ProjectedTokens, *, keep: Tensor | None = None) -> Tensor:
        """As `attend_projected`, from text items (B, T, D)."""
        return self.attend_projected(self.project_queries(items_BTD), projected, keep=keep)

    def forward(self, items_BTD: Tensor, tokens_BLD: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """`attend(items, project(tokens))`: (B, T, D)."""
        return self.attend(items_BTD, self.project(tokens_BLD), keep=keep)

    def _weights(self, queries_BTD: Tensor, projected: ProjectedTokens, keep: Tensor | None) -> Tensor:
        """Softmax weights with the zero token last, (B, H, T, L + 1), in float32."""
        queries = self._split_heads(queries_BTD).to(projected.keys.dtype) * (self.width // self.num_heads) ** -0.5
        logits = torch.matmul(queries, projected.keys.transpose(-1, -2)).float()
        if keep is not None:
            logits = logits.masked_fill(~F.pad(keep, (0, 1), value=True), float("-inf"))
        return logits.softmax(-1)

    def attention_weights(
        self, items_BTD: Tensor, projected: ProjectedTokens, *, keep: Tensor | None = None
    ) -> AttentionMaps:
        """Where each item looks: the plain path, same numbers as `attend`, with the weights kept."""
        weights = self._weights(self.project_queries(items_BTD), projected, keep)
        return AttentionMaps(weights[..., :-1], weights[..., -1])

    # --- training: the plain pass and the key-token pass together ---------------------------------------------

    def attend_with_key_tokens(
        self,
        items_BTD: Tensor,
        projected: ProjectedTokens,
        *,
        keep: KeepMask = None,
        num_key_tokens: int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Both passes that training needs, (B, T, D) each: over kept tokens, and over each query's key tokens.

        The second pass restricts every head to the `num_key_tokens` tokens with the largest head-averaged weight of
        the first (no gradient through the choice); None skips it. Both share one product of queries and keys.
        This is the plain way, with the weights kept for autograd; `objectives.fused` is the one for training.

        Args:
            items_BTD: (B, T, D) text items.
            projected: keys and values of the B images.
            keep: bool tensor (B, H, T, L), or a probability with which each entry is kept (drawn here), or None.
            num_key_tokens: 1 … L, or None.
            generator: source of the keep draws; the default generator of the device otherwise.
        """
        queries = self.project_queries(items_BTD)
        mask = keep if isinstance(keep, Tensor) else None
        queries = self._split_heads(queries).to(projected.keys.dtype) * (self.width // self.num_heads) ** -0.5
        logits = at_least_float32(torch.matmul(queries, projected.keys.transpose(-1, -2)))
        if isinstance(keep, float) and keep < 1.0:
            mask = torch.empty(logits[..., :-1].shape, dtype=torch.bool, device=logits.device)
            mask.bernoulli_(keep, generator=generator)
        weights = softmax_kept(logits, mask)
        values = projected.values
        pooled = self._project_out(torch.matmul(weights.to(values.dtype), values))
        if num_key_tokens is None:
            return pooled, None
        head_mean_BTL = weights[..., :-1].detach().mean(1)
        top = head_mean_BTL.topk(num_key_tokens, dim=-1, sorted=False).indices
        key_mask = torch.zeros_like(head_mean_BTL, dtype=torch.bool).scatter_(-1, top, True)[:, None]
        return pooled, self._project_out(torch.matmul(softmax_kept(logits, key_mask).to(values.dtype), values))


def at_least_float32(x: Tensor) -> Tensor:
    """float32, or float64 left as it is."""
    return x if x.dtype == torch.float64 else x.float()


def softmax_kept(logits: Tensor, keep: Tensor | None) -> Tensor:
    """Softmax over kept tokens and the zero token.

    Args:
        logits: (B, H, T, L + 1), the zero token last.
        keep: bool broadcastable to (B, H, T, L), True = keep; None keeps all. The zero token is always kept.
    """
    if keep is not None:
        logits = logits.masked_fill(~F.pad(keep, (0, 1), value=True), float("-inf"))
    return logits.softmax(-1)
