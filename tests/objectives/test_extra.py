"""Terms beyond the paper: against loops over images and items, off by default, and through a training step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_objectives import OPTIONS, D, heads, rank_inputs
from toy import ToyModel, toy_tokenizer

from itemizedclip.data.batch import ItemBatch, ItemCollator, ItemSample
from itemizedclip.objectives.extra import extra_losses, with_extra
from itemizedclip.objectives.loss import LossInputs, ObjectiveOptions, itemized_losses
from itemizedclip.training.task import ItemizedTask

SCALE, BIAS = torch.tensor(14.0), torch.tensor(-10.0)
BOTH = replace(OPTIONS, coverage_weight=0.4, contradiction_weight=0.3)


def inputs_of(data: dict, seed: int = 9) -> LossInputs:
    g = torch.Generator().manual_seed(seed)
    B, K = data["mask"].shape
    return LossInputs(
        data["image_global"],
        data["image_tokens"],
        data["items"].flatten(0, 1),
        data["mask"],
        data["normal"],
        data["ids"].flatten(),
        contradiction_features_ND=torch.randn(B * K, D, generator=g),
        contradiction_mask_BK=data["mask"] & (torch.rand(B, K, generator=g) < 0.7),
    )


def test_both_terms_are_the_plain_ones():
    head, _ = heads()
    inputs = inputs_of(rank_inputs(3, 4, 3, 10))
    found = extra_losses(head, inputs, SCALE, BIAS, BOTH)
    B, K = inputs.item_mask_BK.shape
    coverage, contradiction = [], torch.zeros(())
    for b in range(B):
        together = torch.zeros(D)
        for k in range(K):
            tokens = inputs.image_tokens_BLD[b : b + 1]
            seen = head(inputs.item_features_ND[b * K + k].view(1, 1, D), tokens)[0, 0]
            if inputs.item_mask_BK[b, k]:
                together = together + F.normalize(seen, dim=0)
            against = inputs.contradiction_features_ND[b * K + k]
            seen = head(against.view(1, 1, D), tokens)[0, 0]
            if inputs.contradiction_mask_BK[b, k]:
                logit = SCALE * F.cosine_similarity(against, seen, dim=0) + BIAS
                contradiction = contradiction - F.logsigmoid(-logit) / B
        coverage.append(1 - F.cosine_similarity(together, inputs.image_global_BD[b], dim=0))
    assert found["coverage"].item() == pytest.approx(torch.stack(coverage).mean().item(), abs=1e-5)
    assert found["contradiction"].item() == pytest.approx(contradiction.item(), rel=1e-4)
    paper = itemized_losses(head, inputs, SCALE, BIAS, OPTIONS, index_BT=rank_inputs(3, 4, 3, 10)["index"])
    total = with_extra(paper, found, BOTH)
    expected = paper["loss"] + 0.4 * found["coverage"] + 0.3 * found["contradiction"]
    assert total["loss"].item() == pytest.approx(expected.item())
    assert with_extra(paper, extra_losses(head, inputs, SCALE, BIAS, OPTIONS), OPTIONS) is paper


def test_coverage_leaves_the_global_feature_alone():
    head, _ = heads()
    inputs = inputs_of(rank_inputs(3, 4, 3, 10))
    moved = replace(
        inputs,
        image_global_BD=inputs.image_global_BD.clone().requires_grad_(),
        image_tokens_BLD=inputs.image_tokens_BLD.clone().requires_grad_(),
    )
    extra_losses(head, moved, SCALE, BIAS, replace(OPTIONS, coverage_weight=1.0))["coverage"].backward()
    assert moved.image_global_BD.grad is None
    assert moved.image_tokens_BLD.grad.abs().sum() > 0


def test_contradictions_reach_the_batch():
    samples = [
        ItemSample("a", torch.zeros(3, 8, 8), ["left small round", "round", "is not round"]),
        ItemSample("b", torch.zeros(3, 8, 8), ["large"]),
    ]
    plain = ItemCollator(toy_tokenizer, 3)(samples)
    assert plain.contradiction_tokens is None
    batch = ItemCollator(toy_tokenizer, 3, contradictions=True)(samples)
    assert torch.equal(batch.item_tokens, plain.item_tokens)
    assert batch.contradiction_mask.tolist() == [[True, True, False], [True, False, False]]
    expected = toy_tokenizer(["right small round", "no round"])
    assert torch.equal(batch.contradiction_tokens[0, :2], expected)
    assert torch.equal(batch.contradiction_tokens[1, 0], toy_tokenizer(["small"])[0])
    joined = ItemBatch.join([batch, batch])
    assert joined.contradiction_tokens.shape[0] == joined.contradiction_mask.shape[0] == 4
    assert [len(part) for part in joined.chunk(3)] == [2, 1, 1]


def test_a_step_learns_from_contradictions():
    """The score of a denial falls in its own image; gradient caching gives the same loss."""
    torch.manual_seed(0)
    texts = [["left red"], ["right blue"], ["small green"]]
    samples = [ItemSample(str(n), torch.randn(3, 8, 8), own) for n, own in enumerate(texts)]
    batch = ItemCollator(toy_tokenizer, 1, contradictions=True)(samples)
    options = ObjectiveOptions(ila_weight=1.0, kta_weight=0.0, mps_weight=0.0, iis_weight=0.0, contradiction_weight=1.0)
    model = ToyModel(dropout=0.0)
    task = ItemizedTask(model, options)
    first = task(batch)
    assert ItemizedTask(model, options, num_chunks=2)(batch)["contradiction"].item() == pytest.approx(
        first["contradiction"].item(), rel=1e-5
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        task(batch)["contradiction"].backward()
        optimizer.step()
    assert task(batch)["contradiction"] < first["contradiction"]
    with pytest.raises(ValueError, match="the batch has no contradictions"):
        task(ItemCollator(toy_tokenizer, 1)(samples))
