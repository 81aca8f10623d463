"""Items travel between ranks, image tokens stay (paper: multi-GPU training).

Axes: W ranks, B images per rank, K item slots, T queries per image, N = B·K rows of an item table, D joint width.

Each rank sends one message per step, N·D·4 bytes of features (0.46 MB for MRI, B = 32, K = 7) and B·(T + 2·K + 1)·4 of
numbers, against B·L·D·4 (770 MB) if tokens travelled. The way back is a reduce-scatter of the same size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from itemizedclip.objectives.pairing import ItemRows
from itemizedclip.runtime.collectives import rank, world_size
from itemizedclip.runtime.timing import timed


@dataclass(frozen=True)
class RemoteItems:
    """Another rank's items and the queries it sampled.

    Attributes:
        features_ND: (B·K, D) item features, without gradient: see `with_gradient`.
        rows: mask, normal flags and text numbers of the items.
        index_BT: int64 (B, T), rows of `features_ND`; row i meets this rank's image i.
        slot: the rank's place in `Exchange.ticket_WND`.
    """

    features_ND: Tensor
    rows: ItemRows
    index_BT: Tensor
    slot: int


@dataclass(frozen=True)
class Exchange:
    """Messages on their way.

    Attributes:
        ticket_WND: stands for every rank's item features in autograd, where their gradient is to go; its own numbers
            mean nothing.
        wait: every other rank's items, in order of rank, once they are here.
        own_slot: this rank's place in the ticket.
    """

    ticket_WND: Tensor
    wait: Callable[[], list[RemoteItems]]
    own_slot: int = 0

    @property
    def other_slots(self) -> list[int]:
        """Slots of the other ranks."""
        return [slot for slot in range(len(self.ticket_WND)) if slot != self.own_slot]


def choose_ranks(slots: Sequence[int], most: int) -> tuple[frozenset[int], float]:
    """The other ranks whose items are attended, and the factor of their pairs that leaves the expected sum as it is.

    Args:
        slots: of the other ranks.
        most: how many of them, 0: all. They are drawn by PyTorch's generator of the processor, without replacement:
            each with probability most / len(slots).
    """
    if not most or most >= len(slots):
        return frozenset(slots), 1.0
    drawn = torch.randperm(len(slots))[:most].tolist()
    return frozenset(slots[place] for place in drawn), len(slots) / most


class _Received:
    """Where the messages land, and the work that brings them."""

    def __init__(self) -> None:
        self.messages_WM = torch.empty(0)
        self.sent: Tensor | None = None
        self.work: Any = None

    def start(self, message_M: Tensor) -> None:
        self.sent = message_M  # must outlive the transfer
        self.messages_WM = message_M.new_empty(world_size(), len(message_M))
        self.work = dist.all_gather_into_tensor(self.messages_WM.view(-1), message_M, async_op=True)

    def wait(self) -> None:
        if self.work is not None:
            with timed("exchange"):
                self.work.wait()
        self.work = self.sent = None


class _Gather(torch.autograd.Function):
    """Starts an all-gather and returns the ticket; the backward pass adds up what every rank's loss owes the owner."""

    @staticmethod
    def forward(ctx: Any, features_ND: Tensor, numbers_M: Tensor, received: _Received) -> Tensor:
        received.start(torch.cat([features_ND.flatten(), numbers_M]))
        return features_ND.new_zeros(()).expand(world_size(), *features_ND.shape)

    @staticmethod
    def backward(ctx: Any, grad_WND: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(grad_WND.contiguous()), None, None


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, features: Tensor) -> Tensor:
        return features.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def with_gradient(ticket: Tensor, features: Tensor) -> Tensor:
    """`features`, whose gradient goes to `ticket`."""
    joined: Tensor = _WithGradient.apply(ticket, features)
    return joined


def reduce_scatter(parts_WND: Tensor) -> Tensor:
    """Sum over ranks of their parts for this rank. Not every backend knows it: an all-reduce stands in then."""
    own = torch.empty_like(parts_WND[0])
    try:
        dist.reduce_scatter_tensor(own, parts_WND.flatten(0, 1))
    except (RuntimeError, NotImplementedError) as error:
        if "support" not in str(error) and "implement" not in str(error):
            raise
        parts_WND = parts_WND.clone()
        dist.all_reduce(parts_WND)
        return parts_WND[rank()]
    return own


def gather_features(features_ND: Tensor) -> Tensor:
    """(W, N, D) features of every rank, in order of rank; gradients flow back to the rank that owns them.

    Every rank must hold the same N.
    """
    if world_size() == 1:
        return features_ND[None]
    received = _Received()
    ticket: Tensor = _Gather.apply(features_ND, features_ND.new_empty(0), received)
    received.wait()
    return with_gradient(ticket, received.messages_WM.view_as(ticket))


def send_items(item_features_ND: Tensor, rows: ItemRows, index_BT: Tensor) -> Exchange | None:
    """Start the exchange; None with one rank or no process group.

    Every rank must hold the same B, K and D.
    """
    if world_size() == 1:
        return None
    K, T = rows.mask_BK.shape[1], index_BT.shape[1]
    columns = [rows.mask_BK.int(), rows.is_normal_B.int()[:, None], index_BT.int()]
    if rows.ids_N is not None:
        columns.append(rows.ids_N.view(-1, K).view(torch.int32))
    # The bits of whole numbers travel as floats; nothing computes with them on the way.
    numbers = torch.cat(columns, dim=1).flatten().view(torch.float32)
    received = _Received()
    ticket: Tensor = _Gather.apply(item_features_ND.float(), numbers, received)
    has_ids, (N, D) = rows.ids_N is not None, item_features_ND.shape

    def wait() -> list[RemoteItems]:
        received.wait()
        remotes = []
        for slot, message in enumerate(received.messages_WM):
            if slot == rank():
                continue
            table = message[N * D :].view(torch.int32).view(N // K, -1)
            mask, normal, index, ids = table.split([K, 1, T, table.shape[1] - K - 1 - T], dim=1)
            ids_N = ids.contiguous().view(torch.int64).flatten() if has_ids else None
            remote_rows = ItemRows(mask.bool(), normal[:, 0].bool(), ids_N)
            remotes.append(RemoteItems(message[: N * D].view(N, D), remote_rows, index.long(), slot))
        return remotes

    return Exchange(ticket, wait, rank())
