"""ReXGroundingCT and BraTS from small files in their formats: reading, measures, predictions on the file's grid."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from commands import fails
from itemizedclip_radiology.benchmarks.grounded_scans import find_brats, find_volume, read_rexgrounding
from itemizedclip_radiology.data.nifti import read_label_volumes
from scan_files import affine_of, brain_phantom, chest_phantom, world_of, write_nifti

from itemizedclip.commands.evaluate import main as evaluate
from itemizedclip.data.batch import BadSampleError
from itemizedclip.models.factory import create_model
from itemizedclip.runtime.errors import MissingFileError, UserError

SPOT = np.array([14.0, -9.0, 7.0])
CHEST_SHAPE, BRAIN_SHAPE = (104, 100, 34), (80, 90, 70)
CHEST_AFFINE = affine_of("LPS", (1.0, 1.0, 3.0), CHEST_SHAPE)
BRAIN_AFFINE = affine_of("LPS", (1.2, 1.2, 1.2), BRAIN_SHAPE)
NAME = "train_7_a_2.nii.gz"
ENTRY = {"name": NAME, "findings": {"0": "Nodule in the left lung.", "1": "Both lungs are over-inflated."},
         "categories": {"0": "2d", "1": "1c"}, "entity_counts": {"0": 1, "1": 2}}  # fmt: skip


def write_checkpoint(folder: Path, config: str) -> Path:
    torch.manual_seed(3)
    model = create_model(config)
    torch.save({"state_dict": model.state_dict(), "model_config": model.config}, folder / "epoch_1.pt")
    return folder / "epoch_1.pt"


@pytest.fixture(scope="module")
def rexgrounding(tmp_path_factory) -> Path:
    """One chest with a nodule and two lungs, the second finding in two numbered instances."""
    root = tmp_path_factory.mktemp("rexgrounding")
    world = world_of(CHEST_SHAPE, CHEST_AFFINE)
    hu = chest_phantom(world, SPOT)
    write_nifti(root / "volumes" / "train_fixed" / "train_7" / "train_7_a" / NAME, hu, CHEST_AFFINE)
    masks = np.zeros((2, *CHEST_SHAPE), dtype=np.uint8)
    masks[0] = hu == 1500
    masks[1] = np.where(hu == -850, np.where(world[..., 0] > 0, 1, 2), 0)
    write_nifti(root / "segmentations" / NAME, masks, np.eye(4))
    (root / "dataset.json").write_text(json.dumps({"train": [], "val": [ENTRY], "test": [ENTRY]}))
    write_checkpoint(root, "CTRATE_HLIP_debug")
    return root


def flags(root: Path, *more: str) -> list[str]:
    return ["--data-dir", str(root), "--checkpoint", str(root / "epoch_1.pt"), "--device", "cpu", "--bootstrap", "20",
            "--workers", "0", *more]  # fmt: skip


def test_findings_of_a_chest(rexgrounding, tmp_path, capsys):
    out, written = tmp_path / "val.json", tmp_path / "predictions"
    found = evaluate(["rexgroundingct", *flags(rexgrounding, "--output", str(out), "--predictions", str(written))])
    facts = json.loads(out.read_text())["facts"]
    assert (facts["num_masks"], facts["split"], facts["threshold"]) == (2, "val", 0.5)
    masks = nibabel.load(rexgrounding / "segmentations" / NAME).get_fdata()
    predicted = nibabel.load(written / NAME)
    assert predicted.shape == (2, *CHEST_SHAPE)
    assert predicted.get_data_dtype() == np.uint8
    assert predicted.affine == pytest.approx(CHEST_AFFINE)
    # What was written, measured plainly on the file's own grid, gives the same numbers.
    dices = []
    for own, mask in zip(predicted.get_fdata() > 0, masks > 0):
        dices.append(2 * (own & mask).sum() / (own.sum() + mask.sum()))
    assert found["dice"] == pytest.approx(np.mean(dices))
    assert found["hit_rate"] == np.mean([dice >= 0.1 for dice in dices])
    assert found["chance_pointing"] == pytest.approx((masks > 0).mean())
    assert found["dice_best"] <= found["ceiling_dice"]
    assert 0.2 < found["ceiling_dice"] < 1
    assert "patch grid allows" in capsys.readouterr().out


def test_a_test_split_is_only_predicted(rexgrounding, tmp_path):
    (rexgrounding / "segmentations" / NAME).rename(tmp_path / NAME)
    try:
        more = ["--split", "test", "--output", str(tmp_path / "o.json"), "--predictions", str(tmp_path / "predictions")]
        found = evaluate(["rexgroundingct", *flags(rexgrounding, *more)])
    finally:
        (tmp_path / NAME).rename(rexgrounding / "segmentations" / NAME)
    assert set(found) == {"mll", "mams", "nowhere_share"}
    assert (tmp_path / "predictions" / NAME).is_file()
    assert not [path for path in (tmp_path / "predictions").iterdir() if path.name != NAME]


def test_files_of_rexgrounding(rexgrounding, tmp_path, capsys):
    assert read_rexgrounding(rexgrounding / "dataset.json", "val") == [(NAME, tuple(ENTRY["findings"].values()))]
    for layout in ([ENTRY], {"0": ENTRY}):
        (tmp_path / "layout.json").write_text(json.dumps(layout if isinstance(layout, list) else {"val": layout}))
        assert len(read_rexgrounding(tmp_path / "layout.json", "val")) == 1
    for change, message in (
        ({"name": "scan.nii.gz"}, "expected a CT-RATE volume name"),
        ({"findings": {"1": "x"}}, "has the keys 1; expected 0, 1"),
        ({"findings": {"0": 3}}, "expected a text for each"),
        ({"findings": []}, "expected name and findings"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps({"val": [{**ENTRY, **change}]}))
        with pytest.raises(UserError, match=message):
            read_rexgrounding(tmp_path / "bad.json", "val")
    assert "has no entries of split 'train'" in fails(
        capsys, evaluate, ["rexgroundingct", *flags(rexgrounding, "--split", "train")]
    )
    (tmp_path / NAME).touch()
    assert find_volume(tmp_path, NAME) == tmp_path / NAME
    assert find_volume(tmp_path, "valid_1_a_1") is None
    said = fails(capsys, evaluate, ["rexgroundingct", *flags(rexgrounding, "--volumes", str(tmp_path / "none"))])
    assert "none: no such folder (--volumes)" in said


def test_label_files(tmp_path):
    path = tmp_path / "masks.nii.gz"
    for values, expected in (
        (np.ones((3, 4, 5), np.int16), (1, 3, 4, 5)),
        (np.ones((2, 3, 4, 5), np.float32), (2, 3, 4, 5)),
    ):
        write_nifti(path, values, np.eye(4))
        assert read_label_volumes(path).shape == expected
        assert read_label_volumes(path).dtype.kind in "iu"
    for values, message in (
        (np.full((3, 4, 5), 0.5, np.float32), "no whole numbers"),
        (np.ones((3, 4), np.int16), "expected whole labels"),
    ):
        write_nifti(path, values, np.eye(4))
        with pytest.raises(BadSampleError, match=message):
            read_label_volumes(path)
    path.write_bytes(b"\x1f\x8bnothing")
    with pytest.raises(BadSampleError, match="not a readable NIfTI file"):
        read_label_volumes(path)


def test_masks_of_another_size_are_refused(rexgrounding, tmp_path, capsys):
    (tmp_path / "segmentations").mkdir()
    (tmp_path / "dataset.json").write_text(json.dumps({"val": [ENTRY]}))
    there = ["--data-dir", str(tmp_path), "--volumes", str(rexgrounding / "volumes"),
             "--checkpoint", str(rexgrounding / "epoch_1.pt"), "--device", "cpu", "--output",
             str(tmp_path / "o.json")]  # fmt: skip
    said = fails(capsys, evaluate, ["rexgroundingct", *there])
    assert "1 of 1 volumes" in said
    for shape, message in (((2, 5, 5, 5), "masks of 5×5×5 voxels; expected 104×100×34"),
                           ((1, *CHEST_SHAPE), "1 masks; expected 2, one per finding")):  # fmt: skip
        write_nifti(tmp_path / "segmentations" / NAME, np.ones(shape, np.uint8), np.eye(4))
        assert message in fails(capsys, evaluate, ["rexgroundingct", *there])


@pytest.fixture(scope="module")
def brats(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("brats")
    world = world_of(BRAIN_SHAPE, BRAIN_AFFINE)
    for case, endings in (("BraTS2021_00003", ("_flair", "_t1", "_seg")),
                          ("BraTS-GLI-00005-000", ("-t2f", "-t1n", "-seg"))):  # fmt: skip
        for ending in endings:
            grey = brain_phantom(world, SPOT)
            if ending.endswith("seg"):
                distance = np.sqrt(((world - SPOT) ** 2).sum(-1))
                grey = np.select([distance < 4, distance < 7, distance < 11], [1, 4, 2], 0).astype(np.uint8)
            write_nifti(root / case / f"{case}{ending}.nii.gz", grey, BRAIN_AFFINE)
    write_checkpoint(root, "HLIPSN_debug")
    return root


def test_tumours_of_brains(brats, tmp_path):
    out, written = tmp_path / "out.json", tmp_path / "predictions"
    found = evaluate(["brats", *flags(brats, "--output", str(out), "--predictions", str(written), "--core", "")])
    facts = json.loads(out.read_text())["facts"]
    assert facts["num_masks"] == 4
    labels = [nibabel.load(path).get_fdata() for path in sorted(brats.glob("*/*seg.nii.gz"))]
    dices, shares = [], []
    for truth, path in zip(labels, sorted(written.iterdir())):
        predicted = nibabel.load(path).get_fdata() > 0
        for own, mask in zip(predicted, (truth > 0, truth == 4)):
            dices.append(2 * (own & mask).sum() / (own.sum() + mask.sum()))
            shares.append(mask.mean())
    assert found["dice"] == pytest.approx(np.mean(dices))
    assert found["chance_pointing"] == pytest.approx(np.mean(shares))


def test_cases_of_brats(brats, tmp_path):
    cases = find_brats(brats, ("tumor",))
    assert [case.name for case in cases] == ["BraTS-GLI-00005-000", "BraTS2021_00003"]
    assert [case.patient for case in cases] == ["BraTS-GLI-00005", "BraTS2021_00003"]
    with pytest.raises(MissingFileError, match="holds no case; expected folders such as BraTS2021_00000"):
        find_brats(tmp_path, ("tumor",))


def test_models_of_other_inputs_are_refused(brats, rexgrounding, capsys):
    chest = ["--data-dir", str(brats), "--checkpoint", str(rexgrounding / "epoch_1.pt")]
    assert "give a brain MRI model (train_mri.sh)" in fails(capsys, evaluate, ["brats", *chest])
