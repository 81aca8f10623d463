"""The battery: texts, erased regions, and its measures on a model that sees colours and one that sees nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_model import SIDE, TinyDataset, TinyModel, tokenize

from itemizedclip.commands.evaluate import main as evaluate
from itemizedclip.data.batch import ItemSample
from itemizedclip.data.opposites import LEFT_RIGHT, contradiction, negated, swapped
from itemizedclip.evaluation.robustness import (
    CURVE_STEPS,
    RobustnessEvaluator,
    erase,
)
from itemizedclip.evaluation.tcsim import create_scorer
from itemizedclip.models.factory import create_model


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("a pleural effusion", "no pleural effusion"),
        ("The heart is large", "no heart is large"),
        ("no pleural effusion", "pleural effusion"),
        ("Without oedema", "oedema"),
        ("the lungs are not clear", None),
        ("negative for stroke", None),
    ],
)
def test_denials(item, expected):
    assert negated(item) == expected


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("left lower lobe", "right lower lobe"),
        ("a large mass left of a small one", "a large mass right of a small one"),
        ("a small mass", "a large mass"),
        ("cleft palate", None),
    ],
)
def test_opposites(item, expected):
    assert swapped(item) == expected
    assert swapped("a small mass", LEFT_RIGHT) is None
    assert contradiction("a small mass") == "a large mass"
    assert contradiction("a mass") == "no mass"


def test_erased_patches_hold_the_mean():
    image = torch.randn(3, 8, 12)
    found = erase(image, np.array([0, 5]), (2, 3))
    gone = torch.zeros(8, 12, dtype=torch.bool)
    gone[:4, :4] = gone[4:, 8:] = True
    assert (found[:, ~gone] == image[:, ~gone]).all()
    assert torch.allclose(found[:, gone], image.mean((1, 2))[:, None].expand(-1, int(gone.sum())))
    study = torch.randn(2, 1, 4, 4, 4)
    found = erase(study, np.array([8]), (2, 2, 2, 2))
    assert (found[0] == study[0]).all()
    assert (found[1, :, 2:] == study[1, :, 2:]).all()
    assert torch.allclose(found[1, 0, :2, :2, :2], study[1].mean())
    assert (erase(image, np.arange(6), (2, 3)).std((1, 2)) < 1e-6).all()


class Words(TinyDataset):
    """Items in the tiny model's words; the wordings and denials of the battery have unknown ones."""


def words(texts):
    known = [" ".join(word for word in text.lower().replace(".", "").split() if word in KNOWN) for text in texts]
    return tokenize([text or "the" for text in known])


KNOWN = {"red", "green", "blue", "small", "large", "one", "two", "three", "left", "right", "the", "a"}


def test_the_battery_is_the_plain_one():
    dataset, model = Words(), TinyModel()
    dataset.texts[0][0] = "left red one"
    evaluator = RobustnessEvaluator(dataset, words)
    found = evaluator.run(model)
    model.eval()
    # "no red one" is "red one" to this tokenizer, as are the wordings: every preference stays, every denial is a tie.
    assert found["negation"] == 0.5
    assert found["wording/upper_case"] == found["wording/there_is"] == found["own"]
    assert found["order_change"] == pytest.approx(0, abs=1e-6)
    assert "series_missing" not in found
    assert evaluator.facts["images_of_measure"]["opposite"] == evaluator.facts["images_of_measure"]["mirrored"] == 1
    # Deletion of image 0 once more: scores with the first n patches of the map erased.
    text = model.encode_text(words([dataset.texts[0][0]]))
    scorer = create_scorer(model.head, text, "tcsim", normalise_tokens=True)

    def score(image):
        return float(scorer.score(model.encode_image(image[None])))

    tokens = torch.nn.functional.normalize(model.encode_image(dataset.images[0][None]).tokens_BLD, dim=-1)
    weights = model.head.attention_weights(text[None], model.head.project(tokens)).tokens[0].mean(0)[0]
    order = weights.argsort(descending=True).tolist()
    means = []
    for step in range(CURVE_STEPS + 1):
        image = dataset.images[0].clone()
        for patch in order[: round(step * 16 / CURVE_STEPS)]:
            y, x = divmod(patch, 4)
            image[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = dataset.images[0].mean((1, 2))[:, None, None]
        means.append(score(image))
    one = TinyDataset(count=7)
    one.texts = dataset.texts
    columns = evaluator.resampling.measure(np.eye(7))
    assert columns["deletion"][0] == pytest.approx(np.mean(means), abs=1e-5)
    top = [score(erase(dataset.images[0], np.array(order[:2]), (4, 4)))]
    assert columns["erased_attended"][0] == pytest.approx(score(dataset.images[0]) - top[0], abs=1e-5)
    swap = model.encode_text(words(["right red one"]))
    mirrored = model.encode_image(dataset.images[0][None].flip(-1))
    preferred = [
        float(create_scorer(model.head, features, "tcsim", normalise_tokens=True).score(mirrored))
        for features in (swap, text)
    ]
    assert found["mirrored"] == float(preferred[0] > preferred[1])


def test_series_that_are_missing():
    class Studies(Words):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return ItemSample(sample.sample_id, sample.image[:, None, None].repeat(2, 1, 1, 1, 1)[:2], sample.items)

    class Flat(TinyModel):
        """Reads the first series of a study as a photograph, unless it is left out."""

        def encode_image(self, images, *, series_names=None):
            plane = images[:, 0].reshape(len(images), 1, SIDE, -1)[..., :SIDE].expand(-1, 3, -1, -1)
            features = super().encode_image(plane)
            return type(features)(features.global_BD, features.tokens_BLD, (1, 1, 4, 4))

    class Tokens(Flat):
        def encode_image(self, images, *, series_names=None):
            first = super().encode_image(images)
            tokens = first.tokens_BLD.repeat(1, images.shape[1], 1)
            return type(first)(first.global_BD, tokens, (images.shape[1], 1, 4, 4))

    dataset = Studies()
    dataset.images = dataset.images[:, :1]
    found = RobustnessEvaluator(dataset, words).run(Tokens())
    # Both series are alike: what is left says nearly the same (the zero token weighs more among fewer tokens).
    assert found["series_missing"] < 0.3
    assert 0 <= found["series_missing_own"] <= 1


def test_one_command(tmp_path, capsys):
    torch.manual_seed(0)
    model = create_model("ViT-scenes-ItemizedCLIP")
    torch.save({"state_dict": model.state_dict(), "model_config": model.config}, tmp_path / "epoch_1.pt")
    metrics = evaluate(["robustness", "--data", "scenes", "--checkpoint", str(tmp_path / "epoch_1.pt"), "--num", "4",
                        "--device", "cpu", "--bootstrap", "20"])  # fmt: skip
    report = json.loads((tmp_path / "epoch_1.robustness.scenes.json").read_text())
    assert report["metrics"] == metrics
    assert report["facts"]["num_images"] == 4
    assert "attended_matters" in report["facts"]["intervals"]["of"]
    assert "item rather than its denial" in " ".join(capsys.readouterr().out.split())
