"""How much of the loss is held at a time: the cache of a processor, a share of a GPU's memory.

Axes: B images, L image tokens, D joint width, H heads, T queries per image and rank, P passes.

Both are facts of the machine, not its state, so that the same machine makes the same random draws again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch

FALLBACK_CACHE_BYTES = 16 * 2**20
GPU_SHARE = 32


@cache
def cache_bytes() -> int:
    """The processor's largest cache."""
    sizes = []
    for level in (3, 2):
        try:
            sizes.append(os.sysconf(f"SC_LEVEL{level}_CACHE_SIZE"))
        except (ValueError, OSError):  # not a name here, or not known to the kernel
            sizes.append(0)
    return max(sizes) if max(sizes) > 0 else FALLBACK_CACHE_BYTES


def work_bytes(device: torch.device) -> int:
    """What one block may take: half of the cache, or 1/32 of the GPU's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // GPU_SHARE
    return cache_bytes() // 2


def ranks_at_once(work: int, numbers_per_rank: int, num_ranks: int) -> int:
    """Ranks whose items are held together; every further lot projects the image tokens again. At least 1.

    Five tables of the items' size are held per rank; 64 MB of them, more where blocks are larger than that.

    Args:
        work: bytes of a block (`work_bytes`).
        numbers_per_rank: B·K·D.
        num_ranks: other ranks in all.
    """
    most = max(1, max(4 * work, 64 * 2**20) // (5 * 4 * numbers_per_rank))
    return _even(num_ranks, most)


def _even(total: int, most: int) -> int:
    """Size of equal parts of `total`, none above `most`."""
    return max(1, -(-total // max(1, -(-total // most))))


def folding_is_cheaper(Q: int, L: int, D: int, H: int, P: int) -> bool:
    """Whether Q queries per image cost fewer multiply-adds on tokens that are not projected (`token_blocks`)."""
    per_query = 3 * L * D * (P + 1)
    return H * per_query * Q + 3 * P * D * D * Q < 6 * L * D * D + per_query * Q


@dataclass(frozen=True)
class Blocks:
    """Images of a block, and ranks whose queries it meets at a time."""

    images: int
    ranks: int

    @staticmethod
    def choose(work: int, B: int, L: int, D: int, heads_queries: int, num_passes: int, num_ranks: int) -> Blocks:
        """The largest block within `work` bytes, one image and one rank at least.

        Args:
            work: see `work_bytes`.
            heads_queries: H·T.
            num_ranks: other ranks, 1 at least.
        """
        tokens = 5 * L * D * 4
        weights = heads_queries * L * 4 * (2 * num_passes + 1)
        ranks = _even(num_ranks, max(1, (work - tokens) // weights))
        images = max(1, min(B, work // (tokens + ranks * weights)))
        return Blocks(images, ranks)
