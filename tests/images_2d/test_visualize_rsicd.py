"""visualize_rsicd.sh's program: pictures and scores of RSICD rows from a checkpoint."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from itemizedclip_2d import visualize_rsicd
from itemizedclip_2d.pictures import ModelSettings, Picture, PictureSettings, Viewer, load_viewer, parse_numbers
from PIL import Image
from rsicd_files import image_cell, write_rsicd_csv, write_rsicd_folder

from itemizedclip.models.factory import LoadedModel, create_model, create_tokenizer, create_transform, load_pretrained
from itemizedclip.viewer.geometry import map_to_input

TINY = {
    "name": "tiny",
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    "head_heads": 4,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An RSICD folder of 8 test rows, a checkpoint with its config and one without."""
    folder = tmp_path_factory.mktemp("visualize")
    rsicd = write_rsicd_folder(folder / "rsicd", image_size=48)
    torch.manual_seed(0)
    model = create_model(TINY)
    torch.save({"state_dict": model.state_dict(), "model_config": TINY}, folder / "own.pt")
    torch.save({"state_dict": model.state_dict()}, folder / "released.pt")
    return rsicd


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Long items stay on one line of the table."""
    monkeypatch.setenv("COLUMNS", "160")


def arguments(files, *more, resume="own.pt", items=True) -> list[str]:
    folder = files.folder.parent
    flags = ["--resume", str(folder / resume), "--rsicd-data-dir", str(files.folder), "--device", "cpu"]
    if items:
        flags += ["--external-captions", files.external_captions]
    return [*flags, *map(str, more)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def table_scores(printed: str) -> list[float]:
    return [float(found) for found in re.findall(r"│\s+(-?\d\.\d{3})\s+│", printed)]


def plain_scores(files, row: int, items: list[str]) -> list[float]:
    """TCSim of each item on its own, by the definition: cos(t, head(t, v))."""
    loaded = load_pretrained(files.folder.parent / "own.pt")
    path = files.folder.parent / "row.jpg"
    path.write_bytes(files.scenes["test"][row].jpeg)
    image = create_transform(TINY, is_train=False)(Image.open(path))
    with torch.no_grad():
        tokens_1LD = loaded.model.encode_image(image[None]).tokens_BLD
        scores = []
        for item in items:
            text_1D = loaded.model.encode_text(create_tokenizer(TINY)([item]))
            conditioned = loaded.model.head(text_1D[None], tokens_1LD)[0]
            scores.append(torch.cosine_similarity(text_1D, conditioned).item())
    return scores


def test_rows_chosen_by_number(files, tmp_path, capsys):
    visualize_rsicd.main(arguments(files, "--viz-id", "5,1-2,5", "--output", tmp_path / "new" / "pictures"))
    scenes = files.scenes["test"]
    expected = [f"{row}_{Path(scenes[row].filename).stem}.png" for row in (1, 2, 5)]
    assert names(tmp_path / "new" / "pictures") == expected
    printed = capsys.readouterr().out
    assert str(tmp_path / "new" / "pictures") in printed
    items = [[item.strip().lower() for item in scenes[row].items] for row in (5, 1, 2)]
    assert all(text in printed for row in items for text in row)
    scores = [score for row, texts in zip((5, 1, 2), items) for score in plain_scores(files, row, texts)]
    np.testing.assert_allclose(table_scores(printed), scores, atol=6e-4)


def test_the_first_images_without_numbers(files, tmp_path):
    visualize_rsicd.main(arguments(files, "--num-images", "2", "--output", tmp_path))
    assert [name.split("_")[0] for name in names(tmp_path)] == ["0", "1"]


@pytest.mark.parametrize("split", ["valid", "train"])
def test_captions_of_another_split(files, tmp_path, capsys, split):
    flags = ("--external-captions", "captions", "--split", split, "--viz-id", "0", "--output", tmp_path)
    visualize_rsicd.main(arguments(files, *flags, items=False))
    scene = files.scenes[split][0]
    assert names(tmp_path) == [f"0_{Path(scene.filename).stem}.png"]
    assert "many grey specks surround" in capsys.readouterr().out


def test_own_texts_heads_and_pdf(files, tmp_path, capsys):
    flags = ["--items", "A Runway; costs $5 ;", "--heads", "--format", "pdf", "--upsampling", "smooth"]
    visualize_rsicd.main(arguments(files, *flags, "--viz-id", "3", "--output", tmp_path, items=False))
    stem = f"3_{Path(files.scenes['test'][3].filename).stem}"
    assert names(tmp_path) == [f"{stem}.pdf", f"{stem}_heads.pdf"]
    assert all((tmp_path / name).read_bytes().startswith(b"%PDF") for name in names(tmp_path))
    scores = table_scores(capsys.readouterr().out)
    np.testing.assert_allclose(scores, plain_scores(files, 3, ["A Runway", "costs $5"]), atol=6e-4)


def test_the_picture_shows_the_image_at_its_own_size(files, tmp_path):
    visualize_rsicd.main(arguments(files, "--viz-id", "0", "--output", tmp_path))
    drawn = np.asarray(Image.open(tmp_path / names(tmp_path)[0]).convert("RGB")).astype(int)
    # The first scene is a red shape, and only the first panel is in colour; overlays lie over grey.
    red = (drawn[..., 0] > 180) & (drawn[..., 1] < 80) & (drawn[..., 2] < 80)
    columns = np.flatnonzero(red.any(0))
    assert red.sum() > 1000
    assert columns[-1] < drawn.shape[1] / 2


def test_long_texts_are_reported(files, tmp_path, capsys):
    long_text = "many small white planes " * 10
    visualize_rsicd.main(arguments(files, "--items", f"short;{long_text}", "--viz-id", "4", "--output", tmp_path))
    assert "item 2 of image 4" in capsys.readouterr().out


def test_a_released_checkpoint_needs_its_model_name(files, tmp_path, capsys):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY))
    flags = arguments(files, "--viz-id", "0", "--output", tmp_path / "pictures", resume="released.pt")
    visualize_rsicd.main([*flags, "--model", str(config)])
    assert len(names(tmp_path / "pictures")) == 1
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        visualize_rsicd.main(flags)
    assert exit_.value.code == 1
    assert "--model" in capsys.readouterr().err


MISTAKES = {
    "no checkpoint": (["--resume", "{tmp}/none.pt"], "none.pt: checkpoint does not exist"),
    "no folder": (["--rsicd-data-dir", "{tmp}/none"], "none/test.csv: no such file"),
    "no item file": (["--external-captions", "a.json;b.json"], "a.json: no such file"),
    "no items for the split": (["--split", "valid"], "no item file for --split valid"),
    "number beyond": (["--viz-id", "3,8"], "--viz-id asks for image 8; there are 8"),
    "huge range": (["--viz-id", "0-999999999999"], "--viz-id asks for image 999999999999"),
    "no number": (["--viz-id", "3,x"], "--viz-id is '3,x'"),
    "falling range": (["--viz-id", "5-3"], "--viz-id is '5-3'"),
    "no images": (["--num-images", "0"], "--num-images is 0"),
    "no text": (["--items", " ; "], "--items holds no text"),
    "no such device": (["--device", "abacus"], "--device is 'abacus'"),
    "output is a file": (["--output", "{tmp}/occupied"], "occupied: results cannot be written there"),
    "no such flag": (["--vizid", "3"], "--vizid"),
}


WRONG_FLAGS = ("no number", "falling range", "no images", "no text", "no such device", "no such flag")


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_get_one_message(files, tmp_path, capsys, case):
    (tmp_path / "occupied").write_text("a file")
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in MISTAKES[case][0]]
    with pytest.raises(SystemExit) as exit_:
        visualize_rsicd.main(arguments(files, "--output", tmp_path / "pictures", *flags))
    assert exit_.value.code == (2 if case in WRONG_FLAGS else 1)
    captured = capsys.readouterr()
    assert MISTAKES[case][1] in " ".join(re.sub("[│╭╮╰╯─]", " ", captured.err).split())
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not (tmp_path / "pictures").exists()


def test_a_bad_row_harms_only_itself(files, tmp_path, capsys):
    folder = tmp_path / "rsicd"
    folder.mkdir()
    good = files.scenes["test"][0]
    write_rsicd_csv(
        folder / "test.csv",
        [
            ("a.jpg", "['a lake .']", "{'bytes': 5}"),
            ("rsicd_images/../../b é.jpg", "['a lake .']", image_cell(good.jpeg)),
            ("c.jpg", "['a lake .']", image_cell(b"no image")),
        ],
    )
    flags = ["--resume", str(files.folder.parent / "own.pt"), "--rsicd-data-dir", str(folder)]
    pictures = ["--output", str(tmp_path / "pictures")]
    visualize_rsicd.main([*flags, *pictures, "--viz-id", "1"])
    assert names(tmp_path / "pictures") == ["1_b_é.png"]
    capsys.readouterr()
    for row, reason in ((0, "column 'image': expected a string"), (2, "c.jpg): column 'image': no readable")):
        with pytest.raises(SystemExit) as exit_:
            visualize_rsicd.main([*flags, *pictures, "--viz-id", str(row)])
        assert exit_.value.code == 1
        error = capsys.readouterr().err
        assert f"row {row}" in error
        assert reason in error


def test_numbers():
    assert parse_numbers("3") == [range(3, 4)]
    assert parse_numbers(" 3, 17 - 25 ") == [range(3, 4), range(17, 26)]
    for wrong in ("", ",", "3,", "-1", "1-", "2-1", "a", "1.5", "1-2-3"):
        with pytest.raises(ValueError, match="--viz-id"):
            parse_numbers(wrong)


def test_a_rest_that_patches_do_not_cover_is_not_shown_as_seen():
    config = {**TINY, "vision_cfg": {**TINY["vision_cfg"], "image_size": 36}}
    torch.manual_seed(0)
    loaded = LoadedModel(create_model(config).eval(), config, create_tokenizer(config))
    viewer = Viewer(loaded, PictureSettings())
    picture = Picture(0, "a.png", Image.new("RGB", (36, 36)), ["a lake"])
    explanation = viewer.explain(picture)
    maps = explanation.maps
    shown = map_to_input(explanation.times_uniform(0), explanation.source.views[0].geometry)[0]
    assert maps.grid == (4, 4)
    assert np.isfinite(shown[:32, :32]).all()
    assert np.isnan(shown[32:]).all()
    assert np.isnan(shown[:, 32:]).all()


def test_models_of_volumes_are_refused(tmp_path):
    model = create_model("HLIPSN_debug")
    torch.save({"state_dict": model.state_dict(), "model_config": model.config}, tmp_path / "mri.pt")
    with pytest.raises(ValueError, match="reads volumes"):
        load_viewer(ModelSettings(resume=tmp_path / "mri.pt", device="cpu"), PictureSettings())


def test_it_runs_by_path_from_anywhere(files, tmp_path):
    script = Path(__file__).parents[2] / "2D_images_tasks" / "src" / "visualize" / "main.py"
    command = [sys.executable, str(script), *arguments(files, "--viz-id", "0", "--output", "here")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(names(tmp_path / "here")) == 1
    assert PictureSettings().output == script.parent / "visualizations"
