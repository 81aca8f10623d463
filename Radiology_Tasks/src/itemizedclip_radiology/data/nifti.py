"""NIfTI files as scans: sizes judged before memory is asked for, units converted, volumes of a series told apart.

Axes: i j k voxel axes of the file, n volumes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes

from itemizedclip.data.batch import BadSampleError
from itemizedclip_radiology.data.scans import MAX_VOLUMES, MAX_VOXELS, Scan, is_plausible, plain_voxels, plane_of

NIFTI_SUFFIXES = (".nii", ".nii.gz")

_MM_PER_UNIT = {"meter": 1000.0, "mm": 1.0, "micron": 0.001}
_MOST_GZIP = 1032
"""Bytes that one byte of gzip can become at most."""

_FORMS_APART_MM = 1.0
_EXPECTED = "expected a NIfTI volume of slices, rows and columns"


def is_nifti(path: Path) -> bool:
    """By its name."""
    return path.name.lower().endswith(NIFTI_SUFFIXES)


def nifti_stem(path: Path) -> str:
    """The name without .nii or .nii.gz."""
    return re.sub(r"(?i)\.nii(\.gz)?$", "", path.name)


def read_nifti(path: Path, *, fill: bool = False) -> list[Scan]:
    """The volumes of one NIfTI file: one, or up to `MAX_VOLUMES` named by what differs (b-values of a .bval file).

    Args:
        path: the file.
        fill: see `plain_voxels`.

    Raises:
        BadSampleError: no such file, damaged, cut short, larger than it can be, no three axes, no affine that can be
            inverted, values that are not finite numbers.
    """
    if not path.is_file():
        raise BadSampleError(f"{path}: no such file; {_EXPECTED}")
    warnings: list[str] = []
    try:
        image: Any = nibabel.load(path)
        shape = tuple(int(n) for n in image.shape)
        _check_size(path, image, shape)
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        kept = _volumes(path, shape, warnings)
        blocks = [_block(image, shape, number) for number in kept]
        affine = np.asarray(image.affine, dtype=np.float64)
    except BadSampleError:
        raise
    except Exception as error:  # bytes that are no NIfTI file make the reader fail in any way
        reason = (str(error) or type(error).__name__).split("\n")[0][:160]
        raise BadSampleError(f"{path}: not a readable NIfTI file ({reason}); {_EXPECTED}: copy it again") from None
    sizes = "×".join(map(str, blocks[0].shape))
    if blocks[0].ndim != 3 or min(blocks[0].shape, default=0) < 2 or blocks[0].dtype.kind not in "iuf":
        raise BadSampleError(f"{path}: {blocks[0].dtype} volume of {sizes}; {_EXPECTED}, two voxels each at least")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-15:
        raise BadSampleError(f"{path}: its affine has no inverse; expected a valid sform or qform: convert it again")
    affine = _of_forms(path, image.header, affine, blocks[0].shape, warnings)
    affine = _in_mm(path, image.header, affine, blocks[0].shape, warnings)
    labels = _labels(path, shape, kept)
    stem = nifti_stem(path)
    columns = np.sqrt((affine[:3, :3] ** 2).sum(0))
    plane = plane_of(affine[:, [2, 1, 0, 3]]) if columns[2] > 1.5 * columns[:2].max() else None
    return [
        Scan(f"{stem}_{label}" if label else stem, plain_voxels(block, path, fill=fill), affine, path, "", [],
             warnings if number == 0 else [], plane)
        for number, (label, block) in enumerate(zip(labels, blocks))
    ]  # fmt: skip


def _check_size(path: Path, image: Any, shape: Sequence[int]) -> None:
    """Judge by header and file size whether the voxels can be there, before memory is asked for them."""
    voxels = int(np.prod([max(0, n) for n in shape], dtype=object))
    if voxels > MAX_VOXELS:
        raise BadSampleError(
            f"{path}: its header tells of {'×'.join(map(str, shape))} voxels, more than any scan has; copy it again"
        )
    needed, size = voxels * int(image.header.get_data_dtype().itemsize), path.stat().st_size
    if needed > (size * _MOST_GZIP if path.name.lower().endswith(".gz") else size):
        raise BadSampleError(
            f"{path}: its header tells of {needed:,} bytes of voxels, the file has {size:,}: cut short; copy it again"
        )


def _volumes(path: Path, shape: Sequence[int], warnings: list[str]) -> list[int]:
    """Numbers of the volumes to read."""
    count = int(np.prod(shape[3:], dtype=int)) if len(shape) > 3 else 1
    if count == 1:
        return [0]
    size = "×".join(map(str, shape))
    if count > MAX_VOLUMES:
        warnings.append(
            f"{path.name}: {size} voxels, {count} volumes in one file; the first is read, the others are left out"
        )
        return [0]
    warnings.append(f"{path.name}: {size} voxels, {count} volumes in one file, read as series of their own")
    return list(range(count))


def _block(image: Any, shape: Sequence[int], number: int) -> np.ndarray:
    """One volume, without reading the others where the file allows."""
    if len(image.shape) == 3:
        return np.asarray(image.dataobj)
    places = [int(n) for n in np.unravel_index(number, shape[3:], order="F")] if len(shape) > 3 else []
    rest = (*places, *[0] * (len(image.shape) - 3 - len(places)))
    return np.asarray(image.dataobj[(slice(None),) * 3 + rest])


def _labels(path: Path, shape: Sequence[int], kept: Sequence[int]) -> list[str]:
    """What tells the volumes apart: their b-value where a .bval file lies beside, else their number."""
    if len(kept) == 1:
        return [""]
    beside = path.with_name(f"{nifti_stem(path)}.bval")
    try:
        values = [float(word) for word in beside.read_text().split()]
        if len(values) == shape[3]:
            names = [f"b{round(values[number])}" for number in kept]
            return [n if names.count(n) == 1 else f"{n}_{k + 1}" for k, n in zip(kept, names)]
    except (OSError, ValueError):
        pass
    return [f"volume{number + 1}" for number in kept]


def _in_mm(path: Path, header: Any, affine: np.ndarray, shape: tuple[int, ...], warnings: list[str]) -> np.ndarray:
    """The affine in mm, whatever unit the header gives; a unit that makes no body of it is not believed."""
    try:
        unit = header.get_xyzt_units()[0]
    except (KeyError, ValueError):
        unit = "unknown"
    factor = _MM_PER_UNIT.get(unit, 1.0)
    if factor == 1.0:
        return affine
    converted = np.diag([factor, factor, factor, 1.0]) @ affine
    if not is_plausible(converted, shape) and is_plausible(affine, shape):
        warnings.append(f"{path.name}: its header says {unit}, which would be no body; its voxel sizes are taken as mm")
        return affine
    warnings.append(f"{path.name}: voxel sizes in {unit}s, converted to mm")
    return converted


def _of_forms(path: Path, header: Any, affine: np.ndarray, shape: Sequence[int], warnings: list[str]) -> np.ndarray:
    """The affine that is taken, and which of sform and qform it is where that matters.

    The sform, as everywhere, unless its voxel sizes are not those of the header and the qform's are: some programs
    leave an sform of 1 mm voxels behind.
    """
    sform, sform_code = header.get_sform(coded=True)
    try:
        qform, qform_code = header.get_qform(coded=True)
    except Exception:  # a quaternion that is none
        qform, qform_code = None, 0
    if not sform_code and not qform_code:
        warnings.append(
            f"{path.name}: says nothing about orientation (no sform, no qform); nibabel's default is taken: left and "
            "right may be exchanged"
        )
    elif sform_code and qform_code and sform is not None and qform is not None:
        corners = np.array(np.meshgrid(*[[0, n - 1] for n in shape], indexing="ij")).reshape(3, -1).T
        apart = float(np.linalg.norm(apply_affine(sform, corners) - apply_affine(qform, corners), axis=1).max())
        if apart > _FORMS_APART_MM:
            told = np.array([float(mm) for mm in header.get_zooms()[:3]])
            by_qform = not np.allclose(voxel_sizes(sform), told, rtol=0.01) and np.allclose(
                voxel_sizes(qform), told, rtol=0.01
            )
            mirrored = np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0
            sides = ", and one mirrors the other" if mirrored else ""
            taken = "the qform is taken, whose voxel sizes are the header's" if by_qform else "the sform is taken"
            warnings.append(
                f"{path.name}: sform and qform lie up to {apart:.3g} mm apart{sides}; {taken} (left and right hang on "
                "it)"
            )
            return np.asarray(qform, dtype=np.float64) if by_qform else affine
    return affine


def read_label_volumes(path: Path) -> np.ndarray:
    """Labels of a NIfTI file, integers (F, i, j, k) in the file's order of axes; one volume alone is F = 1.

    Args:
        path: (i, j, k), or findings first: (F, i, j, k).

    Raises:
        BadSampleError: no such file, damaged, larger than it can be, or values that are no labels.
    """
    expected = "expected whole labels of (i, j, k) or (findings, i, j, k)"
    if not path.is_file():
        raise BadSampleError(f"{path}: no such file; {expected}")
    try:
        image: Any = nibabel.load(path)
        shape = tuple(int(n) for n in image.shape)
        _check_size(path, image, shape)
        values = np.asarray(image.dataobj)
    except BadSampleError:
        raise
    except Exception as error:  # bytes that are no NIfTI file make the reader fail in any way
        reason = (str(error) or type(error).__name__).split("\n")[0][:160]
        raise BadSampleError(f"{path}: not a readable NIfTI file ({reason}); {expected}: copy it again") from None
    if values.ndim not in (3, 4) or min(values.shape, default=0) < 1:
        raise BadSampleError(f"{path}: {values.dtype} of {'×'.join(map(str, values.shape))}; {expected}")
    if values.dtype.kind == "f":
        whole = np.isfinite(values).all() and np.array_equal(values, np.rint(values))
        if not whole or np.abs(values).max(initial=0) > np.iinfo(np.int16).max:
            raise BadSampleError(f"{path}: holds values that are no whole numbers; {expected}")
        values = values.astype(np.int16)
    if values.dtype.kind not in "iu":
        raise BadSampleError(f"{path}: holds {values.dtype} values; {expected}")
    return values[None] if values.ndim == 3 else values
