"""Phantoms that are drawn in world coordinates and sampled on any grid, as NIfTI files and DICOM series."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid


def affine_of(codes: str, spacing: tuple[float, float, float], shape: tuple[int, int, int], tilt: float = 0.0):
    """An affine whose grid is centred on the world's origin.

    Args:
        codes: where the axes i, j, k run to, such as "LPS".
        spacing: mm along i, j, k.
        shape: voxels.
        tilt: rotation about two axes, radians, which makes the grid oblique.
    """
    matrix = np.zeros((3, 3))
    for axis, code in enumerate(codes):
        world, sign = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}[code]
        matrix[world, axis] = sign * spacing[axis]
    c, s = np.cos(tilt), np.sin(tilt)
    about_x = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    about_z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ about_z @ matrix
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine


def world_of(shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """World coordinates (i, j, k, 3) of every voxel."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def chest_phantom(world: np.ndarray, spot: np.ndarray, radius: float = 6.0) -> np.ndarray:
    """A body of soft tissue with two lungs in air, and a dense spot: int16 HU."""
    hu = np.full(world.shape[:-1], -1000, dtype=np.int16)
    x, y, z = np.moveaxis(world, -1, 0)
    hu[(x / 45) ** 2 + (y / 32) ** 2 < 1] = 40
    for side in (-1, 1):
        hu[((x - side * 20) / 14) ** 2 + (y / 20) ** 2 + (z / 60) ** 2 < 1] = -850
    hu[((world - spot) ** 2).sum(-1) < radius**2] = 1500
    return hu


def brain_phantom(world: np.ndarray, spot: np.ndarray, radius: float = 11.0) -> np.ndarray:
    """A grey head with a bright spot: int16 grey values of an MRI."""
    grey = np.zeros(world.shape[:-1], dtype=np.int16)
    grey[((world / np.array([35.0, 42.0, 40.0])) ** 2).sum(-1) < 1] = 300
    grey[((world - spot) ** 2).sum(-1) < radius**2] = 1200
    return grey


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


def write_dicom(
    folder: Path,
    voxels: np.ndarray,
    affine: np.ndarray,
    *,
    description: str = "chest",
    modality: str = "CT",
    kind: str = "AXIAL",
    number: int = 1,
    drop: tuple[int, ...] = (),
) -> str:
    """One file per slice along k, named in shuffled order; CT stored with intercept −1024. Returns the series UID."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = generate_uid()
    intercept = -1024 if modality == "CT" else 0
    to_lps = np.diag([-1.0, -1.0, 1.0])
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    num_slices = voxels.shape[2]
    names = np.random.default_rng(number).permutation(num_slices)
    for k in range(num_slices):
        if k in drop:
            continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = uid, "1.2.3", "1.2.4"
        data.Modality, data.SeriesDescription, data.SeriesNumber = modality, description, number
        data.PatientName, data.PatientID = "Phantom", "1"
        data.ImageType = ["ORIGINAL", "PRIMARY", kind]
        data.InstanceNumber = k + 1
        data.ImageOrientationPatient = [float(f"{v:.10f}") for v in (to_lps @ directions[:, :2]).T.ravel()]
        position = to_lps @ (affine @ np.array([0, 0, k, 1.0]))[:3]
        data.ImagePositionPatient = [float(f"{v:.8f}") for v in position]
        data.PixelSpacing = [float(spacing[1]), float(spacing[0])]
        data.SliceThickness = float(spacing[2])
        pixels = (voxels[:, :, k].T.astype(np.int32) - intercept).astype(np.uint16)
        data.Rows, data.Columns = pixels.shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.RescaleSlope, data.RescaleIntercept = 1, intercept
        data.PixelData = pixels.tobytes()
        pydicom.dcmwrite(folder / f"s{number}_{names[k]:03d}.dcm", data, enforce_file_format=True)
    return uid
