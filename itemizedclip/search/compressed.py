"""Tokens of an image in a hundredth of their bytes: merged by k-means, each kept in 8 bits a number.

L tokens (196 × 512 × 2 bytes: 200 kB at ViT-B/16) become m centroids of 8-bit numbers, a scale for each, and for every
token the number of its centroid: 27 centroids are 14 kB. `unpacked` puts each token's centroid back in its place, so
scores, attention maps and regions come from the code that reads whole tokens; what they lose is measured
(`docs/search.md`). The head standardises every token before it reads it, so tokens are standardised before they are
merged.

Axes: B images, L image tokens, m centroids, D joint width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from itemizedclip.runtime.errors import UserError

ROUNDS = 8
"""Of k-means; later ones move nothing that is seen in a score."""

MOST_CENTROIDS = 256
"""A centroid's number is one byte."""


@dataclass(frozen=True)
class MergedTokens:
    """The tokens of B images, merged.

    Attributes:
        codes_BmD: int8, the centroids divided by their scales.
        scales_Bm: float16.
        places_BL: uint8, the centroid of each token.
    """

    codes_BmD: Tensor
    scales_Bm: Tensor
    places_BL: Tensor

    def unpacked(self) -> Tensor:
        """float32 (B, L, D): every token's centroid in its place."""
        centroids = self.codes_BmD.float() * self.scales_Bm.float()[..., None]
        index = self.places_BL.long()[..., None].expand(-1, -1, centroids.shape[-1])
        return centroids.gather(1, index)

    def rows(self) -> list[bytes]:
        """Each image as bytes: scales, places, codes."""
        return [
            scales.numpy().tobytes() + places.numpy().tobytes() + codes.numpy().tobytes()
            for scales, places, codes in zip(self.scales_Bm, self.places_BL, self.codes_BmD)
        ]

    @staticmethod
    def from_rows(rows: list[bytes], *, num_tokens: int, width: int, num_centroids: int) -> MergedTokens:
        """From `rows`.

        Raises:
            UserError: bytes that are not those of such tokens.
        """
        L, D, m = num_tokens, width, num_centroids
        expected = 2 * m + L + m * D
        for row in rows:
            if len(row) != expected:
                raise UserError(f"stored tokens of {len(row):,} bytes; expected {expected:,}: the table is damaged")
        joined = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), expected)
        scales = joined[:, : 2 * m].copy().view(np.float16)
        places = joined[:, 2 * m : 2 * m + L].copy()
        codes = joined[:, 2 * m + L :].copy().view(np.int8).reshape(-1, m, D)
        if places.size and int(places.max()) >= m:
            raise UserError("stored tokens name a centroid that is not there: the table is damaged")
        return MergedTokens(torch.from_numpy(codes), torch.from_numpy(scales), torch.from_numpy(places))


def bytes_per_image(num_tokens: int, width: int, num_centroids: int) -> int:
    """Of merged tokens."""
    return 2 * num_centroids + num_tokens + num_centroids * width


@torch.no_grad()
def merge_tokens(tokens_BLD: Tensor, num_centroids: int, *, rounds: int = ROUNDS) -> MergedTokens:
    """Merge tokens by k-means from centroids spread by farthest-point choice; nothing is random.

    Args:
        tokens_BLD: image tokens.
        num_centroids: m; L or more keeps every token, in 8 bits.
        rounds: of k-means.

    Raises:
        UserError: m outside 1 … 256.
    """
    if not 1 <= num_centroids <= MOST_CENTROIDS:
        raise UserError(f"{num_centroids} tokens an image; expected 1 to {MOST_CENTROIDS}")
    B, L, D = tokens_BLD.shape
    tokens = F.layer_norm(tokens_BLD.float(), (D,))
    m = min(num_centroids, L)
    # Farthest points: the first token nearest the mean, then always the one farthest from all chosen.
    nearest = (tokens - tokens.mean(1, keepdim=True)).square().sum(-1).argmin(1)
    chosen = [nearest]
    distance = torch.full((B, L), torch.inf, device=tokens.device)
    for _ in range(m - 1):
        last = tokens.gather(1, chosen[-1][:, None, None].expand(-1, 1, D))
        distance = torch.minimum(distance, (tokens - last).square().sum(-1))
        chosen.append(distance.argmax(1))
    centroids = tokens.gather(1, torch.stack(chosen, 1)[..., None].expand(-1, -1, D))
    for _ in range(rounds):
        places = torch.cdist(tokens, centroids).argmin(-1)
        members = F.one_hot(places, m).to(tokens.dtype)
        counts = members.sum(1)
        means = torch.einsum("blm,bld->bmd", members, tokens) / counts.clamp_min(1)[..., None]
        centroids = torch.where(counts[..., None] > 0, means, centroids)
    places = torch.cdist(tokens, centroids).argmin(-1)
    if m < num_centroids:  # so that every row of a table has the same length
        centroids = F.pad(centroids, (0, 0, 0, num_centroids - m))
    scales = (centroids.abs().amax(-1) / 127).clamp_min(1e-6).half()
    codes = (centroids / scales.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
    return MergedTokens(codes.cpu(), scales.cpu(), places.to(torch.uint8).cpu())
