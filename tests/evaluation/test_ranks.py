"""Ranks and retrieval measures: golden vector, hand-worked tables with ties, a literal double loop."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from itemizedclip.evaluation import ranks as ranks_module
from itemizedclip.evaluation.ranks import RivalCounts, retrieval_metrics, retrieval_ranks, validation_metrics

GOLDEN = Path(__file__).parents[1] / "golden" / "retrieval.safetensors"


def beaten_by(true, rivals):
    return sum(float(score > true) + 0.5 * float(score == true) for score in rivals)


def slow_ranks(scores, owner):
    """The definitions of the module docstring, one pair at a time."""
    N, M = scores.shape
    text_to_image = []
    for m in range(M):
        true = scores[owner[m], m]
        text_to_image.append(1 + beaten_by(true, [scores[n, m] for n in range(N) if n != owner[m]]))
    best, mean, worst = [], [], []
    for n in range(N):
        own = [m for m in range(M) if owner[m] == n]
        if not own:
            continue
        beaten = [beaten_by(scores[n, m], [scores[n, r] for r in range(M) if r not in own]) for m in own]
        best.append(1 + min(beaten))
        worst.append(len(own) + max(beaten))
        # Mid-ranks of the own texts among all texts, averaged.
        mids = [1 + beaten_by(scores[n, m], [scores[n, r] for r in range(M) if r != m]) for m in own]
        mean.append(sum(mids) / len(own))
    return text_to_image, best, mean, worst


def test_golden_table():
    with safe_open(GOLDEN, "pt") as file:
        scores, owner = file.get_tensor("in.scores"), file.get_tensor("in.owner")
        expected = json.loads(file.metadata()["expected"])
    ours = retrieval_metrics(scores, owner)
    assert set(ours) == set(expected)
    assert ours == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("distinct", [3, 10_000])
def test_equals_the_literal_definition(distinct):
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(distinct, (9, 31), generator=generator).float()
    owner = torch.randint(8, (31,), generator=generator)  # image 8 has no text
    ours = retrieval_ranks(scores, owner)
    text_to_image, best, mean, worst = slow_ranks(scores, owner)
    assert ours.text_to_image_M.tolist() == text_to_image
    assert ours.best_text_N.tolist() == best
    assert ours.worst_text_N.tolist() == worst
    assert ours.mean_text_N.tolist() == pytest.approx(mean)


def test_hand_worked_table():
    # Image 0 owns texts 0 and 1, image 1 owns text 2.
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.0, 0.4]])
    ours = retrieval_ranks(scores, torch.tensor([0, 0, 1]))
    assert ours.text_to_image_M.tolist() == [1.5, 1.0, 2.0]  # text 0: both images score 0.9
    assert ours.best_text_N.tolist() == [1.0, 2.0]
    assert ours.worst_text_N.tolist() == [3.0, 2.0]
    assert ours.mean_text_N.tolist() == [2.0, 2.0]
    table = validation_metrics(scores, torch.tensor([0, 0, 1]))
    assert table["text_to_image_R@1"] == pytest.approx(1 / 3)
    assert table["image_to_text_R@1"] == 0.5
    assert table["complete@10"] == 1.0
    assert table["mean_item_rank"] == 2.0
    assert table["worst_item_rank"] == 2.5


def test_collapsed_model_is_not_perfect():
    owner = torch.arange(200).repeat_interleave(2)
    table = retrieval_metrics(torch.zeros(200, 400), owner)
    assert table["text_to_image_R@100"] == 0.0
    assert table["text_to_image_mean_rank"] == 100.5  # the middle of 200 images
    assert table["image_to_text_R@100"] == 0.0
    assert table["image_to_text_mean_rank"] == 1 + 398 / 2


def test_perfect_model():
    owner = torch.arange(6).repeat_interleave(3)
    scores = (torch.arange(6)[:, None] == owner).float()
    table = validation_metrics(scores, owner)
    assert table["text_to_image_R@1"] == table["image_to_text_R@1"] == table["complete@10"] == 1.0
    assert table["mean_item_rank"] == 2.0  # three own texts hold the places 1, 2, 3
    assert table["worst_item_rank"] == 3.0


def test_blocks_and_order_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(5)
    scores = torch.randint(6, (12, 40), generator=generator).float()
    owner = torch.randint(12, (40,), generator=generator)
    whole = retrieval_metrics(scores, owner)
    monkeypatch.setattr(ranks_module, "BLOCK_BYTES", 1)
    counts = RivalCounts(owner)
    blocks = torch.randperm(12, generator=generator).split(5)
    for rows in blocks:
        counts.add_rows(rows, scores[rows])
    for rows in reversed(blocks):
        counts.add_columns(rows, scores[rows])
    assert ranks_module.retrieval_table(counts.ranks()) == whole


def test_bad_input_is_refused():
    owner = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="NaN"):
        retrieval_metrics(torch.tensor([[0.1, float("nan")], [0.0, 0.2]]), owner)
    with pytest.raises(ValueError, match=r"owner must be 0 … 1"):
        retrieval_metrics(torch.zeros(2, 2), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="images, texts"):
        retrieval_metrics(torch.zeros(2, 3), owner)
    with pytest.raises(ValueError, match="owner must name"):
        retrieval_metrics(torch.zeros(2, 0), torch.zeros(0, dtype=torch.long))
