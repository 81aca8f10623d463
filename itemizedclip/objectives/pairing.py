"""Which image meets which item (paper: sampled item–image pairs), as index, label and weight tensors.

Axes: B images, K item slots per image, T = K + B − 1 queries per image, N = B·K rows of an item table.

For image i the queries are its own K slots plus one real item of each other image. They are ordered by image:
one negative of every j < i, then the own slots at columns i … i + K − 1, then one negative of every j > i.

Everything that makes a pair count more, less or not at all is a weight made here, but for one: the worst positive (UWP)
is known only once its logit is. Padding, the normal check and duplicates are in the weights; terms know none of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ItemRows:
    """What pairing knows of one rank's images and their items.

    Attributes:
        mask_BK: bool (B, K), True = real item.
        is_normal_B: bool (B,), whether the image's study is normal.
        ids_N: int64 (B·K,), equal for equal texts (`text_ids`); only the duplicate check asks for them.
    """

    mask_BK: Tensor
    is_normal_B: Tensor
    ids_N: Tensor | None = None


@dataclass(frozen=True)
class Checks:
    """Which negative pairs carry no loss although both sides are real.

    Attributes:
        normal: image and item both come from normal studies (radiology).
        duplicates: the item reads like one of the image's own items.
    """

    normal: bool = False
    duplicates: bool = False


@dataclass(frozen=True)
class Pairing:
    """Queries of every image of this rank.

    Attributes:
        index_BT: int64, row of the flat (B·K) item table that each query is.
        labels_BT: float, +1 for own slots, −1 for negatives.
        weights_BT: float, item mask for own slots, 1 for negatives, 0 where the negative's image has no item.
        num_slots: K.
    """

    index_BT: Tensor
    labels_BT: Tensor
    weights_BT: Tensor
    num_slots: int

    @property
    def owner_BT(self) -> Tensor:
        """int64 (B, T): the image each query's item belongs to."""
        return self.index_BT // self.num_slots

    @property
    def own_columns_BK(self) -> Tensor:
        """int64 (B, K): the columns that hold image i's own slots."""
        return own_columns(self.index_BT.shape[0], self.num_slots, self.index_BT.device)


@dataclass(frozen=True)
class Pairs:
    """Labels (+1, −1) and final weights of pairs, of one shape or broadcastable to it."""

    labels: Tensor
    weights: Tensor


@dataclass(frozen=True)
class RankPairs:
    """One rank's queries as this rank's images meet them.

    Attributes:
        own: whether the items are this rank's own.
        local: pairs of ILA and KTA; None when no term asks the head.
        everyone: pairs of MPS; None without it.
        separation: pairs of IIS; None without it, and for another rank's items.
    """

    own: bool
    local: Pairing | None
    everyone: Pairs | None
    separation: Pairs | None


def own_columns(num_images: int, num_slots: int, device: torch.device | None = None) -> Tensor:
    """(B, K): columns i … i + K − 1 of row i."""
    return torch.arange(num_images, device=device)[:, None] + torch.arange(num_slots, device=device)


def build_pairing(index_BT: Tensor, item_mask_BK: Tensor) -> Pairing:
    """Labels and weights of an index table whose own slots sit at columns i … i + K − 1."""
    B, K = item_mask_BK.shape
    if index_BT.shape != (B, K + B - 1):
        raise ValueError(f"index must be (B, K + B - 1) = {(B, K + B - 1)}, got {tuple(index_BT.shape)}")
    mask = item_mask_BK.float()
    columns = own_columns(B, K, index_BT.device)
    labels = torch.full(index_BT.shape, -1.0, device=index_BT.device).scatter_(1, columns, 1.0)
    has_item = (mask.sum(1) > 0).float()
    weights = has_item[index_BT // K].scatter(1, columns, mask)
    return Pairing(index_BT, labels, weights, K)


def sample_pairing(item_mask_BK: Tensor, *, generator: torch.Generator | None = None) -> Pairing:
    """Draw one real item of every other image, uniformly, for every image.

    Args:
        item_mask_BK: bool or 0/1, which slots hold a real item.
        generator: source of the draws, on the mask's device.
    """
    B, K = item_mask_BK.shape
    device = item_mask_BK.device
    mask = item_mask_BK.float()
    # An image without any item gets an arbitrary draw; build_pairing gives it weight 0.
    mask = torch.where(mask.sum(1, keepdim=True) > 0, mask, torch.ones_like(mask))
    # drawn[j, i] is the slot of image j that meets image i.
    drawn = torch.multinomial(mask, B, replacement=True, generator=generator)
    columns = torch.arange(K + B - 1, device=device)
    rows = torch.arange(B, device=device)[:, None]
    is_own = (columns >= rows) & (columns < rows + K)
    owner = torch.where(columns < rows, columns, columns - K + 1).clamp(0, B - 1)
    slot = drawn[owner, rows]
    index = torch.where(is_own, rows * K + (columns - rows), owner * K + slot)
    return build_pairing(index, item_mask_BK)


def local_pairs(images: ItemRows, items: ItemRows, index_BT: Tensor, checks: Checks, *, own: bool) -> Pairing:
    """Pairs of ILA and KTA with their final weights: this rank's images against the queries one rank sampled.

    Args:
        images: this rank's images.
        items: the rank that owns the items; row i of its queries meets image i here.
        index_BT: rows of that rank's item table, in the order of `sample_pairing`.
        checks: negatives to drop.
        own: whether the items are this rank's; another rank's are all negatives.
    """
    pairing = build_pairing(index_BT, items.mask_BK)
    # The padded own slots of another rank stay masked by its mask: only the labels change.
    labels = pairing.labels_BT if own else torch.full_like(pairing.labels_BT, -1.0)
    weights = _drop_negatives(Pairs(labels, pairing.weights_BT), images, items, index_BT, checks)
    return replace(pairing, labels_BT=labels, weights_BT=weights)


def global_pairs(images: ItemRows, items: ItemRows, checks: Checks, *, own: bool) -> Pairs:
    """Pairs of MPS (B, N): every image against every item of one rank; arguments as in `local_pairs`."""
    B, K = items.mask_BK.shape
    device = items.mask_BK.device
    if own:
        labels = 2.0 * torch.eye(B, device=device).repeat_interleave(K, dim=1) - 1.0
    else:
        labels = torch.full((B, B * K), -1.0, device=device)
    weights = items.mask_BK.float().reshape(1, -1).expand_as(labels)
    every_row = torch.arange(B * K, device=device)[None]
    return Pairs(labels, _drop_negatives(Pairs(labels, weights), images, items, every_row, checks))


def separation_pairs(items: ItemRows, checks: Checks) -> Pairs:
    """Pairs of IIS: labels (K, K), weights (B, K, K); an item against the others of its image."""
    K = items.mask_BK.shape[1]
    labels = 2.0 * torch.eye(K, device=items.mask_BK.device) - 1.0
    mask = items.mask_BK.float()
    weights = mask[:, :, None] * mask[:, None, :]
    if checks.duplicates:
        ids_BK = _ids(items).view_as(items.mask_BK)
        weights = weights * ~((ids_BK[:, :, None] == ids_BK[:, None, :]) & (labels < 0))
    return Pairs(labels, weights)


def _drop_negatives(pairs: Pairs, images: ItemRows, items: ItemRows, index: Tensor, checks: Checks) -> Tensor:
    """Weights of `pairs`, 0 for the negatives that `checks` rules out; `index` is (B, T) or (1, T)."""
    is_negative, weights = pairs.labels < 0, pairs.weights
    if checks.normal:
        K = items.mask_BK.shape[1]
        weights = weights * ~(images.is_normal_B[:, None] & items.is_normal_B[index // K] & is_negative)
    if checks.duplicates:
        own_ids_BK = _ids(images).view_as(images.mask_BK)
        alike = (_ids(items)[index][:, :, None] == own_ids_BK[:, None, :]) & images.mask_BK.bool()[:, None, :]
        weights = weights * ~(alike.any(-1) & is_negative)
    return weights


def _ids(rows: ItemRows) -> Tensor:
    if rows.ids_N is None:
        raise ValueError("mask_duplicates needs item_ids_N, the numbers of the item texts")
    return rows.ids_N
