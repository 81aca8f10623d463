"""What a viewer opens with a radiology model: one study or scan, as the model takes it and as people look at it.

Read, for a brain model (several series):
    STUDY/SERIES/img.pt             the training layout
    STUDY/SERIES/img_{blood,bone,brain}.pt   RSNA and CQ500, also the SERIES folder alone
    STUDY/SCAN.pt                   Pub-Brain-5
    one .pt file, one NIfTI file, a folder of NIfTI files, a folder of DICOM series
and for a chest model (one volume): one .pt file, one NIfTI file, a DICOM series, or a folder that holds just one.
A folder may come packed, as .zip, .tar or .tar.gz.

A NIfTI file or DICOM series of a brain is prepared as the Pub-Brain-5 files were: columns to the right, rows to the
back, slices to the feet, the axis of the largest spacing as slices; grey values clipped at the 0.5 and 99.5
percentiles. A head CT becomes three series, one per window of `HEAD_WINDOWS_HU`. A chest is prepared as CT-RATE was:
HU, trilinear to 3×1×1 mm, window, centred pad and crop.

Axes: S series, D H W voxels, of a view in its file's own grid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.items import normalise_item
from itemizedclip.models.factory import LoadedModel
from itemizedclip.runtime.files import read_json
from itemizedclip.viewer.geometry import Geometry
from itemizedclip.viewer.inputs import FileGrid, InputView, ModelInput, SeriesChoice, SeriesListed, SliceLabels
from itemizedclip_radiology.benchmarks.head_ct import (
    WINDOWS,
    cq500_window_files,
    rsna_id,
    rsna_window_files,
    window_folders,
)
from itemizedclip_radiology.benchmarks.labelled_studies import visible_entries
from itemizedclip_radiology.benchmarks.pub_brain_5 import series_name as pub_brain_5_name
from itemizedclip_radiology.data.archives import unpacked_archive
from itemizedclip_radiology.data.chest import ChestInput, ChestSettings, double_rescale_hu
from itemizedclip_radiology.data.ct_rate_tree import parse_volume_name
from itemizedclip_radiology.data.dicom import DicomSeries, find_dicom_series, read_dicom, usable_series
from itemizedclip_radiology.data.mr_rate_tree import series_name as mr_rate_series
from itemizedclip_radiology.data.nifti import is_nifti, nifti_stem, read_nifti
from itemizedclip_radiology.data.reports import report_items
from itemizedclip_radiology.data.scans import (
    Body,
    OrientedScan,
    Scan,
    check_field_of_view,
    looks_like_hu,
    looks_like_shifted_hu,
    orient,
    series_text,
    straightened,
)
from itemizedclip_radiology.data.studies import Preparation, SeriesFile, load_study
from itemizedclip_radiology.data.volumes import (
    GREY_MEAN,
    GREY_STD,
    HounsfieldWindow,
    Size,
    VoxelMap,
    chest_start,
    normalise_grey,
    padded_in_plane,
    read_volume,
    resample_brain,
    resize_chest,
    take_box,
)
from itemizedclip_radiology.models.series_names import encode_series_names

HEAD_WINDOWS_HU: Mapping[str, HounsfieldWindow] = {
    "BloodWindow": HounsfieldWindow(-20, 180),
    "BoneWindow": HounsfieldWindow(-800, 2000),
    "BrainWindow": HounsfieldWindow(0, 80),
}
"""Last part of a head CT's series name → HU shown as black and white.

The published preparation does not say its limits. These are the ones radiologists read hemorrhage with: level 80 width
200 (subdural), level 600 width 2800 (bone), level 40 width 80 (brain).
"""

BRAIN_CODES, CHEST_CODES = "RPI", "LPS"
"""Where columns, rows and slices are counted to in the converted files of either kind."""

CHEST_SPACING_MM = (3.0, 1.0, 1.0)
"""Spacing (D, H, W) of the chest model's input, and of every chest `.pt` file."""

BRAIN_PERCENTILES = 0.5, 99.5
"""Grey values of an MRI beyond these become black and white."""

_TRAINING_FILE = "img.pt"
_NOT_SCANS = ("seg", "mask")  # in the name of a NIfTI file: somebody's outlines, as the published converter knows them
_MOST_LISTED = 8

_FoundT = TypeVar("_FoundT")


def body_of(config: Mapping[str, Any]) -> Body:
    """What a radiology model reads: whole studies of the head, or single chest volumes.

    A model that attends over a study, or reads series names, is made for several series; a chest model is neither.
    """
    vision = config["vision_cfg"]
    return "brain" if vision.get("series_names") or "study" in vision["block_scopes"] else "chest"


def open_input(
    source: Path, loaded: LoadedModel, choice: SeriesChoice | None = None, chest: ChestInput | None = None
) -> ModelInput:
    """Read a study or scan for a radiology model (entry point `itemizedclip.inputs`).

    Args:
        source: a file or folder, see the module's docstring; a DICOM file stands for its series.
        loaded: a model of this wing.
        choice: which series are read; default: all.
        chest: window, fit and what to do about a double rescale; its size is the model's. Default: as the checkpoint
            was trained, else as published.

    Raises:
        BadSampleError: nothing there, nothing that can be read, or several scans for a chest model.
        SeriesListed: `choice.list_only`.
    """
    if not source.exists():
        raise BadSampleError(f"{source}: no such file or folder; expected a study folder, a .pt, NIfTI or DICOM scan")
    choice = choice or SeriesChoice()
    with unpacked_archive(source) as opened:
        size: Size = tuple(loaded.config["vision_cfg"]["volume_size"])
        remarks = _Remarks()
        if body_of(loaded.config) == "chest":
            options = chest or ChestSettings().chest_input(size, loaded.meta.get("transform"))
            series = [_open_chest(opened, replace(options, size=size), choice, remarks)]
        else:
            series = _open_brain(opened, size, choice, remarks)
        remarks.replace(str(opened), str(source))
    names = [one.view.name for one in series]
    return ModelInput(
        name=_name_of(source),
        image=torch.stack([one.image for one in series]),
        views=[one.view for one in series],
        series_names=encode_series_names(names) if loaded.reads_series_names else None,
        items=report_beside(source.resolve()),
        notes=remarks.notes,
        warnings=remarks.warnings,
    )


@dataclass
class _Remarks:
    """What is said of a study: notes, and warnings that must be known to use the result."""

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def of(self, scan: Scan) -> None:
        """Take over those of a scan."""
        self.notes += scan.notes
        self.warnings += scan.warnings

    def replace(self, folder: str, source: str) -> None:
        """Name the archive instead of the folder that it was unpacked into."""
        self.notes = [text.replace(folder, source) for text in self.notes]
        self.warnings = [text.replace(folder, source) for text in self.warnings]


@dataclass(frozen=True)
class PreparedSeries:
    """One series: (1, D, H, W) as the model takes it, and its view."""

    image: Tensor
    view: InputView


def _name_of(source: Path) -> str:
    """For titles and file names; a training file says nothing by its own name."""
    path = source.resolve()
    if path.name == _TRAINING_FILE or path.name in WINDOWS:
        return f"{path.parent.parent.name}/{path.parent.name}"
    return path.name


def report_beside(path: Path) -> list[str]:
    """The items of a study's report, where the index of its data set lies at its usual place.

    Brain studies: train.json, valid.json or val.json in the data set's folder or its parent. CT-RATE: itemized.json
    four folders above a volume, items lower-cased as in training.
    """
    if path.name in (_TRAINING_FILE, *WINDOWS):
        path = path.parent.parent
    if path.suffix == ".pt" and _is_ct_rate(path) and len(path.parents) > 3:
        name, candidates = parse_volume_name(path.name).scan, [path.parents[3] / "itemized.json"]
    else:
        name = path.name
        folders = [path.parent, path.parent.parent]
        candidates = [folder / f"{split}.json" for folder in folders for split in ("train", "valid", "val")]
    for candidate in candidates:
        if not candidate.is_file():
            continue
        try:
            entries = read_json(candidate, holding="studies")
            report = entries[name]["report"] if isinstance(entries, dict) and name in entries else None
            items = [] if report is None else report_items(report)
        except (ValueError, KeyError, TypeError):
            continue  # another kind of file, which is not asked for here
        if items:
            return [normalise_item(item) for item in items] if candidate.name == "itemized.json" else items
    return []


# --- what is in a file or folder -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """What a source holds; one of the three lists is filled.

    Attributes:
        tensors: `.pt` files.
        prepare: how they become volumes, see `itemizedclip_radiology.data.studies`.
        nifti: NIfTI files.
        dicom: whether to look for DICOM series.
        notes: what was left out.
    """

    tensors: list[SeriesFile] = field(default_factory=list)
    prepare: Preparation = "crop"
    nifti: list[Path] = field(default_factory=list)
    dicom: bool = False
    notes: list[str] = field(default_factory=list)


def _find(source: Path) -> _Found:
    if source.is_file():
        if source.suffix == ".pt":
            return _Found([_single_tensor(source)])
        return _Found(nifti=[source]) if is_nifti(source) else _Found(dicom=True)
    entries = visible_entries(source)
    training = [entry / _TRAINING_FILE for entry in entries if (entry / _TRAINING_FILE).is_file()]
    if training:
        return _Found([SeriesFile(path.parent.name, path) for path in training])
    if any((source / name).is_file() for name in WINDOWS):
        return _Found(_windows(source, source.parent.name))
    folders = window_folders(source)
    if folders:
        first_only = _is_rsna(source.name)
        notes = [f"of {len(folders)} series the first is read, as in RSNA"] if first_only and len(folders) > 1 else []
        used = folders[:1] if first_only else folders
        return _Found([file for folder in used for file in _windows(folder, source.name)], notes=notes)
    tensors = [entry for entry in entries if entry.suffix == ".pt"]
    if (source / _TRAINING_FILE).is_file() and len(tensors) == 1:
        return _Found([SeriesFile(source.name, source / _TRAINING_FILE)])
    if tensors:
        return _Found([SeriesFile(pub_brain_5_name(path), path) for path in tensors], "resample")
    volumes = sorted(path for path in source.rglob("*") if is_nifti(path) and not path.name.startswith("."))
    scans = [path for path in volumes if not any(word in _nifti_name(path).lower() for word in _NOT_SCANS)]
    if scans:
        left_out = [path.name for path in volumes if path not in scans]
        notes = [f"not read, as their names say segmentation: {_listed(left_out)}"] if left_out else []
        return _Found(nifti=scans, notes=notes)
    return _Found(dicom=True)


def _is_rsna(study: str) -> bool:
    try:
        rsna_id(study)
    except ValueError:
        return False
    return True


def _windows(folder: Path, study: str) -> list[SeriesFile]:
    return rsna_window_files(folder) if _is_rsna(study) else cq500_window_files(folder)


def _single_tensor(path: Path) -> SeriesFile:
    if path.name == _TRAINING_FILE:
        return SeriesFile(path.resolve().parent.name, path)
    if path.name in WINDOWS:
        folder = path.resolve().parent
        return next(file for file in _windows(folder, folder.parent.name) if file.path.name == path.name)
    return SeriesFile(pub_brain_5_name(path), path)


def _nifti_name(path: Path) -> str:
    """The part of a NIfTI file's name that tells its series: what follows the last hyphen, or its folder's name."""
    stem = path.name[: path.name.lower().rindex(".nii")]
    mr_rate = mr_rate_series(stem)
    if mr_rate is not None:
        return mr_rate
    if stem.lower() in ("series", "img", "image", "scan"):
        parents = [parent.name for parent in path.resolve().parents if parent.name.lower() != "nifti"]
        return parents[0] if parents else stem
    return stem.rsplit("-", 1)[-1] or stem


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_LISTED
    return ", ".join(names[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def _nothing(source: Path, body: Body, left_out: Sequence[str] = ()) -> BadSampleError:
    for depth in ("*/*", "*/*/*"):
        first = next(source.glob(f"{depth}/{_TRAINING_FILE}"), None) if source.is_dir() else None
        if first is not None:
            return BadSampleError(f"{source}: holds studies; give the folder of one, such as {first.parent.parent}")
    expected = {
        "brain": "STUDY/SERIES/img.pt, SCAN.pt, NIfTI files or DICOM series of CT or MR",
        "chest": "one .pt volume in HU, one NIfTI file or one DICOM series of CT",
    }[body]
    found = f" ({'; '.join(left_out[:_MOST_LISTED])})" if left_out else ""
    return BadSampleError(f"{source}: holds no scan{found}; expected {expected}")


# --- brain MRI and head CT -------------------------------------------------------------------------------------------


def _open_brain(source: Path, size: Size, choice: SeriesChoice, remarks: _Remarks) -> list[PreparedSeries]:
    found = _find(source)
    remarks.notes += found.notes
    if found.tensors:
        prepare = found.prepare
        if source.is_file() and not _fits(source, size):
            prepare = "resample"
        files = _chosen(source, found.tensors, lambda file: (file.name, file.path.name), choice, remarks)
        return _brain_tensors(source.name, files, prepare, size, remarks)
    series: list[PreparedSeries] = []
    problems: list[str] = []
    for scan in _scans(source, found, choice, remarks, problems, "brain"):
        try:
            check_field_of_view(scan, "brain")
            scan = straightened(scan)
            series += brain_series(scan, size)
        except BadSampleError as error:
            problems.append(str(error))
            continue
        remarks.of(scan)
    if not series:
        raise BadSampleError(problems[0]) if problems else _nothing(source, "brain")
    remarks.warnings += [f"series left out: {problem}" for problem in problems]
    return series


def scan_series(source: Path, size: Size) -> list[tuple[str, Tensor]]:
    """The series of a NIfTI file, or of a file or folder of a DICOM series, as files of grey values would hold them.

    Returns:
        (what tells it from the others, "" when it is alone; uint8 (D, H, W)): the three windows of a head CT, the
        volumes of a file or folder that holds several.

    Raises:
        BadSampleError: nothing that can be read.
    """
    with unpacked_archive(source) as opened:
        _found_scans(opened, "brain")
        series = _open_brain(opened, size, SeriesChoice(), _Remarks())
    greys = [grey_values(one) for one in series]
    if len(series) == 1:
        return [("", greys[0])]
    windows = [next((word for word in HEAD_WINDOWS_HU if one.view.name.endswith(f"_{word}")), "") for one in series]
    names = windows if len(set(windows)) == len(series) else [one.view.name for one in series]
    return list(zip(names, greys))


def grey_values(series: PreparedSeries) -> Tensor:
    """uint8 (D, H, W) of what the model takes: what a volume file of it holds."""
    return (series.image[0] * GREY_STD + GREY_MEAN).mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def _chosen(
    source: Path,
    found: Sequence[_FoundT],
    names: Callable[[_FoundT], tuple[str, ...]],
    choice: SeriesChoice,
    remarks: _Remarks,
    label: Callable[[_FoundT], str] | None = None,
) -> list[_FoundT]:
    """The series asked for.

    Raises:
        SeriesListed: a list was asked for.
        BadSampleError: none is left.
    """
    listed = [label(one) if label else " ".join(names(one)) for one in found]
    if choice.list_only:
        raise SeriesListed(source, listed)
    kept = [one for one in found if choice.takes(*names(one))]
    if found and not kept:
        raise BadSampleError(
            f"{source}: no series is left by --series {' '.join(choice.wanted) or '(all)'} and --exclude-series "
            f"{' '.join(choice.unwanted) or '(none)'}; there are: {_listed(listed)}"
        )
    if len(kept) < len(found):
        left = [text for one, text in zip(found, listed) if one not in kept]
        remarks.notes.append(f"not read, as asked: {_listed(left)}")
    return kept


def _scans(
    source: Path, found: _Found, choice: SeriesChoice, remarks: _Remarks, problems: list[str], body: Body
) -> list[Scan]:
    """NIfTI files and DICOM series; those that cannot be read are added to `problems`."""
    scans: list[Scan] = []
    dicom: list[DicomSeries] = []
    if found.dicom:
        dicom, left_out = usable_series(find_dicom_series(source))
        # A localizer is no loss; what is damaged or incomplete is.
        remarks.notes += [note for note in left_out if _is_expected(note)]
        remarks.warnings += [note for note in left_out if not _is_expected(note)]
        if not dicom:
            raise _nothing(source, body, left_out)
        if body == "chest":
            dicom = [one for one in dicom if one.modality == "CT"]
            if not dicom:
                raise _nothing(source, body, left_out)
        dicom = _chosen(source, dicom, _names_of_dicom, choice, remarks, lambda one: one.label)
        if body == "chest":
            _refuse_several(source, [one.label for one in dicom])
    nifti = _chosen(source, found.nifti, lambda path: (_nifti_name(path), path.name), choice, remarks)
    if body == "chest":
        _refuse_several(source, [str(path) for path in nifti])
    for path in nifti:
        try:
            volumes = read_nifti(path, fill=choice.fill_nan)
        except BadSampleError as error:
            problems.append(str(error))
            continue
        stem = _nifti_name(path)
        for volume in volumes:
            label = volume.name.removeprefix(nifti_stem(path))
            scans.append(replace(volume, name=f"{stem}{label}"))
    for one in dicom:
        try:
            scans.append(read_dicom(one, fill=choice.fill_nan, keep_headers=choice.keep_headers))
        except BadSampleError as error:
            problems.append(str(error))
    return scans


def _names_of_dicom(series: DicomSeries) -> tuple[str, ...]:
    return (series.description, str(series.number), *(path.name for path in series.files[:1]))


def _is_expected(note: str) -> bool:
    """Whether a series that is left out was none to begin with."""
    return any(word in note for word in ("a localizer", "fewer than", "neither CT nor MR", "pictures of them"))


def _fits(path: Path, size: Size) -> bool:
    """Whether a `.pt` file already has the model's size, with or without the margin."""
    shape = read_volume(path, memory_map=True, allow_channels=True).shape
    return shape[0] == size[0] and all(m <= n <= padded_in_plane(m) for n, m in zip(shape[1:], size[1:]))


def _brain_tensors(
    study: str, files: Sequence[SeriesFile], prepare: Preparation, size: Size, remarks: _Remarks
) -> list[PreparedSeries]:
    """`.pt` files of grey values, as the zero-shot evaluations read them."""
    loaded = load_study(study, files, size=size, prepare=prepare)
    series = []
    for number, name in enumerate(loaded.names):
        volume = read_volume(loaded.sources[number], allow_channels=prepare == "resample")
        white = 255.0 if loaded.grey_ranges[number] == "0-255" else 1.0
        grey = (volume.float() * (255 / white)).round_().clamp_(0, 255).to(torch.uint8).numpy()
        geometry = _of_voxel_map(Geometry.of_input(grey.shape), loaded.voxel_maps[number], size)
        grid = assumed_grid(grey.shape, BRAIN_CODES, (1.0, 1.0, 1.0))
        path = loaded.sources[number]
        series_folder = str(path.parent) if path.name in WINDOWS else ""
        view = InputView(name, grey, "grey", geometry, file_grid=grid, window_of=series_folder)
        series.append(PreparedSeries(loaded.image[number], view))
    remarks.warnings += [f"series left out: {message}" for _, message in loaded.skipped]
    remarks.notes.append(
        ".pt files say nothing about voxel size and orientation: written volumes have voxels of 1 mm, counted as the "
        "brain format is (columns to the right, rows to the back, slices to the feet)"
    )
    return series


_NAMED_CT = re.compile(r"(?i)(?<![a-z])(h?ct|ncct|cect|cta)(?![a-z])")


def brain_series(scan: Scan, size: Size) -> list[PreparedSeries]:
    """One MRI series, or the three windows of a head CT."""
    turned = orient(scan, BRAIN_CODES, largest_spacing_first=True)
    is_ct = scan.modality == "CT" or (not scan.modality and looks_like_hu(scan.voxels))
    plane = scan.plane or turned.plane
    name = series_text(scan.name, plane, is_certain=scan.plane is not None)
    if is_ct:
        hu = _int16(turned.voxels)
        if not looks_like_hu(hu):
            raise _no_hu(scan)
        scan.notes.append(f"{name}: head CT in HU, read as {len(HEAD_WINDOWS_HU)} series by window")
        stem = name.removeprefix(f"{plane}_")
        return [
            _brain_series(f"{stem}_{plane}_{word}", hu, window.apply(torch.from_numpy(hu)), scan, turned, size, window)
            for word, window in HEAD_WINDOWS_HU.items()
        ]
    if not scan.modality and (looks_like_shifted_hu(scan.voxels) or _NAMED_CT.search(scan.source.name)):
        raise _no_hu(scan)
    low, high = np.percentile(turned.voxels, BRAIN_PERCENTILES)
    if not high > low:
        raise BadSampleError(f"{scan.source}: nearly every voxel is {low:g}; expected the grey values of a scan")
    unit = (np.clip(turned.voxels, low, high).astype(np.float32) - np.float32(low)) / np.float32(high - low)
    grey = np.rint(unit * 255).astype(np.uint8)
    image = torch.from_numpy(np.ascontiguousarray(unit))
    return [_brain_series(name, grey, image, scan, turned, size, None, original=np.ascontiguousarray(turned.voxels))]


def _no_hu(scan: Scan) -> BadSampleError:
    return BadSampleError(
        f"{scan.source}: a CT with values from {scan.voxels.min():g} to {scan.voxels.max():g}; expected HU, air near "
        "-1000 and soft tissue near 0: convert it again with its slope and intercept (values of 0 … 4095 mostly lack "
        "an intercept of -1024)"
    )


def _brain_series(
    name: str,
    values: np.ndarray,
    unit: Tensor,
    scan: Scan,
    turned: OrientedScan,
    size: Size,
    window: HounsfieldWindow | None,
    original: np.ndarray | None = None,
) -> PreparedSeries:
    """A series of grey values 0…1 at the file's own size."""
    volume, voxel_map = resample_brain(unit, size)
    view = InputView(
        name,
        values,
        "grey" if window is None else "hu",
        _of_voxel_map(Geometry.of_input(values.shape), voxel_map, size),
        spacing_mm=turned.spacing_mm,
        affine=turned.affine,
        window_hu=None if window is None else (window.hu_min, window.hu_max),
        file_grid=turned.file_grid,
        original=original,
        body="head",
        slice_labels=_labels_in_view(scan, turned.file_grid),
        frame=scan.frame,
        sources=scan.sources,
    )
    return PreparedSeries(normalise_grey(volume, "0-1")[None], view)


def _labels_in_view(scan: Scan, grid: FileGrid) -> SliceLabels | None:
    """The labels of a scan's slices, its last axis, where they lie in the view."""
    if not scan.slice_labels:
        return None
    return SliceLabels(grid.view_axis[2], scan.slice_labels[::-1] if grid.flipped[2] else scan.slice_labels)


def assumed_grid(shape: Sequence[int], codes: str, spacing_mm: tuple[float, float, float]) -> FileGrid:
    """The grid of a `.pt` file (D, H, W): columns, rows and slices counted to where `codes` says, from the origin."""
    D, H, W = shape
    signs = [1.0 if code in "RAS" else -1.0 for code in codes]
    affine = np.diag([*(sign * mm for sign, mm in zip(signs, spacing_mm[::-1])), 1.0])
    return FileGrid((W, H, D), affine, (2, 1, 0), (False, False, False))


def _int16(voxels: np.ndarray) -> np.ndarray:
    """HU as whole numbers, contiguous."""
    limits = np.iinfo(np.int16)
    return np.ascontiguousarray(np.rint(np.clip(voxels, limits.min, limits.max)).astype(np.int16))


def _of_voxel_map(geometry: Geometry, voxel_map: VoxelMap, size: Size) -> Geometry:
    """`geometry` followed by the change of a voxel map: the map counts voxel centres, the geometry edges."""
    scale = tuple(s / m for s, m in zip(geometry.scale, voxel_map.scale))
    offset = tuple((o + at + 0.5) / m - 0.5 for o, at, m in zip(geometry.offset, voxel_map.offset, voxel_map.scale))
    return Geometry(geometry.input_size, size, scale, offset)


# --- chest CT --------------------------------------------------------------------------------------------------------


def _open_chest(source: Path, options: ChestInput, choice: SeriesChoice, remarks: _Remarks) -> PreparedSeries:
    found = _find(source)
    remarks.notes += found.notes
    if found.tensors:
        files = _chosen(source, found.tensors, lambda file: (file.name, file.path.name), choice, remarks)
        _refuse_several(source, [str(file.path) for file in files])
        path = files[0].path
        assert isinstance(path, Path)  # a study to look at is on this machine
        remarks.notes.append(
            "a .pt file says nothing about voxel size and orientation: those of the chest format are taken, 3×1×1 mm, "
            "columns to the left, rows to the back, slices to the head"
        )
        hu = read_volume(path)
        grid = assumed_grid(hu.shape, CHEST_CODES, CHEST_SPACING_MM)
        return _chest_series(path.stem, path, hu, options, remarks, spacing_mm=CHEST_SPACING_MM, file_grid=grid)
    if not found.dicom and not found.nifti:
        raise _nothing(source, "chest")
    scan = _one_chest_scan(source, found, choice, remarks)
    is_ct_rate = _is_ct_rate(scan.source)
    if not is_ct_rate:
        scan = straightened(scan)
    turned = oriented_chest(scan, stored_order=is_ct_rate)
    if is_ct_rate:
        remarks.notes.append(
            "a CT-RATE file: its axes are taken in their stored order, as the published converter does"
        )
    remarks.of(scan)
    hu = torch.from_numpy(np.ascontiguousarray(turned.voxels)).float()
    return _chest_series(
        scan.name or _name_of(scan.source),
        scan.source,
        hu,
        options,
        remarks,
        spacing_mm=turned.spacing_mm,
        affine=turned.affine,
        file_grid=turned.file_grid,
        slice_labels=_labels_in_view(scan, turned.file_grid),
        frame=scan.frame,
        sources=scan.sources,
    )


def chest_scan_hu(source: Path) -> Tensor:
    """The one chest CT of a NIfTI file, or of a file or folder of a DICOM series: HU (D, H, W) at 3×1×1 mm.

    Raises:
        BadSampleError: nothing that can be read, or several scans.
    """
    with unpacked_archive(source) as opened:
        scan = _one_chest_scan(opened, _found_scans(opened, "chest"), SeriesChoice(), _Remarks())
        turned = oriented_chest(scan, stored_order=_is_ct_rate(scan.source))
        hu = torch.from_numpy(np.ascontiguousarray(turned.voxels)).float()
        return at_chest_spacing(hu, turned.spacing_mm, Geometry.of_input(tuple(hu.shape)))[0]


def oriented_chest(scan: Scan, *, stored_order: bool) -> OrientedScan:
    """A chest scan in the model's order of axes, straightened; files of CT-RATE in their stored order, as published."""
    return orient(scan, None) if stored_order else orient(straightened(scan), CHEST_CODES)


def _found_scans(source: Path, body: Body) -> _Found:
    """What a source holds, which must be no volume files of ours."""
    if not source.exists():
        raise BadSampleError(f"{source}: no such file or folder; expected a .pt volume, a NIfTI file or a DICOM series")
    found = _find(source)
    if found.tensors or not (found.dicom or found.nifti):
        raise _nothing(source, body)
    return found


def _one_chest_scan(source: Path, found: _Found, choice: SeriesChoice, remarks: _Remarks) -> Scan:
    problems: list[str] = []
    scans = _scans(source, found, choice, remarks, problems, "chest")
    if not scans:
        raise BadSampleError(problems[0])
    _refuse_several(source, [f"{one.name} ({one.source})" for one in scans])
    check_field_of_view(scans[0], "chest")
    return scans[0]


def _refuse_several(source: Path, names: Sequence[str]) -> None:
    if len(names) > 1:
        listed = "".join(f"\n  {name}" for name in names[:_MOST_LISTED])
        more = f"\n  and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
        raise BadSampleError(
            f"{source}: holds {len(names)} scans, and a chest model reads one; give one of them by --series, or its "
            f"file (a DICOM file stands for its series):{listed}{more}"
        )


def _is_ct_rate(path: Path) -> bool:
    try:
        parse_volume_name(path.name)
    except ValueError:
        return False
    return True


def _chest_series(
    name: str, source: Path, hu: Tensor, options: ChestInput, remarks: _Remarks, **where: Any
) -> PreparedSeries:
    """One chest volume in HU at the file's own size."""
    hu = hu.float()
    shift_hu = double_rescale_hu(hu, source, options)
    if shift_hu:
        hu = hu + shift_hu
        remarks.warnings.append(f"values were HU minus {shift_hu:g}, rescaled twice; added back")
    if options.read_as_is:
        remarks.warnings.append("values were taken as they are, without a look at whether they are HU (--read-as-is)")
    own_size = tuple(hu.shape)
    geometry = Geometry.of_input(own_size)
    volume, geometry = at_chest_spacing(hu, where["spacing_mm"], geometry)
    if options.fit == "resize":
        windowed, _ = resize_chest(options.window.apply(volume), options.size)
        geometry = geometry.resize(options.size)
    else:
        start = chest_start(volume.shape, options.size, None)
        # The lower end of the window is what padding means: 0 after windowing.
        windowed = options.window.apply(take_box(volume, start, options.size, fill=options.window.hu_min))
        geometry = geometry.crop(start, options.size)
        cut = [max(0, n - m) for n, m in zip(volume.shape, options.size)]
        if any(cut):
            remarks.notes.append(
                f"the model sees the middle {'×'.join(str(min(n, m)) for n, m in zip(volume.shape, options.size))} of "
                f"{'×'.join(map(str, volume.shape))} voxels; the rest is outside its crop"
            )
    view = InputView(
        name,
        _int16(hu.numpy()),
        "hu",
        geometry,
        window_hu=(options.window.hu_min, options.window.hu_max),
        body="chest",
        **where,
    )
    return PreparedSeries(windowed.sub_(GREY_MEAN).div_(GREY_STD)[None], view)


def at_chest_spacing(hu: Tensor, spacing_mm: tuple[float, float, float], geometry: Geometry) -> tuple[Tensor, Geometry]:
    """Trilinear to 3×1×1 mm; a size is cut to whole voxels, as published."""
    if np.allclose(spacing_mm, CHEST_SPACING_MM, rtol=0, atol=1e-3):
        return hu, geometry
    # Headers hold spacings as float32: what falls short of a whole voxel by their rounding is whole.
    sizes = (n * own / wanted + 1e-3 for n, own, wanted in zip(hu.shape, spacing_mm, CHEST_SPACING_MM))
    d, h, w = (max(1, int(size)) for size in sizes)
    resized = F.interpolate(hu[None, None], size=(d, h, w), mode="trilinear", align_corners=False)[0, 0]
    return resized, geometry.resize((d, h, w))
