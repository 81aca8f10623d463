"""The itemized loss: four terms, one projection of the image tokens, every rank's items.

Axes: B images on this rank, K item slots, T queries per image, L image tokens, N = B·K rows of the item table,
D joint width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from itemizedclip.models.item_attention import ItemAttention, KeepMask, ProjectedTokens
from itemizedclip.objectives.exchange import RemoteItems, gather_items
from itemizedclip.objectives.pairing import Pairing, build_pairing, sample_pairing
from itemizedclip.objectives.terms import (
    cosine_logits,
    drop_duplicates,
    drop_normal_pairs,
    pair_loss,
    separation_loss,
    upweight_worst_positive,
)

TERMS = ("ila", "kta", "mps", "iis")


@dataclass(frozen=True)
class ObjectiveOptions:
    """Weights of the objectives; a weight of 0 switches the term off, and nothing but --baseline else does."""

    ila_weight: float = 1.0
    """Item local alignment (paper: ILA)."""

    ila_keep_rate: float = 1.0
    """Probability in (0, 1] with which each (image, head, query, token) entry of the ILA attention is kept."""

    kta_weight: float = 1.0
    """Key token alignment (paper: KTA)."""

    key_token_fraction: float = 0.2
    """Share in (0, 1] of the image tokens that are an item's key tokens; at least one token is taken."""

    mps_weight: float = 0.1
    """Multi-positive global alignment (paper: MPS)."""

    iis_weight: float = 1.0
    """Inter-item separation (paper: IIS)."""

    worst_positive_factor: float = 1.5
    """Factor on the weight of each image's worst own item in ILA and KTA (paper: UWP); 1 is off."""

    normal_check: bool = False
    """Negative pairs between two normal studies carry no loss (radiology)."""

    mask_duplicates: bool = False
    """A negative whose text reads like one of the image's own items carries no loss (not in the paper)."""

    baseline: Literal["none", "clip", "siglip", "flair"] = "none"
    """Train by another method instead, to compare; the rest of this group does not apply then."""

    def __post_init__(self) -> None:
        for name in ("ila_weight", "kta_weight", "mps_weight", "iis_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 (off) or a positive weight")
        if not 0 < self.ila_keep_rate <= 1:
            raise ValueError(f"ila_keep_rate is {self.ila_keep_rate}; expected a keep probability in (0, 1]")
        if not 0 < self.key_token_fraction <= 1:
            raise ValueError(f"key_token_fraction is {self.key_token_fraction}; expected a share in (0, 1]")
        if self.worst_positive_factor <= 0:
            raise ValueError(f"worst_positive_factor is {self.worst_positive_factor}; expected more than 0 (1 = off)")
        if self.ila_weight == self.kta_weight == self.mps_weight == 0:
            raise ValueError("ila_weight, kta_weight and mps_weight are all 0: nothing aligns images and items")

    @property
    def uses_head(self) -> bool:
        """Whether any term asks the item-conditioned attention."""
        if self.baseline != "none":
            return self.baseline == "flair"
        return bool(self.ila_weight or self.kta_weight or self.iis_weight)

    @property
    def scoring(self) -> Literal["tcsim", "global"]:
        """How a model trained like this is to be evaluated: by its head, or by the cosine of global features."""
        return "tcsim" if self.uses_head else "global"

    @property
    def uses_bias(self) -> bool:
        """Whether the logit bias β takes part; a softmax has none."""
        return self.baseline != "clip"

    def num_key_tokens(self, num_tokens: int) -> int | None:
        """Key tokens per query among L tokens, at least 1; None when KTA is off."""
        return max(1, int(self.key_token_fraction * num_tokens)) if self.kta_weight else None


@dataclass(frozen=True)
class LossInputs:
    """What the towers produced for this rank's batch.

    Attributes:
        image_global_BD: (B, D).
        image_tokens_BLD: (B, L, D).
        item_features_ND: (B·K, D), item k of image i in row i·K + k.
        item_mask_BK: bool (B, K), True = real item.
        is_normal_B: bool (B,).
        item_ids_N: int64 (B·K,), numbers of the item texts (`text_ids`); needed for `mask_duplicates` alone.
    """

    image_global_BD: Tensor
    image_tokens_BLD: Tensor
    item_features_ND: Tensor
    item_mask_BK: Tensor
    is_normal_B: Tensor
    item_ids_N: Tensor | None = None

    def __post_init__(self) -> None:
        B, K = self.item_mask_BK.shape
        if self.item_features_ND.shape[0] != B * K:
            raise ValueError(
                f"item features have {self.item_features_ND.shape[0]} rows; the item mask {(B, K)} asks for {B * K}"
            )
        if self.image_tokens_BLD.shape[0] != B or self.image_global_BD.shape[0] != B:
            raise ValueError(
                f"image tokens {tuple(self.image_tokens_BLD.shape)} and global features "
                f"{tuple(self.image_global_BD.shape)} must both hold the item mask's {B} images"
            )


def itemized_losses(
    head: ItemAttention,
    inputs: LossInputs,
    logit_scale: Tensor,
    logit_bias: Tensor,
    options: ObjectiveOptions,
    *,
    index_BT: Tensor | None = None,
    keep_mask_BHTL: Tensor | None = None,
) -> dict[str, Tensor]:
    """The total loss and its unweighted terms on this rank, as scalars.

    Args:
        head: the item-conditioned attention; must be called inside the module that DDP wraps.
        inputs: features of this rank's batch.
        logit_scale: τ, already exponentiated.
        logit_bias: β.
        options: weights of the terms.
        index_BT: given pairs instead of drawn ones (tests).
        keep_mask_BHTL: given keep mask instead of a drawn one (tests; one rank only).

    Returns:
        "loss" and, for each term whose weight is not 0, "ila", "kta", "mps", "iis".
    """
    mask = inputs.item_mask_BK
    pairing = sample_pairing(mask) if index_BT is None else build_pairing(index_BT, mask)
    if options.mask_duplicates and inputs.item_ids_N is None:
        raise ValueError("mask_duplicates needs item_ids_N, the numbers of the item texts")
    remotes = gather_items(inputs.item_features_ND, mask, inputs.is_normal_B, pairing, inputs.item_ids_N)
    terms = _Terms(head, inputs, logit_scale, logit_bias, options, keep_mask_BHTL)
    losses = terms.own(pairing)
    for remote in remotes:
        for name, value in terms.remote(remote).items():
            losses[name] = losses[name] + value
    weights = {name: getattr(options, f"{name}_weight") for name in TERMS}
    losses = {name: losses[name] for name in TERMS if weights[name]}
    total = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
    return {"loss": total, **losses}


class _Terms:
    """This rank's images against one set of items after another, with one projection of the tokens."""

    def __init__(
        self,
        head: ItemAttention,
        inputs: LossInputs,
        logit_scale: Tensor,
        logit_bias: Tensor,
        options: ObjectiveOptions,
        keep_mask_BHTL: Tensor | None,
    ) -> None:
        self.head = head
        self.inputs = inputs
        self.scale = logit_scale.float()
        self.bias = logit_bias.float()
        self.options = options
        self.needs_local = bool(options.ila_weight or options.kta_weight or options.iis_weight)
        self.projected: ProjectedTokens | None = head.project(inputs.image_tokens_BLD) if self.needs_local else None
        self.num_key_tokens = options.num_key_tokens(inputs.image_tokens_BLD.shape[1])
        self.keep: KeepMask = options.ila_keep_rate if keep_mask_BHTL is None else keep_mask_BHTL

    def own(self, pairing: Pairing) -> dict[str, Tensor]:
        """ILA, KTA, MPS and IIS of this rank's own items."""
        inputs, options = self.inputs, self.options
        B, K = inputs.item_mask_BK.shape
        items_BTD = inputs.item_features_ND[pairing.index_BT]
        is_own_BT = pairing.labels_BT > 0
        weights = pairing.weights_BT
        if options.normal_check:
            normal = inputs.is_normal_B
            weights = drop_normal_pairs(weights, normal[:, None], normal[pairing.owner_BT], is_own_BT)
        weights = self._drop_duplicates(weights, inputs.item_ids_N, pairing.index_BT, is_own_BT)
        losses: dict[str, Tensor] = {}
        if self.needs_local:
            columns = pairing.own_columns_BK
            pooled, key_pooled, logits = self._local(items_BTD)
            # One choice, made on the ILA logits, serves ILA and KTA alike.
            uwp = upweight_worst_positive(weights, logits, columns, inputs.item_mask_BK, options.worst_positive_factor)
            losses["ila"] = pair_loss(logits, pairing.labels_BT, uwp) / B
            if key_pooled is not None:
                key_logits = cosine_logits(key_pooled, items_BTD, self.scale, self.bias)
                losses["kta"] = pair_loss(key_logits, pairing.labels_BT, uwp) / B
            if options.iis_weight:
                own_pooled = pooled.gather(1, columns[:, :, None].expand(-1, -1, pooled.shape[-1]))
                own_items = inputs.item_features_ND.view(B, 1, K, -1)
                separation = cosine_logits(own_pooled[:, :, None], own_items, self.scale, self.bias)
                ids = inputs.item_ids_N if options.mask_duplicates else None
                ids_BK = None if ids is None else ids.view(B, K)
                losses["iis"] = separation_loss(separation, inputs.item_mask_BK, ids_BK) / (B * K)
        if options.mps_weight:
            same_image = torch.eye(B, dtype=torch.bool, device=weights.device).repeat_interleave(K, dim=1)
            losses["mps"] = self._global(
                inputs.item_features_ND, inputs.item_mask_BK, inputs.is_normal_B, inputs.item_ids_N, same_image
            )
        return losses

    def remote(self, remote: RemoteItems) -> dict[str, Tensor]:
        """ILA, KTA and MPS of this rank's images against another rank's items: every pair is negative."""
        options = self.options
        B, K = self.inputs.item_mask_BK.shape
        losses: dict[str, Tensor] = {}
        if self.needs_local:
            items_BTD = remote.features_ND[remote.index_BT]
            weights = remote.weights_BT
            if options.normal_check:
                item_is_normal = remote.is_normal_B[remote.index_BT // K]
                nothing_own = torch.zeros_like(item_is_normal)
                weights = drop_normal_pairs(weights, self.inputs.is_normal_B[:, None], item_is_normal, nothing_own)
            nothing_own = torch.zeros_like(remote.index_BT, dtype=torch.bool)
            weights = self._drop_duplicates(weights, remote.item_ids_N, remote.index_BT, nothing_own)
            _, key_pooled, logits = self._local(items_BTD)
            losses["ila"] = pair_loss(logits, -1.0, weights) / B
            if key_pooled is not None:
                key_logits = cosine_logits(key_pooled, items_BTD, self.scale, self.bias)
                losses["kta"] = pair_loss(key_logits, -1.0, weights) / B
        if options.mps_weight:
            nothing_own = torch.zeros(B, B * K, dtype=torch.bool, device=remote.index_BT.device)
            losses["mps"] = self._global(
                remote.features_ND, remote.item_mask_BK, remote.is_normal_B, remote.item_ids_N, nothing_own
            )
        return losses

    def _drop_duplicates(self, weights: Tensor, ids_N: Tensor | None, index: Tensor, is_own: Tensor) -> Tensor:
        """`drop_duplicates` for the items `index` of a table numbered `ids_N`, when it is switched on."""
        own_ids = self.inputs.item_ids_N
        if not self.options.mask_duplicates or ids_N is None or own_ids is None:
            return weights
        mask = self.inputs.item_mask_BK
        return drop_duplicates(weights, ids_N[index], own_ids.view_as(mask), mask, is_own)

    def _local(self, items_BTD: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Pooled embeddings, key-token embeddings and ILA logits of one set of queries."""
        assert self.projected is not None
        pooled, key_pooled = self.head.attend_with_key_tokens(
            items_BTD, self.projected, keep=self.keep, num_key_tokens=self.num_key_tokens
        )
        return pooled, key_pooled, cosine_logits(pooled, items_BTD, self.scale, self.bias)

    def _global(
        self,
        items_ND: Tensor,
        mask_BK: Tensor,
        item_is_normal_B: Tensor,
        item_ids_N: Tensor | None,
        same_image_BN: Tensor,
    ) -> Tensor:
        """MPS: the global feature of every image against every item of one rank."""
        B, K = mask_BK.shape
        image = torch.nn.functional.normalize(self.inputs.image_global_BD.float(), dim=-1)
        items = torch.nn.functional.normalize(items_ND.float(), dim=-1)
        # Autocast would take this product in half precision.
        with torch.autocast(image.device.type, enabled=False):
            logits = self.scale * (image @ items.T) + self.bias
        weights = mask_BK.float().reshape(1, -1).expand_as(logits)
        if self.options.normal_check:
            item_is_normal = item_is_normal_B.repeat_interleave(K)[None]
            weights = drop_normal_pairs(weights, self.inputs.is_normal_B[:, None], item_is_normal, same_image_BN)
        every_item = torch.arange(B * K, device=logits.device)[None]
        weights = self._drop_duplicates(weights, item_ids_N, every_item, same_image_BN)
        return pair_loss(logits, 2.0 * same_image_BN - 1.0, weights) / (B * K)
