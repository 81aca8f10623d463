"""The public API: its names and signatures are frozen, it is lazy, and what earlier versions wrote still loads."""

from __future__ import annotations

import doctest
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import itemizedclip as ic
from itemizedclip import api
from itemizedclip.models.factory import CheckpointError
from itemizedclip.runtime.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"
TINY_2D = FIXTURES / "runs/tiny_2d/checkpoints/epoch_6.pt"
TINY_HLIP = FIXTURES / "runs/tiny_hlip/checkpoints/epoch_3.pt"

SIGNATURES = {
    "calibrated": "(loaded, images, *, calibration=None)",
    "create_model_and_transforms": "(name)",
    "evaluate": "(source, name, **settings)",
    "explain": "(loaded, image, items=None, *, normalise_tokens=False)",
    "list_benchmarks": "()",
    "list_models": "()",
    "list_recipes": "()",
    "load": "(source, *, model=None, text_model=None, device='auto')",
    "open_index": "(folder, *, checkpoint=None, device='auto')",
    "score": "(loaded, images, texts, *, scoring='tcsim', normalise_tokens=False)",
    "train": "(options, *, model=None, dataset=None, evaluators=())",
}
"""What users build on: a change here is a change of their programs."""


def test_names_and_signatures_are_frozen():
    assert sorted(ic.__all__) == sorted([*SIGNATURES, "__version__"])
    assert sorted(api.__all__) == sorted(SIGNATURES)
    for name, expected in SIGNATURES.items():
        signature = inspect.signature(getattr(ic, name))
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        shown = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
        assert shown == expected, name
        assert inspect.getdoc(getattr(ic, name)), name
    assert set(ic.__all__) <= set(dir(ic))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        ic.lode  # noqa: B018


def test_importing_loads_nothing_heavy():
    program = (
        "import sys, itemizedclip; print([m for m in ('torch', 'numpy', 'open_clip', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_examples_in_docstrings_hold():
    result = doctest.testmod(api, optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert result.attempted >= 4
    assert result.failed == 0


@pytest.fixture(scope="module")
def tiny():
    return ic.load(TINY_2D, device="cpu")


def test_scores_of_earlier_checkpoints_stay(tiny):
    for checkpoint, file in ((tiny, "scores_2d.json"), (ic.load(TINY_HLIP, device="cpu"), "scores_hlip.json")):
        expected = json.loads((FIXTURES / file).read_text())["scores"]
        texts = list(next(iter(expected.values())))
        for name, of_text in expected.items():
            for key, choice in {
                "tcsim": {},
                "tcsim_normalised": {"normalise_tokens": True},
                "global": {"scoring": "global"},
            }.items():
                scores = ic.score(checkpoint, FIXTURES / name, texts, **choice)
                wanted = torch.tensor([[of_text[text][key] for text in texts]])
                torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=0)


def test_an_index_of_an_earlier_version_is_searched():
    expected = json.loads((FIXTURES / "search.json").read_text())
    index = ic.open_index(FIXTURES / "pictures.index", checkpoint=TINY_2D, device="cpu")
    texts = [query["text"] for query in expected["queries"]]
    for found, query in zip(index.search(texts, k=6, exact=True), expected["queries"]):
        assert [hit.image.path for hit in found.hits] == [hit["path"] for hit in query["hits"]]
        assert [hit.score for hit in found.hits] == pytest.approx([hit["score"] for hit in query["hits"]], abs=1e-5)


def test_an_earlier_run_goes_on(tmp_path):
    """A run folder's checkpoint is found by its folder, and says what its run was."""
    loaded = ic.load(FIXTURES / "runs/tiny_2d", device="cpu")
    assert loaded.source == str(TINY_2D)
    assert loaded.meta["options"]["run"]["recipe"] == "rsicd_debug"
    from itemizedclip.training.checkpoint import load_checkpoint

    assert load_checkpoint(TINY_2D).epoch == 6
    assert load_checkpoint(TINY_HLIP).epoch == 3


def test_images_come_in_every_form(tiny):
    path = FIXTURES / "pictures/0.png"
    picture = Image.open(path).convert("RGB")
    array = np.asarray(picture)
    tensor = tiny.transform(picture)
    one = ic.score(tiny, path, "a red circle")
    assert one.shape == (1, 1)
    for image in (str(path), picture, array, tensor, [path], array[None], tensor[None]):
        assert torch.equal(ic.score(tiny, image, ["a red circle"]), one)
    many = ic.score(tiny, [path, FIXTURES / "pictures/2.png"], ["a red circle", "a lake", "a red circle"])
    assert many.shape == (2, 3)
    assert torch.equal(many[:, 0], many[:, 2])
    assert torch.equal(many[:1, :1], one)
    with pytest.raises(UserError, match="expected uint8"):
        ic.score(tiny, np.zeros((4, 4), dtype=np.float32), "a lake")
    with pytest.raises(UserError, match="expected a path, a picture"):
        ic.score(tiny, [5], "a lake")  # type: ignore[list-item]
    with pytest.raises(UserError, match="no text"):
        ic.score(tiny, path, [])


def test_explanations_are_saved(tiny, tmp_path):
    expected = json.loads((FIXTURES / "explanation_2d.json").read_text())
    texts = ["a red circle", "the triangle lies on the left"]
    explanation = ic.explain(tiny, FIXTURES / "pictures/0.png", texts)
    assert explanation.scores.tolist() == pytest.approx([item["score"] for item in expected["items"]], abs=1e-5)
    written = explanation.save(tmp_path / "out")
    assert sorted(path.name for path in written) == ["attention.png", "explanation.json"]
    assert all(path.is_file() for path in written)
    with pytest.raises(UserError, match="no picture"):
        ic.explain(tiny, tiny.transform(Image.new("RGB", (40, 40))), texts).save(tmp_path / "none")
    with pytest.raises(UserError, match="no text to look for"):
        ic.explain(tiny, FIXTURES / "pictures/0.png")


def test_what_cannot_be_loaded_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"none\.pt: checkpoint does not exist"):
        ic.load(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"a folder without epoch_N\.pt"):
        ic.load(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"hf-hub:nobody/nothing: model\.safetensors cannot be fetched .* bring that"
    ):
        ic.load("hf-hub:nobody/nothing")
    with pytest.raises(UserError, match="did you mean ViT-B-16-ItemizedCLIP"):
        ic.create_model_and_transforms("ViT-B-16-ItemizedCLIPP")
    with pytest.raises(UserError, match="give paths to score"):
        _ = ic.load(TINY_HLIP, device="cpu").transform


def test_a_dataset_of_ones_own_is_trained_and_loaded(tmp_path):
    from itemizedclip.data.batch import ItemSample
    from itemizedclip.training.options import LoadingSettings, OptimizerSettings, RunOptions, RunSettings

    model, _, _ = ic.create_model_and_transforms(json.loads((FIXTURES / "tiny_2d.json").read_text()))
    size = model.config["vision_cfg"]["image_size"]

    class Colours:
        fingerprint = "colours"

        def __len__(self) -> int:
            return 8

        def __getitem__(self, key: tuple[int, int]) -> ItemSample:
            _, index = key
            return ItemSample(f"c{index}", torch.full((3, size, size), index / 8), [f"colour {index}", "plain"])

    options = RunOptions(
        run=RunSettings(logs=tmp_path, name="own", device="cpu"),
        optimizer=OptimizerSettings(epochs=1, warmup=1),
        loading=LoadingSettings(batch_size=4, num_sampled_captions=2, workers=0),
    )
    with pytest.raises(UserError, match="together"):
        ic.train(options, model=model)
    result = ic.train(options, model=model, dataset=Colours())
    assert result.step == 2
    assert ic.load(result.folder).meta["data_fingerprint"] == "colours"
