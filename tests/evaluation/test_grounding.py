"""Grounding measures and the way between tokens and pixels, against plain implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_model import TinyDataset, TinyModel, tokenize

from itemizedclip.evaluation.explanation import THRESHOLDS
from itemizedclip.evaluation.grounding import GroundingEvaluator, Truth, dice_by_threshold, instance_counts
from itemizedclip.evaluation.intervals import bootstrap_intervals
from itemizedclip.evaluation.lattice import Lattice, bounding_box, box_iou
from itemizedclip.runtime.errors import UserError
from itemizedclip.viewer.geometry import Geometry, map_to_input

RNG = np.random.default_rng(0)


def lattice_of(geometry: Geometry, grid: tuple[int, ...]) -> Lattice:
    return Lattice(geometry.input_size, geometry.view_size, geometry.scale, geometry.offset, grid)


@pytest.mark.parametrize(
    ("geometry", "grid"),
    [
        (Geometry.of_input((33, 47)).resize((28, 40)).crop((0, 6), (28, 28)), (7, 7)),
        (Geometry.of_input((20, 30)).crop((-4, 3), (28, 24)), (7, 3)),
        (Geometry.of_input((10, 21, 18)).resize((12, 24, 24)).crop((-2, 4, 4), (16, 16, 16)), (4, 4, 2)),
        (Geometry.of_input((9, 9)), (1, 1)),
    ],
)
def test_maps_go_the_way_of_the_viewer(geometry, grid):
    values = RNG.random(grid).astype(np.float32)
    expected = np.nan_to_num(map_to_input(values, geometry, "smooth"))
    assert lattice_of(geometry, grid).enlarge(values) == pytest.approx(expected, abs=1e-5)


def test_a_mask_goes_down_to_shares_of_patches():
    geometry = Geometry.of_input((20, 30)).resize((40, 60)).crop((-8, 10), (48, 40))
    lattice, mask = lattice_of(geometry, (6, 5)), RNG.random((20, 30)) < 0.4
    plain, counts = np.zeros((6, 5)), np.zeros((6, 5))
    for y in range(20):
        for x in range(30):
            at = [(place + 0.5) * 2 - offset for place, offset in zip((y, x), (-8, 10))]
            if 0 <= at[0] < 48 and 0 <= at[1] < 40:
                cell = int(at[0] // 8), int(at[1] // 8)
                plain[cell] += mask[y, x]
                counts[cell] += 1
    assert lattice.reduce(mask) == pytest.approx(plain / np.maximum(counts, 1))


def test_dice_by_hand():
    values = np.array([[0.0, 0.1, 0.2], [0.5, 0.8, 1.0]], dtype=np.float32)
    mask = np.array([[0, 0, 1], [0, 2, 2]])
    dice, iou = dice_by_threshold(values, mask)
    for at, threshold in enumerate(THRESHOLDS):
        found = values > np.float64(threshold)
        both = (found & (mask > 0)).sum()
        assert dice[at] == pytest.approx(2 * both / (found.sum() + 3))
        assert iou[at] == pytest.approx(both / (found | (mask > 0)).sum())


def test_instances_by_hand():
    mask = np.zeros((10, 10), dtype=np.uint8)
    mask[0:3, 0:3] = 1  # found wholly
    mask[0:3, 3:6] = 2  # touches the first; missed: the prediction has Dice 2·1 / (9 + 10) with it
    mask[8, 8] = 3  # missed
    predicted = np.zeros((10, 10), dtype=bool)
    predicted[0:3, 0:3] = True
    predicted[0, 3] = True
    predicted[6, 0:4] = True  # wrong
    assert instance_counts(predicted, mask) == (1, 1, 2)
    # Without numbers touching instances are one component.
    assert instance_counts(predicted, (mask > 0) * 1) == (1, 1, 1)
    assert instance_counts(np.zeros((10, 10), dtype=bool), mask) == (0, 0, 3)
    # Two predictions on one instance: the better one is right, the other wrong.
    one = np.zeros((4, 9), dtype=np.uint8)
    one[:, :] = 1
    halves = np.ones((4, 9), dtype=bool)
    halves[:, 3] = False
    assert instance_counts(halves, one) == (1, 1, 0)


def test_boxes_by_hand():
    mask = np.zeros((6, 8), dtype=bool)
    assert bounding_box(mask) is None
    mask[2, 3] = mask[4, 6] = True
    assert bounding_box(mask) == (2, 3, 5, 7)
    assert box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0


class Grounded(TinyDataset):
    """Images of 8 × 8 whose view is themselves; every mask is a box, some are empty."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes = []
        for own in self.texts:
            corners = RNG.integers(0, 5, (len(own), 2))
            self.boxes.append([((int(y), int(x), int(y) + 3, int(x) + 2),) for y, x in corners])

    def mask(self, row, k):
        mask = np.zeros((8, 8), dtype=bool)
        if (row + k) % 4:
            top, left, bottom, right = self.boxes[row][k][0]
            mask[top:bottom, left:right] = True
        return mask

    def truth(self, row, grid):
        masks = [self.mask(row, k) for k in range(len(self.texts[row]))]
        return Truth(lattice_of(Geometry.of_input((8, 8)), grid), masks, self.boxes[row])


def test_the_evaluator_is_the_plain_one():
    dataset, model = Grounded(), TinyModel()
    seen = {}
    evaluator = GroundingEvaluator(dataset, tokenize, threshold=0.6, predict=lambda row, own: seen.update({row: own}))
    found = evaluator.run(model)
    model.eval()
    sums: dict[str, list[float]] = {}
    counts = np.zeros(3)
    for row, texts in enumerate(dataset.texts):
        with torch.no_grad():
            features = model.encode_image(dataset.images[row][None])
            items = model.encode_text(tokenize(texts))[None]
            weights = model.head.attention_weights(items, model.head.project(features.tokens_BLD)).tokens[0].mean(0)
        for k in range(len(texts)):
            values = map_to_input(weights[k].reshape(4, 4), Geometry.of_input((8, 8)), "smooth")
            predicted = values > 0.6 * values.max()
            assert (seen[row][k] == predicted).all()
            mask = dataset.mask(row, k)
            if not mask.any():
                continue
            both, size = (predicted & mask).sum(), predicted.sum() + mask.sum()
            peak = np.unravel_index(values.argmax(), values.shape)
            for name, value in (
                ("dice", 2 * both / size), ("hit_rate", 2 * both / size >= 0.1), ("miou", both / (size - both)),
                ("pointing_game", mask[peak]), ("chance_pointing", mask.mean()),
                ("chance_dice", 2 * mask.sum() / (64 + mask.sum())),
            ):  # fmt: skip
                sums.setdefault(name, []).append(float(value))
            counts += instance_counts(predicted, mask)
    for name, values in sums.items():
        assert found[name] == pytest.approx(np.mean(values)), name
    assert found["instance_precision"] == pytest.approx(counts[0] / (counts[0] + counts[1]))
    assert found["instance_recall"] == pytest.approx(counts[0] / (counts[0] + counts[2]))
    assert evaluator.facts["num_masks"] == len(sums["dice"])
    assert found["dice"] <= found["dice_best"] <= found["ceiling_dice"]
    assert found["dice_best"] == pytest.approx(max(evaluator.facts["dice_by_threshold"].values()))
    assert 0 <= found["box_accuracy"] <= 1
    intervals = bootstrap_intervals(evaluator.resampling, 200)
    for name in ("dice", "pointing_game", "instance_f1", "mll", "mams"):
        low, high = intervals[name]
        assert low <= found[name] <= high


def test_a_perfect_map_reaches_the_ceiling_and_a_perfect_box():
    class Perfect(GroundingEvaluator):
        def findings_of(self, row, maps):
            truth = self.dataset.truth(row, maps.grid)
            for k in range(len(maps)):
                maps.head_weights[k] = torch.from_numpy(truth.lattice.reduce(truth.masks[k]))
            return super().findings_of(row, maps)

    class Whole(Grounded):
        def mask(self, row, k):
            mask = np.zeros((8, 8), dtype=bool)
            mask[2:6, 4:8] = True  # whole patches
            return mask

        def truth(self, row, grid):
            truth = super().truth(row, grid)
            return Truth(truth.lattice, truth.masks, [((2, 4, 6, 8),)] * len(truth.masks))

    found = Perfect(Whole(), tokenize, threshold=0.5).run(TinyModel())
    assert found["dice_best"] == pytest.approx(found["ceiling_dice"])
    assert found["ceiling_dice"] > 0.9
    assert found["pointing_game"] == found["box_accuracy"] == found["instance_recall"] == found["hit_rate"] == 1


def test_wrong_thresholds_and_masks_are_said():
    with pytest.raises(UserError, match=r"threshold is 0\.52; expected one of 0\.05"):
        GroundingEvaluator(Grounded(), tokenize, threshold=0.52)

    class Fewer(Grounded):
        def truth(self, row, grid):
            truth = super().truth(row, grid)
            return Truth(truth.lattice, truth.masks[:0] + truth.masks[:1])

    with pytest.raises(UserError, match=r"1 masks for \d items of image"):
        GroundingEvaluator(Fewer(), tokenize).run(TinyModel())
