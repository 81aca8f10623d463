"""Which image meets which item (paper: sampled item–image pairs), as index, label and weight tensors.

Axes: B images, K item slots per image, T = K + B − 1 queries per image.

For image i the queries are its own K slots plus one real item of each other image. They are ordered by image:
one negative of every j < i, then the own slots at columns i … i + K − 1, then one negative of every j > i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
