"""Retrieval between images and their items: every item of every image in one pool.

Axes: N images, M texts (items of all images), U different texts, B images of a batch, D joint width, W ranks.

Text features travel between ranks, image tokens never do: each rank scores its own images with all texts, and ranks
exchange M true scores and 2·M counts. Texts that read the same are encoded and scored once, so they tie exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from itemizedclip.data.batch import Tokenizer
from itemizedclip.evaluation.encoding import (
    EncodingOptions,
    encode_images,
    encode_texts,
    evaluation_mode,
    model_device,
    number_texts,
    read_items,
)
from itemizedclip.evaluation.evaluator import ItemDataset, facts_of_unusable, joined_unusable, sample_id_of
from itemizedclip.evaluation.intervals import Resampling
from itemizedclip.evaluation.ranks import RetrievalRanks, RivalCounts, rank_resampling, validation_table
from itemizedclip.evaluation.tcsim import Scoring, TextScorer, create_scorer
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.runtime import collectives
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.logs import OnProgress

KEPT_SCORE_BYTES = 2**30
"""A rank keeps its images' scores for the second pass up to this many bytes; beyond, it computes them again."""


@dataclass
class RetrievalEvaluator:
    """Text-to-image and image-to-text retrieval over a whole data set.

    Attributes:
        dataset: images with atomic items.
        tokenizer: texts → int64 (M, C).
        table: which measures: `ranks.validation_table` (training) or `ranks.retrieval_table` (COCO, Flickr30k).
        name: prefix for logs.
        scoring: "tcsim", or "global" for the cosine of global features.
        normalise_tokens: see `TcsimScorer`; published retrieval does not.
        equal_texts_are_rivals: whether a text that reads like one of the image's own, but belongs to another image,
            is a wrong answer (as published). False leaves such pairs out of the ranking; right where items repeat by
            design, as in the itemized scenes.
        encoding: batch sizes, workers, precision of the towers, what to do about images that cannot be used: left out,
            their texts are no one's answer.
        score_dtype: precision of scoring.
        unit: what the images are called in messages.
        patients: whose each image of the data set is; None: each stands for itself. Intervals are taken by patient.
        on_progress: called after each batch.
        resampling: after `run`: how shares and mean ranks follow from the images asked for, in the same gallery.
        facts: after `run`: numbers of images and texts, scoring, fingerprint of the texts.
        unusable: after `run`: row → why an image was left out.
    """

    dataset: ItemDataset
    tokenizer: Tokenizer
    table: Callable[[RetrievalRanks], dict[str, float]] = validation_table
    name: str = "retrieval"
    scoring: Scoring = "tcsim"
    normalise_tokens: bool = False
    equal_texts_are_rivals: bool = True
    encoding: EncodingOptions = field(default_factory=EncodingOptions)
    score_dtype: torch.dtype = torch.float32
    unit: str = "images"
    patients: Sequence[str] | None = None
    on_progress: OnProgress | None = None
    resampling: Resampling | None = field(default=None, init=False)
    facts: dict[str, Any] = field(default_factory=dict, init=False)
    unusable: dict[int, str] = field(default_factory=dict, init=False)

    def run(self, model: DualEncoder) -> dict[str, float]:
        """The measures of `table`, the same on every rank; all ranks must call it.

        Raises:
            BadSampleError: an image without an item, or images of one batch that differ in shape.
            ValueError: an empty data set, or scores that are not finite.
        """
        if not len(self.dataset):
            raise UserError(f"{self.name}: the data set is empty")
        with evaluation_mode(model):
            return self.table(self.ranks(model))

    @torch.no_grad()
    def ranks(self, model: DualEncoder) -> RetrievalRanks:
        """Ranks of all true pairs, on every rank."""
        device = model_device(model)
        unusable: dict[int, str] = {}
        items = read_items(self.dataset, self.encoding, unusable)
        self.unusable = joined_unusable(self, unusable, len(self.dataset))
        texts, number_M = number_texts([text for own in items.values() for text in own])
        owner_M = torch.tensor([row for row, own in items.items() for _ in own], device=device)
        scorer = create_scorer(
            model.head,
            encode_texts(model, self.tokenizer, texts, self.encoding),
            self.scoring,
            normalise_tokens=self.normalise_tokens,
            dtype=self.score_dtype,
        )
        ranks = self._count(model, scorer, list(items), unusable, number_M.to(device), owner_M)
        rows = [row for row in items if row not in self.unusable]
        used = [items[row] for row in rows]
        names = self.patients or [sample_id_of(self.dataset, row) for row in range(len(self.dataset))]
        self.resampling = rank_resampling(ranks, [len(own) for own in used], [names[row] for row in rows])
        self.facts = {
            "num_images": len(used),
            "num_texts": sum(map(len, used)),
            "num_different_texts": len({text for own in used for text in own}),
            "scoring": self.scoring,
            "normalise_tokens": self.scoring == "tcsim" and self.normalise_tokens,
            "equal_texts_are_rivals": self.equal_texts_are_rivals,
            "texts_sha256": hashlib.sha256(json.dumps(used).encode()).hexdigest(),
            **facts_of_unusable(self.dataset, self.unusable),
        }
        return ranks

    def _count(
        self,
        model: DualEncoder,
        scorer: TextScorer,
        rows: Sequence[int],
        unusable: dict[int, str],
        number_M: Tensor,
        owner_M: Tensor,
    ) -> RetrievalRanks:
        """Ranks of the pairs of images `rows` and texts; `unusable` are those of this rank's share, and gets more."""
        kept: list[tuple[Tensor, Tensor]] = []
        kept_bytes = 0

        def first_pass() -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal kept_bytes
            for rows_B, scores_BU in self._scores(model, scorer, rows, unusable, self.on_progress):
                yield rows_B, scores_BU
                kept_bytes += scores_BU.numel() * scores_BU.element_size()
                if kept_bytes <= KEPT_SCORE_BYTES:
                    kept.append((rows_B, scores_BU))
                else:
                    kept.clear()

        def again() -> Iterable[tuple[Tensor, Tensor]]:
            return kept if kept_bytes <= KEPT_SCORE_BYTES else self._scores(model, scorer, rows, unusable, None)

        def count(blocks: Iterable[tuple[Tensor, Tensor]], add: Callable[..., None]) -> None:
            for rows_B, scores_BU in blocks:
                no_rivals_BM = self._no_rivals(rows_B, number_M, owner_M)
                add(rows_B, scores_BU[:, number_M], no_rivals_BM=no_rivals_BM)

        counts = RivalCounts(owner_M)
        count(first_pass(), counts.add_rows)
        failed = joined_unusable(self, unusable, len(self.dataset))
        if len(failed) > len(self.unusable):
            # Only now it is known which texts are without their image: the ranks are counted without them.
            self.unusable = failed
            used_M = ~torch.isin(owner_M, torch.tensor(list(failed), device=owner_M.device))
            number_M, owner_M = number_M[used_M], owner_M[used_M]
            counts = RivalCounts(owner_M)
            count(again(), counts.add_rows)
        # Each text's true score is known to one rank and 0 on the others.
        counts.true_scores_M = collectives.all_reduce_sum(counts.true_scores_M)
        count(again(), counts.add_columns)
        counts.rival_texts_M = collectives.all_reduce_sum(counts.rival_texts_M)
        counts.rival_images_M = collectives.all_reduce_sum(counts.rival_images_M)
        return counts.ranks()

    def _no_rivals(self, rows_B: Tensor, number_M: Tensor, owner_M: Tensor) -> Tensor | None:
        """bool (B, M): texts that read like one of the image's own, where these do not count as wrong."""
        if self.equal_texts_are_rivals:
            return None
        own_BM = owner_M == rows_B[:, None]
        own_BU = torch.zeros((len(rows_B), int(number_M.max()) + 1), dtype=torch.int32, device=rows_B.device)
        own_BU.index_add_(1, number_M, own_BM.int())
        return own_BU[:, number_M] > 0

    def _scores(
        self,
        model: DualEncoder,
        scorer: TextScorer,
        rows: Sequence[int],
        unusable: dict[int, str],
        on_progress: OnProgress | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's images, batch by batch: rows (B,) and scores (B, U)."""
        for batch in encode_images(
            model, self.dataset, self.encoding, rows=rows, unusable=unusable, on_progress=on_progress
        ):
            yield batch.rows_B, scorer.score(batch.features)
