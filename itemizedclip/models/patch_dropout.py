"""Training on a random part of an image's patches (Li et al. 2023, "Scaling Language-Image Pre-training via Masking").

Axes: N rows that lose equally many tokens (images, or attention groups of studies), L tokens, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchDropout(nn.Module):
    """Drops a share of the tokens in training; what is kept keeps its order.

    Args:
        has_class_token: the first token of each row always stays.

    Attributes:
        share: dropped, in [0, 1); at least one token stays.
    """

    def __init__(self, share: float = 0.0, *, has_class_token: bool = False) -> None:
        super().__init__()
        self.share = share
        self.has_class_token = has_class_token

    def forward(self, x_NLC: Tensor) -> Tensor:
        """(N, L, C) → (N, L', C); in evaluation mode all of them."""
        if not self.training or self.share == 0:
            return x_NLC
        first = int(self.has_class_token)
        N, C, patches = len(x_NLC), x_NLC.shape[-1], x_NLC.shape[1] - first
        kept = max(1, int(patches * (1 - self.share)))
        drawn = torch.rand(N, patches, device=x_NLC.device).topk(kept, dim=1, sorted=False).indices
        index = drawn.sort(dim=1).values + first
        if first:
            index = torch.cat([index.new_zeros(N, 1), index], dim=1)
        return x_NLC.gather(1, index[..., None].expand(-1, -1, C))
