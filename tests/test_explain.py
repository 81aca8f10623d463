"""MLL, mAMS, pointing game and mIoU: by hand, and against a loop over images."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_model import SIDE, MaskedTinyDataset, TinyDataset, TinyModel, tokenize

from itemizedclip.evaluation.encoding import EncodingOptions
from itemizedclip.evaluation.explain import (
    ExplainEvaluator,
    mask_ious,
    mean_map_similarity,
    pointing_hits,
    upsample_maps,
)


def test_map_similarity_by_hand():
    maps = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    half = math.sqrt(0.5)
    assert mean_map_similarity(maps) == pytest.approx((0 + half + half) / 3)
    assert mean_map_similarity(torch.ones(2, 5)) == pytest.approx(1.0)
    assert math.isnan(mean_map_similarity(maps[:1]))
    assert mean_map_similarity(torch.zeros(2, 4)) == 0.0  # attention all on the zero token


def test_pointing_by_hand():
    maps = torch.zeros(1, 4, 6)
    maps[0, 1, 4] = 1
    for pixel, tolerance, hit in (((1, 4), 0, True), ((1, 5), 0, False), ((1, 5), 1, True), ((2, 5), 1, False)):
        mask = torch.zeros(1, 4, 6, dtype=torch.bool)
        mask[0, pixel[0], pixel[1]] = True
        assert pointing_hits(maps, mask, tolerance_px=tolerance).tolist() == [hit]
    assert pointing_hits(maps, torch.zeros(1, 4, 6, dtype=torch.bool), tolerance_px=99).tolist() == [False]


def test_iou_by_hand():
    maps = torch.tensor([[[0.4, 0.3], [0.1, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    masks = torch.tensor([[[True, False], [True, False]], [[True, True], [False, False]]])
    # Of the first map, 1 pixel lies above 0.8 of its maximum, 2 above 0.5, 3 above 0.2. The second finds nothing.
    expected = torch.tensor([[1 / 2, 1 / 3, 2 / 3], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(mask_ious(maps, masks, (0.8, 0.5, 0.2)), expected)


def test_upsampling_keeps_rows_and_columns_apart():
    maps = torch.zeros(1, 6)
    maps[0, 4] = 1  # row 1, column 1 of 2 × 3
    enlarged = upsample_maps(maps, (2, 3), (8, 12))
    assert enlarged.shape == (1, 8, 12)
    peak = int(enlarged.flatten().argmax())
    assert (peak // 12, peak % 12) in {(row, column) for row in range(4, 8) for column in range(4, 8)}


@pytest.mark.parametrize("normalise_tokens", [False, True])
def test_evaluator_equals_a_loop(normalise_tokens):
    model, data = TinyModel().eval(), MaskedTinyDataset()
    data.item_masks[0][0] = False  # an item that the crop has removed
    lowest, similarities, nowhere, hits = [], [], [], []
    ious: dict[float, list[float]] = {step / 20: [] for step in range(1, 20)}
    for row in range(len(data)):
        tokens = model.encode_image(data.images[row : row + 1]).tokens_BLD.detach()
        if normalise_tokens:
            tokens = F.normalize(tokens, dim=-1)
        items = model.encode_text(tokenize(data.texts[row]))[None].detach()
        projected = model.head.project(tokens)
        lowest.append(F.cosine_similarity(items, model.head.attend(items, projected), dim=-1).min().item())
        weights = model.head.attention_weights(items, projected)
        maps = weights.tokens[0].mean(0)
        nowhere += weights.nowhere[0].mean(0).tolist()
        pairs = [
            F.cosine_similarity(maps[i], maps[j], dim=0).item() for i in range(len(maps)) for j in range(i)
        ]
        if pairs:
            similarities.append(sum(pairs) / len(pairs))
        for k, mask in enumerate(data.item_masks[row]):
            if not mask.any():
                continue
            enlarged = F.interpolate(maps[k].reshape(1, 1, 4, 4), size=(SIDE, SIDE), mode="bilinear")[0, 0]
            hits.append(bool(mask.flatten()[enlarged.flatten().argmax()]))
            for threshold in ious:
                found = enlarged > threshold * enlarged.max()
                ious[threshold].append(float((found & mask).sum() / (found | mask).sum()))
    miou = {threshold: sum(values) / len(values) for threshold, values in ious.items()}
    best = max(miou, key=miou.__getitem__)
    evaluator = ExplainEvaluator(
        data, tokenize, normalise_tokens=normalise_tokens, encoding=EncodingOptions(batch_size=3)
    )
    found = evaluator.run(model)
    assert found == pytest.approx(
        {
            "mll": sum(lowest) / len(lowest),
            "mams": sum(similarities) / len(similarities),
            "nowhere_share": sum(nowhere) / len(nowhere),
            "pointing_game": sum(hits) / len(hits),
            "miou": miou[0.5],
            "miou_best": miou[best],
            "miou_best_threshold": best,
        },
        abs=1e-5,
    )
    assert evaluator.facts["num_masks"] == len(hits) == evaluator.facts["num_items"] - 1


def test_without_masks_and_with_one_item():
    data = TinyDataset()
    assert set(ExplainEvaluator(data, tokenize).run(TinyModel())) == {"mll", "mams", "nowhere_share"}
    data.texts = [own[:1] for own in data.texts]
    assert set(ExplainEvaluator(data, tokenize).run(TinyModel())) == {"mll", "nowhere_share"}


def test_perfect_attention_points_and_covers():
    """Attention planted on one patch, its mask the same patch."""
    maps = torch.zeros(1, 16)
    maps[0, 6] = 1
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[0, 2:4, 4:6] = True
    enlarged = upsample_maps(maps, (4, 4), (SIDE, SIDE))
    assert pointing_hits(enlarged, mask).all()
    assert mask_ious(enlarged, mask, (0.5,)).item() == 1.0


@pytest.mark.parametrize("masks", [torch.ones(9, 8, 8, dtype=torch.bool), torch.ones(8, 8), torch.ones(1, 8, 8)])
def test_masks_that_do_not_fit(masks):
    class Wrong(TinyDataset):
        def masks(self, index):
            return masks

    with pytest.raises(ValueError, match="masks of image 0 are"):
        ExplainEvaluator(Wrong(), tokenize).run(TinyModel())
