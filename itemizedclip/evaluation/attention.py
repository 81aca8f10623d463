"""Where each text item looks: attention maps of any model, over its own token grid.

Axes: B images, T items of one image, H heads, L image tokens, D joint width, K item slots; *grid how the tokens lie
in the image, (h, w) for photographs, (S, d, h, w) for studies of S series.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from itemizedclip.data.batch import ItemBatch
from itemizedclip.models.dual_encoder import DualEncoder, ImageFeatures
from itemizedclip.models.item_attention import ItemAttention
from itemizedclip.runtime.errors import UserError


@dataclass(frozen=True)
class ItemMaps:
    """Where the T items of one image look, on the CPU, float32.

    For every item and head, the weights of all tokens and the zero token's share sum to 1.

    Attributes:
        head_weights: (T, H, *grid), softmax weights without the zero token's column.
        head_nowhere: (T, H), the zero token's share: what the item does not spend on the image.
        scores: (T,), TCSim of each item with its own item-conditioned image embedding.
    """

    head_weights: Tensor
    head_nowhere: Tensor
    scores: Tensor

    def __len__(self) -> int:
        """T."""
        return len(self.scores)

    def first(self, count: int) -> ItemMaps:
        """The first items alone."""
        return ItemMaps(self.head_weights[:count], self.head_nowhere[:count], self.scores[:count])

    @property
    def grid(self) -> tuple[int, ...]:
        """How the tokens lie in the image."""
        return tuple(self.head_weights.shape[2:])

    @property
    def weights(self) -> Tensor:
        """(T, *grid), averaged over heads (paper: attention map)."""
        return self.head_weights.mean(1)

    @property
    def nowhere(self) -> Tensor:
        """(T,), the zero token's share, averaged over heads: how much an item "attends nowhere"."""
        return self.head_nowhere.mean(1)

    def times_uniform(self, *, per_head: bool = False) -> Tensor:
        """Weights as multiples of an even spread over the L tokens, (T, *grid) or (T, H, *grid).

        1 is what every token would get if the item looked everywhere alike; the mean over the tokens is one minus the
        share of nowhere. Unlike a weight, the number does not depend on how finely the image is cut into tokens.
        """
        return (self.head_weights if per_head else self.weights) * math.prod(self.grid)

    @property
    def peaks(self) -> Tensor:
        """(T,), the most attended token of each item, in multiples of an even spread."""
        return self.times_uniform().flatten(1).amax(1)


def item_maps(model: DualEncoder, batch: ItemBatch, *, normalise_tokens: bool = False) -> list[ItemMaps]:
    """Attention maps of every real item of a batch, one entry per image.

    Args:
        model: any model, in evaluation mode.
        batch: images and their items, on any device.
        normalise_tokens: L2-normalise the image tokens before the head, as the published zero-shot scores do; maps
            and scores change in the third or fourth decimal. Training does not normalise.

    Raises:
        ValueError: a model in training mode, whose maps would be random where it uses dropout.
    """
    if model.training:
        raise UserError("the model is in training mode; call model.eval() before asking for attention maps")
    batch = batch.to(model.logit_scale.device)
    B, K, _ = batch.item_tokens.shape
    with torch.no_grad():
        features = model.encode_image(batch.images, series_names=batch.series_names)
        items_BKD = model.encode_text(batch.item_tokens.flatten(0, 1)).view(B, K, -1)
        maps = maps_of_features(model.head, features, items_BKD, normalise_tokens=normalise_tokens)
    return [_select(one, mask.cpu()) for one, mask in zip(maps, batch.item_mask)]


@torch.no_grad()
def maps_of_features(
    head: ItemAttention, features: ImageFeatures, items_BTD: Tensor, *, normalise_tokens: bool = False
) -> list[ItemMaps]:
    """Attention maps of B images whose features are at hand, for T items each.

    Args:
        head: the model's head.
        features: image features, not normalised.
        items_BTD: item features (B, T, D), not normalised.
        normalise_tokens: see `item_maps`.

    Raises:
        ValueError: tokens that do not fill the grid.
    """
    tokens_BLD = features.tokens_BLD
    B, L, _ = tokens_BLD.shape
    if math.prod(features.grid) != L:
        raise UserError(f"{L} image tokens do not fill the grid {features.grid}")
    if normalise_tokens:
        tokens_BLD = F.normalize(tokens_BLD, dim=-1)
    projected = head.project(tokens_BLD)
    attention = head.attention_weights(items_BTD, projected)
    # Item k is compared with its own conditioned embedding, never with another item's.
    scores_BT = F.cosine_similarity(items_BTD.float(), head.attend(items_BTD, projected).float(), dim=-1).cpu()
    weights = attention.tokens.float().transpose(1, 2).unflatten(-1, features.grid).cpu()
    nowhere_BTH = attention.nowhere.float().transpose(1, 2).cpu()
    return [ItemMaps(weights[b], nowhere_BTH[b], scores_BT[b]) for b in range(B)]


def _select(maps: ItemMaps, keep_T: Tensor) -> ItemMaps:
    return ItemMaps(maps.head_weights[keep_T], maps.head_nowhere[keep_T], maps.scores[keep_T])
