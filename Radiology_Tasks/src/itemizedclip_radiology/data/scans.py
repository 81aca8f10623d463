"""Scans as scanners and archives leave them: NIfTI files and DICOM series, in their own voxel grid.

A `Scan` keeps the file's voxels and affine. `orient` turns it the way the models' converters did, by permuting and
flipping axes alone: no voxel is interpolated, and `FileGrid` knows the way back.

Axes: i j k voxel axes of the file; D H W slices, rows, columns after `orient`; world coordinates in mm, RAS+ (right,
anterior, superior are positive), as in NIfTI.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
import pydicom
import SimpleITK as sitk
from nibabel import orientations
from nibabel.affines import voxel_sizes

from itemizedclip.data.batch import BadSampleError
from itemizedclip.viewer.inputs import FileGrid

NIFTI_SUFFIXES = (".nii", ".nii.gz")

MIN_SLICES = 8
"""DICOM series of fewer slices are localizers and reformats, not scans."""

Plane = Literal["AX", "COR", "SAG"]
"""Which way slices lie: across, from front to back, from side to side."""

_PLANE_OF_AXIS: tuple[Plane, Plane, Plane] = ("AX", "COR", "SAG")
_UNEVEN_MM = 0.1
_NO_DICOM = (".pt", ".gz", ".nii", ".json", ".csv", ".txt", ".png", ".jpg", ".zip")  # DICOM files often have no suffix
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM counts towards left and back, NIfTI towards right and front
_MODALITIES = ("CT", "MR")


@dataclass(frozen=True)
class Scan:
    """One series in its file's own grid.

    Attributes:
        name: of the file or the series, without its plane.
        voxels: (i, j, k), int16 or float32, finite.
        affine: float64 (4, 4), voxel (i, j, k) → world.
        source: file, or folder of a DICOM series.
        modality: "CT", "MR", or "" when the file does not say.
        notes: what was decided while reading.
    """

    name: str
    voxels: np.ndarray
    affine: np.ndarray
    source: Path
    modality: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class OrientedScan:
    """A scan with its axes in a model's order.

    Attributes:
        voxels: (D, H, W), a view of the scan's.
        spacing_mm: along (D, H, W).
        affine: float64 (4, 4), voxel (d, h, w) → world.
        file_grid: the way back to the file.
        plane: which way the slices lie.
    """

    voxels: np.ndarray
    spacing_mm: tuple[float, float, float]
    affine: np.ndarray
    file_grid: FileGrid
    plane: Plane


def orient(scan: Scan, codes: str | None, *, largest_spacing_first: bool = False) -> OrientedScan:
    """Permute and flip the axes of a scan to (slices, rows, columns).

    Args:
        scan: in its file's grid.
        codes: where the columns, rows and slices are counted to: "RPI" for brains (columns to the right, rows to the
            back, slices to the feet), "LPS" for chests. An oblique scan goes to the nearest. None keeps the file's own
            order, its last axis as slices.
        largest_spacing_first: the axis of the largest spacing becomes the slices, so that a sagittal scan keeps its
            fine planes (as the published brain converter does).
    """
    own = orientations.io_orientation(scan.affine)
    if codes is None:
        turn = np.array([[2, 1], [1, 1], [0, 1]], dtype=float)
    else:
        turn = orientations.ornt_transform(own, orientations.axcodes2ornt(codes[::-1]))
    spacing = voxel_sizes(scan.affine @ orientations.inv_ornt_aff(turn, scan.voxels.shape))
    plane_axis = 0
    # Within a thousandth spacings count as equal: headers of isotropic scans differ in the last digits.
    if largest_spacing_first and spacing.max() > 1.001 * spacing[0]:
        plane_axis = int(spacing.argmax())
        order = [plane_axis, *(axis for axis in range(3) if axis != plane_axis)]
        turn[:, 0] = [order.index(int(axis)) for axis in turn[:, 0]]
    affine = scan.affine @ orientations.inv_ornt_aff(turn, scan.voxels.shape)
    (i, j, k), (flip_i, flip_j, flip_k) = turn[:, 0].astype(int).tolist(), (turn[:, 1] < 0).tolist()
    grid = FileGrid(scan.voxels.shape, np.array(scan.affine, dtype=np.float64), (i, j, k), (flip_i, flip_j, flip_k))
    d, h, w = (float(size) for size in voxel_sizes(affine))
    return OrientedScan(grid.to_view(scan.voxels), (d, h, w), affine, grid, plane_of(affine))


def plane_of(affine_dhw: np.ndarray) -> Plane:
    """The plane of slices that are counted along the first axis."""
    towards = np.abs(affine_dhw[:3, 0])
    return _PLANE_OF_AXIS[2 - int(towards.argmax())]


def series_text(name: str, plane: Plane) -> str:
    """A series name as the models read them, such as AX_FLAIR: the plane stands first unless the name holds it."""
    words = re.sub(r"[\s_]+", "_", name.strip()).strip("_") or "series"
    if re.search(r"(?i)(?<![a-z])(ax|axial|tra|cor|coronal|sag|sagittal)(?![a-z])", words):
        return words
    return f"{plane}_{words}"


def looks_like_hu(voxels: np.ndarray) -> bool:
    """Whether values are Hounsfield units of a body in air: a CT, whatever its file is called.

    Air lies near −1000, soft tissue around 0; grey values of MRI are not negative.
    """
    values = voxels[::4, ::4, ::2]
    air = float(((values < -800) & (values > -3100)).mean())
    soft_tissue = float(((values > -150) & (values < 250)).mean())
    return air > 0.05 and soft_tissue > 0.02


# --- NIfTI -----------------------------------------------------------------------------------------------------------


def is_nifti(path: Path) -> bool:
    """By its name."""
    return path.name.lower().endswith(NIFTI_SUFFIXES)


def nifti_stem(path: Path) -> str:
    """The name without .nii or .nii.gz."""
    return re.sub(r"(?i)\.nii(\.gz)?$", "", path.name)


def read_nifti(path: Path) -> Scan:
    """One NIfTI file; of several volumes in it the first.

    Raises:
        BadSampleError: no such file, damaged, no three axes, no affine that can be inverted, values that are not
            finite numbers.
    """
    expected = "expected a NIfTI volume of slices, rows and columns"
    if not path.is_file():
        raise BadSampleError(f"{path}: no such file; {expected}")
    notes = []
    try:
        image: Any = nibabel.load(path)
        shape = image.shape
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        first = (slice(None),) * 3 + (0,) * (len(image.shape) - 3)
        voxels = np.asarray(image.dataobj[first] if len(image.shape) > 3 else image.dataobj)
        affine = np.asarray(image.affine, dtype=np.float64)
    except Exception as error:  # bytes that are no NIfTI file make the reader fail in any way
        reason = (str(error) or type(error).__name__).split("\n")[0][:160]
        raise BadSampleError(f"{path}: not a readable NIfTI file ({reason}); {expected}: copy it again") from None
    if len(shape) > 3:
        notes.append(f"{path.name}: {'×'.join(map(str, shape))} voxels; the first volume is read")
    sizes = "×".join(map(str, voxels.shape))
    if voxels.ndim != 3 or min(voxels.shape, default=0) < 2 or voxels.dtype.kind not in "iuf":
        raise BadSampleError(f"{path}: {voxels.dtype} volume of {sizes}; {expected}, two voxels each at least")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise BadSampleError(f"{path}: its affine has no inverse; expected a valid sform or qform: convert it again")
    header = image.header
    if not (header["sform_code"] or header["qform_code"]):
        notes.append(f"{path.name}: says nothing about orientation (no sform, no qform); nibabel's default is taken")
    return Scan(nifti_stem(path), _plain(voxels, path), affine, path, "", notes)


def _plain(voxels: np.ndarray, source: Path) -> np.ndarray:
    """int16 where the values are such integers, else finite float32; in the machine's byte order."""
    limits = np.iinfo(np.int16)
    if voxels.dtype.kind in "iu" and limits.min <= voxels.min() and voxels.max() <= limits.max:
        return voxels.astype(np.int16)
    voxels = voxels.astype(np.float32)
    if not np.isfinite(voxels).all():
        bad = int((~np.isfinite(voxels)).sum())
        raise BadSampleError(
            f"{source}: {bad:,} of {voxels.size:,} values are NaN or infinite; expected finite values: convert it again"
        )
    return voxels


# --- DICOM -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DicomSeries:
    """The files of one series.

    Attributes:
        uid: SeriesInstanceUID.
        description: SeriesDescription, or the protocol's name; may be empty.
        modality: "CT", "MR", …
        files: one per slice, in order along the slices' normal; one file of many frames stands alone.
        num_slices: slices, or frames.
        reason: why it is no scan to read (a localizer, few slices, …); "" when it is one.
        notes: what was decided while sorting.
    """

    uid: str
    description: str
    modality: str
    files: list[Path]
    num_slices: int
    reason: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """For people: description, slices, first file."""
        return f"{self.description or 'no description'}, {self.modality}, {self.num_slices} slices ({self.files[0]})"


_TAGS = [
    "SeriesInstanceUID", "SeriesDescription", "ProtocolName", "SeriesNumber", "Modality", "ImageType", "InstanceNumber",
    "ImagePositionPatient", "ImageOrientationPatient", "NumberOfFrames", "Rows", "Columns",
]  # fmt: skip


@dataclass(frozen=True)
class _Slice:
    """What the header of one DICOM image says; numbers are 0 and lists empty where it says nothing."""

    path: Path
    uid: str
    description: str
    series_number: int
    modality: str
    is_localizer: bool
    number: int
    frames: int
    size: tuple[int, int]
    position: list[float]
    direction: list[float]


def _read_slice(path: Path) -> _Slice | None:
    """The header of a file; None for one that is no DICOM image, or damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # values that break a rule of the standard are common and do no harm here
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
            return _Slice(
                path=path,
                uid=str(header.get("SeriesInstanceUID", "")),
                description=str(header.get("SeriesDescription") or header.get("ProtocolName") or "").strip(),
                series_number=int(header.get("SeriesNumber") or 0),
                modality=str(header.get("Modality") or ""),
                is_localizer=any("LOCALIZER" in str(kind).upper() for kind in header.get("ImageType") or []),
                number=int(header.get("InstanceNumber") or 0),
                frames=int(header.get("NumberOfFrames") or 1),
                size=(int(header.Rows), int(header.Columns)),
                position=[float(value) for value in header.get("ImagePositionPatient") or []],
                direction=[float(value) for value in header.get("ImageOrientationPatient") or []],
            )
    except Exception:  # any file may lie in the folder, and its bytes make the reader fail in any way
        return None


def find_dicom_series(source: Path) -> list[DicomSeries]:
    """All DICOM series below a folder, by series number; of a file, the series it belongs to.

    Files that are no DICOM images are passed over.
    """
    wanted: str | None = None
    folder = source
    if source.is_file():
        own = _read_slice(source)
        if own is None:
            return []
        wanted, folder = own.uid, source.parent
    by_uid: dict[str, list[_Slice]] = {}
    for path in sorted(folder.rglob("*") if wanted is None else folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() in _NO_DICOM or not path.is_file():
            continue
        found = _read_slice(path)
        if found is not None and wanted in (None, found.uid):
            by_uid.setdefault(found.uid, []).append(found)
    order = sorted(by_uid, key=lambda uid: (by_uid[uid][0].series_number, uid))
    return [_sort_series(by_uid[uid]) for uid in order]


def _sort_series(slices: list[_Slice]) -> DicomSeries:
    """The series of some files."""
    first = slices[0]
    notes: list[str] = []
    reason = ""
    if first.modality not in _MODALITIES:
        reason = f"modality {first.modality or 'not given'}, neither CT nor MR"
    elif any(one.is_localizer for one in slices):
        reason = "a localizer"
    files, num_slices = [one.path for one in slices], len(slices)
    if len(slices) == 1 and first.frames > 1:
        num_slices = first.frames
    elif not reason and num_slices >= MIN_SLICES:
        sorted_files, reason, notes = _along_normal(slices)
        if not reason:
            files, num_slices = sorted_files, len(sorted_files)
    if not reason and num_slices < MIN_SLICES:
        reason = f"{num_slices} slices, fewer than {MIN_SLICES}"
    return DicomSeries(first.uid, first.description, first.modality, files, num_slices, reason, notes)


def _along_normal(slices: list[_Slice]) -> tuple[list[Path], str, list[str]]:
    """Files sorted along the normal of their slices, one per position; or a reason why they are no stack."""
    if any(len(one.position) != 3 or len(one.direction) != 6 for one in slices):
        return [], "slices without position or orientation", []
    directions = np.array([one.direction for one in slices])
    if np.abs(directions - directions[0]).max() > 1e-3:
        return [], "slices lie in different planes", []
    if len({one.size for one in slices}) > 1:
        return [], "slices differ in size", []
    normal = np.cross(directions[0, :3], directions[0, 3:])
    along: list[float] = (np.array([one.position for one in slices]) @ normal).tolist()
    order = sorted(range(len(slices)), key=lambda n: (round(along[n], 3), slices[n].number))
    kept = [n for place, n in enumerate(order) if place == 0 or along[n] - along[order[place - 1]] > 1e-3]
    notes = []
    if len(kept) < len(order):
        notes.append(f"{len(order)} files at {len(kept)} positions; the first of each position is read")
    gaps = np.diff([along[n] for n in kept])
    if len(gaps) and gaps.max() - gaps.min() > _UNEVEN_MM:
        notes.append(f"slices are unevenly spaced, {gaps.min():.2f} to {gaps.max():.2f} mm; their mean is taken")
    return [slices[n].path for n in kept], "", notes


def read_dicom(series: DicomSeries) -> Scan:
    """The voxels of one series, rescaled (HU for CT).

    Raises:
        BadSampleError: its pixels cannot be decoded, or are no grey values.
    """
    source = series.files[0].parent if len(series.files) > 1 else series.files[0]
    try:
        with _no_itk_warnings():
            if len(series.files) == 1:
                image = sitk.ReadImage(str(series.files[0]))
            else:
                reader = sitk.ImageSeriesReader()
                reader.SetFileNames([str(path) for path in series.files])
                image = reader.Execute()
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[-1][:200]
        raise BadSampleError(
            f"{source}: DICOM series {series.description!r} cannot be decoded ({reason}); convert it to NIfTI"
        ) from None
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise BadSampleError(f"{source}: DICOM series {series.description!r} is no stack of grey slices; leave it out")
    voxels = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    notes = [f"{series.description or series.files[0].name}: {note}" for note in series.notes]
    return Scan(series.description, _plain(voxels, source), _LPS_TO_RAS @ affine, source, series.modality, notes)


@contextmanager
def _no_itk_warnings() -> Iterator[None]:
    """ITK's remarks on uneven slices go to standard error in paragraphs; the notes say it in a line."""
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def usable_series(series: Sequence[DicomSeries]) -> tuple[list[DicomSeries], list[str]]:
    """The scans among some series, and a note about each other one."""
    kept = [one for one in series if not one.reason]
    notes = [f"series left out: {one.description or one.uid}: {one.reason}" for one in series if one.reason]
    return kept, notes
