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
from torch.autograd.function import FunctionCtx

from itemizedclip.objectives.pairing import ItemRows
from itemizedclip.runtime.collectives import rank, world_size


@dataclass(frozen=True)
class RemoteItems:
    """Another rank's items and the queries it sampled.

    Attributes:
        features_ND: (B·K, D) item features; gradients flow back to the rank that owns them.
        rows: mask, normal flags and text numbers of the items.
        index_BT: int64 (B, T), rows of `features_ND`; row i meets this rank's image i.
    """

    features_ND: Tensor
    rows: ItemRows
    index_BT: Tensor


class _GatherWithGradient(torch.autograd.Function):
    """All-gather whose backward pass adds up, on the owner, what every rank's loss owes it."""

    @staticmethod
    def forward(ctx: FunctionCtx, local: Tensor) -> Tensor:
        gathered = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(gathered, local.contiguous())
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[rank()]


def gather_features(features_ND: Tensor) -> Tensor:
    """(W, N, D) features of every rank, in order of rank; gradients flow back to the rank that owns them.

    Every rank must hold the same N.
    """
    if world_size() == 1:
        return features_ND[None]
    gathered: Tensor = _GatherWithGradient.apply(features_ND)
    return gathered


def gather_items(item_features_ND: Tensor, rows: ItemRows, index_BT: Tensor) -> list[RemoteItems]:
    """Every other rank's items, in order of rank; an empty list with one rank or no process group.

    Every rank must hold the same B, K and D.
    """
    if world_size() == 1:
        return []
    K, T = rows.mask_BK.shape[1], index_BT.shape[1]
    features = gather_features(item_features_ND.float())
    columns = [rows.mask_BK.long(), rows.is_normal_B.long()[:, None], index_BT]
    if rows.ids_N is not None:
        columns.append(rows.ids_N.view(-1, K))
    packed = torch.cat(columns, dim=1)
    tables = [torch.empty_like(packed) for _ in range(world_size())]
    dist.all_gather(tables, packed)
    remotes = []
    for other, table in enumerate(tables):
        if other == rank():
            continue
        mask, normal, index = table[:, :K].bool(), table[:, K].bool(), table[:, K + 1 : K + 1 + T]
        ids = None if rows.ids_N is None else table[:, K + 1 + T :].flatten()
        remotes.append(RemoteItems(features[other], ItemRows(mask, normal, ids), index))
    return remotes
