"""TCSim of few texts with images whose tokens are at hand: no token is ever projected.

Axes: N images, M texts, B images of a block, m texts of a block, L image tokens, H heads, D joint width, d = D / H.

The head's logits and values are linear in the standardised token s_l, so a text can carry the projections instead:
with K_h, c_h the key projection and bias of head h (LayerNorm folded in), V_h, e_h those of the values and p the
softmax weights,

    q_h·(K_h s_l + c_h) = (K_hᵀ q_h)·s_l + q_h·c_h      and
    Σ_l p_l (V_h s_l + e_h) = V_h (Σ_l p_l s_l) + e_h Σ_l p_l.

Multiply-adds per image: 2·M·H·L·D here against 2·L·D² + 2·M·L·D when tokens are projected (`tcsim.TcsimScorer`), so
this pays below D / (H − 1) texts: 73 for D = 512, H = 8. One text costs a sixty-fourth. It matters where no image tower
runs beside it, as in a search over stored tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from itemizedclip.evaluation.tcsim import (
    MIN_NORM,
    ScoreBlock,
    TcsimScorer,
    TextScorer,
    blocks_of,
    default_block_bytes,
    float_head,
    fold_layer_norms,
    full_precision,
)
from itemizedclip.models.dual_encoder import ImageFeatures
from itemizedclip.models.item_attention import ItemAttention
from itemizedclip.runtime.errors import UserError

MAX_TEXTS_PER_BLOCK = 64
"""Texts whose attention weights are held at once."""


class FoldedScorer(TextScorer):
    """TCSim with a fixed set of few texts, in float32; the scores of `TcsimScorer` by another road.

    Args:
        head: the model's head; its weights are copied.
        texts_MD: text features, on the head's device.
        normalise_tokens: as for `TcsimScorer`.
        block_bytes: bound of the intermediate results; default by device.

    Raises:
        ValueError: texts that are not (M, D) with M ≥ 1.
    """

    def __init__(
        self, head: ItemAttention, texts_MD: Tensor, *, normalise_tokens: bool, block_bytes: int | None = None
    ) -> None:
        if texts_MD.dim() != 2 or texts_MD.shape[1] != head.width or not len(texts_MD):
            raise UserError(f"texts must be (M, {head.width}) with M ≥ 1, got {tuple(texts_MD.shape)}")
        H, D = head.num_heads, head.width
        self.normalise_tokens = normalise_tokens
        self.num_texts = len(texts_MD)
        self.num_heads = H
        self.block_bytes = block_bytes or default_block_bytes(texts_MD.device)
        with torch.no_grad(), full_precision(texts_MD.device):
            head, texts_MD = float_head(head), texts_MD.detach().float()
            weight, bias = fold_layer_norms(head)
            key_weight, value_weight = weight.view(2, H, D // H, D)
            key_bias, value_bias = bias.view(2, H, D // H)
            queries_MHd = head.project_queries(texts_MD).view(-1, H, D // H) * (D // H) ** -0.5
            self._asks_MHD = torch.einsum("mhd,hdD->mhD", queries_MHd, key_weight)
            self._offsets_MH = torch.einsum("mhd,hd->mh", queries_MHd, key_bias)
            self._value_weight, self._value_bias = value_weight.clone(), value_bias.clone()
            self._out_weight = head.attn.out_proj.weight.detach().clone()
            self._out_bias = head.attn.out_proj.bias.detach().clone()
            self._targets_MD = F.normalize(texts_MD, dim=-1)
        self._layer_norm_eps = head.ln_k.eps

    @torch.no_grad()
    def score_blocks(self, features: ImageFeatures) -> Iterator[ScoreBlock]:
        B, L, D = features.tokens_BLD.shape
        m = min(self.num_texts, MAX_TEXTS_PER_BLOCK)
        # Tokens twice, logits and weights, pooled tokens; four bytes each.
        bytes_per_image = 4 * (2 * L * D + 2 * m * self.num_heads * L + m * self.num_heads * D)
        for images in blocks_of(B, self.block_bytes // bytes_per_image):
            with full_precision(features.tokens_BLD.device):
                tokens_BLD = features.tokens_BLD[images].float()
                if self.normalise_tokens:
                    tokens_BLD = F.normalize(tokens_BLD, dim=-1)
                standardised_BLD = F.layer_norm(tokens_BLD, (D,), eps=self._layer_norm_eps)
            for texts in blocks_of(self.num_texts, m):
                with full_precision(features.tokens_BLD.device):
                    scores = self._score_block(standardised_BLD, texts)
                yield ScoreBlock(images, texts, scores)

    def _score_block(self, standardised_BLD: Tensor, texts: slice) -> Tensor:
        """Scores (B, m) of images with some texts."""
        B, H = len(standardised_BLD), self.num_heads
        asks_aD = self._asks_MHD[texts].flatten(0, 1)  # a = m·H
        logits_BaL = asks_aD @ standardised_BLD.transpose(1, 2) + self._offsets_MH[texts].reshape(-1, 1)
        # The zero token: one more logit, 0, whose value is 0.
        weights_BaL = F.pad(logits_BaL, (0, 1)).softmax(-1)[..., :-1]
        seen_BmHD = (weights_BaL @ standardised_BLD).unflatten(1, (-1, H))
        on_image_BmH = weights_BaL.sum(-1).view(B, -1, H)
        pooled_BmHd = torch.einsum("bmhD,hdD->bmhd", seen_BmHD, self._value_weight)
        pooled_BmHd = pooled_BmHd + on_image_BmH[..., None] * self._value_bias
        z_BmD = F.linear(pooled_BmHd.flatten(2), self._out_weight, self._out_bias)
        dots_Bm = torch.linalg.vecdot(z_BmD, self._targets_MD[texts])
        return dots_Bm / torch.linalg.vector_norm(z_BmD, dim=-1).clamp_min(MIN_NORM)


def scorer_of_stored_tokens(head: ItemAttention, texts_MD: Tensor, *, normalise_tokens: bool) -> TextScorer:
    """The cheaper of the two TCSim scorers for images that need no tower (see the top of the file)."""
    pays = len(texts_MD) * (head.num_heads - 1) < head.width
    kind = FoldedScorer if pays else TcsimScorer
    return kind(head, texts_MD, normalise_tokens=normalise_tokens)
