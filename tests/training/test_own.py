"""Own data in one file: what it may hold, training on it in the manner of a recipe, fine-tuning, evaluation."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fails
from PIL import Image

from itemizedclip.commands import evaluate as evaluate_command
from itemizedclip.commands import explain as explain_command
from itemizedclip.commands import train as train_command
from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.jsonl import read_own
from itemizedclip.evaluation.own import labels_of, read_classes
from itemizedclip.models.factory import create_model, load_model_config, load_pretrained
from itemizedclip.models.lora import add_adapters, folded_weights
from itemizedclip.models.weights import read_checkpoint
from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.training.options import options_to_dict
from itemizedclip.training.own import own
from itemizedclip.training.recipes import parse_recipe

SMALL = ("--like", "scenes", "--epochs", "1", "--warmup", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu",
         "--precision", "fp32", "--num-sampled-captions", "2")  # fmt: skip
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 40, 210)}


def write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> Path:
    """Twelve pictures with items, labels and splits in own.jsonl."""
    monkeypatch.chdir(tmp_path)
    lines = []
    for number in range(12):
        colour = list(COLOURS)[number % 3]
        Image.new("RGB", (70, 64), COLOURS[colour]).save(tmp_path / f"{number}.png")
        split = "train" if number < 8 else "val" if number < 10 else "test"
        lines.append({"image": f"{number}.png", "items": [f"a {colour} picture", f"number {number}"], "split": split,
                      "labels": colour, "normal": number == 0})  # fmt: skip
    write_lines(tmp_path / "own.jsonl", lines)
    return tmp_path


# --- the file --------------------------------------------------------------------------------------------------------


def test_every_layout_says_the_same(pictures):
    by_lines = read_own("own.jsonl")
    items = {entry.image: list(entry.items) for entry in by_lines.entries}
    (pictures / "items.json").write_text(json.dumps(items))
    rows = [f"{name},{text}" for name, texts in items.items() for text in texts]
    (pictures / "items.csv").write_text("file_name,text\n" + "\n".join(rows))
    for name in ("items.json", "items.csv"):
        other = read_own(name)
        assert {entry.image: list(entry.items) for entry in other.entries} == items
        assert len(other.part("train").entries) == 12  # none says a split
    assert [len(by_lines.part(part).entries) for part in ("train", "val", "test")] == [8, 2, 2]
    assert by_lines.entries[0].normal is True
    with pytest.raises(
        UserError, match=r"expected one .jsonl, .json or .csv .* found items.csv, items.json, own.jsonl"
    ):
        read_own(pictures)
    (pictures / "own.jsonl").unlink()
    (pictures / "items.csv").unlink()
    assert read_own(pictures).path.name == "items.json"


def test_the_fingerprint_follows_what_is_trained_on(pictures):
    before = read_own("own.jsonl")
    assert before.fingerprint == read_own("own.jsonl").fingerprint
    lines = [json.loads(line) for line in (pictures / "own.jsonl").read_text().splitlines()]
    lines[3]["split"] = "val"
    assert read_own(write_lines(pictures / "other.jsonl", lines)).fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": "a", "series": {"T1": "b"}, "items": ["x"]}, "has both fields 'image' and 'series'"),
        ({"series": {}, "items": ["x"]}, "field 'series': expected {\"NAME\""),
        ({"series": ["b"], "items": ["x"]}, "field 'series': expected {\"NAME\""),
        ({"image": "a", "items": ["x"], "split": "holdout"}, "field 'split': expected train, val or test"),
        ({"image": "a", "items": ["x"], "normal": "no"}, "field 'normal': expected true or false"),
        ({"image": "a", "items": ["x"], "labels": {"c": 2}}, "field 'labels': 'c' is 2; expected 1, 0 or null"),
        ({"image": "a", "labels": 7}, "field 'labels': expected"),
        ({"image": "a"}, "field 'items': expected a list of texts, found null"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path, line, message):
    with pytest.raises(BadSampleError, match=re.escape(message)):
        read_own(write_lines(tmp_path / "x.jsonl", [line]))


def test_labels(tmp_path):
    file = read_own(
        write_lines(
            tmp_path / "x.jsonl",
            [
                {"image": "a", "labels": "red"},
                {"image": "b", "labels": {"red": 0, "blue": None}},
                {"image": "c", "labels": ["red", "blue"]},
                {"image": "d", "items": ["x"]},
            ],
        )
    )
    nan = np.nan
    expected = [[1, 0], [0, nan], [1, 1], [nan, nan]]
    np.testing.assert_array_equal(labels_of(file, ["red", "blue"]), expected)
    with pytest.raises(UserError, match="its labels are blue, red"):
        labels_of(file, ["green"])
    (tmp_path / "classes.txt").write_text("red\nblue: a blue one; something blue\n")
    classes = read_classes(tmp_path / "classes.txt", "a {class} picture")
    assert classes.prompts == [["a red picture"], ["a blue one", "something blue"]]


# --- training --------------------------------------------------------------------------------------------------------


def test_like_takes_the_recipe_and_masks_duplicates():
    from itemizedclip_2d.recipes import rsicd

    for like, recipe in (("rsicd", rsicd()),):
        options = parse_recipe("own", ["--like", like, "--data", "x.jsonl", "--epochs", "3"])
        assert options.model == recipe.model
        assert options.loading == recipe.loading
        assert options.optimizer.lr == recipe.optimizer.lr
        assert options.optimizer.epochs == 3
        assert options.objective.mask_duplicates
        assert options.data.like == like
    assert options_to_dict(own())["data"]["like"] == ""


def test_unknown_words_are_one_sentence(capsys):
    assert "no way to train on own data named mrii (did you mean mri?)" in fails(
        capsys, train_command.main, ["own", "--like", "mrii"]
    )
    assert "no value of --finetune named lara" in fails(capsys, train_command.main, ["own", "--finetune", "lara"])


def test_trained_validated_evaluated_and_fine_tuned_every_way(pictures, capsys):
    train_command.main(["own", "--data", "own.jsonl", "--name", "a", *SMALL])
    metrics = [json.loads(line) for line in (pictures / "logs/a/metrics.jsonl").read_text().splitlines()]
    assert any("val/text_to_image_R@1" in line for line in metrics)
    checkpoint = "logs/a/checkpoints/epoch_1.pt"

    flags = ["own", "--data", "own.jsonl", "--checkpoint", checkpoint, "--workers", "0", "--device", "cpu"]
    retrieval = evaluate_command.main(flags)
    assert 1 <= retrieval["mean_item_rank"] <= 2
    (pictures / "classes.txt").write_text("red\ngreen\nblue\n")
    one_each = evaluate_command.main([*flags, "--classes", "classes.txt", "--split", "all", "--template", "a {class}"])
    assert set(one_each) == {"top1", "top5", "mean_rank"}
    written = json.loads((pictures / "logs/a/checkpoints/epoch_1.own.own.json").read_text())
    assert written["metrics"] == one_each
    (pictures / "classes.txt").write_text("red\nblue\n")
    several = evaluate_command.main([*flags, "--classes", "classes.txt", "--split", "all"])
    assert set(several) == {"macro_auc", "auc/red", "auc/blue"}
    explain_command.main(["0.png", "--checkpoint", checkpoint, "--items-file", "own.jsonl", "--output", "seen"])
    assert json.loads((pictures / "seen/explanation.json").read_text())["items"][0]["item"] == "a red picture"
    measured = explain_command.main(["--folder", ".", "--items-json", "own.jsonl", "--checkpoint", checkpoint])
    assert "mll" in {name.lower() for name in measured}
    capsys.readouterr()

    before = read_checkpoint(checkpoint)["state_dict"]
    moved = {
        "full": {"image", "text", "head"}, "frozen": {"head"}, "frozen-image": {"text", "head"},
        "lora-text": {"text", "head"},
    }  # fmt: skip
    for preset, expected in moved.items():
        pytest.importorskip("peft")
        train_command.main(["own", "--data", "own.jsonl", "--name", preset, "--finetune", preset, "--pretrained",
                            checkpoint, *SMALL, "--lr", "0.01"])  # fmt: skip
        after = load_pretrained(f"logs/{preset}/checkpoints/epoch_1.pt")
        changed = {key for key, value in after.model.state_dict().items() if not torch.equal(value, before[key])}
        parts = {
            "head"
            if key.startswith("visual_proj")
            else "image"
            if key.startswith(("visual.", "image_post"))
            else "text"
            for key in changed - {"logit_scale", "logit_bias"}
        }
        assert parts == expected, preset
    assert "lora" not in after.config


def test_a_run_with_adapters_goes_on_and_is_the_start_of_another(pictures):
    pytest.importorskip("peft")
    train_command.main(["own", "--data", "own.jsonl", "--name", "a", *SMALL])
    lora = ["own", "--data", "own.jsonl", "--name", "l", "--finetune", "lora", "--pretrained",
            "logs/a/checkpoints/epoch_1.pt", *SMALL]  # fmt: skip
    train_command.main(lora)
    contents = read_checkpoint("logs/l/checkpoints/epoch_1.pt")
    assert contents["model_config"]["lora"] == {"image": 8, "text": 8}
    train_command.main([*lora, "--resume", "latest", "--epochs", "2"])
    assert Path("logs/l/checkpoints/epoch_2.pt").is_file()
    train_command.main(["own", "--data", "own.jsonl", "--name", "m", "--finetune", "full", "--pretrained",
                        "logs/l/checkpoints/epoch_2.pt", *SMALL])  # fmt: skip
    assert not [key for key in read_checkpoint("logs/m/checkpoints/epoch_1.pt")["state_dict"] if "lora" in key]


def test_folding_gives_the_model_with_adapters():
    pytest.importorskip("peft")
    torch.manual_seed(0)
    config = load_model_config("ViT-scenes-ItemizedCLIP")
    model, plain = create_model(config).eval(), create_model(config).eval()
    add_adapters(model, image=4, text=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # zero at first
    plain.load_state_dict(folded_weights(model.state_dict()))
    images, tokens = torch.randn(2, 3, 64, 64), torch.randint(1, 400, (3, 8))
    with torch.no_grad():
        for one, other in (
            (model.encode_image(images).tokens_BLD, plain.encode_image(images).tokens_BLD),
            (model.encode_text(tokens), plain.encode_text(tokens)),
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert all(
        "lora_" in name for name, p in model.named_parameters() if p.requires_grad and name.startswith("visual.")
    )
    assert model.head.attn.in_proj_weight.requires_grad


def test_without_peft_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=re.escape("pip install -e '.[finetune]'")):
        add_adapters(create_model("ViT-scenes-ItemizedCLIP"), image=2)


def test_what_is_missing_is_said_before_training(pictures, capsys):
    assert "give --data FILE" in fails(capsys, train_command.main, ["own", "--name", "x", *SMALL])
    said = fails(
        capsys, train_command.main, ["own", "--data", "own.jsonl", "--finetune", "full", "--name", "x", *SMALL]
    )
    assert "--finetune needs --pretrained" in said
    (pictures / "3.png").unlink()
    said = fails(capsys, train_command.main, ["own", "--data", "own.jsonl", "--name", "x", *SMALL])
    assert "3.png: no such file; 1 of the 8 entries of own.jsonl have none" in said
    write_lines(pictures / "studies.jsonl", [{"series": {"T1": "0.png"}, "items": ["x"]}] * 4)
    said = fails(capsys, train_command.main, ["own", "--data", "studies.jsonl", "--name", "x", *SMALL])
    assert "is a study of series, and this model reads images" in said


# --- studies ---------------------------------------------------------------------------------------------------------


def write_study_file(folder: Path, size: tuple[int, int, int], *, low: float, high: float) -> None:
    generator = torch.Generator().manual_seed(0)
    lines = []
    for number in range(8):
        names = ["AX_T2", "AX_FLAIR"][: 1 + number % 2]
        for name in names:
            volume = torch.rand(size, generator=generator) * (high - low) + low
            torch.save(volume, folder / f"{number}_{name}.pt")
        lines.append({
            "id": f"s{number}", "series": {name: f"{number}_{name}.pt" for name in names},
            "items": ["Study is fine."] if number % 4 == 0 else [f"Lesion number {number}.", "Old infarct."],
            "normal": number % 4 == 0, "split": "train" if number < 5 else "val",
            "labels": {"lesion": int(number % 4 > 0)},
        })  # fmt: skip
    write_lines(folder / "own.jsonl", lines)


@pytest.mark.parametrize(
    ("like", "size", "values"),
    [("mri_debug", (16, 64, 64), (0, 255)), ("chest-ct_debug", (32, 96, 96), (-1000, 400))],
)
def test_studies_are_trained_on_and_evaluated(tmp_path, monkeypatch, capsys, like, size, values):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    write_study_file(tmp_path, size, low=values[0], high=values[1])
    train_command.main(["own", "--data", "own.jsonl", "--like", like, "--name", "a", "--epochs", "1", "--batch-size",
                        "2", "--device", "cpu"])  # fmt: skip
    metrics = [json.loads(line) for line in (tmp_path / "logs/a/metrics.jsonl").read_text().splitlines()]
    assert any("val/text_to_image_R@1" in line for line in metrics)
    (tmp_path / "classes.txt").write_text("lesion: a lesion\n")
    measures = evaluate_command.main(
        ["own", "--data", "own.jsonl", "--split", "all", "--classes", "classes.txt", "--checkpoint",
         "logs/a/checkpoints/epoch_1.pt", "--workers", "0", "--device", "cpu"]
    )  # fmt: skip
    assert set(measures) == {"macro_auc", "auc/lesion"}
    preset = "lora" if like == "mri_debug" else "frozen"
    train_command.main(["own", "--data", "own.jsonl", "--like", like, "--finetune", preset, "--pretrained",
                        "logs/a/checkpoints/epoch_1.pt", "--name", "b", "--epochs", "1", "--warmup", "1",
                        "--batch-size", "2", "--device", "cpu"])  # fmt: skip
    assert load_pretrained("logs/b/checkpoints/epoch_1.pt").config.get("lora") is None
    capsys.readouterr()
    said = fails(capsys, train_command.main, ["own", "--data", "own.jsonl", "--finetune", "full", "--pretrained",
                                              "logs/a/checkpoints/epoch_1.pt", "--name", "c"])  # fmt: skip
    assert "the model reads studies: add --like mri" in said


def test_normal_is_what_the_file_says(tmp_path):
    pytest.importorskip("timm")
    from itemizedclip_radiology.own import OwnBrainStudies

    write_study_file(tmp_path, (8, 32, 32), low=0, high=255)
    studies = OwnBrainStudies(
        read_own(tmp_path / "own.jsonl"), is_train=True, num_items=2, num_series=3, volume_size=(8, 32, 32)
    )
    samples = [studies[(0, row)] for row in range(8)]
    assert [sample.is_normal for sample in samples] == [row % 4 == 0 for row in range(8)]
    assert samples[1].image.shape == (3, 1, 8, 32, 32)
    assert torch.equal(studies[(0, 1)].image, samples[1].image)
    (tmp_path / "2_AX_T2.pt").unlink()
    assert studies.without_folder() == ["s2"]
    with pytest.raises(MissingFileError):
        read_own(tmp_path / "none.jsonl")
