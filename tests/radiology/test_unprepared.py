"""Half-prepared trees say what lies there instead, and which command makes what is read; scans in own data are read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from itemizedclip_radiology.benchmarks.chest_ct import open_ct_rate
from itemizedclip_radiology.data.brain import BrainStudies, find_study_files
from itemizedclip_radiology.data.chest import ChestInput, ChestScans, find_ct_rate_root, load_chest_volume
from itemizedclip_radiology.data.unprepared import hint_for_folder
from itemizedclip_radiology.data.volumes import crop_series, detect_grey_range, read_volume
from itemizedclip_radiology.own import OwnBrainStudies, OwnChestScans
from itemizedclip_radiology.prepare import studies as module
from itemizedclip_radiology.prepare.studies import PrepareStudiesOptions, open_tasks, read_records
from public_trees import brain, chest, write_ct_rate, write_mr_rate, write_rad_chestct
from scan_files import write_dicom, write_nifti

from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.jsonl import check_files, read_own
from itemizedclip.runtime.errors import UserError

PREPARE = "itemizedclip prepare studies"


def test_nifti_beside_a_missing_volume(tmp_path):
    write_nifti(tmp_path / "mri/S1/AX_T1/img.nii.gz", *brain())
    (tmp_path / "mri/train.json").write_text(json.dumps({"S1": {"series": {"AX_T1": {}}, "report": ["A mass."]}}))
    data = BrainStudies(
        data_root=tmp_path / "mri", json_path=tmp_path / "mri/train.json", is_train=True, num_items=1, seed=0
    )
    expected = (
        rf"img\.pt: no such file; .* Beside it lie NIfTI files \(img\.nii\.gz, …\): run `{PREPARE} {tmp_path}/mri"
    )
    with pytest.raises(BadSampleError, match=expected):
        data[0]
    with pytest.raises(BadSampleError, match=r"no such file; expected [^.]*\.save\(tensor, path\)$"):
        read_volume(tmp_path / "no/where.pt")


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-1024, 3071, "look like HU: a head CT is read in three windows, which"),
        (0, 4095, "save uint8 grey values 0…255, which"),
    ],
)
def test_values_that_are_no_grey_values(low, high, said):
    volume = torch.tensor([[[low, 0.0], [5.0, high]]])
    with pytest.raises(BadSampleError, match=f"{said}.*{PREPARE}"):
        detect_grey_range(volume, source="img.pt")


def test_volumes_of_another_size():
    expected = "volume of 30×512×512 voxels; expected 48×224×224.*as it came from the scanner, resample the scan"
    with pytest.raises(BadSampleError, match=expected):
        crop_series(torch.zeros(30, 512, 512), (48, 224, 224), source="x")


def test_downloads_are_recognised(tmp_path):
    write_mr_rate(tmp_path / "mr", num_train=1, num_valid=0, num_test=0, zipped=())
    with pytest.raises(UserError, match=rf"It is mr-rate as downloaded: run `{PREPARE} .*/mr --from mr-rate --to NEW`"):
        find_study_files(tmp_path / "mr")
    write_ct_rate(tmp_path / "ct")
    with pytest.raises(UserError, match="It is ct-rate as downloaded"):
        find_ct_rate_root(tmp_path / "ct")
    labels = tmp_path / "labels.csv"
    names = ",".join(["VolumeName", *_ct_rate_columns()])
    labels.write_text(f"{names}\nvalid_1_a_1.nii.gz,{','.join('0' * 18)}\n")
    with pytest.raises(UserError, match="It is ct-rate as downloaded"):
        open_ct_rate(labels, tmp_path / "ct")
    write_rad_chestct(tmp_path / "rad", ("trn00001",))
    assert "--from rad-chestct" in hint_for_folder(tmp_path / "rad", "chest-ct")
    write_dicom(tmp_path / "pacs/patient/one", *brain(), modality="MR")
    with pytest.raises(UserError, match=r"It holds DICOM files \(.*\.dcm, …\): run .* --recipe mri`, and give NEW"):
        find_study_files(tmp_path / "pacs")
    assert hint_for_folder(tmp_path / "nowhere", "mri") == ""


def _ct_rate_columns() -> tuple[str, ...]:
    from itemizedclip_radiology.benchmarks.chest_ct import CT_RATE_COLUMNS

    return CT_RATE_COLUMNS


def test_own_names_in_a_ct_rate_tree(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "items.json").write_text(json.dumps({"patient7": {"recons": ["patient7.nii.gz"], "report": ["A."]}}))
    with pytest.raises(
        BadSampleError, match=r"'patient7'; expected a scan name such as train_12_b: names of CT-RATE alone"
    ):
        ChestScans(data_root=tmp_path, items_json=tmp_path / "items.json", is_train=True, num_items=1, seed=0)


# --- scans in a file of own data -------------------------------------------------------------------------------------


def prepared_volumes(source: Path, to: Path, recipe: str) -> dict[str, torch.Tensor]:
    """Name of a series → the volume that `prepare studies` makes of it."""
    options = PrepareStudiesOptions(source=source, to=to, recipe=recipe, key_file=to.parent / "key")
    for task in open_tasks(options):
        module.prepare_entry(task)
    return {record.series: torch.load(to / record.file) for record in read_records(to) if record.file}


def own_file(folder: Path, series: dict[str, str]) -> Path:
    (folder / "my.jsonl").write_text(json.dumps({"series": series, "items": ["Old infarct."]}) + "\n")
    return folder / "my.jsonl"


def test_scans_of_own_data_are_read_as_prepared_ones(tmp_path):
    write_nifti(tmp_path / "in/one/t1.nii.gz", *brain())
    write_dicom(tmp_path / "in/two", *brain("PIL"), modality="MR", description="SAG FLAIR")
    volumes = prepared_volumes(tmp_path / "in", tmp_path / "out", "mri")
    file = read_own(own_file(tmp_path, {"AX_t1": "in/one/t1.nii.gz", "SAG_FLAIR": "in/two", "gone": "in/no.nii.gz"}))
    assert check_files(file) == []
    data = OwnBrainStudies(file, is_train=False, num_items=1, num_series=1)
    sample = data[0]
    assert sample.image.shape == (2, 1, 48, 224, 224)
    for number, name in enumerate(("AX_t1", "SAG_FLAIR")):
        grey = (sample.image[number, 0] * 0.226 + 0.449) * 255
        torch.testing.assert_close(grey, volumes[name].float(), atol=1e-3, rtol=0)
    assert len(data.skipped) == 1
    assert OwnBrainStudies(file, is_train=True, num_items=1, num_series=3)[(0, 0)].image.shape[0] == 3


def test_a_head_ct_of_own_data_is_its_windows(tmp_path):
    hu, affine = chest()
    write_dicom(tmp_path / "in/ct", hu, affine, description="head routine")
    volumes = prepared_volumes(tmp_path / "in", tmp_path / "out", "ct")
    data = OwnBrainStudies(read_own(own_file(tmp_path, {"head": "in/ct"})), is_train=False, num_items=1, num_series=1)
    loaded = data.load(0, None)
    assert loaded.names == ["head_BloodWindow", "head_BoneWindow", "head_BrainWindow"]
    for number, window in enumerate(("BloodWindow", "BoneWindow", "BrainWindow")):
        grey = (loaded.image[number, 0] * 0.226 + 0.449) * 255
        torch.testing.assert_close(grey, volumes[f"head_routine_AX_{window}"].float(), atol=1e-3, rtol=0)


def test_a_chest_ct_of_own_data(tmp_path):
    write_dicom(tmp_path / "in/ct", *chest())
    (volume,) = prepared_volumes(tmp_path / "in", tmp_path / "out", "chest-ct").values()
    torch.save(volume, tmp_path / "volume.pt")
    file = read_own(own_file(tmp_path, {"recon": "in/ct"}))
    data = OwnChestScans(file, is_train=False, num_items=1)
    assert data.why_unusable(0) is None
    expected = load_chest_volume(tmp_path / "volume.pt", ChestInput()).image
    np.testing.assert_allclose(data[0].image.numpy(), expected.numpy(), atol=2e-3)  # prepared ones are whole HU
