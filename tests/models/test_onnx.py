"""Exported graphs: the numbers of PyTorch at every number of images, series, texts and tokens, and without PyTorch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fails
from PIL import Image

import itemizedclip as ic
from itemizedclip.commands import export
from itemizedclip.data.batch import trim_padding
from itemizedclip.evaluation.tcsim import TcsimScorer
from itemizedclip.models.factory import LoadedModel, create_model, create_tokenizer, load_pretrained
from itemizedclip.models.onnx import export_onnx
from itemizedclip.models.tokenizers import ClipTokenizer

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

RUNS = Path(__file__).parents[1] / "fixtures" / "runs"
TEXTS = ["a small red seven", "a large cyan two", "a seven", "nothing of that kind at all in here", "two"]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folders of the two small trained models."""
    folders = {}
    for name, checkpoint in (("2d", "tiny_2d/checkpoints/epoch_6.pt"), ("hlip", "tiny_hlip/checkpoints/epoch_3.pt")):
        if name == "hlip":
            pytest.importorskip("timm")
        folders[name] = tmp_path_factory.mktemp(name)
        export.main([str(RUNS / checkpoint), "--to", str(folders[name])])
    return folders


def graphs(folder):
    return {name: onnxruntime.InferenceSession(str(folder / f"{name}.onnx")).run for name in ("image", "text", "head")}


@torch.no_grad()
def test_photographs_at_any_number_of_images_and_texts(exported):
    loaded = load_pretrained(RUNS / "tiny_2d/checkpoints/epoch_6.pt")
    run = graphs(exported["2d"])
    size = loaded.config["vision_cfg"]["image_size"]
    generator = torch.Generator().manual_seed(3)
    for B, M in ((1, 1), (3, 5), (4, 2)):
        images = torch.randn(B, 3, size, size, generator=generator)
        text = trim_padding(loaded.tokenizer(TEXTS[:M]))
        overall, tokens = run["image"](None, {"images": images.numpy()})
        (items,) = run["text"](None, {"text": text.numpy()})
        scores, attention, nowhere = run["head"](None, {"items": items, "tokens": tokens})
        features, text_MD = loaded.model.encode_image(images), loaded.model.encode_text(text)
        expected = TcsimScorer(loaded.model.head, text_MD, normalise_tokens=False).score(features)
        np.testing.assert_allclose(scores, expected, atol=TOLERANCE)
        np.testing.assert_allclose(overall, features.global_BD, atol=TOLERANCE)
        assert attention.shape == (B, M, features.tokens_BLD.shape[1])
        np.testing.assert_allclose(attention.sum(-1) + nowhere, 1, atol=1e-5)


@torch.no_grad()
def test_studies_at_any_number_of_series(exported):
    from itemizedclip_radiology.models.series_names import encode_series_names

    loaded = load_pretrained(RUNS / "tiny_hlip/checkpoints/epoch_3.pt")
    run = graphs(exported["hlip"])
    generator = torch.Generator().manual_seed(4)
    names = ["AX_FLAIR", "AX_T2", "SAG T1-MPRAGE (c)", "AX_FLAIR"]
    for S in (1, 2, 4):
        images = torch.randn(1, S, 1, *loaded.config["vision_cfg"]["volume_size"], generator=generator)
        inputs, codes = {"images": images.numpy()}, None
        if loaded.config["vision_cfg"].get("series_names"):
            codes = encode_series_names(names[:S])[None]
            inputs["series_names"] = codes.numpy()
        features = loaded.model.encode_image(images, series_names=codes)
        text = loaded.tokenizer(TEXTS[:3])
        _, tokens = run["image"](None, inputs)
        (items,) = run["text"](None, {"text": text.numpy()})
        scores = run["head"](None, {"items": items, "tokens": tokens})[0]
        text_MD = loaded.model.encode_text(text)
        expected = TcsimScorer(loaded.model.head, text_MD, normalise_tokens=False).score(features)
        np.testing.assert_allclose(scores, expected, atol=TOLERANCE)
        np.testing.assert_allclose(tokens, features.tokens_BLD, atol=TOLERANCE)


@torch.no_grad()
def test_series_names_and_study_attention(tmp_path):
    """A brain model, which attends over the study and reads names: more and fewer series than the export saw."""
    pytest.importorskip("timm")
    from itemizedclip_radiology.models.series_names import encode_series_names

    torch.manual_seed(0)
    model = create_model("HLIPSN_debug").eval()
    export_onnx(LoadedModel(model, model.config, create_tokenizer(model.config), source="none"), tmp_path)
    run = graphs(tmp_path)
    names = ["AX_FLAIR", "a", "SAG T1-MPRAGE (c)", "AX_FLAIR", "AX_T2+C"]
    for S in (1, 2, 5):
        images, codes = torch.randn(1, S, 1, *model.config["vision_cfg"]["volume_size"]), encode_series_names(names[:S])
        features = model.encode_image(images, series_names=codes[None])
        overall, tokens = run["image"](None, {"images": images.numpy(), "series_names": codes[None].numpy()})
        np.testing.assert_allclose(tokens, features.tokens_BLD, atol=TOLERANCE)
        np.testing.assert_allclose(overall, features.global_BD, atol=TOLERANCE)


def without_torch(folder: Path, *arguments: str) -> list[str]:
    """What example.py says in a process in which nobody can import PyTorch."""
    program = "import runpy, sys; sys.modules['torch'] = None; sys.modules['itemizedclip'] = None; "
    program += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, str(folder / "example.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_the_example_needs_no_pytorch(exported, tmp_path):
    program = (exported["2d"] / "example.py").read_text()
    assert "torch" not in re.sub(r'""".*?"""', "", program, flags=re.DOTALL)
    assert len([line for line in program.splitlines() if line.strip()]) < 40
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (90, 131, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    lines = without_torch(exported["2d"], str(tmp_path / "a.png"), *TEXTS)
    expected = ic.score(ic.load(RUNS / "tiny_2d/checkpoints/epoch_6.pt", device="cpu"), tmp_path / "a.png", TEXTS)[0]
    assert [line.split("  ")[1] for line in lines] == TEXTS
    np.testing.assert_allclose([float(line.split()[0]) for line in lines], expected, atol=2e-4)


def test_the_example_of_studies_needs_no_pytorch(exported, tmp_path):
    from itemizedclip_radiology.models.series_names import encode_series_names

    loaded = load_pretrained(RUNS / "tiny_hlip/checkpoints/epoch_3.pt")
    rng = np.random.default_rng(0)
    names, volumes = ["AX_FLAIR", "AX T2"], []
    for name in names:
        volumes.append(rng.integers(0, 256, loaded.config["vision_cfg"]["volume_size"]).astype(np.uint8))
        np.save(tmp_path / f"{name}.npy", volumes[-1])
    given = [f"{name}={tmp_path / name}.npy" for name in names]
    lines = without_torch(exported["hlip"], *given, "--", *TEXTS[:3])
    low, high = map(float, loaded.meta["transform"].get("input_info", (0, 255))[:2])
    between = ((torch.from_numpy(np.stack(volumes)).float() - low) / (high - low)).clamp(0, 1)
    images = (between - 0.449) / 0.226
    codes = encode_series_names(names)[None] if loaded.config["vision_cfg"].get("series_names") else None
    with torch.no_grad():
        features = loaded.model.encode_image(images[None, :, None], series_names=codes)
        text_MD = loaded.model.encode_text(loaded.tokenizer(TEXTS[:3]))
    expected = TcsimScorer(loaded.model.head, text_MD, normalise_tokens=False).score(features)[0]
    np.testing.assert_allclose([float(line.split()[0]) for line in lines], expected, atol=2e-4)


@pytest.mark.parametrize(
    "text",
    ["A red roof", "two  parked\tcars, 12 trees; it's RED!!", "naïve café 3.5×2.1 cm", "多くの", "🙂 x",
     "a_b-c ... (d)", "word " * 150, "the runway's end", "100%", " "],
)  # fmt: skip
def test_the_written_tokenizer_is_the_same(text):
    from tokenizers import Tokenizer

    tokenizer = ClipTokenizer(40)
    assert Tokenizer.from_str(tokenizer.to_json()).encode(text).ids == tokenizer([text])[0].tolist()


def test_what_cannot_be_exported_is_one_sentence(tmp_path, capsys, monkeypatch):
    assert "does not exist" in fails(capsys, export.main, [str(tmp_path / "x.pt"), "--to", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    checkpoint = str(RUNS / "tiny_2d/checkpoints/epoch_6.pt")
    assert "pip install -e '.[onnx]'" in fails(capsys, export.main, [checkpoint, "--to", str(tmp_path)])


def test_the_description_says_how_images_are_read(exported):
    content = json.loads((exported["2d"] / "model.json").read_text())
    assert content["image"]["kind"] == "photograph"
    assert {"image_size", "mean", "std"} <= set(content["image"])
    assert json.loads((exported["hlip"] / "model.json").read_text())["image"]["reads_series_names"] in (True, False)
