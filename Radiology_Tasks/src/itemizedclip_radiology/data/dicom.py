"""DICOM series as scans: every slice where its header says, one volume per series, nothing guessed in silence.

A file of many frames counts as many slices. Geometry comes from positions and directions of the slices, pixels and
rescale from GDCM (SimpleITK), slice by slice, so that a file that cannot be decoded has a name.

Axes: i j k columns, rows, slices; world coordinates in mm, LPS as DICOM has them, until a `Scan` is made.
"""

from __future__ import annotations

import math
import warnings as python_warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.multival import MultiValue
from pydicom.tag import Tag

from itemizedclip.data.batch import BadSampleError
from itemizedclip.viewer.inputs import SourceSlice, VoxelGrid
from itemizedclip_radiology.data.scans import MAX_VOLUMES, MAX_VOXELS, Plane, Scan, plain_voxels, plane_of

MIN_SLICES = 8
"""DICOM series of fewer slices are localizers and reformats, not scans."""

_NO_DICOM = (".pt", ".gz", ".nii", ".json", ".csv", ".txt", ".png", ".jpg", ".zip", ".tar", ".tgz")
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM counts towards left and back, NIfTI towards right and front
_MODALITIES = ("CT", "MR")
_SAME_PLACE_MM = 1e-3
_EVEN_MM = 0.1
_ON_LINE_MM = 0.5
_GAP = 1.5
"""A step of so many usual ones is a gap: slices are missing."""

_MOST_GAPS = 0.2
"""Where more steps are gaps than this share the spacing varies by design."""

_MAX_SLOPE, _MAX_INTERCEPT = 1e6, 1e7
_NOT_PICTURES_OF_SLICES = ("SCREEN SAVE", "SECONDARY CAPTURE", "MIP", "MNIP", "PROJECTION IMAGE", "VRT", "SSD")
_REFORMATS = ("MPR", "REFORMATTED", "CURVED", "RESAMPLED", "STACKED")

_SIEMENS_B, _GE_B = Tag(0x0019, 0x100C), Tag(0x0043, 0x1039)
_TAGS: list[Any] = [
    "SOPClassUID", "SeriesInstanceUID", "SeriesDescription", "ProtocolName", "SeriesNumber", "Modality", "ImageType",
    "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "NumberOfFrames", "Rows",
    "Columns", "BitsAllocated", "SamplesPerPixel", "RescaleSlope", "RescaleIntercept", "DiffusionBValue", "EchoTime",
    "InversionTime", "TemporalPositionIdentifier", "AcquisitionNumber", "TriggerTime", "AcquisitionTime",
    "ConvolutionKernel", "FrameOfReferenceUID", "BurnedInAnnotation", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    Tag(0x0019, 0x0010), _SIEMENS_B, Tag(0x0043, 0x0010), _GE_B,
]  # fmt: skip


_PERSONAL = [
    "StudyInstanceUID", "SOPInstanceUID", "PatientName", "PatientID", "PatientBirthDate", "AccessionNumber",
    "OtherPatientIDs", "OtherPatientNames", "PatientAddress", "PatientTelephoneNumbers", "InstitutionName",
    "InstitutionAddress", "ReferringPhysicianName", "PerformingPhysicianName", "PhysiciansOfRecord", "OperatorsName",
    "StudyID", "StationName", "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate",
]  # fmt: skip
"""What tells whose images these are; read for pseudonyms and to keep it out of everything that is written."""

_TAGS += _PERSONAL


@dataclass(frozen=True)
class DicomSlice:
    """What the header says of one slice; lists are empty and `rescale` is None where it says nothing.

    Attributes:
        path, frame: where its pixels are.
        uid, description, series_number, modality, kind: of its series; kind is ImageType.
        number: InstanceNumber, or the frame's.
        size: rows, columns.
        position: of the first pixel's centre, mm.
        direction: of a row, then of a column.
        spacing: between rows, between columns, mm.
        rescale: slope and intercept.
        differs: name of an attribute → value, for what may tell volumes of one series apart.
        damage: why its pixels cannot be read, "" when they can.
        study, patient: StudyInstanceUID and PatientID.
        burned_in: the pixels show text about the patient, as the header says.
        personal: everything in the header that tells whose image this is.
    """

    path: Path
    frame: int
    uid: str
    description: str
    series_number: int
    modality: str
    kind: tuple[str, ...]
    number: int
    size: tuple[int, int]
    position: tuple[float, ...]
    direction: tuple[float, ...]
    spacing: tuple[float, ...]
    rescale: tuple[float, float] | None
    differs: dict[str, Hashable]
    frame_of_reference: str = ""
    damage: str = ""
    study: str = ""
    patient: str = ""
    burned_in: bool = False
    personal: frozenset[str] = frozenset()


@dataclass(frozen=True)
class DicomSeries:
    """The slices of one volume.

    Attributes:
        uid: SeriesInstanceUID.
        description: SeriesDescription, or the protocol's name, and what tells it from other volumes of the series
            (`_b1000`, `_TE30`); may be empty.
        modality: "CT", "MR", …
        slices: in order along their normal, one per position.
        reason: why it is no scan to read (a localizer, few slices, …); "" when it is one.
        notes: what was decided while sorting.
        warnings: what must be known to use it.
        plane: in which the slices lie, None where they do not say.
    """

    uid: str
    description: str
    modality: str
    slices: list[DicomSlice]
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    plane: Plane | None = None

    @property
    def files(self) -> list[Path]:
        """Its files, each once."""
        return list(dict.fromkeys(one.path for one in self.slices))

    @property
    def num_slices(self) -> int:
        """Slices, or frames."""
        return len(self.slices)

    @property
    def number(self) -> int:
        """SeriesNumber, 0 when there is none."""
        return self.slices[0].series_number

    @property
    def label(self) -> str:
        """For people: series number, description, kernel, slices, first file."""
        kernel = self.slices[0].differs.get("kernel")
        words = [self.description or "no description", *([f"kernel {kernel}"] if kernel else []), self.modality]
        return f"series {self.number}: {', '.join(words)}, {self.num_slices} slices ({self.files[0]})"


# --- headers ---------------------------------------------------------------------------------------------------------


def _read_slices(path: Path) -> list[DicomSlice]:
    """The slices of a file, one per frame; none for a file that is no DICOM image, or whose header is damaged."""
    try:
        with python_warnings.catch_warnings(), path.open("rb") as file:
            python_warnings.simplefilter("ignore")  # values that break a rule of the standard are common
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
            damage = _damage(path, header, file.tell())
            return _slices_of(path, header, damage)
    except Exception:  # any file may lie in the folder, and its bytes make the reader fail in any way
        return []


def _damage(path: Path, header: Any, pixels_at: int) -> str:
    """Why the pixels of a file cannot be what its header says, "" when they can."""
    samples, bits = int(header.get("SamplesPerPixel") or 1), int(header.get("BitsAllocated") or 16)
    pixels = int(header.Rows) * int(header.Columns) * int(header.get("NumberOfFrames") or 1) * samples
    if pixels > MAX_VOXELS:
        return f"{header.Rows}×{header.Columns} pixels, more than any scanner gives"
    syntax = getattr(header.file_meta, "TransferSyntaxUID", None)
    there = path.stat().st_size - pixels_at
    if there <= 12:
        return "holds no pixels"
    if syntax is None or not syntax.is_compressed:
        needed = (pixels * bits + 7) // 8
        if there - 8 < needed:
            return f"{needed:,} bytes of pixels expected, {max(0, there - 12):,} there: cut short"
    return ""


def _numbers(value: Any) -> tuple[float, ...]:
    """A multi-valued attribute; empty where it is absent or no list of finite numbers."""
    try:
        numbers = tuple(float(entry) for entry in ([value] if isinstance(value, (int, float, str)) else value or []))
    except (TypeError, ValueError):
        return ()
    return numbers if all(map(math.isfinite, numbers)) else ()


def _number(value: Any) -> float | None:
    return found[0] if (found := _numbers(value)) else None


def _b_value(header: Any) -> float | None:
    """b-value in s/mm², from the standard's attribute or that of a maker."""
    if (value := _number(header.get("DiffusionBValue"))) is not None:
        return value
    for tag, creator in ((_SIEMENS_B, "SIEMENS"), (_GE_B, "GEMS")):
        owner = header.get(Tag(tag.group, 0x0010))
        if tag not in header or owner is None or not str(owner.value).upper().startswith(creator):
            continue
        raw = header[tag].value
        text = raw.decode("ascii", "ignore").strip("\0 ").split("\\") if isinstance(raw, bytes) else raw
        value = _number(text[0] if isinstance(text, (list, MultiValue)) else text)
        if value is not None:
            return value % 1e5 if tag == _GE_B and value > 1e6 else value  # GE adds 10⁹ to it
    return None


def _slices_of(path: Path, header: Any, damage: str) -> list[DicomSlice]:
    kind = tuple(str(word).upper() for word in header.get("ImageType") or [])
    shared = _first(header.get("SharedFunctionalGroupsSequence"))
    frames = list(header.get("PerFrameFunctionalGroupsSequence") or [])
    count = int(header.get("NumberOfFrames") or 1)
    if not 1 <= count <= 2**16 or (frames and len(frames) != count):
        return []
    spacing_reason = "" if count == 1 or frames or shared is not None else "many frames without functional groups"

    def of(frame: Any, group: str) -> Any:
        found = _first(frame.get(group)) if frame is not None else None
        return found if found is not None else _first(shared.get(group)) if shared is not None else None

    personal = frozenset(
        str(word).strip()
        for tag in (*_PERSONAL, "SeriesInstanceUID", "FrameOfReferenceUID")
        for word in _words(header.get(tag))
        if str(word).strip()
    )
    slices = []
    for n in range(count):
        frame = frames[n] if frames else None
        place, turn = of(frame, "PlanePositionSequence"), of(frame, "PlaneOrientationSequence")
        measures, values = of(frame, "PixelMeasuresSequence"), of(frame, "PixelValueTransformationSequence")
        echo, diffusion = of(frame, "MREchoSequence"), of(frame, "MRDiffusionSequence")
        content = of(frame, "FrameContentSequence")
        slope, intercept = (
            _number((values if values is not None else header).get(tag)) for tag in ("RescaleSlope", "RescaleIntercept")
        )
        differs: dict[str, Hashable] = {
            "b": _b_value(header) if diffusion is None else _number(diffusion.get("DiffusionBValue")) or 0.0,
            "TE": _number(header.get("EchoTime")) if echo is None else _number(echo.get("EffectiveEchoTime")),
            "TI": _number(header.get("InversionTime")),
            "kind": kind,
            "kernel": "/".join(_words(header.get("ConvolutionKernel"))),
            "phase": _number((content if content is not None else header).get("TemporalPositionIdentifier"))
            if content is None
            else _number(content.get("TemporalPositionIndex")),
            "trigger": _number(header.get("TriggerTime")),
            "acquisition": _number(header.get("AcquisitionNumber")),
            "time": str(header.get("AcquisitionTime") or ""),
        }
        slices.append(
            DicomSlice(
                path=path,
                frame=n,
                uid=str(header.get("SeriesInstanceUID", "")),
                description=str(header.get("SeriesDescription") or header.get("ProtocolName") or "").strip(),
                series_number=int(_number(header.get("SeriesNumber")) or 0),
                modality=str(header.get("Modality") or ""),
                kind=kind,
                number=n + 1 if count > 1 else int(_number(header.get("InstanceNumber")) or 0),
                size=(int(header.Rows), int(header.Columns)),
                position=_numbers((place if place is not None else header).get("ImagePositionPatient")),
                direction=_numbers((turn if turn is not None else header).get("ImageOrientationPatient")),
                spacing=_numbers((measures if measures is not None else header).get("PixelSpacing")),
                rescale=None if slope is None and intercept is None else (
                    1.0 if slope is None else slope, intercept or 0.0
                ),
                differs=differs,
                frame_of_reference=str(header.get("FrameOfReferenceUID") or ""),
                damage=damage or spacing_reason,
                study=str(header.get("StudyInstanceUID") or ""),
                patient=str(header.get("PatientID") or ""),
                burned_in=str(header.get("BurnedInAnnotation") or "").upper() == "YES",
                personal=personal,
            )
        )  # fmt: skip
    return slices


def _first(sequence: Any) -> Any:
    return sequence[0] if sequence else None


def _words(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(word) for word in value] if isinstance(value, (list, tuple, MultiValue)) else [str(value)]


# --- series and their volumes ----------------------------------------------------------------------------------------


def find_dicom_series(source: Path, *, nested: bool = True, files: Sequence[Path] = ()) -> list[DicomSeries]:
    """All volumes below a folder, by series number; of a file, those of the series it belongs to.

    Files that are no DICOM images are passed over.

    Args:
        source: folder or file.
        nested: also those of the folders in the folder.
        files: only these of its files; none: all.
    """
    wanted: str | None = None
    folder = source
    if source.is_file():
        own = _read_slices(source)
        if not own:
            return []
        wanted, folder = own[0].uid, source.parent
    by_uid: dict[str, list[DicomSlice]] = {}
    for path in sorted(files or (folder.rglob("*") if wanted is None and nested else folder.iterdir())):
        if path.name.startswith(".") or path.suffix.lower() in _NO_DICOM or not path.is_file():
            continue
        for found in _read_slices(path):
            if wanted in (None, found.uid):
                by_uid.setdefault(found.uid, []).append(found)
    order = sorted(by_uid, key=lambda uid: (by_uid[uid][0].series_number, uid))
    return _related([volume for uid in order for volume in _volumes(by_uid[uid])])


def usable_series(series: Sequence[DicomSeries]) -> tuple[list[DicomSeries], list[str]]:
    """The scans among some series, and a note about each other one."""
    kept = [one for one in series if not one.reason]
    notes = [f"series left out: {one.description or one.uid}: {one.reason}" for one in series if one.reason]
    return kept, notes


def _volumes(slices: list[DicomSlice]) -> list[DicomSeries]:
    """The volumes of one series."""
    first = slices[0]
    everything = DicomSeries(first.uid, first.description, first.modality, slices)
    if first.modality not in _MODALITIES:
        return [replace(everything, reason=f"modality {first.modality or 'not given'}, neither CT nor MR")]
    localizers = [one for one in slices if "LOCALIZER" in one.kind]
    if len(localizers) == len(slices):
        return [replace(everything, reason="a localizer")]
    pictures = next((word for word in _NOT_PICTURES_OF_SLICES if any(word in part for part in first.kind)), None)
    if pictures:
        return [replace(everything, reason=f"no slices but pictures of them ({pictures.lower()})")]
    damaged = [one for one in slices if one.damage]
    if damaged:
        one = damaged[0]
        more = f" and {len(damaged) - 1} more files" if len({d.path for d in damaged}) > 1 else ""
        remedy = (
            "convert it with its positions and voxel sizes" if "functional groups" in one.damage else "copy it again"
        )
        return [replace(everything, reason=f"{one.path}: {one.damage}{more}; {remedy}")]
    if len(slices) < MIN_SLICES:
        return [replace(everything, reason=f"{len(slices)} slices, fewer than {MIN_SLICES}")]
    warnings: list[str] = []
    stack = _one_grid([one for one in slices if one not in localizers], len(localizers), warnings)
    if isinstance(stack, str):
        return [replace(everything, reason=stack)]
    parts = _told_apart(stack)
    if len(parts) > MAX_VOLUMES:
        warnings.append(
            f"{len(parts)} volumes in one series ({', '.join(list(parts)[:3])}, …); the first is read, the others are "
            "left out"
        )
        parts = dict(list(parts.items())[:1])
    elif len(parts) > 1:
        warnings.append(f"{len(parts)} volumes in one series, read as series of their own: {', '.join(parts)}")
    found = []
    for number, (label, part) in enumerate(parts.items()):
        name = "_".join(word for word in (first.description, label) if word)
        found.append(_stacked(replace(everything, description=name, slices=part), warnings if number == 0 else []))
    return found


def _one_grid(slices: list[DicomSlice], localizers: int, warnings: list[str]) -> list[DicomSlice] | str:
    """The slices of the usual size and direction; those of another one are left out with a warning. Or a reason."""
    if any(len(one.position) != 3 or len(one.direction) != 6 for one in slices):
        return "slices without position or orientation"
    if any(len(one.spacing) != 2 or min(one.spacing) <= 0 for one in slices):
        bad = next(one for one in slices if len(one.spacing) != 2 or min(one.spacing) <= 0)
        said = "no PixelSpacing" if not bad.spacing else f"PixelSpacing {'×'.join(f'{mm:g}' for mm in bad.spacing)}"
        return f"{bad.path}: {said}, so that nothing says how large its voxels are; export it again with voxel sizes"
    for one in slices:
        row, column = np.array(one.direction[:3]), np.array(one.direction[3:])
        if abs(np.linalg.norm(row) - 1) > 1e-2 or abs(np.linalg.norm(column) - 1) > 1e-2 or abs(row @ column) > 1e-2:
            return f"{one.path}: its rows and columns have no right angle; export it again"
    groups: dict[tuple[Any, ...], list[DicomSlice]] = {}
    for one in slices:
        key = one.size, tuple(round(mm, 3) for mm in one.spacing), tuple(round(x, 2) for x in one.direction)
        groups.setdefault(key, []).append(one)
    usual = max(groups.values(), key=len)
    left = len(slices) - len(usual)
    if len(usual) < max(MIN_SLICES, len(slices) / 2):
        return "slices lie in different planes" if len({one.size for one in slices}) == 1 else "slices differ in size"
    if left or localizers:
        other = next((one for one in slices if one not in usual), None)
        shown = f", such as {other.path.name} of {other.size[0]}×{other.size[1]}" if other is not None else ""
        warnings.append(f"{left + localizers} images of another size or direction (scouts) are left out{shown}")
    return usual


def _along(slices: Sequence[DicomSlice]) -> np.ndarray:
    """Places of slices along their normal, mm."""
    direction = np.array(slices[0].direction)
    places: np.ndarray = np.array([one.position for one in slices]) @ np.cross(direction[:3], direction[3:])
    return places


def _repeated(slices: Sequence[DicomSlice]) -> bool:
    """Whether two slices lie at one place."""
    return bool((np.diff(np.sort(_along(slices))) <= _SAME_PLACE_MM).any())


_NAMED: list[tuple[str, Callable[[Any], str]]] = [
    ("b", lambda value: f"b{value:g}"),
    ("TE", lambda value: f"TE{value:g}"),
    ("kind", lambda value: "_".join(value[2:4]) or "_".join(value)),
    ("TI", lambda value: f"TI{value:g}"),
    ("phase", lambda value: f"phase{value:g}"),
    ("acquisition", lambda value: f"acquisition{value:g}"),
    ("kernel", str),
    ("trigger", lambda value: f"trigger{value:g}"),
    ("time", lambda value: f"at{str(value).split('.')[0]}"),
]
"""What may tell volumes of one series apart, most telling first, and how it is named."""


def _told_apart(slices: list[DicomSlice]) -> dict[str, list[DicomSlice]]:
    """Volumes without two slices at one place, by what differs between them; one, named "", where nothing repeats."""
    if not _repeated(slices):
        return {"": slices}
    places = len(np.unique(np.round(_along(slices) / 0.01)))
    for attribute, named in _NAMED:
        groups: dict[Hashable, list[DicomSlice]] = {}
        for one in slices:
            groups.setdefault(one.differs.get(attribute), []).append(one)
        if len(groups) < 2 or (None in groups and attribute != "b"):
            continue
        whole = {value: part for value, part in groups.items() if len(part) >= max(MIN_SLICES, 0.5 * places)}
        if sum(map(len, whole.values())) < 0.9 * len(slices) or len(whole) < 2:
            continue
        found: dict[str, list[DicomSlice]] = {}
        ordered = sorted(whole, key=lambda value: (isinstance(value, str), value if value is not None else -1.0))
        for value in ordered:
            own = named(value) if value is not None else "b0"
            for label, part in _told_apart(whole[value]).items():
                found["_".join(word for word in (own, label) if word)] = part
        return found
    # Nothing in the header tells them apart: the n-th image of every place, if all places have as many.
    order = sorted(range(len(slices)), key=lambda n: (slices[n].number, slices[n].frame))
    along = np.round(_along(slices) / 0.01).astype(int).tolist()
    turn: Counter[int] = Counter()
    parts: dict[int, list[DicomSlice]] = {}
    for n in order:
        turn[along[n]] += 1
        parts.setdefault(turn[along[n]], []).append(slices[n])
    if len(set(turn.values())) == 1 and len(parts[1]) >= MIN_SLICES:
        return {f"volume{number}": part for number, part in sorted(parts.items())}
    return {"": slices}


def _stacked(series: DicomSeries, warnings: list[str]) -> DicomSeries:
    """The series with its slices sorted along their normal, one per place."""
    along = _along(series.slices)
    order = sorted(range(len(along)), key=lambda n: (round(float(along[n]), 3), series.slices[n].number))
    kept = [n for place, n in enumerate(order) if not place or along[n] - along[order[place - 1]] > _SAME_PLACE_MM]
    slices = [series.slices[n] for n in kept]
    found = list(warnings)
    if len(kept) < len(order):
        found.append(f"{len(order)} files at {len(kept)} positions; the first of each position is read")
    if len(slices) < MIN_SLICES:
        reason = f"{len(slices)} slices, fewer than {MIN_SLICES}"
        return replace(series, slices=slices, reason=reason, warnings=found)
    direction = np.array(slices[0].direction)
    normal = np.cross(direction[:3], direction[3:])
    plane = plane_of(np.stack([normal, normal, normal, normal], axis=1))
    unscaled = [one for one in slices if one.rescale is None]
    scaled = [one for one in slices if one.rescale not in (None, (1.0, 0.0))]
    reason = ""
    if unscaled and scaled:
        reason = (
            f"{unscaled[0].path}: {len(unscaled)} of {len(slices)} slices have no RescaleSlope and RescaleIntercept, "
            f"the others have {scaled[0].rescale}: a part of the values would be off; export the series again"
        )
    wild = [one for one in scaled if one.rescale and not (
        0 < abs(one.rescale[0]) <= _MAX_SLOPE and abs(one.rescale[1]) <= _MAX_INTERCEPT)]  # fmt: skip
    if wild:
        reason = f"{wild[0].path}: RescaleSlope and RescaleIntercept are {wild[0].rescale}; export it again"
    return replace(series, slices=slices, reason=reason, warnings=found, plane=plane)


def _related(series: list[DicomSeries]) -> list[DicomSeries]:
    """Series with what can be said of them beside each other: reformats, and second reconstructions of one CT scan."""
    found: list[DicomSeries] = []
    for one in series:
        notes = list(one.notes)
        reformat = next((word for word in _REFORMATS if any(word in part for part in one.slices[0].kind)), None)
        if not one.reason and reformat:
            notes.append(f"a reformat ({reformat.lower()}), derived from another series, in the plane {one.plane}")
        twin = next((other for other in found if _same_acquisition(other, one)), None)
        if not one.reason and twin is not None:
            kernels = " and ".join(str(s.slices[0].differs.get("kernel") or "?") for s in (twin, one))
            notes.append(f"a second reconstruction of series {twin.number} (kernels {kernels})")
        found.append(replace(one, notes=notes))
    return found


def _same_acquisition(one: DicomSeries, other: DicomSeries) -> bool:
    """Whether two CT series show the same slices of one acquisition, reconstructed by different kernels."""
    a, b = one.slices[0], other.slices[0]
    return (
        not one.reason
        and not other.reason
        and one.modality == other.modality == "CT"
        and bool(a.frame_of_reference)
        and a.frame_of_reference == b.frame_of_reference
        and a.differs.get("kernel") != b.differs.get("kernel")
        and a.differs.get("time") == b.differs.get("time")
        and one.plane == other.plane
    )


# --- voxels ----------------------------------------------------------------------------------------------------------


def read_dicom(series: DicomSeries, *, fill: bool = False, keep_headers: bool = False) -> Scan:
    """The voxels of one series, rescaled (HU for CT), on an even grid whose affine is that of the slices' positions.

    Where slices are missing their place is filled with the lowest value and named in the warnings; where the spacing
    varies by design slices are interpolated.

    Args:
        series: one of `find_dicom_series`.
        fill: see `plain_voxels`.
        keep_headers: keep those of its files with the scan's `sources`.

    Raises:
        BadSampleError: a file whose pixels cannot be decoded, or are no grey values; positions that are no stack.
    """
    source = series.files[0].parent if len(series.files) > 1 else series.files[0]
    frames: dict[Path, np.ndarray] = {}
    planes = []
    for one in series.slices:
        if one.path not in frames:
            frames = {one.path: _pixels(one.path, series.description)}
        stack = frames[one.path]
        if stack.shape[1:] != one.size or one.frame >= len(stack):
            raise BadSampleError(f"{one.path}: decodes to {stack.shape}, its header says {one.size}; copy it again")
        planes.append(stack[one.frame])
    voxels = np.stack(planes)
    label = series.description or series.files[0].name
    warnings = [f"{label}: {warning}" for warning in series.warnings]
    voxels, first, step = _even(series, voxels, source, warnings, label)
    one = series.slices[0]
    affine = _affine(one)
    affine[:3, 2], affine[:3, 3] = step, first
    values = plain_voxels(voxels.transpose(2, 1, 0), source, fill=fill)
    if values.min() == values.max():
        warnings.append(f"{label}: every voxel has the value {values.min():g}")
    notes = [f"{label}: {note}" for note in series.notes]
    return Scan(
        series.description,
        values,
        _LPS_TO_RAS @ affine,
        source,
        series.modality,
        notes,
        warnings,
        series.plane,
        slice_labels=_slice_labels(series, first, step, len(voxels)),
        frame=one.frame_of_reference,
        sources=_sources(series, keep_headers),
    )


def _sources(series: DicomSeries, keep_headers: bool) -> tuple[SourceSlice, ...]:
    """The slices where their own headers say."""
    headers = {path: pydicom.dcmread(path, stop_before_pixels=True) for path in series.files if keep_headers}
    return tuple(
        SourceSlice(
            VoxelGrid((one.size[1], one.size[0], 1), _LPS_TO_RAS @ _affine(one)), one.frame, headers.get(one.path)
        )
        for one in series.slices
    )


def _affine(one: DicomSlice) -> np.ndarray:
    """(column, row, a step of 1 mm along the normal) of a slice → mm LPS."""
    row, column = np.array(one.direction[:3]), np.array(one.direction[3:])
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * one.spacing[1], column * one.spacing[0]
    affine[:3, 2], affine[:3, 3] = np.cross(row, column), one.position
    return affine


def _slice_labels(series: DicomSeries, first: np.ndarray, step: np.ndarray, count: int) -> tuple[str, ...]:
    """Series number, image number and position of every slice of a grid, "" where none was taken."""
    along, direction = _along(series.slices), np.array(series.slices[0].direction)
    normal = np.cross(direction[:3], direction[3:])
    axis = int(np.abs(normal).argmax())
    labels = []
    for n in range(count):
        # `_along` measures from the patient's origin.
        at = float(normal @ (first + n * step))
        nearest = int(np.abs(along - at).argmin())
        one = series.slices[nearest]
        if abs(along[nearest] - at) > _EVEN_MM:
            labels.append("")
            continue
        mm = one.position[axis]
        side = ("RL", "AP", "IS")[axis][mm >= 0]  # DICOM counts towards left, back and head
        labels.append(f"series {series.number} · image {one.number} · {side} {abs(mm):.1f} mm")
    return tuple(labels)


def _pixels(path: Path, description: str) -> np.ndarray:
    """(frames, rows, columns) of one file, rescaled."""
    try:
        with _no_itk_warnings():
            image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[-1][:200]
        raise BadSampleError(
            f"{path}: of DICOM series {description!r}, cannot be decoded ({reason}); copy it again, or convert the "
            "series to NIfTI"
        ) from None
    if image.GetNumberOfComponentsPerPixel() != 1 or image.GetDimension() not in (2, 3):
        raise BadSampleError(f"{path}: of DICOM series {description!r}, no grey slice; leave it out")
    pixels = sitk.GetArrayFromImage(image)
    return pixels[None] if pixels.ndim == 2 else pixels


def _even(
    series: DicomSeries, voxels: np.ndarray, source: Path, warnings: list[str], label: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels (k, rows, columns) at even steps, the place of the first slice, and the step (both LPS, mm)."""
    positions = np.array([one.position for one in series.slices])
    along = _along(series.slices)
    per_mm = (positions[-1] - positions[0]) / (
        along[-1] - along[0]
    )  # also the drift within the plane of a tilted gantry
    off = np.linalg.norm(positions - positions[0] - (along - along[0])[:, None] * per_mm, axis=1).max()
    if off > _ON_LINE_MM:
        raise BadSampleError(
            f"{source}: the slices of DICOM series {label!r} lie up to {off:.1f} mm off a straight stack; expected "
            "one stack: choose its files"
        )
    gaps = np.diff(along)
    if gaps.max() - gaps.min() <= _EVEN_MM:
        return voxels, positions[0], per_mm * (along[-1] - along[0]) / len(gaps)
    usual = float(np.median(gaps))
    holes = gaps >= _GAP * usual
    if holes.mean() > _MOST_GAPS:  # thin slices here, thick ones there
        usual, holes = float(gaps.min()), np.zeros_like(holes)
        warnings.append(
            f"{label}: slices {gaps.min():.2f} to {gaps.max():.2f} mm apart; interpolated to steps of {usual:.2f} mm"
        )
    count = round((along[-1] - along[0]) / usual) + 1
    if count * voxels[0].size > MAX_VOXELS:
        raise BadSampleError(f"{source}: slices of DICOM series {label!r} lie too far apart; choose its files")
    # Whole steps where slices are only missing, so that those that are there keep their values.
    step = (along[-1] - along[0]) / max(1, count - 1)
    wanted = along[0] + step * np.arange(count)
    below = np.clip(np.searchsorted(along, wanted + 1e-6) - 1, 0, len(along) - 2)
    share = np.clip((wanted - along[below]) / gaps[below], 0.0, 1.0)
    share[np.abs(share * gaps[below]) < _EVEN_MM] = 0.0
    share[np.abs((1 - share) * gaps[below]) < _EVEN_MM] = 1.0
    blank = holes[below] & (share * gaps[below] > 0.5 * step) & ((1 - share) * gaps[below] > 0.5 * step)
    values = voxels.astype(np.float32)
    even = values[below] * (1 - share)[:, None, None].astype(np.float32)
    even += values[below + 1] * share[:, None, None].astype(np.float32)
    even[blank] = values.min()
    for hole in np.flatnonzero(holes):
        before, after = series.slices[hole], series.slices[hole + 1]
        inside = int(blank[(wanted > along[hole]) & (wanted < along[hole + 1])].sum())
        warnings.append(
            f"{label}: {inside} slices are missing between images {before.number} and {after.number} (a gap of "
            f"{gaps[hole]:.1f} mm, steps are {usual:.1f} mm); they are left blank"
        )
    if voxels.dtype.kind in "iu":
        even = np.rint(even).astype(np.int32)
    return even, positions[0], per_mm * step


@contextmanager
def _no_itk_warnings() -> Iterator[None]:
    """ITK's remarks on odd files go to standard error in paragraphs; the notes say it in a line."""
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)
