"""Cubes planted at known mm, read back from what people look at: montage, page, attention as NIfTI.

The attention is that of `perfect_maps`: it lies on the cube alone. Letters, slice numbers and the place under the
pointer are read as a person reads them.
"""

from __future__ import annotations

import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from browser import BROWSER, DRIVER, MISSING, browser, hover, pixels, press
from itemizedclip_radiology.viewing.inputs import open_input
from perfect_maps import perfect_explanation
from report_cases import PROVENANCE
from scan_files import affine_of, chest_phantom, world_of, write_dicom, write_nifti
from test_scan_geometry import BRAIN, CHEST, CUBE, SHAPE, SIDE_MM, SPACING, head, head_hu, make_enhanced, tilted

from itemizedclip.viewer.figures import LEAST_PEAK
from itemizedclip.viewer.inputs import ModelInput
from itemizedclip.viewer.page.html import report_html
from itemizedclip.viewer.volumes import montage_figure, place_of_token, write_attention_volumes

VOXEL_MM = max(SPACING)
WORLD = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


def sheared_nifti(folder: Path) -> Path:
    """Rows that drift as slices advance, and slices that drift as rows do."""
    affine = affine_of("RAS", SPACING, SHAPE)
    affine[0, 2] += 1.4
    affine[2, 1] += 0.3
    affine[:3, 3] = -affine[:3, :3] @ (np.array(SHAPE) - 1) / 2
    return write_nifti(folder / "t2.nii.gz", head(world_of(SHAPE, affine)), affine)


def nifti(folder: Path, codes: str, tilt: float = 0.0) -> Path:
    affine = affine_of(codes, SPACING, SHAPE, tilt)
    return write_nifti(folder / "t2.nii.gz", head(world_of(SHAPE, affine)), affine)


def dicom(folder: Path, codes: str, tilt: float = 0.0) -> Path:
    affine = affine_of(codes, SPACING, SHAPE, tilt)
    write_dicom(folder / "dicom", head(world_of(SHAPE, affine)), affine, description="t2", modality="MR")
    return folder / "dicom"


def tilted_ct(folder: Path) -> Path:
    affine = tilted(20.0, SPACING, SHAPE)
    write_dicom(folder / "dicom", head_hu(world_of(SHAPE, affine)), affine, description="head")
    return folder / "dicom"


def enhanced(folder: Path) -> Path:
    make_enhanced(dicom(folder, "LPS", 0.2))
    return folder / "dicom"


def middle_of_nifti(path: Path) -> np.ndarray:
    image = nibabel.load(path)
    values = image.get_fdata()
    return (image.affine @ np.append(np.argwhere(values > values.max() / 2).mean(0), 1))[:3]


# --- attention as NIfTI ----------------------------------------------------------------------------------------------

FILES = {
    "nifti RAS": lambda folder: nifti(folder, "RAS"),
    "nifti PIR, oblique": lambda folder: nifti(folder, "PIR", 0.2),
    "nifti, sheared": sheared_nifti,
    "dicom coronal": lambda folder: dicom(folder, "LIP", 0.2),
    "dicom enhanced": enhanced,
    "dicom, tilted gantry": tilted_ct,
}


@pytest.mark.parametrize("kind", FILES)
def test_attention_as_nifti(tmp_path, kind):
    source = FILES[kind](tmp_path)
    opened = open_input(source, BRAIN)
    number = 1 if len(opened.views) > 1 else 0  # bone: brain saturates in the others
    explanation = perfect_explanation(opened, number)
    path = write_attention_volumes(explanation, tmp_path / "out")[number]
    np.testing.assert_allclose(middle_of_nifti(path), CUBE, atol=VOXEL_MM)
    if source.is_file():
        # Over the very voxels of the file, sheared or not.
        file, written = nibabel.load(source), nibabel.load(path)
        assert written.shape == file.shape
        np.testing.assert_allclose(written.affine, file.affine, atol=1e-5)
        place = place_of_token(explanation, int(explanation.maps.weights[0].argmax()))
        apart = file.affine @ [*place.file_voxel, 1] - [*place.world_mm, 1]
        assert np.abs(apart).max() <= VOXEL_MM / 2 + 1e-3
    if kind != "nifti, sheared":  # ITK knows right angles only, and refuses the file itself too
        image = sitk.ReadImage(str(path))
        values = sitk.GetArrayFromImage(image)
        middle = np.argwhere(values > values.max() / 2).mean(0)[::-1]
        world = np.array(image.TransformContinuousIndexToPhysicalPoint(middle.tolist())) * [-1, -1, 1]
        np.testing.assert_allclose(world, CUBE, atol=VOXEL_MM)


def test_a_sheared_file_is_never_shown_elsewhere_by_itk(tmp_path):
    """What ITK cannot place is not written with a form that it would place wrongly."""
    source = sheared_nifti(tmp_path)
    path = write_attention_volumes(perfect_explanation(open_input(source, BRAIN)), tmp_path / "out")[0]
    header = nibabel.load(path).header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 0)


def test_attention_of_a_chest_tensor(tmp_path):
    """A .pt file counts columns to the left, rows to the back, slices to the head, 3×1×1 mm, from the origin."""
    shape = (40, 110, 100)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    hu = chest_phantom((index[..., ::-1] - [50, 55, 20]) * [1.0, 1.0, 3.0], np.full(3, 1e4))
    cube = (np.abs(index - [22, 40, 70]) * [3, 1, 1] < SIDE_MM / 2).all(-1)
    hu[cube] = 2000
    torch.save(torch.from_numpy(hu), tmp_path / "a.pt")
    path = write_attention_volumes(perfect_explanation(open_input(tmp_path / "a.pt", CHEST)), tmp_path / "out")[0]
    np.testing.assert_allclose(middle_of_nifti(path), [-70, -40, 66], atol=1.5)


# --- montage ---------------------------------------------------------------------------------------------------------


def cube_in_montage(opened: ModelInput) -> dict[int, float]:
    """World axis → mm of the cube, from the first plain panel: its letters, its slice number, its bright pixels."""
    figure = montage_figure(perfect_explanation(opened), num_slices=1)
    panel = next(axes for axes in figure.axes if axes.images)
    texts = [text.get_text() for text in panel.findobj(lambda artist: hasattr(artist, "get_text"))]
    left, right, top, bottom = (text for text in texts if text in WORLD)
    assert {left + right, top + bottom} <= {"RL", "AP", "SI"}
    pixels = np.asarray(panel.images[0].get_array())[..., 0].astype(float)
    rows, columns = np.nonzero(pixels > 0.75 * pixels.max())
    low, high = panel.images[0].get_extent()[:2]
    assert (low, high) == (-0.5, pixels.shape[1] - 0.5) or high > low
    found = {}
    for letter, at, count in ((right, columns, pixels.shape[1]), (bottom, rows, pixels.shape[0])):
        axis, sign = WORLD[letter]
        found[axis] = sign * (at.mean() - (count - 1) / 2)
    return found


@pytest.mark.parametrize("codes", ["RAS", "LPI", "PIR", "ASL", "LIP", "SRA"])
@pytest.mark.parametrize("write", [nifti, dicom])
def test_montage(tmp_path, codes, write):
    """Every grid is centred on the world's origin; its two fine axes have 2 mm."""
    opened = open_input(write(tmp_path, codes), BRAIN)
    found = cube_in_montage(opened)
    assert len(found) == 2
    for axis, voxels in found.items():
        assert voxels * 2.0 == pytest.approx(CUBE[axis], abs=2.0)
    explanation = perfect_explanation(opened)
    assert float(explanation.maps.peaks[0]) > LEAST_PEAK
    texts = [text.get_text() for text in montage_figure(explanation).findobj(lambda a: hasattr(a, "get_text"))]
    kind = r"peak slice \d+ of 28[\s·]+image (\d+)" if write is dicom else r"peak slice (\d+) of 28"
    number = int(re.search(kind, "\n".join(texts))[1])
    # Counted along the file's own axis, or as the images are numbered, from 1; the peak is any slice of the cube.
    axis, sign = WORLD[codes[2]]
    assert abs(sign * (number - 14.5) * 5.0 - CUBE[axis]) <= SIDE_MM / 2 + 2.5


# --- page ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (BROWSER and DRIVER), reason=MISSING)
@pytest.mark.slow
def test_page(tmp_path):
    """The pointer on the middle of the bright square of two planes reads the cube's mm along all three axes."""
    with browser(tmp_path / "profile") as page:
        for name in ("nifti PIR, oblique", "nifti, sheared", "dicom coronal", "dicom, tilted gantry"):
            folder = tmp_path / name
            opened = open_input(FILES[name](folder), BRAIN)
            number = 1 if len(opened.views) > 1 else 0
            html = folder / "report.html"
            html.write_text(report_html(perfect_explanation(opened, number), PROVENANCE), encoding="utf-8")
            page.open(html.as_uri())
            press(page, "o")
            for plane in range(3):
                page.find_all("#planes button")[plane].click()
                page.settle()
                # The cube's edges lie along the world's axes: oblique slices away from its middle cut it askew.
                middle = round(float((np.linalg.inv(opened.views[number].affine) @ [*CUBE, 1])[plane]))
                page.run("const f = document.getElementById('slice'); f.value = arguments[0];"
                         "f.dispatchEvent(new Event('input'))", middle)  # fmt: skip
                page.settle()
                grey = pixels(page)[..., 0]
                rows, columns = np.nonzero(grey > 0.97 * grey.max())
                text = hover(page, (columns.mean() + 0.5) / grey.shape[1], (rows.mean() + 0.5) / grey.shape[0])
                read = re.search(r"([LR]) ([\d.]+) ([PA]) ([\d.]+) ([IS]) ([\d.]+) mm", text)
                world = [WORLD[read[n]][1] * float(read[n + 1]) for n in (1, 3, 5)]
                view = opened.views[number]
                to_voxels = np.linalg.inv(view.affine[:3, :3]) @ (np.array(world) - CUBE)
                across = [axis for axis in range(3) if axis != plane]
                # The pointer names the middle of a voxel, half of one from its edge.
                assert np.abs(to_voxels[across]).max() <= 1.0 + 0.5, (name, plane, text)
        assert page.complaints() == []
