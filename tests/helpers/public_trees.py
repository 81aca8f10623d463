"""Small downloads of public data sets, in their real layouts: invented volumes under invented names."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from scan_files import affine_of, brain_phantom, chest_phantom, world_of, write_dicom, write_nifti

SHAPE, SPACING = (40, 44, 16), (2.2, 2.2, 6.0)
SPOT = np.array([8.0, -12.0, 9.0])
CHEST_SHAPE, CHEST_SPACING = (56, 56, 20), (2.0, 2.0, 6.0)


def brain(codes: str = "LPS", spot: Sequence[float] = SPOT) -> tuple[np.ndarray, np.ndarray]:
    """A brain MRI on a small grid, and its affine."""
    affine = affine_of(codes, SPACING, SHAPE)
    return brain_phantom(world_of(SHAPE, affine), np.asarray(spot)), affine


def chest(spot: Sequence[float] = SPOT) -> tuple[np.ndarray, np.ndarray]:
    """A chest CT in HU on a small grid, and its affine."""
    affine = affine_of("LPS", CHEST_SPACING, CHEST_SHAPE)
    return chest_phantom(world_of(CHEST_SHAPE, affine), np.asarray(spot)), affine


def write_mr_rate(
    root: Path, *, num_train: int = 3, num_valid: int = 2, num_test: int = 4, zipped: Sequence[int] = (1,)
) -> dict[str, str]:
    """MR-RATE: study → its split. Odd studies have a lesion at the one side, even ones at the other.

    Files: batch00/STUDY/img/…, some as .zip; splits.csv, reports/, metadata/, pathology_labels/, sentences.jsonl,
    pathologies.json. The sentences of the last training study are marked as unreadable.
    """
    splits = ["train"] * num_train + ["val"] * num_valid + ["test"] * num_test
    rows, labels, sentences, reports = [], [], [], []
    for number, split in enumerate(splits):
        study, patient = f"22B{number:04d}", f"P{number // 2 if split == 'train' else number:03d}"
        folder = root / "mri/batch00" / study
        side = 1 if number % 2 else -1
        for series, codes in (("t1w-raw-axi", "LPS"), ("flair-raw-sag", "PIL"), ("t1w-raw-axi-2", "LPS")):
            voxels, affine = brain(codes, (side * 12.0, -12.0, 9.0))
            name = f"{study}_{series}"
            write_nifti(folder / f"img/{name}.nii.gz", voxels.astype(np.uint16), affine)
        write_nifti(folder / f"seg/{study}_t1w-raw-axi_brain-mask.nii.gz", (voxels > 0).astype(np.uint8), affine)
        if number in zipped:
            with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
                for path in sorted(folder.rglob("*.nii.gz")):
                    archive.write(path, path.relative_to(folder.parent))
                    path.unlink()
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir()
            folder.rmdir()
        rows.append(f"batch00,{patient},{study},{split}")
        labels.append(f"{study},{number % 2},{1 - number % 2}")
        finding = "infarct" if number % 2 else "meningioma"
        reports.append(
            f'{study},"all","","MRI","A {finding} is seen on the {"left" if side > 0 else "right"}.","{finding}"'
        )
        texts = [f"There is {finding}.", f"Lesion in the {'left' if side > 0 else 'right'} hemisphere."]
        sentences.append({"volume_name": study, "valid_json": number != num_train - 1, "extracted_sentences": texts})
    for name, header, lines in (
        ("splits.csv", "batch_id,patient_uid,study_uid,split", rows),
        ("pathology_labels/mrrate_labels.csv", "study_uid,Cerebral infarction,Intracranial meningioma", labels),
        ("reports/batch00_reports.csv", "study_uid,report,clinical_information,technique,findings,impression", reports),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("\n".join([header, *lines]) + "\n")
    (root / "sentences.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sentences))
    named = {
        "Cerebral infarction": {"positive": "There is infarct", "negative": "There is no infarct"},
        "Intracranial meningioma": {"positive": "There is meningioma", "negative": "There is no meningioma"},
    }
    (root / "pathologies.json").write_text(json.dumps({"pathologies": named}))
    return {f"22B{number:04d}": split for number, split in enumerate(splits)}


def write_ct_rate(root: Path, *, first_release: bool = False) -> None:
    """CT-RATE: two training scans, one with two reconstructions, and one of validation; metadata.

    Of the first release: values without their intercept of -1024 and voxels of 1 mm in the files.
    """
    lines = ["VolumeName,Manufacturer,RescaleIntercept,RescaleSlope,XYSpacing,ZSpacing"]
    for scan, count in (("train_1_a", 2), ("train_2_b", 1), ("valid_1_a", 1)):
        split, patient, _ = scan.split("_")
        for number in range(1, count + 1):
            hu, affine = chest()
            if first_release:
                hu, affine = hu + 1024, np.diag([-1.0, -1.0, 1.0, 1.0])
            name = f"{scan}_{number}.nii.gz"
            write_nifti(root / f"dataset/{split}/{split}_{patient}/{scan}/{name}", hu.astype(np.int16), affine)
            lines.append(f'{name},Made,-1024,1,"[2.0, 2.0]",6.0')
    (root / "dataset/metadata").mkdir(parents=True)
    (root / "dataset/metadata/train_metadata.csv").write_text("\n".join(lines) + "\n")


def write_rad_chestct(root: Path, names: Sequence[str] = ("trn00001", "val00002", "tst00003")) -> np.ndarray:
    """Rad-ChestCT: .npz files of slices × rows × columns at 0.8 mm; the array that all of them hold."""
    affine = affine_of("LPS", (0.8, 0.8, 0.8), (100, 90, 60))
    voxels = chest_phantom(world_of((100, 90, 60), affine), np.array([4.0, 2.0, 3.0])).clip(-1000, 1000)
    array = np.ascontiguousarray(voxels.transpose(2, 1, 0)).astype(np.int16)
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        np.savez_compressed(root / f"{name}.npz", ct=array)
    return array


def _head_ct(folder: Path, study: str, number: int, description: str = "") -> list[Path]:
    hu, affine = chest()  # values of a CT are what matters
    write_dicom(folder, hu, affine, description=description, number=number)
    paths = sorted(folder.glob("*.dcm"))
    for path in paths:
        data = pydicom.dcmread(path)
        data.StudyInstanceUID = study
        pydicom.dcmwrite(path, data)
    return paths


def write_rsna(root: Path, studies: Sequence[str] = ("ID_00aa11bb22", "ID_0123456789")) -> None:
    """RSNA: the slices of all studies as ID_….dcm in one folder."""
    folder = root / "stage_2_train"
    folder.mkdir(parents=True)
    for number, study in enumerate(studies):
        for k, path in enumerate(_head_ct(root / "made" / study, study, 1)):
            image = f"ID_{number:03x}{k:06x}"
            data = pydicom.dcmread(path)
            data.SOPInstanceUID = image
            pydicom.dcmwrite(folder / f"{image}.dcm", data)
            path.unlink()


def write_cq500(root: Path) -> None:
    """CQ500: one study of two series as a zip, one as a folder."""
    for number, series in ((0, ("CT Plain", "CT 4cc sec 150cc D3D on")), (7, ("CT Plain",))):
        folder = root / f"CQ500CT{number} CQ500CT{number}"
        for k, name in enumerate(series):
            _head_ct(folder / "Unknown Study" / name, f"1.2.{number}", k + 1)
    folder = root / "CQ500CT0 CQ500CT0"
    with zipfile.ZipFile(root / "CQ500-CT-0.zip", "w") as archive:
        for path in sorted(folder.rglob("*.dcm")):
            archive.write(path, path.relative_to(root))
            path.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir()
    folder.rmdir()


def write_brats(root: Path) -> None:
    """BraTS: two glioma cases of training, one metastasis of validation, with their outlines."""
    for part, case in (
        ("ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData", "BraTS-GLI-00000-000"),
        ("ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData", "BraTS-GLI-00001-001"),
        ("ASNR-MICCAI-BraTS2023-MET-Challenge-ValidationData", "BraTS-MET-00002-000"),
    ):
        for scan in ("t1c", "t2f", "seg"):
            voxels, affine = brain()
            values = voxels if scan != "seg" else (voxels > 0).astype(np.int16)
            write_nifti(root / part / case / f"{case}-{scan}.nii.gz", values, affine)
