"""The few collectives the project needs; each is a no-op with one process and no process group.

Axes: W ranks, N rows held by this rank (may differ between ranks).

Starting and ending a process group is the trainer's business (`itemizedclip.runtime.processes`).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number among W; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """W; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def group_device() -> torch.device:
    """Where tensors must lie for the backend: the current GPU for NCCL, the CPU otherwise."""
    if is_distributed() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def barrier() -> None:
    """Wait until every rank is here."""
    if is_distributed():
        # A reduction rather than dist.barrier(), which guesses the GPU from the rank number.
        dist.all_reduce(torch.zeros(1, device=group_device()))


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, on the tensor's own device and of its own dtype; the argument is not changed.

    Every rank must pass the same shape and dtype. bool is not accepted: sum int64 instead.
    """
    return _reduce(tensor, dist.ReduceOp.SUM)


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Element-wise maximum over ranks; otherwise as `all_reduce_sum`."""
    return _reduce(tensor, dist.ReduceOp.MAX)


def _reduce(tensor: Tensor, op: Any) -> Tensor:
    if tensor.dtype == torch.bool:
        raise TypeError("bool tensors cannot be summed over ranks; convert to int64 first")
    if not is_distributed():
        return tensor
    moved = tensor.detach().to(group_device(), copy=True).contiguous()
    dist.all_reduce(moved, op=op)
    return moved.to(tensor.device)


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of every rank, (N_0 + … + N_{W-1}, …) in order of rank, on the argument's device; without gradient.

    Args:
        rows: (N, …); N may differ between ranks and may be 0, the other axes and the dtype must agree.
    """
    if not is_distributed() or world_size() == 1:
        return rows
    device = group_device()
    local = rows.detach().to(device)
    as_bool = local.dtype == torch.bool
    if as_bool:
        local = local.to(torch.uint8)
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[rank()] = len(local)
    dist.all_reduce(counts)
    longest = int(counts.max())
    padded = local.new_zeros((longest, *local.shape[1:]))
    padded[: len(local)] = local
    gathered = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(gathered, padded)
    joined = torch.cat([part[: int(count)] for part, count in zip(gathered, counts)])
    return (joined.bool() if as_bool else joined).to(rows.device)


def gather_objects(value: T) -> list[T]:
    """One small object of plain data per rank, in order of rank, on every rank.

    Objects travel pickled between this run's own processes; never pass anything read from a file unchecked.
    """
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: T, source: int = 0) -> T:
    """Rank `source`'s object of plain data, on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, device=group_device())
    return box[0]
