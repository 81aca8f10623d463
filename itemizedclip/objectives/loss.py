"""The itemized loss: four terms, one projection of the image tokens, every rank's items.

Axes: B images on this rank, K item slots, T queries per image, L image tokens, N = B·K rows of the item table,
D joint width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from itemizedclip.models.item_attention import ItemAttention, KeepMask, ProjectedTokens, at_least_float32
from itemizedclip.objectives.exchange import Exchange, RemoteItems, choose_ranks, send_items, with_gradient
from itemizedclip.objectives.fused import TermWeights, fused_losses
from itemizedclip.objectives.pairing import (
    Checks,
    ItemRows,
    Pairs,
    RankPairs,
    global_pairs,
    local_pairs,
    sample_pairing,
    separation_pairs,
)
from itemizedclip.objectives.terms import cosine_logits, pair_loss, upweight_worst_positive

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

    remote_ranks: int = 0
    """Attend the items of at most so many other ranks a step (ILA, KTA), drawn anew by each rank and weighted up so
    that the expected loss is the same; MPS meets all. 0: attend all (the paper). See docs/scale.md."""

    coverage_weight: float = 0.0
    """An image's own items together explain its global feature (not in the paper)."""

    contradiction_weight: float = 0.0
    """Denials of items and items with opposite words exchanged are negatives of their own image (not in the paper)."""

    baseline: Literal["none", "clip", "siglip", "concat", "flair", "flair_own"] = "none"
    """Train by another method instead, to compare; the rest of this group does not apply then."""

    def __post_init__(self) -> None:
        for name in ("ila_weight", "kta_weight", "mps_weight", "iis_weight", "coverage_weight", "contradiction_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 (off) or a positive weight")
        if self.remote_ranks < 0:
            raise ValueError(f"remote_ranks is {self.remote_ranks}; expected 0 (all) or a number of other ranks")
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
            return self.baseline in ("flair", "flair_own")
        own_terms = self.coverage_weight or self.contradiction_weight
        return bool(self.ila_weight or self.kta_weight or self.iis_weight or own_terms)

    @property
    def uses_contradictions(self) -> bool:
        """Whether batches must hold texts that contradict their images."""
        return self.baseline == "none" and self.contradiction_weight > 0

    @property
    def scoring(self) -> Literal["tcsim", "global"]:
        """How a model trained like this is to be evaluated: by its head, or by the cosine of global features."""
        return "tcsim" if self.uses_head else "global"

    @property
    def uses_bias(self) -> bool:
        """Whether the logit bias β takes part; a softmax has none."""
        return self.baseline not in ("clip", "concat")

    @property
    def joins_items(self) -> bool:
        """Whether an image's items are one text in training."""
        return self.baseline == "concat"

    @property
    def checks(self) -> Checks:
        """Which negative pairs carry no loss."""
        return Checks(normal=self.normal_check, duplicates=self.mask_duplicates)

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
        contradiction_features_ND: (B·K, D), texts that contradict the items; needed for their term alone.
        contradiction_mask_BK: bool (B, K), True where there is one.
    """

    image_global_BD: Tensor
    image_tokens_BLD: Tensor
    item_features_ND: Tensor
    item_mask_BK: Tensor
    is_normal_B: Tensor
    item_ids_N: Tensor | None = None
    contradiction_features_ND: Tensor | None = None
    contradiction_mask_BK: Tensor | None = None

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

    @property
    def rows(self) -> ItemRows:
        """What pairing asks for."""
        return ItemRows(self.item_mask_BK, self.is_normal_B, self.item_ids_N)


def itemized_losses(
    head: ItemAttention,
    inputs: LossInputs,
    logit_scale: Tensor,
    logit_bias: Tensor,
    options: ObjectiveOptions,
    *,
    index_BT: Tensor | None = None,
    keep_mask_BHTL: Tensor | None = None,
    exchange: Exchange | None = None,
    fused: bool = True,
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
        exchange: given items of other ranks instead of the process group's (tests and benchmarks).
        fused: differentiate while computing, for one backward pass of "loss" alone. False is the plain way, in memory
            that grows with ranks and queries: each term has a gradient, of any order and under `torch.func` too.

    Returns:
        "loss" and, for each term whose weight is not 0, "ila", "kta", "mps", "iis".
    """
    rows = inputs.rows
    B, K = rows.mask_BK.shape
    if index_BT is None:
        index_BT = sample_pairing(rows.mask_BK).index_BT
    own_index = index_BT
    if exchange is None:
        exchange = send_items(inputs.item_features_ND, rows, index_BT)
    needs_local = bool(options.ila_weight or options.kta_weight or options.iis_weight)
    keep: Tensor | float = options.ila_keep_rate if keep_mask_BHTL is None else keep_mask_BHTL
    weights = {name: getattr(options, f"{name}_weight") for name in TERMS}
    denominators = {"ila": B, "kta": B, "mps": B * K, "iis": B * K}

    others = [] if exchange is None else exchange.other_slots
    attended, factor = choose_ranks(others, options.remote_ranks if needs_local else 0)

    def pairs_of(remote: RemoteItems | None) -> RankPairs:
        own, items = remote is None, rows if remote is None else remote.rows
        index = own_index if remote is None else remote.index_BT
        local = None
        if needs_local and (remote is None or remote.slot in attended):
            local = local_pairs(rows, items, index, options.checks, own=own)
            if remote is not None and factor != 1.0:
                local = replace(local, weights_BT=local.weights_BT * factor)
        return RankPairs(
            own,
            local,
            global_pairs(rows, items, options.checks, own=own) if options.mps_weight else None,
            separation_pairs(rows, options.checks) if own and options.iis_weight else None,
        )

    if fused:
        total, sums_4 = fused_losses(
            head, inputs.image_tokens_BLD, inputs.image_global_BD, inputs.item_features_ND, logit_scale, logit_bias,
            exchange, pairs_of, attended,
            own_mask_BK=rows.mask_BK, factors=TermWeights(**{n: weights[n] / denominators[n] for n in TERMS}),
            worst_positive_factor=options.worst_positive_factor, keep=keep,
            num_key_tokens=options.num_key_tokens(inputs.image_tokens_BLD.shape[1]),
        )  # fmt: skip
        values = dict(zip(TERMS, sums_4.unbind()))
        return {"loss": total, **{name: values[name] / denominators[name] for name in TERMS if weights[name]}}

    # Every set of queries this rank's images meet: its own first, then each other rank's.
    sets = [(inputs.item_features_ND, pairs_of(None))]
    if exchange is not None:
        remotes, tickets = exchange.wait(), exchange.ticket_WND.unbind()
        sets += [(with_gradient(tickets[r.slot], r.features_ND), pairs_of(r)) for r in remotes]
    scale, bias = at_least_float32(logit_scale), at_least_float32(logit_bias)
    projected = head.project(inputs.image_tokens_BLD) if needs_local else None
    collected: dict[str, list[Tensor]] = {name: [] for name in TERMS}
    for features_ND, pairs in sets:
        if projected is not None and pairs.local is not None:
            for name, value in local_losses(
                head, projected, features_ND, pairs, rows.mask_BK, scale, bias, keep, options
            ).items():
                collected[name].append(value)
        if pairs.everyone is not None:
            collected["mps"].append(global_loss(inputs.image_global_BD, features_ND, pairs.everyone, scale, bias))
    losses = {name: torch.stack(collected[name]).sum() / denominators[name] for name in TERMS if weights[name]}
    total = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
    return {"loss": total, **losses}


def local_losses(
    head: ItemAttention,
    projected: ProjectedTokens,
    items_ND: Tensor,
    pairs: RankPairs,
    own_mask_BK: Tensor,
    scale: Tensor,
    bias: Tensor,
    keep: KeepMask,
    options: ObjectiveOptions,
) -> dict[str, Tensor]:
    """Sums of ILA, and where asked for KTA and IIS, of this rank's images against one rank's queries.

    Args:
        head: the item-conditioned attention.
        projected: keys and values of the images.
        items_ND: the item table of that rank.
        pairs: who meets whom.
        own_mask_BK: which items of this rank are real, to choose the worst one.
        scale: τ.
        bias: β.
        keep: keep mask or keep probability of ILA.
        options: key tokens and the factor of the worst positive.
    """
    pairing, separation = pairs.local, pairs.separation
    assert pairing is not None
    items_BTD = items_ND[pairing.index_BT]
    num_key_tokens = options.num_key_tokens(projected.num_tokens)
    pooled, key_pooled = head.attend_with_key_tokens(items_BTD, projected, keep=keep, num_key_tokens=num_key_tokens)
    logits = cosine_logits(pooled, items_BTD, scale, bias)
    weights, columns = pairing.weights_BT, pairing.own_columns_BK
    if pairs.own:
        # One choice, made on the ILA logits, serves ILA and KTA alike.
        weights = upweight_worst_positive(weights, logits, columns, own_mask_BK, options.worst_positive_factor)
    sums = {"ila": pair_loss(logits, pairing.labels_BT, weights)}
    if key_pooled is not None:
        sums["kta"] = pair_loss(cosine_logits(key_pooled, items_BTD, scale, bias), pairing.labels_BT, weights)
    if separation is not None:
        B, K = columns.shape
        own_pooled = pooled.gather(1, columns[:, :, None].expand(-1, -1, pooled.shape[-1]))
        own_logits = cosine_logits(own_pooled[:, :, None], items_ND.view(B, 1, K, -1), scale, bias)
        sums["iis"] = pair_loss(own_logits, separation.labels, separation.weights)
    return sums


def global_loss(image_global_BD: Tensor, items_ND: Tensor, pairs: Pairs, scale: Tensor, bias: Tensor) -> Tensor:
    """Sum of MPS: the global feature of every image against every item of one rank."""
    image = F.normalize(at_least_float32(image_global_BD), dim=-1)
    items = F.normalize(at_least_float32(items_ND), dim=-1)
    # Autocast would take this product in half precision.
    with torch.autocast(image.device.type, enabled=False):
        logits = scale * (image @ items.T) + bias
    return pair_loss(logits, pairs.labels, pairs.weights)
