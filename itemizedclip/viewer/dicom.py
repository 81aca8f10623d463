"""Attention as DICOM, for the archives and viewers that the study itself lies in.

A Parametric Map per item and series holds the map as it is, in multiples of an even spread. A Segmentation per series
has one segment per item: what lies above a threshold. Both are made image by image of the source series, each where
its own header says, so that tilted, uneven and incomplete series need no grid, and name the images they lie over.

Axes: T items, S series (views), n images of one series, y x rows and columns of an image.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.registry import MissingExtraError
from itemizedclip.viewer.explanation import Explanation
from itemizedclip.viewer.figures import LEAST_PEAK
from itemizedclip.viewer.geometry import Upsampling
from itemizedclip.viewer.inputs import InputView, SourceSlice, VoxelGrid
from itemizedclip.viewer.volumes import file_names, map_in_grid, slug

MOST_MAP_VOXELS = 16_000_000
"""Maps of series with more pixels take squares of several of their pixels as one: they are stored as float32."""

_MAKER, _PRODUCT = "ItemizedCLIP", "itemizedclip explain"
_LABEL_CHARACTERS = 64  # of a text in a DICOM header
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])
_EMPTY_WHERE_ABSENT = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID")


@dataclass(frozen=True)
class DicomOrigin:
    """What the files say of the model that made them.

    Attributes:
        model: name of its config.
        sha256: of its weights, hexadecimal.
    """

    model: str
    sha256: str


def check_highdicom() -> None:
    """Before anything is computed.

    Raises:
        MissingExtraError: highdicom is not installed.
    """
    try:
        import highdicom  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("writing DICOM needs the package highdicom: pip install -e '.[dicom]'") from error


def write_dicom(
    explanation: Explanation, folder: Path, origin: DicomOrigin, *, mode: Upsampling = "smooth", threshold: float = 3.0
) -> list[Path]:
    """Parametric Maps, itemNN_TEXT__SERIES.map.dcm, and Segmentations, segments__SERIES.seg.dcm.

    An item without localisation (`LEAST_PEAK`) has no segment, and a series without segments no Segmentation.

    Args:
        explanation: of a study read from DICOM with `SeriesChoice.keep_headers`.
        folder: made when missing.
        origin: of the model.
        mode: see `map_to_input`.
        threshold: from which a voxel belongs to a segment, in multiples of an even spread.

    Raises:
        UserError: a series that is no DICOM, or lacks what results must refer to.
        MissingExtraError: highdicom is not installed.
    """
    check_highdicom()
    views, maps_TSdhw = explanation.source.views, explanation.maps.times_uniform()
    names = file_names([view.name for view in views])
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    number = 0
    # highdicom warns of what the study's own headers are like, which is not to be changed here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for s, view in enumerate(views):
            headers = _source_headers(view)
            segments: list[tuple[str, np.ndarray]] = []
            for k, text in enumerate(explanation.items):
                number += 1
                step = _pixel_step(view.sources)
                values = _over_images(maps_TSdhw[k, s], view, mode, step)
                path = folder / f"item{k + 1:02d}_{slug(text)}__{names[s]}.map.dcm"
                _save(_parametric_map(values, text, view, headers, step, origin, number), view, path)
                written.append(path)
                if float(explanation.maps.peaks[k]) >= LEAST_PEAK:
                    whole = values if step == 1 else _over_images(maps_TSdhw[k, s], view, mode, 1)
                    if (whole >= threshold).any():
                        segments.append((text, whole >= threshold))
            if segments:
                number += 1
                path = folder / f"segments__{names[s]}.seg.dcm"
                _save(_segmentation(segments, view, headers, threshold, origin, number), view, path)
                written.append(path)
    return written


def _over_images(grid_map: Any, view: InputView, mode: Upsampling, step: int) -> np.ndarray:
    """(n, y, x) of a map (d, h, w) over the images of the source series."""
    images = [map_in_grid(grid_map, view, _coarser(one.grid, step), mode)[..., 0].T for one in view.sources]
    return np.stack(images)


def _coarser(grid: VoxelGrid, step: int) -> VoxelGrid:
    """Squares of `step` pixels as one; those at the far edges may reach beyond the image."""
    i, j, k = grid.shape
    affine = grid.affine.copy()
    affine[:3, 3] = (grid.affine @ [(step - 1) / 2, (step - 1) / 2, 0, 1])[:3]
    affine[:3, :2] *= step
    return VoxelGrid((-(-i // step), -(-j // step), k), affine)


def _pixel_step(sources: Sequence[SourceSlice]) -> int:
    """The least whole number of pixels by which a map has no more than `MOST_MAP_VOXELS`."""
    pixels = sum(one.grid.shape[0] * one.grid.shape[1] for one in sources)
    return max(1, int(np.ceil(np.sqrt(pixels / MOST_MAP_VOXELS))))


# --- headers ---------------------------------------------------------------------------------------------------------


def _source_headers(view: InputView) -> list[Any]:
    """Headers as highdicom reads them: one per image, or one of many frames, which then are those of the view.

    Series whose images differ in the last digits of their direction, and files of many frames that give one with each
    of them, are brought to one for all: the reader made sure that they are the same.
    """
    if not view.sources or any(one.header is None for one in view.sources):
        raise UserError(f"{view.name}: is no DICOM series; results as DICOM refer to one")
    first = view.sources[0].header
    lacking = [tag for tag in _NEEDED if not first.get(tag)]
    if lacking:
        raise UserError(f"{view.name}: its DICOM files have no {lacking[0]}, which results refer to; export it again")
    if "NumberOfFrames" in first and int(first.NumberOfFrames) > 1:
        return [_frames_of(view.sources)]
    headers = []
    for one in view.sources:
        header = copy.copy(one.header)
        header.ImageOrientationPatient, header.PixelSpacing = first.ImageOrientationPatient, first.PixelSpacing
        headers.append(_completed(header))
    return headers


def _completed(header: Any) -> Any:
    """With empty values of what DICOM asks for and files of research lack."""
    for tag in _EMPTY_WHERE_ABSENT:
        if tag not in header:
            setattr(header, tag, "")
    return header


def _frames_of(sources: Sequence[SourceSlice]) -> Any:
    """A header of many frames with those of a view alone, in its order."""
    from pydicom.dataset import Dataset

    header = copy.deepcopy(sources[0].header)
    size, turn = Dataset(), Dataset()
    grid = sources[0].grid
    size.PixelSpacing, turn.ImageOrientationPatient = _spacing(grid), _orientation(grid)
    shared = header.SharedFunctionalGroupsSequence[0]
    old = shared.get("PixelMeasuresSequence") or header.PerFrameFunctionalGroupsSequence[0].get("PixelMeasuresSequence")
    if old and "SliceThickness" in old[0]:
        size.SliceThickness = old[0].SliceThickness
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [size], [turn]
    frames = []
    for one in sources:
        frame = header.PerFrameFunctionalGroupsSequence[one.frame]
        for group in ("PixelMeasuresSequence", "PlaneOrientationSequence"):
            if group in frame:
                delattr(frame, group)
        frames.append(frame)
    header.PerFrameFunctionalGroupsSequence, header.NumberOfFrames = frames, len(frames)
    return _completed(header)


def _spacing(grid: VoxelGrid) -> list[float]:
    """Between rows, between columns, mm."""
    columns, rows = np.linalg.norm(grid.affine[:3, :2], axis=0).round(9).tolist()
    return [rows, columns]


def _orientation(grid: VoxelGrid) -> list[float]:
    """Of a row, then of a column, LPS."""
    return list((_RAS_TO_LPS @ grid.affine[:3, :2] / np.linalg.norm(grid.affine[:3, :2], axis=0)).T.ravel())


def _places(grid: VoxelGrid) -> list[float]:
    """Of the first pixel's centre, mm LPS."""
    return list(_RAS_TO_LPS @ grid.affine[:3, 3])


# --- objects ---------------------------------------------------------------------------------------------------------


def _common(view: InputView, origin: DicomOrigin, number: int, description: str) -> dict[str, Any]:
    from highdicom import UID

    series = int(view.sources[0].header.get("SeriesNumber") or 0) % 100_000
    return {
        "series_instance_uid": UID(),
        "series_number": 1000 * series + number,
        "sop_instance_uid": UID(),
        "instance_number": 1,
        "manufacturer": _MAKER,
        "manufacturer_model_name": _PRODUCT,
        "software_versions": version("itemizedclip"),
        "device_serial_number": origin.sha256[:16] or "unknown",
        "series_description": description[:_LABEL_CHARACTERS],
        "specific_character_set": "ISO_IR 192",
    }


def _parametric_map(
    values: np.ndarray,
    text: str,
    view: InputView,
    headers: list[Any],
    step: int,
    origin: DicomOrigin,
    number: int,
) -> Any:
    """values: float32 (n, y, x), in multiples of an even spread."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    top = max(float(values.max()), 1.0)
    mapping = hd.pm.RealWorldValueMapping(
        lut_label="ATTENTION",
        lut_explanation="Attention, multiples of an even spread",
        unit=codes.UCUM.NoUnits,
        value_range=(0.0, top),
        slope=1.0,
        intercept=0.0,
        quantity_definition=codes.DCM.Saliency,
    )
    where: dict[str, Any] = {}
    if step > 1:
        grids = [_coarser(one.grid, step) for one in view.sources]
        thickness = _thickness(view)
        where = {
            "pixel_measures": hd.PixelMeasuresSequence(
                pixel_spacing=_spacing(grids[0]), slice_thickness=thickness or None
            ),
            "plane_orientation": hd.PlaneOrientationSequence("PATIENT", _orientation(grids[0])),
            "plane_positions": [hd.PlanePositionSequence("PATIENT", _places(grid)) for grid in grids],
        }
    made = hd.pm.ParametricMap(
        source_images=headers,
        pixel_array=np.ascontiguousarray(values),
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[hd.VOILUTTransformation(window_center=top / 2, window_width=top)],
        content_label="ATTENTION",
        content_description=text[:_LABEL_CHARACTERS],
        derivation=codes.DCM.UnspecifiedMethodOfCalculation,
        **where,
        **_common(view, origin, number, f"Attention: {text} ({view.name})"),
    )
    made.Laterality = ""  # asked for by validators where the body part is not said
    return made


def _thickness(view: InputView) -> float:
    header = view.sources[0].header
    groups = [header, *(header.get("SharedFunctionalGroupsSequence") or [])]
    for group in groups:
        measures = group.get("PixelMeasuresSequence")
        found = measures[0].get("SliceThickness") if measures else group.get("SliceThickness")
        if found:
            return float(found)
    return 0.0


def _segmentation(
    segments: Sequence[tuple[str, np.ndarray]],
    view: InputView,
    headers: list[Any],
    threshold: float,
    origin: DicomOrigin,
    number: int,
) -> Any:
    """segments: text and bool (n, y, x) of each."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    algorithm = hd.AlgorithmIdentificationSequence(
        name=origin.model or _MAKER,
        family=codes.DCM.ArtificialIntelligence,
        version=origin.sha256[:16] or "unknown",
        parameters={"threshold_times_even": f"{threshold:g}"},
    )
    descriptions = [
        hd.seg.SegmentDescription(
            segment_number=n,
            segment_label=text[:_LABEL_CHARACTERS],
            segmented_property_category=codes.SCT.SpatialAndRelationalConcept,
            segmented_property_type=codes.DCM.SelectedRegion,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            tracking_uid=hd.UID(),
            tracking_id=text[:_LABEL_CHARACTERS],
        )
        for n, (text, _) in enumerate(segments, start=1)
    ]
    return hd.seg.Segmentation(
        source_images=headers,
        pixel_array=np.stack([mask for _, mask in segments], axis=-1).astype(np.uint8),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        content_label="ATTENTION",
        content_description=f"Attention of at least {threshold:g} times an even spread"[:_LABEL_CHARACTERS],
        **_common(view, origin, number, f"Attention above {threshold:g} times even ({view.name})"),
    )


def _save(made: Any, view: InputView, path: Path) -> None:
    """Write an object, its references to frames counted as in the source's file."""
    if int(view.sources[0].header.get("NumberOfFrames") or 1) > 1:
        for group in made.PerFrameFunctionalGroupsSequence:
            for derivation in group.get("DerivationImageSequence") or []:
                for reference in derivation.SourceImageSequence:
                    if "ReferencedFrameNumber" in reference:
                        n = int(reference.ReferencedFrameNumber)
                        reference.ReferencedFrameNumber = view.sources[n - 1].frame + 1
    made.save_as(path)
