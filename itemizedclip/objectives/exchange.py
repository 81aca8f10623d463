"""Items travel between ranks, image tokens stay (paper: multi-GPU training).

Axes: W ranks, B images per rank, K item slots, T queries per image, D joint width.

Bytes sent by a rank per step: B·K·D·4 for the item features (0.46 MB for MRI, B = 32, K = 7) plus B·T·8 for the index,
against B·L·D·4 (770 MB) if tokens travelled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from itemizedclip.objectives.pairing import Pairing
from itemizedclip.runtime.collectives import rank, world_size


@dataclass(frozen=True)
class RemoteItems:
    """Another rank's items and the queries it sampled.

    Attributes:
        features_ND: (B·K, D) item features; gradients flow back to the rank that owns them.
        item_mask_BK: bool (B, K).
        is_normal_B: bool (B,).
        index_BT: int64 (B, T), rows of `features_ND`; row i meets this rank's image i.
        weights_BT: float (B, T), the remote mask: own slots their item mask, negatives 1.
        item_ids_N: int64 (B·K,), numbers of the item texts; None when the sender has none.
    """

    features_ND: Tensor
    item_mask_BK: Tensor
    is_normal_B: Tensor
    index_BT: Tensor
    weights_BT: Tensor
    item_ids_N: Tensor | None = None


class _GatherWithGradient(torch.autograd.Function):
    """All-gather whose backward pass adds up, on the owner, what every rank's loss owes it."""

    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:
        gathered = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(gathered, local.contiguous())
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[rank()]


def gather_features(features_ND: Tensor) -> Tensor:
    """(W, N, D) features of every rank, in order of rank; gradients flow back to the rank that owns them.

    Every rank must hold the same N.
    """
    return features_ND[None] if world_size() == 1 else _GatherWithGradient.apply(features_ND)


def gather_items(
    item_features_ND: Tensor,
    item_mask_BK: Tensor,
    is_normal_B: Tensor,
    pairing: Pairing,
    item_ids_N: Tensor | None = None,
) -> list[RemoteItems]:
    """Every other rank's items, in order of rank; an empty list with one rank or no process group.

    Every rank must hold the same B, K and D.
    """
    if world_size() == 1:
        return []
    K = item_mask_BK.shape[1]
    features = gather_features(item_features_ND.float())
    T = pairing.index_BT.shape[1]
    columns = [item_mask_BK.long(), is_normal_B.long()[:, None], pairing.index_BT]
    if item_ids_N is not None:
        columns.append(item_ids_N.view(-1, K))
    packed = torch.cat(columns, dim=1)
    tables = [torch.empty_like(packed) for _ in range(world_size())]
    dist.all_gather(tables, packed)
    remotes = []
    for other, table in enumerate(tables):
        if other == rank():
            continue
        mask, normal, index = table[:, :K], table[:, K].bool(), table[:, K + 1 : K + 1 + T]
        ids = None if item_ids_N is None else table[:, K + 1 + T :].flatten()
        # The weights follow from mask and index, so they need not travel.
        has_item = (mask.sum(1) > 0).float()
        weights = has_item[index // K].scatter(1, pairing.own_columns_BK, mask.float())
        remotes.append(RemoteItems(features[other], mask.bool(), normal, index, weights, ids))
    return remotes
