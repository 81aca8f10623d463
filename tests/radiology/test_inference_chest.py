"""inference_chest_ct.py: one scan and findings in words, from every kind of file, to scores, pictures and volumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from itemizedclip_radiology.benchmarks.chest_ct import CHEST_CLASSES, chest_prompt
from itemizedclip_radiology.data.chest import ChestInput, load_chest_volume
from itemizedclip_radiology.viewing.inference_chest_ct import main, prompt_of
from PIL import Image
from scan_files import affine_of, chest_phantom, world_of, write_dicom, write_nifti

from itemizedclip.models.factory import create_model, create_tokenizer

SCRIPT = Path(__file__).parents[2] / "Radiology_Tasks" / "src" / "open_ct_rate" / "inference_chest_ct.py"
SPOT = np.array([14.0, -9.0, 7.0])
SHAPE = (104, 100, 34)
AFFINE = affine_of("LPS", (1.0, 1.0, 3.0), SHAPE, tilt=0.1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return create_model("CTRATE_HLIP_debug").eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "epoch_1.pt"
    torch.save({"state_dict": model.state_dict(), "model_config": model.config, "epoch": 1}, path)
    return path


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> Path:
    return write_nifti(tmp_path_factory.mktemp("scan") / "patient.nii.gz", phantom(), AFFINE)


def phantom() -> np.ndarray:
    return chest_phantom(world_of(SHAPE, AFFINE), SPOT)


def fails(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(flags))
    assert stop.value.code not in (0, None)
    return capsys.readouterr().err


def plain_scores(model, image: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """TCSim of single texts with L2-normalised tokens."""
    tokenizer = create_tokenizer(model.config)
    with torch.no_grad():
        tokens = F.normalize(model.encode_image(image[None]).tokens_BLD, dim=-1)
        scores = []
        for text in texts:
            query = model.encode_text(tokenizer([text]))
            scores.append(F.cosine_similarity(query, model.head(query[None], tokens)[0], dim=-1))
    return torch.cat(scores)


def test_sixteen_findings_of_a_tensor_scored_as_in_zero_shot(model, checkpoint, tmp_path, capsys):
    hu = phantom().transpose(2, 1, 0).copy()
    torch.save(torch.from_numpy(hu), tmp_path / "valid_1_a_1.pt")
    source, out = tmp_path / "valid_1_a_1.pt", tmp_path / "out"
    main([str(source), "--resume", str(checkpoint), "--output", str(out), "--no-nifti"])
    content = json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert [item["item"] for item in content["items"]] == list(CHEST_CLASSES)
    assert content["prompts"]["Lung nodule"] == "findings consistent with nodules or nodular density"
    image = load_chest_volume(tmp_path / "valid_1_a_1.pt", ChestInput(size=(32, 96, 96))).image
    expected = plain_scores(model, image, [chest_prompt(name) for name in CHEST_CLASSES])
    found = torch.tensor([item["score"] for item in content["items"]])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        "explanation.json", "montage_1.png", "montage_2.png",
    ]  # fmt: skip
    assert "Lung nodule" in capsys.readouterr().out


def test_nifti_in_any_words(model, checkpoint, scan, tmp_path):
    out = tmp_path / "out"
    explanation = main(
        [str(scan), "--resume", str(checkpoint), "--findings", "Pleural Effusion; a dense spot ;a dense spot",
         "--output", str(out), "--upsampling", "nearest", "--heads"]
    )  # fmt: skip
    assert explanation.items == ["Pleural Effusion", "a dense spot"]
    content = json.loads((out / "explanation.json").read_text())
    assert list(content["prompts"].values()) == ["findings consistent with pleural effusion", "a dense spot"]
    original = nibabel.load(scan)
    volumes = sorted((out / "volumes").iterdir())
    assert len(volumes) == 2 * (1 + 8)  # no copy of the scan: it is a NIfTI file itself
    for path in volumes:
        written = nibabel.load(path)
        assert written.shape == original.shape
        np.testing.assert_array_equal(written.affine, original.affine)
    # The largest value of a volume lies where the JSON says, and is the largest of the map.
    for number, item in enumerate(content["items"]):
        name = f"item{number + 1:02d}_{('pleural_effusion', 'a_dense_spot')[number]}.nii.gz"
        values = np.asarray(nibabel.load(out / "volumes" / name).dataobj)
        assert values.max() == pytest.approx(item["peak_times_uniform"], rel=1e-3)
        voxel = tuple(item["peak"]["file_voxel"])
        assert values[voxel] == pytest.approx(values.max(), rel=1e-3)
        np.testing.assert_allclose(original.affine @ [*voxel, 1], [*item["peak"]["world_mm_ras"], 1], atol=1e-4)
        heads = [nibabel.load(out / "volumes" / name.replace(".nii", f"_head{h}.nii")).get_fdata() for h in range(1, 9)]
        np.testing.assert_allclose(np.mean(heads, 0), values, atol=4e-3 * np.max(heads))
    with Image.open(out / "montage.png") as picture:
        assert picture.width > 1000


def test_dicom_folder_gives_the_nifti_files_scores(checkpoint, scan, tmp_path):
    write_dicom(tmp_path / "dicom", phantom(), AFFINE)
    flags = ["--resume", str(checkpoint), "--findings", "dense spot"]
    of_dicom = main([str(tmp_path / "dicom"), *flags, "--output", str(tmp_path / "a")])
    of_nifti = main([str(scan), *flags, "--output", str(tmp_path / "b"), "--no-nifti"])
    torch.testing.assert_close(of_dicom.maps.scores, of_nifti.maps.scores, atol=1e-4, rtol=0)
    assert not (tmp_path / "b" / "volumes").exists()
    image = nibabel.load(tmp_path / "a" / "volumes" / "image__chest.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), phantom())
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-4)


def test_window_and_fit(checkpoint, scan, tmp_path):
    base = [str(scan), "--resume", str(checkpoint), "--findings", "spot", "--no-nifti"]
    published = main([*base, "--output", str(tmp_path / "a")])
    wide = main([*base, "--output", str(tmp_path / "b"), "--input-info", "-1000", "1000", "resize"])
    assert published.source.views[0].window_hu == (-1150, 350)
    assert wide.source.views[0].window_hu == (-1000, 1000)
    assert not torch.allclose(published.source.image, wide.source.image)
    assert json.loads((tmp_path / "b" / "explanation.json").read_text())["fit"] == "resize"


def test_prompts():
    assert prompt_of("lung OPACITY") == "findings consistent with opacity"
    assert prompt_of("rib fracture") == "rib fracture"


def test_one_message_for_what_is_wrong(checkpoint, scan, tmp_path, capsys):
    resume = ["--resume", str(checkpoint)]
    assert "no such file or folder" in fails(capsys, str(tmp_path / "nowhere.nii.gz"), *resume)
    assert "does not exist" in fails(capsys, str(scan), "--resume", str(tmp_path / "no.pt"))
    assert "--input-info" in fails(capsys, str(scan), *resume, "--input-info", "350", "-1150", "crop")
    assert "holds no text" in fails(capsys, str(scan), *resume, "--findings", " ; ")
    assert "no such file" in fails(capsys, str(scan), *resume, "--findings-file", str(tmp_path / "none.txt"))
    (tmp_path / "file").write_text("in the way")
    assert "cannot write there" in fails(capsys, str(scan), *resume, "--output", str(tmp_path / "file" / "out"))
    (tmp_path / "scan.nii.gz").write_bytes(b"not gzip")
    assert "not a readable NIfTI file" in fails(capsys, str(tmp_path / "scan.nii.gz"), *resume)
    shifted = write_nifti(tmp_path / "shifted.nii.gz", phantom() - 1024, AFFINE)
    assert "--double-rescale undo" in fails(capsys, str(shifted), *resume)
    brain = create_model("HLIPSN_debug")
    torch.save({"state_dict": brain.state_dict(), "model_config": brain.config}, tmp_path / "brain.pt")
    assert "is no chest CT model" in fails(capsys, str(scan), "--resume", str(tmp_path / "brain.pt"))


def test_runs_by_its_path_from_anywhere(tmp_path):
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "--findings" in result.stdout
