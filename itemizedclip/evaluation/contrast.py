"""Right text or wrong text: of two texts about one image that differ in one respect, which one does the model prefer?

Axes: N images, M texts, B images of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from itemizedclip.data.batch import ItemSample, Tokenizer
from itemizedclip.data.scenes import Contrast
from itemizedclip.evaluation.encoding import (
    EncodingOptions,
    encode_images,
    encode_texts,
    evaluation_mode,
    in_order_of_rows,
    model_device,
    number_texts,
)
from itemizedclip.evaluation.tcsim import Scoring, create_scorer
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.runtime.errors import UserError


class ContrastDataset(Protocol):
    """Images with contrasts."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> ItemSample: ...

    def contrasts(self, row: int, /) -> list[Contrast]:
        """Right and wrong texts about one image; may be none."""


@dataclass
class ContrastEvaluator:
    """Share of contrasts whose right text scores higher than its wrong one, by kind; ties count half; chance is 0.5.

    Measures: each kind's share, and `mean`, the plain mean over kinds; none where no image has a contrast.

    Attributes:
        dataset: images and their contrasts.
        tokenizer: texts → int64 (M, C).
        name: prefix for logs.
        scoring: "tcsim" or "global".
        normalise_tokens: see `TcsimScorer`.
        encoding: batch sizes, workers, precision of the towers.
        facts: after `run`: numbers of contrasts by kind.
    """

    dataset: ContrastDataset
    tokenizer: Tokenizer
    name: str = "contrast"
    scoring: Scoring = "tcsim"
    normalise_tokens: bool = True
    encoding: EncodingOptions = field(default_factory=EncodingOptions)
    facts: dict[str, Any] = field(default_factory=dict, init=False)

    @torch.no_grad()
    def run(self, model: DualEncoder) -> dict[str, float]:
        """The measures, the same on every rank; all ranks must call it.

        Raises:
            UserError: scores that are not finite.
        """
        contrasts = [self.dataset.contrasts(row) for row in range(len(self.dataset))]
        kinds = sorted({contrast.kind for own in contrasts for contrast in own})
        if not kinds:
            self.facts = {"num_contrasts": {}, "chance": 0.5}
            return {}
        pairs = [text for own in contrasts for contrast in own for text in (contrast.right, contrast.wrong)]
        device = model_device(model)
        with evaluation_mode(model):
            texts, number_M = number_texts(pairs)
            features_UD = encode_texts(model, self.tokenizer, texts, self.encoding)
            scorer = create_scorer(model.head, features_UD, self.scoring, normalise_tokens=self.normalise_tokens)
            numbers = number_M.view(-1, 2).split([len(own) for own in contrasts])
            rows = [torch.empty(0, dtype=torch.int64)]
            findings = [torch.empty((0, 2 * len(kinds)), dtype=torch.float64)]
            for batch in encode_images(model, self.dataset, self.encoding):
                scores_BM = scorer.score(batch.features)
                for row, scores_M in zip(batch.rows_B.tolist(), scores_BM):
                    chosen = scores_M[numbers[row].to(device)].cpu()
                    findings.append(self._findings(chosen, [kinds.index(c.kind) for c in contrasts[row]], len(kinds)))
                rows.append(batch.rows_B.cpu())
        hits, counts = in_order_of_rows(torch.cat(rows), torch.cat(findings)).sum(0).view(2, -1)
        self.facts = {"num_contrasts": dict(zip(kinds, map(int, counts.tolist()))), "chance": 0.5}
        shares = dict(zip(kinds, (hits / counts).tolist()))
        return {**shares, "mean": sum(shares.values()) / len(shares)}

    def _findings(self, scores_P2: Tensor, kinds: list[int], num_kinds: int) -> Tensor:
        """float64 (1, 2 · kinds): hits and counts of one image's pairs (right, wrong)."""
        if not torch.isfinite(scores_P2).all():
            raise UserError(f"{self.name}: scores are not finite: check the weights and the precision")
        hits_P = 0.5 * (1 + (scores_P2[:, 0] - scores_P2[:, 1]).sign()).double()
        table = torch.zeros(2, num_kinds, dtype=torch.float64)
        for hit, kind in zip(hits_P, kinds):
            table[0, kind] += hit
            table[1, kind] += 1
        return table.view(1, -1)
