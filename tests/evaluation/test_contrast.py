"""Contrasts: shares of right texts preferred, against plain scores pair by pair."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from toy import ToyModel, toy_tokenizer

from itemizedclip.data.batch import ItemSample
from itemizedclip.data.scenes import Contrast
from itemizedclip.evaluation.contrast import ContrastEvaluator
from itemizedclip.evaluation.tcsim import score_images_plainly


class Pictures:
    """Five noise images; the last has no contrast."""

    words = (("red", "blue"), ("small", "large"), ("left", "right"), ("top", "bottom"))

    def __len__(self) -> int:
        return 5

    def __getitem__(self, row: int) -> ItemSample:
        image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(row))
        return ItemSample(str(row), image, ["red"])

    def contrasts(self, row: int) -> list[Contrast]:
        if row == 4:
            return []
        same = [Contrast("tie", "round", "round")] if row == 1 else []
        return [Contrast("even" if row % 2 == 0 else "odd", *self.words[(row + k) % 3]) for k in range(row + 1)] + same


@pytest.mark.parametrize("scoring", ["tcsim", "global"])
def test_shares_are_those_of_pairs_scored_one_by_one(scoring):
    torch.manual_seed(0)
    model, pictures = ToyModel().eval(), Pictures()
    evaluator = ContrastEvaluator(pictures, toy_tokenizer, scoring=scoring)
    found = evaluator.run(model)
    hits: dict[str, list[float]] = {}
    with torch.no_grad():
        for row in range(5):
            features = model.encode_image(pictures[row].image[None])
            for contrast in pictures.contrasts(row):
                texts = model.encode_text(toy_tokenizer([contrast.right, contrast.wrong]))
                if scoring == "tcsim":
                    right, wrong = score_images_plainly(model.head, features.tokens_BLD, texts, normalise_tokens=True)[
                        0
                    ]
                else:
                    right, wrong = F.cosine_similarity(features.global_BD, texts)
                tie = contrast.kind == "tie"
                hits.setdefault(contrast.kind, []).append(0.5 if tie else float(right > wrong))
    expected = {kind: sum(values) / len(values) for kind, values in hits.items()}
    assert found == pytest.approx({**expected, "mean": sum(expected.values()) / 3})
    assert evaluator.facts["num_contrasts"] == {"even": 4, "odd": 6, "tie": 1}


def test_nothing_to_choose_between_gives_no_measure():
    class Plain(Pictures):
        def contrasts(self, row: int) -> list[Contrast]:
            return []

    assert ContrastEvaluator(Plain(), toy_tokenizer).run(ToyModel().eval()) == {}
