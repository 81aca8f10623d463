"""Ranks of the true pairs by counting, and the retrieval measures made from them.

Axes: N images, M texts, B images of a block, P texts of a block.

A rank is 1 + the number of rivals with a larger score + half the number of rivals with an equal score (mid-rank), so a
model that gives every pair the same score lands in the middle of the list and not at its top. A pair is within the
first k when its rank is at most k. Rivals are

    text to image   the other images, for one text;
    image to text   texts of *other* images. An image's own n texts are ordered among themselves: with f(t) for the
                    rivals of own text t counted as above, the best own text has rank 1 + min f, the worst n + max f,
                    and the mean over own texts is (n + 1) / 2 + mean f.

Published logs of training count from 0: subtract 1 from our mean and worst ranks to compare. Texts that read the same
but belong to different images are rivals, as in the published tables, unless the caller says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from itemizedclip.evaluation.intervals import Array, Resampling, weighted_mean
from itemizedclip.runtime.errors import UserError

RETRIEVAL_CUTOFFS = (1, 5, 10, 50, 100)
"""k of R@k in the tables of natural images."""

VALIDATION_CUTOFFS = (1, 10, 100)
"""k of R@k during training."""

COMPLETE_CUTOFFS = (10, 100, 1000)
"""k of COMPLETE@k: the share of images with all their own texts within the first k."""

BLOCK_BYTES = 64 * 2**20
"""Comparisons of one block stay near this many bytes."""


@dataclass(frozen=True)
class RetrievalRanks:
    """Ranks of the true pairs, counted from 1; float64 on the CPU.

    Attributes:
        text_to_image_M: rank of each text's image among all images.
        best_text_N: rank of each image's best own text among all texts; images without a text are left out.
        mean_text_N: mean rank of each image's own texts.
        worst_text_N: rank of each image's worst own text.
    """

    text_to_image_M: Tensor
    best_text_N: Tensor
    mean_text_N: Tensor
    worst_text_N: Tensor


class RivalCounts:
    """Counts, for each text, how many rivals beat its true pair; fed with blocks of scores in any order.

    Two passes, because a text meets images scored before its own: `add_rows` takes the scores of some images against
    all texts and keeps the true pairs' scores; when every image has been seen, `add_columns` takes the same scores
    again. Both counters are int64, twice the count (an equal score is one half), so that sums over ranks are exact:
    with several ranks, sum `true_scores_M` before the second pass and both counters after it.

    Attributes:
        true_scores_M: score of each text with its own image, 0 where not yet seen.
        rival_texts_M: twice the number of other images' texts that beat text m, for the image of text m.
        rival_images_M: twice the number of other images that beat the image of text m, for text m.
    """

    def __init__(self, owner_M: Tensor) -> None:
        """`owner_M`: int64, the image each text belongs to."""
        if owner_M.dim() != 1 or owner_M.numel() == 0 or owner_M.is_floating_point():
            raise UserError(f"owner must name the image of each text, int64 (M,) with M ≥ 1, got {_describe(owner_M)}")
        self.owner_M = owner_M.long()
        self.true_scores_M = torch.zeros(len(owner_M), dtype=torch.float32, device=owner_M.device)
        self.rival_texts_M = torch.zeros_like(self.owner_M)
        self.rival_images_M = torch.zeros_like(self.owner_M)

    def add_rows(self, rows_B: Tensor, scores_BM: Tensor, *, no_rivals_BM: Tensor | None = None) -> None:
        """First pass: scores (B, M) of the images `rows_B` against every text.

        `no_rivals_BM`, bool: pairs that count as neither right nor wrong, besides the image's own texts.
        """
        scores_BM = self._checked(rows_B, scores_BM)
        row_P, own_P = self._own_pairs(rows_B)
        self.true_scores_M[own_P] = true_P = scores_BM[row_P, own_P]
        row_E, text_E = (row_P, own_P) if no_rivals_BM is None else self._no_rivals(rows_B, no_rivals_BM)
        for rows in _blocks(scores_BM):
            # Sorted once, a row answers for all its texts; what is no rival is few, and taken off.
            inside_P, inside_E = _inside(row_P, rows), _inside(row_E, rows)
            true_p, row_p = true_P[inside_P], row_P[inside_P] - rows.start
            spared = _table(row_E[inside_E] - rows.start, scores_BM[row_E[inside_E], text_E[inside_E]], rows)
            beaten = _twice_above(_sorted_rows(scores_BM[rows]), true_p, row_p)
            beaten -= _twice_above(spared.sort(dim=1).values, true_p, row_p)
            self.rival_texts_M[own_P[inside_P]] = beaten

    def add_columns(self, rows_B: Tensor, scores_BM: Tensor, *, no_rivals_BM: Tensor | None = None) -> None:
        """Second pass: the same arguments once every true score is known."""
        scores_BM = self._checked(rows_B, scores_BM)
        for rows in _blocks(scores_BM):
            larger, at_least = scores_BM[rows] > self.true_scores_M, scores_BM[rows] >= self.true_scores_M
            # PyTorch adds bytes many times faster than truth values.
            self.rival_images_M += (larger.view(torch.int8) + at_least.view(torch.int8)).sum(0, dtype=torch.int32)
        row_E, text_E = (
            self._own_pairs(rows_B) if no_rivals_BM is None else self._no_rivals(rows_B, no_rivals_BM)
        )  # fmt: skip
        spared_E, true_E = scores_BM[row_E, text_E], self.true_scores_M[text_E]
        self.rival_images_M.index_add_(0, text_E, -((spared_E > true_E).long() + (spared_E >= true_E)))

    def _own_pairs(self, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """Position in the block and text of each image's own pairs."""
        # By sorting once instead of comparing every text with every image.
        ordered_B, order_B = rows_B.sort()
        slot_M = torch.searchsorted(ordered_B, self.owner_M).clamp_max(len(rows_B) - 1)
        own_P = (ordered_B[slot_M] == self.owner_M).nonzero().squeeze(1)
        return order_B[slot_M[own_P]], own_P

    def _no_rivals(self, rows_B: Tensor, no_rivals_BM: Tensor) -> tuple[Tensor, Tensor]:
        """Position in the block and text of all pairs that are no rivals, an image's own among them."""
        row_E, text_E = (no_rivals_BM | (self.owner_M == rows_B[:, None])).nonzero(as_tuple=True)
        return row_E, text_E

    def ranks(self) -> RetrievalRanks:
        """The ranks, once both passes have seen every image."""
        owner, rivals = self.owner_M.cpu(), self.rival_texts_M.cpu().double() / 2
        _, image_M, num_texts_N = torch.unique(owner, return_inverse=True, return_counts=True)
        num_texts_N = num_texts_N.double()

        def per_image(reduction: str) -> Tensor:
            empty = torch.zeros_like(num_texts_N)
            return empty.scatter_reduce(0, image_M, rivals, reduction, include_self=False)

        return RetrievalRanks(
            text_to_image_M=1 + self.rival_images_M.cpu().double() / 2,
            best_text_N=1 + per_image("amin"),
            mean_text_N=(num_texts_N + 1) / 2 + per_image("mean"),
            worst_text_N=num_texts_N + per_image("amax"),
        )

    def _checked(self, rows_B: Tensor, scores_BM: Tensor) -> Tensor:
        expected = (len(rows_B), len(self.owner_M))
        if tuple(scores_BM.shape) != expected:
            raise UserError(f"scores must be (images, texts) = {expected}, got {tuple(scores_BM.shape)}")
        # The sum tells in one pass that all are finite; that it is not may be an overflow.
        if not scores_BM.sum(dtype=torch.float32).isfinite() and not scores_BM.isfinite().all():
            raise UserError("scores hold NaN or infinity, which no rank can be made of: check weights and precision")
        return scores_BM.float()


def _blocks(scores_BM: Tensor) -> list[slice]:
    """Rows whose sorted copy stays near BLOCK_BYTES."""
    size = max(1, BLOCK_BYTES // (4 * scores_BM.shape[1]))
    return [slice(start, min(start + size, len(scores_BM))) for start in range(0, len(scores_BM), size)]


def _inside(row_P: Tensor, rows: slice) -> Tensor:
    return ((row_P >= rows.start) & (row_P < rows.stop)).nonzero().squeeze(1)


def _sorted_rows(scores_BM: Tensor) -> Tensor:
    """Each row in rising order; NumPy takes a twentieth of PyTorch's time, which sorts the places as well."""
    if scores_BM.device.type == "cpu":
        return torch.from_numpy(np.sort(scores_BM.numpy(), axis=1))
    return scores_BM.sort(dim=1).values


def _places(row_P: Tensor, num_rows: int) -> tuple[Tensor, int]:
    """Column of each entry when the entries of a row stand beside each other in a table, and the columns needed."""
    count_B = torch.bincount(row_P, minlength=num_rows)
    order_P = row_P.argsort(stable=True)
    place_P = torch.empty_like(row_P)
    place_P[order_P] = torch.arange(len(row_P), device=row_P.device) - (count_B.cumsum(0) - count_B)[row_P[order_P]]
    return place_P, int(count_B.max()) if len(row_P) else 1


def _table(row_E: Tensor, values_E: Tensor, rows: slice) -> Tensor:
    """The values of each row beside each other, filled up with −inf."""
    place_E, columns = _places(row_E, rows.stop - rows.start)
    table = values_E.new_full((rows.stop - rows.start, columns), float("-inf"))
    table[row_E, place_E] = values_E
    return table


def _twice_above(rising_BC: Tensor, true_P: Tensor, row_P: Tensor) -> Tensor:
    """2 · (values of its row above each true score) + (values equal to it); int64 (P,)."""
    # Rows have different numbers of true scores: each as a column of a table, as searchsorted wants them.
    place_P, columns = _places(row_P, len(rising_BC))
    asked = true_P.new_zeros((len(rising_BC), columns))
    asked[row_P, place_P] = true_P
    below = torch.searchsorted(rising_BC, asked) + torch.searchsorted(rising_BC, asked, right=True)
    return 2 * rising_BC.shape[1] - below[row_P, place_P]


def retrieval_ranks(scores_NM: Tensor, owner_M: Tensor) -> RetrievalRanks:
    """Ranks of the true pairs of a whole score matrix.

    Args:
        scores_NM: (N, M), larger is better.
        owner_M: int64 (M,), the image 0 … N − 1 of each text.

    Raises:
        ValueError: shapes that do not fit, an owner that is no image, or a NaN.
    """
    if scores_NM.dim() != 2:
        raise UserError(f"scores must be (images, texts), got {_describe(scores_NM)}")
    counts = RivalCounts(owner_M)
    N = len(scores_NM)
    if int(owner_M.min()) < 0 or int(owner_M.max()) >= N:
        raise UserError(f"owner must be 0 … {N - 1} for {N} images, got {int(owner_M.min())} … {int(owner_M.max())}")
    rows_N = torch.arange(N, device=owner_M.device)
    counts.add_rows(rows_N, scores_NM)
    counts.add_columns(rows_N, scores_NM)
    return counts.ranks()


def retrieval_metrics(scores_NM: Tensor, owner_M: Tensor) -> dict[str, float]:
    """The retrieval table of natural images from a score matrix; see `retrieval_table` and `retrieval_ranks`."""
    return retrieval_table(retrieval_ranks(scores_NM, owner_M))


def validation_metrics(scores_NM: Tensor, owner_M: Tensor) -> dict[str, float]:
    """The measures of validation during training; see `validation_table` and `retrieval_ranks`."""
    return validation_table(retrieval_ranks(scores_NM, owner_M))


def retrieval_table(ranks: RetrievalRanks) -> dict[str, float]:
    """R@1/5/10/50/100, mean and median rank: text to image, image to best own text, image to worst own text.

    The median is floored: ⌊median of (rank − 1)⌋ + 1.
    """
    table: dict[str, float] = {}
    for direction, suffix, values in (
        ("text_to_image", "", ranks.text_to_image_M),
        ("image_to_text", "", ranks.best_text_N),
        ("image_to_text", "_worst", ranks.worst_text_N),
    ):
        for k in RETRIEVAL_CUTOFFS:
            table[f"{direction}_R@{k}{suffix}"] = share_within(values, k)
        table[f"{direction}_mean_rank{suffix}"] = values.mean().item()
        table[f"{direction}_median_rank{suffix}"] = float(np.floor(np.median(values.numpy() - 1)) + 1)
    return table


def validation_table(ranks: RetrievalRanks) -> dict[str, float]:
    """R@1/10/100 both ways, COMPLETE@10/100/1000, and mean and worst rank of an image's own texts (from 1)."""
    table = {f"text_to_image_R@{k}": share_within(ranks.text_to_image_M, k) for k in VALIDATION_CUTOFFS}
    table |= {f"image_to_text_R@{k}": share_within(ranks.best_text_N, k) for k in VALIDATION_CUTOFFS}
    table |= {f"complete@{k}": share_within(ranks.worst_text_N, k) for k in COMPLETE_CUTOFFS}
    table["mean_item_rank"] = ranks.mean_text_N.mean().item()
    table["worst_item_rank"] = ranks.worst_text_N.mean().item()
    return table


def rank_resampling(ranks: RetrievalRanks, num_texts_N: Sequence[int], patients_N: Sequence[str]) -> Resampling:
    """How shares and mean ranks of both tables follow from the images asked for; the gallery stays as it was.

    Args:
        ranks: of all true pairs.
        num_texts_N: texts of each image, in the order of the ranks.
        patients_N: whose each image is.
    """
    text_to_image_M: Array = ranks.text_to_image_M.numpy()
    best_N: Array = ranks.best_text_N.numpy()
    mean_N: Array = ranks.mean_text_N.numpy()
    worst_N: Array = ranks.worst_text_N.numpy()
    of_texts: dict[str, Array] = {
        f"text_to_image_R@{k}": (text_to_image_M <= k).astype(np.float64)
        for k in {*RETRIEVAL_CUTOFFS, *VALIDATION_CUTOFFS}
    }
    of_texts["text_to_image_mean_rank"] = text_to_image_M
    of_images: dict[str, Array] = {
        f"image_to_text_R@{k}": (best_N <= k).astype(np.float64) for k in {*RETRIEVAL_CUTOFFS, *VALIDATION_CUTOFFS}
    }
    of_images |= {f"image_to_text_R@{k}_worst": (worst_N <= k).astype(np.float64) for k in RETRIEVAL_CUTOFFS}
    of_images |= {f"complete@{k}": (worst_N <= k).astype(np.float64) for k in COMPLETE_CUTOFFS}
    of_images |= {"image_to_text_mean_rank": best_N, "image_to_text_mean_rank_worst": worst_N}
    of_images |= {"mean_item_rank": mean_N, "worst_item_rank": worst_N}

    def measure(weights_RN: Array) -> dict[str, Array]:
        weights_RM = np.repeat(weights_RN, num_texts_N, axis=1)
        found = {name: weighted_mean(values, weights_RM) for name, values in of_texts.items()}
        return found | {name: weighted_mean(values, weights_RN) for name, values in of_images.items()}

    return Resampling(patients_N, measure)


def share_within(ranks: Tensor, k: int) -> float:
    """Share of ranks that are at most k."""
    return (ranks <= k).double().mean().item()


def top_k_table(ranks: Tensor, cutoffs: Sequence[int]) -> dict[str, float]:
    """`{"top1": …, "top5": …, "mean_rank": …}` of ranks counted from 1."""
    return {f"top{k}": share_within(ranks, k) for k in cutoffs} | {"mean_rank": ranks.double().mean().item()}


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
