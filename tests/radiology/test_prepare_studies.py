"""Studies of scanners → what training reads: the same by any number of processes, and nobody's name in it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from itemizedclip_radiology.data.brain import BrainStudies
from itemizedclip_radiology.data.volumes import GREY_MEAN, GREY_STD
from itemizedclip_radiology.prepare import studies as module
from itemizedclip_radiology.prepare.pseudonyms import open_key, without_identities
from itemizedclip_radiology.prepare.studies import PrepareStudiesOptions, SeriesRecord, prepare, write_results
from itemizedclip_radiology.viewing.inputs import open_input
from PIL import Image
from scan_files import affine_of, brain_phantom, chest_phantom, world_of, write_dicom, write_nifti

from itemizedclip.models.factory import LoadedModel, load_model_config
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.jobs import JobEnd

SPOT = np.array([8.0, -12.0, 9.0])
SHAPE, SPACING = (44, 48, 20), (2.0, 2.0, 5.0)
PERSONAL = {
    "PatientName": "Musterfrau^Erika", "PatientID": "MRN7712", "AccessionNumber": "ACC99821", "StudyID": "ST4711",
    "PatientBirthDate": "19500102", "InstitutionName": "Hospital Nirgendwo", "ReferringPhysicianName": "Weiss^Otto",
    "StudyDate": "20240317", "StationName": "SCANNER5",
}  # fmt: skip


def write_study(folder: Path, number: int, names: tuple[str, ...] = ("AX T2", "SAG FLAIR Musterfrau")) -> None:
    """A brain MRI with everything in its headers that tells whose it is."""
    for k, name in enumerate(names):
        affine = affine_of("PIL" if "SAG" in name else "LPS", SPACING, SHAPE)
        write_dicom(folder / f"s{k}", brain_phantom(world_of(SHAPE, affine), SPOT), affine, description=name,
                    modality="MR", number=k + 1)  # fmt: skip
        for path in (folder / f"s{k}").iterdir():
            data = pydicom.dcmread(path)
            for tag, value in PERSONAL.items():
                setattr(data, tag, value)
            data.PatientID, data.StudyInstanceUID = f"MRN7712{number}", f"1.2.840.77{number}"
            pydicom.dcmwrite(path, data)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Four studies, one of them with a scout and a broken file, beside a NIfTI file."""
    root = tmp_path_factory.mktemp("pacs")
    for number in range(3):
        write_study(root / f"Musterfrau_Erika_{number}" / "exam", number)
    affine = affine_of("LPS", SPACING, SHAPE)
    voxels = brain_phantom(world_of(SHAPE, affine), SPOT)
    write_dicom(root / "Musterfrau_Erika_1/scout", voxels[:, :, :3], affine, kind="LOCALIZER", modality="MR", number=9)
    (root / "Musterfrau_Erika_1/broken.dcm").write_bytes(b"\0" * 400)
    write_nifti(root / "Musterfrau_t1_post.nii.gz", voxels, affine)
    (root / "empty").mkdir()
    return root


def options(source: Path, to: Path, **more: object) -> PrepareStudiesOptions:
    """Quick: one process after the other, in a key of the test's own."""
    wanted = {"recipe": "mri", "valid_share": 0.4, "key_file": to.parent / "key", "workers": 1} | more
    return PrepareStudiesOptions(source=source, to=to, **wanted)


def in_this_process(function, jobs, **_):
    """Stands for `run_jobs` where processes are not what is tested."""
    for number, job in enumerate(jobs):
        function(*job)
        yield JobEnd(number, "", 0.1)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "run_jobs", in_this_process)


def contents(to: Path) -> dict[str, object]:
    """Everything that was written but thumbnails' bytes."""
    return {
        str(path.relative_to(to)): torch.load(path).numpy().tobytes() if path.suffix == ".pt" else path.read_bytes()
        for path in sorted(to.rglob("*"))
        if path.is_file()
    }


def test_what_training_reads(source, tmp_path, quick):
    to = tmp_path / "out"
    records = prepare(options(source, to))
    write_results(to, "mri", records)
    kept = [record for record in records if record.file]
    assert len(kept) == 7
    assert sorted({Path(record.file).parent.name for record in kept}) == ["AX_T2", "AX_t1_post", "SAG_FLAIR"]
    reasons = sorted(record.reason for record in records if record.reason)
    assert reasons == ["a localizer", "holds no DICOM or NIfTI scan"]
    splits = {split: json.loads((to / f"{split}.json").read_text()) for split in ("train", "valid")}
    assert len(splits["train"]) + len(splits["valid"]) == 4
    # The volume is what the viewer gives the model for the same series.
    dicom = next(record for record in kept if record.series == "AX_T2")
    names = list(csv.DictReader((to / "series.csv").open()))
    assert {row["study"] for row in names} == {record.study for record in records}
    volume = torch.load(to / dicom.file)
    assert volume.dtype == torch.uint8
    assert volume.shape == (48, 224, 224)
    model = LoadedModel(None, load_model_config("HLIPSN_BiomedBERT_81616_itemizedclip"), lambda texts: None, {})
    shown = open_input(source / "Musterfrau_Erika_0/exam/s0", model)
    expected = (shown.image[0, 0] * GREY_STD + GREY_MEAN) * 255
    torch.testing.assert_close(volume.float(), expected, atol=0.51, rtol=0)
    sidecar = json.loads((to / dicom.file).with_suffix(".json").read_text())
    assert sidecar["geometry"]["view_size"] == [48, 224, 224]
    np.testing.assert_allclose(sidecar["straight_and_turned"]["affine"], shown.views[0].affine, atol=1e-4)
    with Image.open(to / "contact_sheet.png") as sheet:
        assert sheet.size[0] > 500
    # Reports that were put in stay when more is prepared, and training reads it all.
    for split in splits:
        for entry in splits[split].values():
            entry["report"] = ["No acute infarct."]
        (to / f"{split}.json").write_text(json.dumps(splits[split]))
    write_results(to, "mri", prepare(options(source, to)))
    split = "train" if splits["train"] else "valid"
    data = BrainStudies(data_root=to, json_path=to / f"{split}.json", is_train=False, num_items=3, seed=0)
    assert data[0].items == ["No acute infarct."]
    assert tuple(data[0].image.shape[1:]) == (1, 48, 224, 224)


def test_nothing_tells_whose_it_is(source, tmp_path, quick, caplog):
    to = tmp_path / "out"
    with caplog.at_level("INFO"):
        write_results(to, "mri", prepare(options(source, to)))
    words = {part for value in PERSONAL.values() for part in value.split("^")} | {"MRN", "1.2.840", "Musterfrau"}
    said = " ".join(record.getMessage() for record in caplog.records)
    for path in to.rglob("*"):
        text = str(path.relative_to(to)) + (path.read_bytes().decode("latin-1") if path.is_file() else "")
        for word in words:
            assert word.lower() not in text.lower(), (word, path)
    assert not any(word in said for word in words)


def test_names_are_joined_by_a_table_of_its_own(source, tmp_path, quick):
    to, table = tmp_path / "out", tmp_path / "private/names.csv"
    prepare(options(source, to, names_table=table))
    rows = list(csv.DictReader(table.open()))
    assert {Path(row["path"]).name for row in rows} == {path.name for path in source.iterdir()}
    assert table.stat().st_mode & 0o077 == 0
    with pytest.raises(UserError, match="lies in --to, which is shared"):
        options(source, to, names_table=to / "names.csv")


@pytest.mark.slow
def test_shards_processes_and_kills_change_nothing(source, tmp_path):
    whole = tmp_path / "a" / "out"
    whole.parent.mkdir()
    write_results(whole, "mri", prepare(options(source, whole, workers=2)))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/key").write_text((tmp_path / "a/key").read_text())
    parts = tmp_path / "b" / "out"
    for shard in ("2/2", "1/2"):
        records = prepare(options(source, parts, shard=shard, workers=2))
    write_results(parts, "mri", records)
    assert contents(parts) == contents(whole)
    # Killed at some moment, and started again.
    (tmp_path / "c").mkdir()
    (tmp_path / "c/key").write_text((tmp_path / "a/key").read_text())
    killed = tmp_path / "c" / "out"
    flags = ["--to", str(killed), "--recipe", "mri", "--valid-share", "0.4", "--key-file", str(tmp_path / "c/key"),
             "--workers", "1"]  # fmt: skip
    command = [sys.executable, "-m", "itemizedclip_radiology.prepare.studies", str(source), *flags]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(killed.glob(".prepare/done/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)  # its children end with it
    assert subprocess.run(command, stderr=subprocess.PIPE, check=False).returncode == 0
    found = contents(killed)
    assert {name: value for name, value in found.items() if not name.endswith(".part")} == contents(whole)


def test_ct_becomes_its_windows_and_chests_hu(tmp_path, quick):
    shape, spacing = (64, 64, 24), (2.0, 2.0, 5.0)
    affine = affine_of("LPS", spacing, shape)
    hu = chest_phantom(world_of(shape, affine), SPOT)
    write_dicom(tmp_path / "ct/one", hu, affine, description="head routine")
    write_dicom(tmp_path / "ct/mr", brain_phantom(world_of(shape, affine), SPOT), affine, modality="MR", number=2)
    records = prepare(options(tmp_path / "ct", tmp_path / "head", recipe="ct"))
    windows = ["BloodWindow", "BoneWindow", "BrainWindow"]
    assert sorted(record.series for record in records if record.file) == [f"head_routine_AX_{w}" for w in windows]
    assert [record.reason for record in records if record.reason] == ["a MR series; the recipe ct takes CT"]
    records = prepare(options(tmp_path / "ct", tmp_path / "chest", recipe="chest-ct", valid_share=0.0))
    (kept,) = [record for record in records if record.file]
    write_results(tmp_path / "chest", "chest-ct", records)
    volume = torch.load(tmp_path / "chest" / kept.file)
    assert volume.dtype == torch.int16
    assert volume.shape == (40, 128, 128)
    assert (volume.min(), volume.max()) == (-1000, 1500)
    (scan,) = json.loads((tmp_path / "chest/itemized.json").read_text()).values()
    assert scan == {"recons": [f"{Path(kept.file).stem}.nii.gz"], "report": []}


def test_burned_in_text_is_left_out(tmp_path, quick):
    write_study(tmp_path / "pacs/one", 1, ("AX T2",))
    for path in (tmp_path / "pacs/one").rglob("*.dcm"):
        data = pydicom.dcmread(path)
        data.BurnedInAnnotation = "YES"
        pydicom.dcmwrite(path, data)
    (record,) = prepare(options(tmp_path / "pacs", tmp_path / "out"))
    assert record.reason == "its header says that text about the patient is burned into the images"


def test_a_list_of_paths_with_patients_and_splits(source, tmp_path, quick):
    table = tmp_path / "list.csv"
    rows = [(path, "P1" if "_0" in path.name or "_1" in path.name else "P2") for path in sorted(source.iterdir())]
    lines = [f"{path},{patient},{'valid' if patient == 'P1' else 'train'}" for path, patient in rows]
    table.write_text("path,patient,split\n" + "\n".join(lines) + "\n")
    records = prepare(options(table, tmp_path / "out"))
    assert {record.split for record in records if record.series == "AX_T2"} == {"train", "valid"}
    assert sum(record.split == "valid" for record in records if record.file) == 4
    table.write_text("path,split\na,dev\n")
    with pytest.raises(UserError, match="line 2: split is 'dev'; expected train or valid"):
        prepare(options(table, tmp_path / "out"))
    table.write_text("file\na\n")
    with pytest.raises(UserError, match="no column 'path'; found file"):
        prepare(options(table, tmp_path / "out"))
    with pytest.raises(UserError, match="--shard is '3/2'"):
        options(table, tmp_path / "out", shard="3/2")


def test_files_beside_folders_are_read(tmp_path, quick):
    write_study(tmp_path / "pacs/a", 1, ("AX T2",))
    write_study(tmp_path / "loose", 2, ("AX T2",))
    for path in (tmp_path / "loose/s0").iterdir():
        path.rename(tmp_path / "pacs" / path.name)
    (tmp_path / "pacs/notes.txt").write_text("who came when")
    records = prepare(options(tmp_path / "pacs", tmp_path / "out"))
    assert [(record.series, record.reason) for record in records] == [("AX_T2", "")] * 2
    assert len({record.study for record in records}) == 2
    # Notes alone are no study.
    for path in (tmp_path / "pacs").glob("*.dcm"):
        path.unlink()
    assert len(prepare(options(tmp_path / "pacs", tmp_path / "less"))) == 1


def test_pseudonyms_need_the_key(tmp_path):
    names = open_key(tmp_path / "keys/one")
    assert (tmp_path / "keys/one").stat().st_mode & 0o077 == 0
    assert open_key(tmp_path / "keys/one") == names
    assert names.name("study", "1.2.3") == names.name("study", "1.2.3") != names.name("patient", "1.2.3")
    assert open_key(tmp_path / "keys/two").name("study", "1.2.3") != names.name("study", "1.2.3")
    (tmp_path / "no").write_text("secret")
    with pytest.raises(UserError, match="no: holds no key"):
        open_key(tmp_path / "no")
    assert (
        without_identities("t2 Erika MRN7712 of 20240317", {"Musterfrau^Erika", "MRN7712", "20240317"}) == "t2 … … of …"
    )


def test_records_name_their_reason_once():
    records = [SeriesRecord("s0123456789ab", "a", "train", reason=f"s0123456789ab: covers {n} mm") for n in (3, 4)]
    table = module.summary_table([replace(records[0], file="x", reason=""), *records])
    assert table.row_count == 3
