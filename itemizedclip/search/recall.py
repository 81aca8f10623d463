"""What the prefilter of a search keeps: measured against the exact search, never assumed.

A search first ranks all N images by the cosine of the global features and scores the first C of them exactly. An image
of the exact first k is found when its rank by cosine is at most C; the recall at C candidates is the share of such
images, over the queries it was measured on.

Axes: N images, M queries, n images of a block, k best images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from itemizedclip.evaluation.tcsim import GlobalScorer, TextScorer, TopK, top_images
from itemizedclip.evaluation.tcsim_folded import scorer_of_stored_tokens
from itemizedclip.models.dual_encoder import ImageFeatures
from itemizedclip.models.item_attention import ItemAttention
from itemizedclip.runtime import collectives

RECALL_TOP = 10
"""k of the recall that an index keeps."""

CANDIDATE_COUNTS = (20, 50, 100, 200, 500, 1000, 2000, 5000)
"""Numbers of candidates C that the recall is given for."""

DEFAULT_CANDIDATES = 500
"""Candidates of a search when no recall was measured."""

MOST_DEFAULT_CANDIDATES = 2000
"""No search scores more candidates than this unless it is asked to: under a second on one CPU core at ViT-B/16."""

WANTED_RECALL = 0.95
"""A search takes the smallest measured number of candidates with this recall."""

BUILT_IN_QUERIES = (
    "a person", "a group of people", "a child playing", "a dog", "a cat", "a bird in the air", "a horse",
    "a car on a road", "a bus", "a bicycle against a wall", "a boat on the water", "an aeroplane", "a train",
    "a bridge", "a tall building", "a house with a red roof", "a street at night", "trees", "a green field",
    "a mountain with snow", "a beach", "a river", "clouds in a blue sky", "a table with food", "a chair by a window",
    "a flower", "text on a sign", "something round", "a red object", "two things side by side", "a pattern of lines",
    "an empty parking lot",
)  # fmt: skip
"""What an index is measured with unless it is given queries of its users."""


@dataclass(frozen=True)
class PrefilterRecall:
    """Mean recall of the prefilter, and what it was measured on.

    Attributes:
        k: the exact first k images of a query are to be found.
        num_images: N at that time.
        num_queries: M.
        queries: where they came from, for people.
        at: number of candidates → recall, 0 … 1; every number of `CANDIDATE_COUNTS` below N, and N itself.
    """

    k: int
    num_images: int
    num_queries: int
    queries: str
    at: dict[int, float]

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> PrefilterRecall:
        """From JSON, whose keys are strings."""
        return cls(**{**content, "at": {int(count): float(share) for count, share in content["at"].items()}})

    def lower_bound(self, candidates: int) -> tuple[int, float] | None:
        """The largest measured number of candidates that is no more than this one, and its recall."""
        measured = [count for count in self.at if count <= candidates]
        return (max(measured), self.at[max(measured)]) if measured else None


def default_candidates(num_images: int, recall: PrefilterRecall | None) -> int:
    """How many of N images a search scores exactly unless it is told: all of few."""
    if num_images <= MOST_DEFAULT_CANDIDATES:
        return num_images
    if recall is None:
        return DEFAULT_CANDIDATES
    enough = [count for count, share in sorted(recall.at.items()) if share >= WANTED_RECALL]
    return min([*enough[:1], MOST_DEFAULT_CANDIDATES])


class Features(Protocol):
    """What is searched: see `itemizedclip.search.store.FeatureStore`."""

    def __len__(self) -> int: ...

    def batches(self, *, share: tuple[int, int] = (0, 1)) -> Iterable[tuple[Tensor, ImageFeatures]]: ...

    def global_batches(self, *, share: tuple[int, int] = (0, 1)) -> Iterable[tuple[Tensor, ImageFeatures]]: ...


def measure_recall(
    head: ItemAttention,
    store: Features,
    texts_MD: Tensor,
    *,
    queries: str,
    k: int = RECALL_TOP,
    counts: Sequence[int] = CANDIDATE_COUNTS,
) -> PrefilterRecall:
    """Search exactly, then look where the best images stand by their global features; ranks share the work.

    Args:
        head: the model's head.
        store: the N images.
        texts_MD: features of the queries.
        queries: what they are, for people.
        k: how many of the best images are to be found; fewer when there are fewer.
        counts: numbers of candidates.
    """
    share = collectives.rank(), collectives.world_size()
    N, k = len(store), min(k, len(store))
    scorer = scorer_of_stored_tokens(head, texts_MD, normalise_tokens=False)
    _, best_Mk = merge_best(*top_images(scorer, store.batches(share=share), k, device=texts_MD.device))
    ranks_Mk = global_ranks(GlobalScorer(texts_MD), store, best_Mk, share)
    at = {count: float((ranks_Mk <= count).double().mean()) for count in sorted({*counts, N}) if count <= N}
    return PrefilterRecall(k, N, len(texts_MD), queries, at)


def merge_best(scores_Mk: Tensor, images_Mk: Tensor) -> tuple[Tensor, Tensor]:
    """The best of what each rank found, on every rank."""
    if collectives.world_size() == 1:
        return scores_Mk, images_Mk
    best = TopK(scores_Mk.shape[1], len(scores_Mk), device=scores_Mk.device)
    all_scores, all_images = collectives.gather_rows(scores_Mk.T).T, collectives.gather_rows(images_Mk.T).T
    for row in range(len(scores_Mk)):
        found = all_images[row] >= 0  # a rank may hold fewer than k images
        best.update(all_scores[row : row + 1, found], all_images[row, found], rows=slice(row, row + 1))
    return best.result()


def global_ranks(scorer: TextScorer, store: Features, images_Mk: Tensor, share: tuple[int, int]) -> Tensor:
    """Rank by global score, from 1, of some images of each query; equal scores go to the lower image number."""
    own_Mk = torch.zeros(images_Mk.shape, dtype=torch.float32, device=images_Mk.device)
    for numbers_n, features in store.global_batches(share=share):
        scores_Mn = scorer.score(features).T
        for row, column, place in (images_Mk[..., None] == numbers_n).nonzero().tolist():
            own_Mk[row, column] = scores_Mn[row, place]
    own_Mk = collectives.all_reduce_sum(own_Mk)  # each image is known to one rank and 0 on the others
    before_Mk = torch.zeros_like(images_Mk)
    for numbers_n, features in store.global_batches(share=share):
        scores_Mn = scorer.score(features).T
        for column in range(images_Mk.shape[1]):
            own, image = own_Mk[:, column, None], images_Mk[:, column, None]
            before_Mk[:, column] += ((scores_Mn > own) | ((scores_Mn == own) & (numbers_n < image))).sum(1)
    return 1 + collectives.all_reduce_sum(before_Mk)
