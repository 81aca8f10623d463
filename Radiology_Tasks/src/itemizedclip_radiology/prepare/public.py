"""Public data sets as they are downloaded, for `itemizedclip prepare studies SOURCE --from NAME`.

    mr-rate      splits.csv; batchNN/STUDY/img/STUDY_SERIES.nii.gz or batchNN/STUDY.zip, in mri/ or not; or
                 STUDY/native_space/img/…
    ct-rate      dataset/{train,valid}[_fixed]/train_1/train_1_a/train_1_a_1.nii.gz, dataset/metadata/*_metadata.csv
    rad-chestct  trn00001.npz …, in folders or not
    rsna         stage_2_train/ID_….dcm, the slices of all studies in one folder
    cq500        CQ500-CT-0.zip … or their folders
    brats        …Training…/BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1c.nii.gz and …Validation… (2023)

Their names are public and anonymous: studies, patients and splits keep them, since labels go by them. What is written
is what the recipes and benchmarks of the same names read.

Axes: D H W voxels.
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from nibabel.affines import voxel_sizes

from itemizedclip.data.batch import BadSampleError
from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.runtime.files import open_table
from itemizedclip_radiology.benchmarks.chest_ct import rad_chestct_id
from itemizedclip_radiology.benchmarks.head_ct import WINDOWS, cq500_id
from itemizedclip_radiology.data.archives import ARCHIVE_SUFFIXES, is_archive
from itemizedclip_radiology.data.ct_rate_tree import EXCLUDED_RECONSTRUCTIONS, parse_volume_name
from itemizedclip_radiology.data.mr_rate_tree import series_name
from itemizedclip_radiology.data.nifti import is_nifti, nifti_stem, read_nifti
from itemizedclip_radiology.data.scans import MAX_VOXELS, Scan, plain_voxels
from itemizedclip_radiology.data.volumes import excess_rescale_hu
from itemizedclip_radiology.prepare.labels import list_rsna_images, write_image_table
from itemizedclip_radiology.prepare.sources import Entry, Recipe, VolumeFacts

logger = logging.getLogger(__name__)


class PublicLayout(ABC):
    """How a public data set lies on disk, and where its volumes go.

    Attributes:
        name: of --from.
        recipe: how its volumes are prepared.
        then: the command that reads what is written; {to} stands for the folder.
        own_size: volumes keep their own size, and are resampled by what reads them.
        has_index: train.json, valid.json, … or itemized.json are written.
    """

    name: ClassVar[str]
    recipe: ClassVar[Recipe]
    then: ClassVar[str]
    own_size: ClassVar[bool] = False
    has_index: ClassVar[bool] = False

    @abstractmethod
    def entries(self, source: Path, state: Path) -> list[Entry]:
        """The studies of a download.

        Args:
            source: its folder.
            state: folder for what takes long to find out.

        Raises:
            MissingFileError: it holds none, or lacks a table that is needed.
        """

    def series(self, entry: Entry, opened: Path) -> list[tuple[str, Path]] | None:
        """(name, file) of a study's series; None: the DICOM series that are in it.

        Args:
            entry: the study.
            opened: its folder, unpacked.
        """
        return None

    def read(self, entry: Entry, path: Path, *, fill: bool) -> list[Scan]:
        """The volumes of one of these files.

        Raises:
            BadSampleError: a file that cannot be used.
        """
        return read_nifti(path, fill=fill)

    def file(self, entry: Entry, name: str, window: str) -> Path:
        """Where a volume goes, below --to; `window` is that of a head CT, such as BrainWindow."""
        return Path(entry.study, name, "img.pt")

    def study_of(self, text: str) -> str:
        """The study that a table of reports or items means; raises ValueError for what is none."""
        return text.strip()


def _folders(*candidates: Path) -> list[Path]:
    return [folder for folder in candidates if folder.is_dir()]


def _children(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _stem(path: Path) -> str:
    """The name of a folder, or that of an archive without its ending."""
    name = path.name
    for suffix in ARCHIVE_SUFFIXES:
        if path.is_file() and name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _no_study(source: Path, expected: str, name: str) -> MissingFileError:
    return MissingFileError(f"{source}: holds no study of {name}; expected {expected}")


# --- MR-RATE ---------------------------------------------------------------------------------------------------------


class MrRate(PublicLayout):
    """Brain and spine MRI; the volumes in their own space."""

    name = "mr-rate"
    recipe = "mri"
    then = "DATA_ROOT={to} itemizedclip train mr-rate; itemizedclip evaluate mr-rate --data-dir {to} --checkpoint …"
    has_index = True

    _SPLITS: ClassVar[dict[str, str]] = {"train": "train", "val": "valid", "valid": "valid", "test": "test"}

    def entries(self, source: Path, state: Path) -> list[Entry]:
        """See `PublicLayout`; only studies of splits.csv."""
        splits = self.patients_and_splits(source)
        found: dict[str, Path] = {}
        unlisted = 0
        for path in self._studies(source):
            study = _stem(path)
            if study not in splits:
                unlisted += 1
            elif study not in found or path.is_dir():
                found[study] = path
        if not found:
            raise _no_study(source, "batch00/STUDY_UID.zip, or STUDY_UID/img/…, of studies in splits.csv", "MR-RATE")
        if unlisted:
            logger.warning(
                "%d folders and archives of %s are in no line of splits.csv and are left out", unlisted, source
            )
        return [
            Entry(path, splits[study][0], splits[study][1], study=study, layout=self.name)
            for study, path in sorted(found.items())
        ]

    def patients_and_splits(self, source: Path) -> dict[str, tuple[str, str]]:
        """Study → patient, split; raises MissingFileError without splits.csv, UserError for another file."""
        tables = [path for path in (source / "splits.csv", source.parent / "splits.csv") if path.is_file()]
        if not tables:
            raise MissingFileError(
                f"{source}: no splits.csv in it; expected MR-RATE's folder: download splits.csv, too"
            )
        splits: dict[str, tuple[str, str]] = {}
        with open_table(tables[0], holding="MR-RATE's columns patient_uid, study_uid, split") as table:
            patient, study, split = table.place("patient_uid"), table.place("study_uid"), table.place("split")
            for where, row in table.rows():
                if row[split] not in self._SPLITS:
                    raise UserError(f"{where}: split is {row[split]!r}; expected train, val or test")
                splits[row[study].strip()] = row[patient].strip(), self._SPLITS[row[split]]
        return splits

    @staticmethod
    def _studies(source: Path) -> Iterator[Path]:
        for folder in _folders(source, source / "mri"):
            for path in _children(folder):
                if re.fullmatch(r"batch\d+", path.name):
                    yield from (child for child in _children(path) if child.is_dir() or is_archive(child))
                elif (
                    is_archive(path) or (path.is_dir() and (path / "img").is_dir()) or (path / "native_space").is_dir()
                ):
                    yield path

    def series(self, entry: Entry, opened: Path) -> list[tuple[str, Path]]:
        """See `PublicLayout`: AX_T1W, SAG_FLAIR, …, a second one of a kind AX_T1W_2."""
        folders = _folders(opened / "img", opened / "native_space" / "img")
        if not folders:
            raise BadSampleError(f"{entry.path}: has no folder img; expected MR-RATE's volumes in native space")
        named = []
        for path in _children(folders[0]):
            if is_nifti(path):
                stem = nifti_stem(path)
                named.append((series_name(stem) or stem.removeprefix(f"{entry.study}_"), path))
        return named


# --- chest CT --------------------------------------------------------------------------------------------------------


class CtRate(PublicLayout):
    """Chest CT; values and voxel sizes of the first release are put right by its metadata."""

    name = "ct-rate"
    recipe = "chest-ct"
    then = (
        "DATA_ROOT={to} ITEMS_JSON={to}/itemized.json bash train_ctrate.sh; itemizedclip evaluate ct-rate --data-dir "
        "{to} --checkpoint …"
    )
    has_index = True

    def entries(self, source: Path, state: Path) -> list[Entry]:
        """See `PublicLayout`; one entry per scan. Of train and train_fixed the second is taken."""
        facts = dict(self._metadata(source))
        found: list[Entry] = []
        for split in ("train", "valid"):
            bases = (source, source / "dataset")
            folders = _folders(*(base / f"{split}{suffix}" for suffix in ("_fixed", "") for base in bases))
            if len(folders) > 1:
                logger.warning("%s is taken, %s is not", folders[0], ", ".join(map(str, folders[1:])))
            for scan in self._scans(folders[:1], split):
                files = tuple(path for path in _children(scan) if is_nifti(path))
                known = tuple(facts[name] for path in files if (name := nifti_stem(path)) in facts)
                patient = scan.name.rsplit("_", 1)[0]
                found.append(Entry(scan, patient, split, study=scan.name, layout=self.name, files=files, facts=known))
        if not found:
            raise _no_study(source, "train/train_1/train_1_a/train_1_a_1.nii.gz, in dataset/ or not", "CT-RATE")
        return found

    @staticmethod
    def _scans(folders: Iterable[Path], split: str) -> Iterator[Path]:
        name = re.compile(rf"{split}_\d+_[a-z]+")
        for folder in folders:
            for patient in _children(folder):
                if patient.is_dir():
                    yield from (scan for scan in _children(patient) if scan.is_dir() and name.fullmatch(scan.name))

    @staticmethod
    def _metadata(source: Path) -> Iterator[tuple[str, VolumeFacts]]:
        for folder in _folders(source / "metadata", source / "dataset" / "metadata", source):
            for path in sorted(folder.glob("*metadata.csv")):
                with open_table(path, holding="CT-RATE's columns VolumeName, RescaleSlope, …") as table:
                    name, slope, intercept = map(table.place, ("VolumeName", "RescaleSlope", "RescaleIntercept"))
                    plane, between = table.place("XYSpacing"), table.place("ZSpacing")
                    for where, row in table.rows():
                        try:
                            x, y = (float(part) for part in row[plane].strip("[]() ").split(","))
                            volume = parse_volume_name(row[name]).stem
                            facts = VolumeFacts(
                                volume, float(row[slope]), float(row[intercept]), (x, y, float(row[between]))
                            )
                        except ValueError:
                            raise UserError(
                                f"{where}: expected a volume, two numbers, [x, y] and a number, found {row[name]}, "
                                f"{row[slope]}, {row[intercept]}, {row[plane]}, {row[between]}"
                            ) from None
                        yield volume, facts

    def series(self, entry: Entry, opened: Path) -> list[tuple[str, Path]]:
        """See `PublicLayout`."""
        return [(nifti_stem(path), path) for path in entry.files]

    def read(self, entry: Entry, path: Path, *, fill: bool) -> list[Scan]:
        """See `PublicLayout`; HU, the rescale applied exactly once."""
        name = nifti_stem(path)
        if name in EXCLUDED_RECONSTRUCTIONS:
            raise BadSampleError(f"{path}: left out by the published code, which gives no reason")
        scan = read_nifti(path, fill=fill)[0]
        known = next((facts for facts in entry.facts if facts.volume == name), None)
        if known is None:
            return [scan]
        told = np.array(known.spacing_mm)
        if not np.allclose(voxel_sizes(scan.affine), told, rtol=0.01):
            affine = scan.affine.copy()
            affine[:3, :3] *= told / voxel_sizes(scan.affine)
            sizes = " × ".join(f"{mm:g}" for mm in voxel_sizes(scan.affine))
            note = f"{name}: voxels of {sizes} mm in the file; those of the metadata are taken"
            scan = replace(scan, affine=affine, warnings=[*scan.warnings, note])
        return [_rescaled_once(scan, known)]

    def file(self, entry: Entry, name: str, window: str) -> Path:
        """See `PublicLayout`."""
        return parse_volume_name(name).path

    def study_of(self, text: str) -> str:
        """See `PublicLayout`; a volume stands for its scan."""
        return text.strip() if re.fullmatch(r"(train|valid)_\d+_[a-z]+", text.strip()) else parse_volume_name(text).scan


def _rescaled_once(scan: Scan, facts: VolumeFacts) -> Scan:
    """HU: values as they are where they look like it, else with slope and intercept."""
    try:
        excess_rescale_hu(torch.from_numpy(np.ascontiguousarray(scan.voxels)), source=scan.source)
    except BadSampleError:
        hu = plain_voxels(np.rint(scan.voxels * facts.slope + facts.intercept).astype(np.int32), scan.source)
        note = f"{scan.name}: rescaled by the metadata (slope {facts.slope:g}, intercept {facts.intercept:g})"
        return replace(scan, voxels=hu, notes=[*scan.notes, note])
    return scan


class RadChestCt(PublicLayout):
    """Chest CT of 0.8 mm, without orientation."""

    name = "rad-chestct"
    recipe = "chest-ct"
    then = "itemizedclip evaluate rad-chestct --data-dir {to} --checkpoint …"

    SPACING_MM = 0.8
    KEY = "ct"

    def entries(self, source: Path, state: Path) -> list[Entry]:
        """See `PublicLayout`."""
        found: dict[str, Path] = {}
        for path in sorted(source.rglob("*.npz")):
            try:
                found.setdefault(rad_chestct_id(path.name), path)
            except ValueError:
                continue
        if not found:
            raise _no_study(source, "files such as trn00001.npz", "Rad-ChestCT")
        # All of it is evaluated, whatever its names say; they name no patients.
        return [Entry(path, study, "valid", study=study, layout=self.name) for study, path in sorted(found.items())]

    def series(self, entry: Entry, opened: Path) -> list[tuple[str, Path]]:
        """See `PublicLayout`."""
        return [(entry.study, opened)]

    def read(self, entry: Entry, path: Path, *, fill: bool) -> list[Scan]:
        """See `PublicLayout`; slices, rows and columns are taken as they lie, as by the published converter."""
        expected = f"expected an .npz with an array {self.KEY!r} of slices × rows × columns"
        try:
            with zipfile.ZipFile(path) as archive:
                told = archive.getinfo(f"{self.KEY}.npy").file_size
                if told > MAX_VOXELS:  # bytes: a scan has a tenth
                    raise BadSampleError(f"{path}: tells of {told:,} bytes, more than any scan has; copy it again")
            with np.load(path, allow_pickle=False) as arrays:
                voxels = arrays[self.KEY]
        except BadSampleError:
            raise
        except Exception as error:  # bytes that are no such file make the reader fail in any way
            raise BadSampleError(f"{path}: cannot be read ({str(error)[:120]}); {expected}: copy it again") from None
        if voxels.ndim != 3 or min(voxels.shape) < 2 or voxels.dtype.kind not in "iuf":
            raise BadSampleError(f"{path}: {voxels.dtype} array of {'×'.join(map(str, voxels.shape))}; {expected}")
        affine = np.diag([-self.SPACING_MM, -self.SPACING_MM, self.SPACING_MM, 1.0])
        note = f"{entry.study}: stored without orientation; columns to the left, rows to the back, slices to the head"
        return [Scan(entry.study, plain_voxels(voxels, path, fill=fill).transpose(2, 1, 0), affine, path, "CT", [note])]

    def file(self, entry: Entry, name: str, window: str) -> Path:
        """See `PublicLayout`."""
        return Path(entry.study, f"{entry.study}.pt")

    def study_of(self, text: str) -> str:
        """See `PublicLayout`."""
        return rad_chestct_id(text)


# --- head CT ---------------------------------------------------------------------------------------------------------

_FILE_OF_WINDOW = {window: file for file, window in WINDOWS.items()}


class _Windows(PublicLayout):
    """Head CT in three windows: STUDY/SERIES/img_blood.pt, img_bone.pt, img_brain.pt."""

    recipe = "ct"

    def file(self, entry: Entry, name: str, window: str) -> Path:
        """See `PublicLayout`."""
        return Path(entry.study, name, _FILE_OF_WINDOW[window])


class Rsna(_Windows):
    """RSNA 2019: the slices of all studies in one folder, told apart by their headers."""

    name = "rsna"
    then = "itemizedclip evaluate rsna --data-dir {to} --labels rsna.csv --checkpoint …"

    def entries(self, source: Path, state: Path) -> list[Entry]:
        """See `PublicLayout`; which slice is whose is kept in the state folder: 750,000 headers are read but once."""
        table = state / "rsna_images.csv"
        if not table.is_file():
            logger.info("reading the headers of all slices of %s once", source)
            state.mkdir(parents=True, exist_ok=True)
            write_image_table(table, list_rsna_images(source))
        study_of: dict[str, str] = {}
        with open_table(table, holding="RSNA's images and studies") as rows:
            image, study = rows.place("ImageID"), rows.place("StudyInstanceUID")
            study_of = {row[image]: row[study] for _, row in rows.rows()}
        files: dict[str, list[Path]] = {}
        for folder, _, names in os.walk(source):
            for file in names:
                if file.removesuffix(".dcm") in study_of:
                    files.setdefault(study_of[file.removesuffix(".dcm")], []).append(Path(folder, file))
        if not files:
            raise _no_study(source, f"the .dcm files that {table} names", "RSNA")
        return [
            Entry(source, study, "valid", study=f"RSNA_{study}", layout=self.name, files=tuple(sorted(paths)))
            for study, paths in sorted(files.items())
        ]


class Cq500(_Windows):
    """CQ500: one zip or folder per study, named after it."""

    name = "cq500"
    then = "itemizedclip evaluate cq500 --data-dir {to} --labels CQ500.csv --checkpoint …"

    def entries(self, source: Path, state: Path) -> list[Entry]:
        """See `PublicLayout`."""
        found: dict[str, Path] = {}
        for path in _children(source):
            try:
                study = cq500_id(_stem(path))
            except ValueError:
                continue
            if path.is_dir() or (is_archive(path) and study not in found):
                found[study] = path
        if not found:
            raise _no_study(source, "CQ500-CT-0.zip, or folders such as 'CQ500CT0 CQ500CT0'", "CQ500")
        return [Entry(path, study, "valid", study=study, layout=self.name) for study, path in sorted(found.items())]


# --- BraTS -----------------------------------------------------------------------------------------------------------


class Brats(PublicLayout):
    """BraTS 2023, as Pub-Brain-5 holds it: pub_brain_5/brats23/train/adult_glioma/STUDY/SCAN.pt at its own size."""

    name = "brats"
    recipe = "mri"
    then = (
        "itemizedclip evaluate pub-brain-5 --data-dir {to} --labels pub_brain_5.csv --allow-missing --checkpoint … "
        "(with Pub-Brain-5's other parts beside it, without --allow-missing)"
    )
    own_size = True

    _CASE = re.compile(r"BraTS-(?P<kind>[A-Z]+)-(?P<patient>\d{5})-\d{3}")
    _KINDS: ClassVar[dict[str, str]] = {
        "GLI": "adult_glioma", "MEN": "adult_meningioma", "MET": "adult_metastasis", "PED": "pediatric_glioma",
    }  # fmt: skip

    def entries(self, source: Path, state: Path) -> list[Entry]:
        """See `PublicLayout`; a folder whose name holds Validation or Test is Pub-Brain-5's test part."""
        found: dict[str, Entry] = {}
        for folder, inside, _ in os.walk(source):
            inside.sort()
            for name in [name for name in inside if self._CASE.fullmatch(name)]:
                inside.remove(name)
                kind = self._CASE.fullmatch(name)
                if kind is None or kind["kind"] not in self._KINDS:
                    continue
                path = Path(folder, name)
                part = "test" if re.search(r"(?i)valid|test", str(path.relative_to(source).parent)) else "train"
                study = f"pub_brain_5/brats23/{part}/{self._KINDS[kind['kind']]}/{name}"
                found[name] = Entry(path, name.rsplit("-", 1)[0], "valid", study=study, layout=self.name)
        if not found:
            raise _no_study(source, "folders such as BraTS-GLI-00000-000 with NIfTI files", "BraTS")
        return [found[name] for name in sorted(found)]

    def series(self, entry: Entry, opened: Path) -> list[tuple[str, Path]]:
        """See `PublicLayout`."""
        return [(nifti_stem(path), path) for path in _children(opened) if is_nifti(path)]

    def file(self, entry: Entry, name: str, window: str) -> Path:
        """See `PublicLayout`."""
        return Path(entry.study, f"{name}.pt")


PUBLIC_LAYOUTS: dict[str, PublicLayout] = {
    layout.name: layout for layout in (MrRate(), CtRate(), RadChestCt(), Rsna(), Cq500(), Brats())
}
"""Value of --from → layout."""
