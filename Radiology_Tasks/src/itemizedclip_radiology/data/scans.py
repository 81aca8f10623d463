"""Scans as scanners and archives leave them, in their own voxel grid; `nifti` and `dicom` read the files.

A `Scan` keeps the file's voxels and affine. `orient` turns it the way the models' converters did, by permuting and
flipping axes alone: no voxel is interpolated, and `FileGrid` knows the way back. Only grids that are no right-angled
boxes (a tilted gantry, a sheared affine) are resampled first (`straightened`), so that every view of planes shows what
lies there.

Axes: i j k voxel axes of the file; D H W slices, rows, columns after `orient`; world coordinates in mm, RAS+ (right,
anterior, superior are positive), as in NIfTI.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from nibabel import orientations
from nibabel.affines import voxel_sizes
from scipy import ndimage

from itemizedclip.data.batch import BadSampleError
from itemizedclip.viewer.inputs import FileGrid, SourceSlice, VoxelGrid

Plane = Literal["AX", "COR", "SAG"]
"""Which way slices lie: across, from front to back, from side to side."""

_PLANE_OF_AXIS: tuple[Plane, Plane, Plane] = ("AX", "COR", "SAG")
_WORDS_OF_PLANE: dict[Plane, str] = {
    "AX": "ax|axial|tra|trans|transversal",
    "COR": "cor|coronal",
    "SAG": "sag|sagittal",
}
_SHEAR_VOXELS = 0.5
"""A grid whose corners lie so many voxels off a right-angled box is resampled onto one."""

MAX_VOLUMES = 6
"""Volumes of one file or series that are read as series of their own; of more, dynamics mostly, the first."""

MAX_VOXELS = 2**31
"""More than any scanner gives; a header that asks for more is damaged or made to fill the memory."""

Body = Literal["brain", "chest"]

_EXTENT_MM: dict[Body, tuple[float, float]] = {"brain": (40.0, 700.0), "chest": (60.0, 1200.0)}
"""Largest side of a scan: phantoms and slabs below, whole bodies above."""


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
        warnings: what must be known to use the scan: gaps, guesses, what was left out.
        plane: in which its slices were taken, None when the file does not say.
        slice_labels: what other viewers call its slices, one text per k; empty when the file does not say.
        frame: FrameOfReferenceUID, "" when the file does not say.
        sources: the DICOM images it was read from.
        sheared: the file's own grid, where `voxels` were resampled from it; that of DICOM images stands in `sources`.
    """

    name: str
    voxels: np.ndarray
    affine: np.ndarray
    source: Path
    modality: str = ""
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    plane: Plane | None = None
    slice_labels: tuple[str, ...] = ()
    frame: str = ""
    sources: tuple[SourceSlice, ...] = ()
    sheared: VoxelGrid | None = None


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
    file_affine, flipped = np.array(scan.affine, dtype=np.float64), (flip_i, flip_j, flip_k)
    grid = FileGrid(scan.voxels.shape, file_affine, (i, j, k), flipped, scan.sheared)
    d, h, w = (float(size) for size in voxel_sizes(affine))
    return OrientedScan(grid.to_view(scan.voxels), (d, h, w), affine, grid, plane_of(affine))


def plane_of(affine_dhw: np.ndarray) -> Plane:
    """The plane of slices that are counted along the first axis."""
    towards = np.abs(affine_dhw[:3, 0])
    return _PLANE_OF_AXIS[2 - int(towards.argmax())]


def series_text(name: str, plane: Plane, *, is_certain: bool = False) -> str:
    """A series name as the models read them, such as AX_FLAIR: the plane stands first unless the name holds it.

    Args:
        name: of the file, or the description of the series.
        plane: measured.
        is_certain: the slices were taken in this plane (and not only counted so): a name that holds another one, such
            as that of a coronal reformat of an axial scan, gets this one.
    """
    words = re.sub(r"[\s_]+", "_", name.strip()).strip("_") or "series"
    named = [one for one in _PLANE_OF_AXIS if re.search(_plane_pattern(one), words)]
    if is_certain and named and plane not in named:
        for one in named:
            words = re.sub(_plane_pattern(one), "", words)
        words, named = re.sub(r"_+", "_", words).strip("_") or "series", []
    return words if named else f"{plane}_{words}"


def _plane_pattern(plane: Plane) -> str:
    return rf"(?i)(?<![a-z])({_WORDS_OF_PLANE[plane]})(?![a-z])"


def looks_like_hu(voxels: np.ndarray) -> bool:
    """Whether values are Hounsfield units of a body in air: a CT, whatever its file is called.

    Air lies near −1000, soft tissue around 0; grey values of MRI are not negative.
    """
    values = voxels[::4, ::4, ::2]
    air = float(((values < -800) & (values > -3100)).mean())
    soft_tissue = float(((values > -150) & (values < 250)).mean())
    return air > 0.05 and soft_tissue > 0.02


def looks_like_shifted_hu(voxels: np.ndarray) -> bool:
    """Whether values are those of a head CT without its intercept, 1024 too high.

    Grey values of an MRI may lie there, too, but not so close together as brain in a CT, and nothing is as dark as air
    and as bright as bone in nearly the same number of voxels.
    """
    values = voxels[::4, ::4, ::2].astype(np.float32)
    brain = float(((values > 1024 + 5) & (values < 1024 + 60)).mean())
    around = float(((values > 1024 - 150) & (values < 1024 + 250)).mean())
    air = float(((values >= -100) & (values < 150)).mean())
    bone = float(((values > 1024 + 400) & (values < 4096)).mean())
    return air > 0.05 and around > 0.05 and brain > 0.6 * around and 0.005 < bone < 0.3


# --- grids that are no boxes, sizes that are no bodies ---------------------------------------------------------------


def straightened(scan: Scan) -> Scan:
    """The scan on a right-angled grid: itself, or resampled trilinearly where its own axes are oblique to each other.

    The new grid keeps the first axis and the plane of the first two, the voxel sizes along them and the distance of the
    slices; it covers all of the old one. What lies outside becomes the scan's lowest value, air in a CT.

    Raises:
        BadSampleError: axes so oblique that the box around them is several times larger.
    """
    matrix, shape = scan.affine[:3, :3], np.array(scan.voxels.shape)
    first = matrix[:, 0] / np.linalg.norm(matrix[:, 0])
    second = matrix[:, 1] - first * (first @ matrix[:, 1])
    second /= np.linalg.norm(second)
    normal = np.cross(first, second)
    normal *= np.sign(normal @ matrix[:, 2])
    axes = np.stack([first, second, normal], axis=1)
    spacing = np.array([np.linalg.norm(matrix[:, 0]), np.linalg.norm(matrix[:, 1]), abs(normal @ matrix[:, 2])])
    off = axes.T @ matrix - np.diag(spacing)
    if (np.abs(off) @ (shape - 1) / spacing).max() <= _SHEAR_VOXELS:
        return scan
    corners = np.array(np.meshgrid(*[[0, n - 1] for n in shape], indexing="ij")).reshape(3, -1)
    low, high = (inside := axes.T @ matrix @ corners).min(1), inside.max(1)
    size = np.floor((high - low) / spacing + 1e-3).astype(int) + 1
    if size.prod() > 4 * shape.prod():
        raise BadSampleError(
            f"{scan.source}: its axes are far from right angles (a box around it has {'×'.join(map(str, size))} voxels "
            f"instead of {'×'.join(map(str, shape))}); expected a stack of slices: resample it on a straight grid"
        )
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = scan.affine[:3, 3] + axes @ low
    back = np.linalg.inv(scan.affine) @ affine
    lowest = float(scan.voxels.min())
    voxels = ndimage.affine_transform(
        scan.voxels.astype(np.float32), back[:3, :3], back[:3, 3], tuple(size.tolist()), order=1, cval=lowest
    )
    if scan.voxels.dtype.kind == "i":
        voxels = np.rint(voxels).astype(scan.voxels.dtype)
    angle = np.degrees(np.arccos(min(1.0, abs(normal @ matrix[:, 2]) / np.linalg.norm(matrix[:, 2]))))
    what = "rows and columns are not at right angles"
    if angle > 0.05:
        what = f"slices are shifted against each other by {angle:.1f}° (a tilted gantry)"
    note = f"{scan.name}: {what}; resampled on a straight grid of {'×'.join(map(str, size))} voxels"
    # The new slices lie in the planes of the old ones, if they are as many.
    labels = scan.slice_labels if size[2] == len(scan.slice_labels) else ()
    own = None if scan.sources else VoxelGrid(scan.voxels.shape, scan.affine)
    warnings = [*scan.warnings, note]
    return replace(scan, voxels=voxels, affine=affine, warnings=warnings, slice_labels=labels, sheared=own)


def check_field_of_view(scan: Scan, body: Body) -> None:
    """Refuse a scan whose largest side is none of a head or chest: wrong units, or no voxel size at all.

    Raises:
        BadSampleError: names the size.
    """
    if not is_plausible(scan.affine, scan.voxels.shape, body):
        sides = "×".join(f"{mm:.4g}" for mm in voxel_sizes(scan.affine) * scan.voxels.shape)
        lowest, highest = _EXTENT_MM[body]
        raise BadSampleError(
            f"{scan.source}: covers {sides} mm; expected a {body} of {lowest:g} to {highest:g} mm: correct its voxel "
            "size or units"
        )


def is_plausible(affine: np.ndarray, shape: tuple[int, ...], body: Body | None = None) -> bool:
    """Whether a grid is of the size of a head or chest, or of any of them."""
    largest = float((voxel_sizes(affine) * shape).max())
    bodies = [body] if body else list(_EXTENT_MM)
    return any(_EXTENT_MM[one][0] <= largest <= _EXTENT_MM[one][1] for one in bodies)


def plain_voxels(voxels: np.ndarray, source: Path, *, fill: bool = False) -> np.ndarray:
    """int16 where the values are such integers, else finite float32; in the machine's byte order.

    Args:
        voxels: as read.
        source: for messages.
        fill: put the lowest finite value where there is none.

    Raises:
        BadSampleError: NaN or infinite values that are not to be filled, or nothing else.
    """
    limits = np.iinfo(np.int16)
    if voxels.dtype.kind in "iu" and limits.min <= voxels.min() and voxels.max() <= limits.max:
        return voxels.astype(np.int16)
    with np.errstate(over="ignore"):
        voxels = voxels.astype(np.float32)
    finite = np.isfinite(voxels)
    if finite.all():
        return voxels
    bad = int(finite.size - finite.sum())
    if not fill or bad == finite.size:
        raise BadSampleError(
            f"{source}: {bad:,} of {voxels.size:,} values are NaN or infinite; expected finite values: convert it "
            "again, or fill them with the lowest value by --fill-nan"
        )
    return np.where(finite, voxels, voxels[finite].min())
