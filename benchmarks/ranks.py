"""Retrieval ranks of a score matrix: the published way against `itemizedclip.evaluation.ranks`.

    python benchmarks/ranks.py --threads 1                  # 1,000 images with five texts each
    python benchmarks/ranks.py --images 5000 --threads 1    # COCO's size

The published way sorts every row and every column and looks for the true pair in the order. Both sides are run in turns
in one process; the best processor time counts. Scores are drawn without ties, where both ways agree.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from itemizedclip.evaluation.ranks import retrieval_ranks


def published_ranks(scores_NM: Tensor, owner_M: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks from 1: of each text's image (M,), and of each image's best text (N,)."""
    orders_MN = scores_NM.T.argsort(dim=1, descending=True)
    text_to_image_M = (orders_MN == owner_M[:, None]).nonzero()[:, 1] + 1
    orders_NM = scores_NM.argsort(dim=1, descending=True)
    places_NM = torch.empty_like(orders_NM).scatter_(1, orders_NM, torch.arange(len(owner_M)).expand_as(orders_NM))
    best_N = torch.stack([places_NM[n, owner_M == n].min() + 1 for n in range(len(scores_NM))])
    return text_to_image_M, best_N


def best_seconds(run: Callable[[], object], turns: int) -> float:
    """Shortest processor time of a call."""
    best = float("inf")
    for _ in range(turns):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--texts-per-image", type=int, default=5)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    owner_M = torch.arange(arguments.images).repeat_interleave(arguments.texts_per_image)
    scores_NM = torch.rand(arguments.images, len(owner_M), dtype=torch.float64).float()
    ours = retrieval_ranks(scores_NM, owner_M)
    seconds = {
        "published": best_seconds(lambda: published_ranks(scores_NM, owner_M), arguments.turns),
        "ours": best_seconds(lambda: retrieval_ranks(scores_NM, owner_M), arguments.turns),
    }
    text_to_image_M, best_N = published_ranks(scores_NM, owner_M)
    different = int((ours.text_to_image_M != text_to_image_M).sum() + (ours.best_text_N != best_N).sum())
    print(
        f"{arguments.images:,} images, {len(owner_M):,} texts, {arguments.threads} threads: published "
        f"{1000 * seconds['published']:.0f} ms, ours {1000 * seconds['ours']:.1f} ms, ratio "
        f"{seconds['published'] / seconds['ours']:.1f}; ranks that differ (equal float32 scores): {different}"
    )


if __name__ == "__main__":
    main()
