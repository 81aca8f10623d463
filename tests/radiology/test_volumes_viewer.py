"""Inputs of 3-D studies: what the readers make of files, and the way from a token back to the file's own voxels.

Then what is written of an explanation: montages, NIfTI volumes, JSON.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from itemizedclip_radiology.data.chest import ChestInput, load_chest_volume
from itemizedclip_radiology.data.dicom import find_dicom_series, read_dicom, usable_series
from itemizedclip_radiology.data.nifti import read_nifti
from itemizedclip_radiology.data.scans import Scan, looks_like_hu, orient, series_text
from itemizedclip_radiology.data.studies import SeriesFile, load_study
from itemizedclip_radiology.data.volumes import GREY_MEAN, GREY_STD, HounsfieldWindow
from itemizedclip_radiology.models.series_names import encode_series_names
from itemizedclip_radiology.synthetic.cohort import (
    write_ct_rate,
    write_head_ct_benchmarks,
    write_pub_brain_5,
    write_studies,
)
from itemizedclip_radiology.viewing.inputs import HEAD_WINDOWS_HU, at_chest_spacing, body_of, open_input
from scan_files import affine_of, brain_phantom, chest_phantom, world_of, write_dicom, write_nifti

from itemizedclip.data.batch import BadSampleError
from itemizedclip.evaluation.attention import ItemMaps
from itemizedclip.models.factory import LoadedModel, load_model_config
from itemizedclip.viewer.explanation import Explanation
from itemizedclip.viewer.figures import save_figure
from itemizedclip.viewer.files import ExplanationFiles, describe, write_explanation
from itemizedclip.viewer.geometry import Geometry, map_to_input, mask_to_view
from itemizedclip.viewer.inputs import ModelInput
from itemizedclip.viewer.volumes import (
    file_names,
    montage_figure,
    place_of_token,
    slabs_by_attention,
    slice_of_map,
    volume_of_map,
    write_attention_volumes,
)

BRAIN_PATCH, CHEST_PATCH = (8, 16, 16), (8, 24, 24)


def model(name: str) -> LoadedModel:
    """Readers need no weights."""
    return LoadedModel(None, load_model_config(name), None)  # type: ignore[arg-type]


BRAIN, CHEST = model("HLIPSN_debug"), model("CTRATE_HLIP_debug")


def spot_in_image(image: torch.Tensor) -> tuple[int, int, int]:
    """Centre of the brightest voxels of (1, D, H, W)."""
    bright = (image[0] >= image.max() - 0.2).nonzero().double().mean(0)
    return tuple(int(x) for x in bright.round())


def token_map(image: torch.Tensor, patch: tuple[int, int, int]) -> torch.Tensor:
    """A map (d, h, w) that is 1 where the image is brightest."""
    cells = [n // p for n, p in zip(image.shape[1:], patch)]
    values = torch.zeros(cells)
    values[tuple(at // p for at, p in zip(spot_in_image(image), patch))] = 1
    return values


def world_distance(view_index, view, spot) -> np.ndarray:
    """Distance along each axis of the view, in its voxels, of a voxel from a world point."""
    at = np.linalg.inv(view.affine) @ np.append(spot, 1)
    return np.abs(np.array(view_index) - at[:3])


def peak_of(values: np.ndarray) -> tuple[int, ...]:
    """The middle of the largest values."""
    found = np.argwhere(values >= np.nanmax(values) - 1e-6)
    return tuple(found.mean(0))


def check_way_back(opened: ModelInput, number: int, patch, spot, mode) -> None:
    """Where the model's input is brightest, a map's peak comes back to the spot, within one patch."""
    view, image = opened.views[number], opened.image[number]
    assert view.geometry.input_size == view.values.shape
    values = map_to_input(token_map(image, patch), view.geometry, mode)
    assert values.shape == view.values.shape
    patch_in_file = np.array(patch) / np.array(view.geometry.scale)
    assert (world_distance(peak_of(values), view, spot) <= patch_in_file).all()
    # The view itself shows the spot where the world says it is, to a voxel or two.
    shown = np.argwhere(view.values == view.values.max()).mean(0)
    assert (world_distance(shown, view, spot) <= 1.5).all()


# --- the way back ----------------------------------------------------------------------------------------------------

SPOT = np.array([14.0, -9.0, 7.0])


@pytest.mark.parametrize("mode", ["nearest", "smooth"])
@pytest.mark.parametrize(
    ("codes", "shape", "spacing", "tilt"),
    [
        ("RPI", (90, 100, 24), (1.0, 1.0, 4.0), 0.0),
        ("LAS", (81, 97, 21), (1.1, 1.0, 4.2), 0.0),  # as dcm2niix writes, odd sizes
        ("ASL", (96, 96, 20), (1.0, 1.0, 4.0), 0.0),  # sagittal
        ("RSA", (70, 84, 25), (1.2, 1.1, 3.7), 0.0),  # coronal
        ("LPS", (90, 100, 24), (1.0, 1.0, 4.0), 0.35),  # oblique
        ("PIR", (30, 88, 90), (3.2, 1.0, 1.0), -0.3),  # slices along the file's first axis
        ("RAS", (84, 90, 86), (1.0, 1.0, 1.0), 0.0),  # isotropic
    ],
)
def test_brain_nifti_of_any_orientation(tmp_path, codes, shape, spacing, tilt, mode):
    affine = affine_of(codes, spacing, shape, tilt)
    path = write_nifti(tmp_path / "sub-1-T1.nii.gz", brain_phantom(world_of(shape, affine), SPOT), affine)
    opened = open_input(path, BRAIN)
    assert tuple(opened.image.shape) == (1, 1, 16, 64, 64)
    check_way_back(opened, 0, BRAIN_PATCH, SPOT, mode)
    grid = opened.views[0].file_grid
    assert grid.shape == shape
    np.testing.assert_allclose(grid.affine, affine, atol=1e-5)
    # View and file are the same voxels: the view's affine says the same of every voxel as the file's.
    rng = np.random.default_rng(0)
    original = np.asarray(nibabel.load(path).dataobj).astype(float)
    high = np.percentile(original, 99.5)
    back = grid.from_view(opened.views[0].values)
    assert back.shape == shape
    for index in rng.integers(0, shape, (20, 3)):
        assert abs(back[tuple(index)] - min(original[tuple(index)], high) * 255 / high) <= 0.5
    np.testing.assert_array_equal(grid.to_view(back), opened.views[0].values)


@pytest.mark.parametrize("mode", ["nearest", "smooth"])
@pytest.mark.parametrize("fit", ["crop", "resize"])
@pytest.mark.parametrize(
    ("codes", "shape", "spacing", "tilt"),
    [
        ("LPS", (110, 104, 60), (1.0, 1.0, 2.0), 0.0),  # larger in-plane, 40 slices of 3 mm
        ("LPS", (131, 120, 33), (0.83, 0.9, 1.7), 0.0),  # odd, fewer slices than the model's
        ("RAS", (90, 81, 45), (1.0, 1.0, 2.5), 0.0),  # smaller than the model's
        ("SLP", (40, 110, 100), (3.0, 1.0, 1.0), 0.0),  # permuted
        ("LPS", (110, 104, 50), (1.0, 1.0, 2.0), 0.25),
    ],
)
def test_chest_nifti_of_any_size_and_orientation(tmp_path, codes, shape, spacing, tilt, fit, mode):
    affine = affine_of(codes, spacing, shape, tilt)
    path = write_nifti(tmp_path / "scan.nii.gz", chest_phantom(world_of(shape, affine), SPOT), affine)
    opened = open_input(path, CHEST, chest=ChestInput(fit=fit))
    assert tuple(opened.image.shape) == (1, 1, 32, 96, 96)
    view = opened.views[0]
    assert (view.unit, view.window_hu) == ("hu", (-1150, 350))
    check_way_back(opened, 0, CHEST_PATCH, SPOT, mode)
    np.testing.assert_array_equal(view.file_grid.from_view(view.values), nibabel.load(path).dataobj)


@pytest.mark.parametrize("shape", [(32, 96, 96), (41, 131, 101), (23, 77, 90), (33, 95, 97)])
@pytest.mark.parametrize("fit", ["crop", "resize"])
def test_chest_tensor_is_what_the_evaluation_reads(tmp_path, shape, fit):
    affine = affine_of("SPL", (3.0, 1.0, 1.0), shape)
    hu = chest_phantom(world_of(shape, affine), SPOT)
    torch.save(torch.from_numpy(hu).half(), tmp_path / "valid_1_a_1.pt")
    options = ChestInput(fit=fit, size=(32, 96, 96))
    opened = open_input(tmp_path / "valid_1_a_1.pt", CHEST, chest=options)
    expected = load_chest_volume(tmp_path / "valid_1_a_1.pt", options)
    torch.testing.assert_close(opened.image, expected.image, rtol=0, atol=1e-6)
    view = opened.views[0]
    assert view.spacing_mm == (3, 1, 1)
    assert view.affine is None
    np.testing.assert_array_equal(view.file_grid.affine, np.diag([-1, -1, 3, 1]))
    assert view.file_grid.shape == shape[::-1]
    np.testing.assert_array_equal(view.values, hu)
    values = map_to_input(token_map(opened.image[0], CHEST_PATCH), view.geometry)
    at = (np.linalg.inv(affine) @ np.append(SPOT, 1))[:3]
    assert (np.abs(np.array(peak_of(values)) - at) <= np.array(CHEST_PATCH) / view.geometry.scale).all()


@pytest.mark.parametrize("mode", ["nearest", "smooth"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("AX_T1/img.pt", (16, 64, 64)),
        ("AX_T1/img.pt", (16, 73, 73)),  # with the margin that is cropped away, as 256 for 224
        ("scan-T1.pt", (24, 80, 61)),  # padded to a square, resized, cropped
        ("scan-T1.pt", (9, 55, 90)),
    ],
)
def test_brain_tensors_of_any_size(tmp_path, name, shape, mode):
    """The planted spot comes back within a patch; crop and resampling as the loaders' own voxel maps say."""
    affine = affine_of("SPL", (64 / shape[0], 64 / shape[1], 64 / shape[2]), shape)
    grey = brain_phantom(world_of(shape, affine), SPOT, radius=7) // 5
    (tmp_path / name).parent.mkdir(exist_ok=True)
    torch.save(torch.from_numpy(grey).to(torch.uint8), tmp_path / name)
    opened = open_input(tmp_path / name, BRAIN)
    view, image = opened.views[0], opened.image[0]
    np.testing.assert_array_equal(view.values, grey)
    at = (np.linalg.inv(affine) @ np.append(SPOT, 1))[:3]
    back = peak_of(map_to_input(token_map(image, BRAIN_PATCH), view.geometry, mode))
    assert (np.abs(np.array(back) - at) <= np.array(BRAIN_PATCH) / view.geometry.scale).all()
    prepare = "crop" if name.endswith("img.pt") else "resample"
    voxel_map = load_study("x", [SeriesFile("T1", tmp_path / name)], size=(16, 64, 64), prepare=prepare).voxel_maps[0]
    for voxel in ((0, 0, 0), (3, 20, 41), (15, 63, 63)):
        edge = view.geometry.to_input([x + 0.5 for x in voxel])
        np.testing.assert_allclose([x - 0.5 for x in edge], voxel_map.to_input(voxel), atol=1e-9)


def test_geometry_agrees_with_the_converters_resampling():
    """A ramp over the rows of a scan, resampled: its values say where each voxel of the model's view comes from."""
    shape, spacing = (101, 120, 30), (0.8, 0.7, 2.5)
    affine = affine_of("LPS", spacing, shape)
    ramp = np.broadcast_to(np.arange(120)[None, :, None], shape)
    scan = orient(Scan("", ramp.astype(np.float32), affine, Path("x")), "LPS")
    size = tuple(int(n * own / wanted) for n, own, wanted in zip(shape[::-1], scan.spacing_mm, (3, 1, 1)))
    moved = F.interpolate(torch.from_numpy(scan.voxels.copy())[None, None], size=size, mode="trilinear")[0, 0]
    _, geometry = at_chest_spacing(
        torch.from_numpy(scan.voxels.copy()), scan.spacing_mm, Geometry.of_input(scan.voxels.shape)
    )
    rows = [geometry.to_input((0.5, y + 0.5, 0.5))[1] - 0.5 for y in range(1, size[1] - 1)]
    np.testing.assert_allclose(moved[0, 1:-1, 0], rows, atol=1e-3)


# --- what readers make of files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["RPI", "LPS", "RAS", "ASL", "PIR"])
@pytest.mark.parametrize("largest", [0, 1, 2])
def test_orientation_equals_simpleitk(tmp_path, codes, largest):
    """RPI and the axis of the largest spacing first, by SimpleITK's own orientation filter."""
    rng = np.random.default_rng(1)
    shape, spacing = (5, 6, 7), [1.0, 1.0, 1.0]
    spacing[largest] = 3.0
    affine = affine_of(codes, tuple(spacing), shape, tilt=0.2)
    path = write_nifti(tmp_path / "a.nii", rng.integers(0, 99, shape).astype(np.int16), affine)
    image = sitk.DICOMOrient(sitk.ReadImage(str(path)), "RPI")
    array, mm = sitk.GetArrayFromImage(image), image.GetSpacing()[::-1]
    turned = orient(read_nifti(path)[0], "RPI", largest_spacing_first=True)
    np.testing.assert_array_equal(turned.voxels, np.moveaxis(array, int(np.argmax(np.round(mm, 3))), 0))
    assert turned.spacing_mm[0] == pytest.approx(3.0, abs=1e-4)
    chest = orient(read_nifti(path)[0], "LPS")
    expected = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS"))
    np.testing.assert_array_equal(chest.voxels, expected)


def test_mri_grey_values_are_the_converters(tmp_path):
    """Percentiles, scaling and resampling, by hand."""
    shape = (60, 70, 16)
    affine = affine_of("RPI", (1.0, 1.0, 5.0), shape)
    rng = np.random.default_rng(0)
    voxels = (brain_phantom(world_of(shape, affine), SPOT) + rng.integers(0, 40, shape)).astype(np.int16)
    opened = open_input(write_nifti(tmp_path / "AX_FLAIR.nii.gz", voxels, affine), BRAIN)
    array = voxels.transpose(2, 1, 0).astype(np.float64)
    low, high = np.percentile(array, 0.5), np.percentile(array, 99.5)
    unit = (np.clip(array, low, high) - low) / (high - low)
    square = np.pad(unit, ((0, 0), (0, 0), (5, 5)))
    resized = F.interpolate(torch.from_numpy(square).float()[:, None], size=(73, 73), mode="bilinear")[:, 0]
    expected = (resized[:, 4:68, 4:68] - GREY_MEAN) / GREY_STD
    torch.testing.assert_close(opened.image[0, 0], expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(opened.views[0].values, unit * 255, atol=0.5001)
    assert [view.name for view in opened.views] == ["AX_FLAIR"]
    assert torch.equal(opened.series_names, encode_series_names(["AX_FLAIR"]))


def test_folder_of_nifti_files_is_one_study(tmp_path):
    for name, codes in (("b-T2", "LAS"), ("a_sag_T1", "ASL"), ("tumour_seg", "LAS")):
        shape = (40, 44, 12)
        affine = affine_of(codes, (1.0, 1.0, 4.0), shape)
        write_nifti(tmp_path / "study" / f"{name}.nii.gz", brain_phantom(world_of(shape, affine), SPOT), affine)
    (tmp_path / "study" / "broken.nii.gz").write_bytes(b"no gzip")
    opened = open_input(tmp_path / "study", BRAIN)
    assert [view.name for view in opened.views] == ["a_sag_T1", "AX_T2"]
    assert opened.views[0].values.shape == (12, 44, 40)  # slices from right to left, rows from head to foot
    assert any("tumour_seg" in note for note in opened.notes)
    assert any("broken.nii.gz" in note and "not a readable NIfTI" in note for note in opened.warnings)


def test_series_folders_of_the_published_converter(tmp_path):
    shape = (20, 22, 10)
    affine = affine_of("RPI", (1.0, 1.0, 4.0), shape)
    voxels = brain_phantom(world_of(shape, affine), SPOT * 0)
    write_nifti(tmp_path / "T1_POST" / "nifti" / "SERIES.nii.gz", voxels, affine)
    assert open_input(tmp_path, BRAIN).views[0].name == "AX_T1_POST"


def test_four_axes_are_series_of_their_own(tmp_path):
    shape = (30, 32, 12)
    affine = affine_of("RPI", (1.0, 1.0, 4.0), shape)
    first = brain_phantom(world_of(shape, affine), SPOT * 0)
    write_nifti(tmp_path / "dwi.nii.gz", np.stack([first, first[::-1] // 2], -1), affine)
    opened = open_input(tmp_path / "dwi.nii.gz", BRAIN)
    assert [view.name for view in opened.views] == ["AX_dwi_volume1", "AX_dwi_volume2"]
    np.testing.assert_array_equal(opened.views[0].file_grid.to_view(first), opened.views[0].original)
    np.testing.assert_array_equal(opened.views[1].file_grid.to_view(first[::-1] // 2), opened.views[1].original)
    assert any("30×32×12×2 voxels, 2 volumes in one file" in warning for warning in opened.warnings)
    (tmp_path / "dwi.bval").write_text("0 1000\n")
    opened = open_input(tmp_path / "dwi.nii.gz", BRAIN)
    assert [view.name for view in opened.views] == ["AX_dwi_b0", "AX_dwi_b1000"]
    many = np.stack([first] * 9, -1)
    opened = open_input(write_nifti(tmp_path / "perfusion.nii.gz", many, affine), BRAIN)
    assert [view.name for view in opened.views] == ["AX_perfusion"]
    assert any("9 volumes in one file; the first is read" in warning for warning in opened.warnings)


def test_head_ct_becomes_three_windows(tmp_path):
    shape = (60, 70, 20)
    affine = affine_of("LPS", (1.0, 1.0, 5.0), shape)
    hu = chest_phantom(world_of(shape, affine) * 1.3, SPOT)
    write_nifti(tmp_path / "head.nii.gz", hu, affine)
    opened = open_input(tmp_path / "head.nii.gz", BRAIN)
    assert [view.name for view in opened.views] == [f"head_AX_{word}" for word in HEAD_WINDOWS_HU]
    explanation = planted(opened, BRAIN_PATCH, [(0, torch.ones(2, 4, 4))])
    written = write_explanation(explanation, tmp_path / "out", ExplanationFiles(slices=1), {})
    assert [p.name for p in written if "image__" in p.name] == ["image__head_AX_BloodWindow.nii.gz"]  # HU, once
    for number, window in enumerate(HEAD_WINDOWS_HU.values()):
        view = opened.views[number]
        assert (view.unit, view.window_hu) == ("hu", (window.hu_min, window.hu_max))
        values = opened.image[number] * GREY_STD + GREY_MEAN
        assert -1e-5 <= values.min() < values.max() <= 1 + 1e-5
    # Soft tissue of 40 HU is mid-grey in the brain window and nearly black in the bone window's fifth.
    brain, bone = (opened.image[n] * GREY_STD + GREY_MEAN for n in (2, 1))
    assert ((brain - 0.5).abs() < 0.01).float().mean() > 0.1
    assert ((bone - 840 / 2800).abs() < 0.01).float().mean() > 0.1


@pytest.mark.parametrize("layout", ["study", "series", "file"])
def test_tensor_layouts_equal_the_evaluations_reader(tmp_path, layout):
    write_studies(tmp_path / "mri", kind="mri", num_train=1, num_valid=1, with_margin=True)
    write_pub_brain_5(tmp_path / "pb", num_studies=2)
    study = next((tmp_path / "mri" / "train").iterdir())
    folders = sorted(study.iterdir())
    source = {"study": study, "series": folders[0], "file": folders[0] / "img.pt"}[layout]
    opened = open_input(source, BRAIN)
    used = folders if layout == "study" else folders[:1]
    expected = load_study("x", [SeriesFile(f.name, f / "img.pt") for f in used], size=(16, 64, 64))
    assert torch.equal(opened.image, expected.image)
    assert torch.equal(opened.series_names, expected.series_names)
    np.testing.assert_array_equal(opened.views[0].values, torch.load(folders[0] / "img.pt").numpy())
    index = json.loads((tmp_path / "mri" / "train.json").read_text())
    assert opened.items == ([] if layout == "series" else index[study.name]["report"])
    for folder in (study.parent, study.parent.parent):
        with pytest.raises(BadSampleError, match=f"holds studies; give the folder of one, such as {study.parents[1]}"):
            open_input(folder, BRAIN)
    if layout == "study":
        scans = tmp_path / "pb" / "pub_brain_5" / "stroke" / "sub-00001"
        opened = open_input(scans, BRAIN)
        files = [SeriesFile("AX_" + p.stem.rsplit("-", 1)[-1], p) for p in sorted(scans.iterdir())]
        expected = load_study("x", files, size=(16, 64, 64), prepare="resample")
        assert torch.equal(opened.image, expected.image)
        assert [view.name for view in opened.views] == expected.names


def test_head_ct_benchmarks_keep_their_names(tmp_path):
    write_head_ct_benchmarks(tmp_path, num_studies=2)
    rsna = next(path for path in (tmp_path / "rsna").iterdir() if path.name.startswith("RSNA_"))
    names = [f"MPR-AX_HEAD-protocol_{window}Window" for window in ("Blood", "Bone", "Brain")]
    assert [view.name for view in open_input(rsna, BRAIN).views] == names
    series = next(iter(sorted(rsna.iterdir())))
    assert [view.name for view in open_input(series / "img_bone.pt", BRAIN).views] == names[1:2]
    cq500 = tmp_path / "cq500" / "CQ500CT001"
    expected = [f"{s}_AX_{w}Window" for s in ("CT_Plain", "CT_Thin") for w in ("Blood", "Bone", "Brain")]
    assert [view.name for view in open_input(cq500, BRAIN).views] == expected


def test_double_rescale_is_refused_or_undone(tmp_path):
    shape = (100, 100, 40)
    affine = affine_of("LPS", (1.0, 1.0, 3.0), shape)
    path = write_nifti(tmp_path / "v2.nii.gz", chest_phantom(world_of(shape, affine), SPOT) - 1024, affine)
    with pytest.raises(BadSampleError, match="HU minus 1024"):
        open_input(path, CHEST)
    opened = open_input(path, CHEST, chest=ChestInput(double_rescale="undo"))
    assert opened.views[0].values.min() == -1000
    assert any("rescaled twice" in warning for warning in opened.warnings)


def test_ct_rate_files_keep_their_stored_order(tmp_path):
    shape = (100, 90, 40)
    affine = affine_of("RAS", (1.0, 1.0, 3.0), shape)
    hu = chest_phantom(world_of(shape, affine), SPOT)
    opened = open_input(write_nifti(tmp_path / "valid_1_a_1.nii.gz", hu, affine), CHEST)
    np.testing.assert_array_equal(opened.views[0].values, hu.transpose(2, 1, 0))
    np.testing.assert_allclose(opened.views[0].affine, affine[:, [2, 1, 0, 3]], atol=1e-5)
    renamed = open_input(write_nifti(tmp_path / "scan.nii.gz", hu, affine), CHEST)
    np.testing.assert_array_equal(renamed.views[0].values, hu.transpose(2, 1, 0)[:, ::-1, ::-1])


@pytest.mark.parametrize("dtype", [">i2", ">f4", "<u2", "<i4", "<f8", "u1"])
def test_values_of_any_type_and_byte_order(tmp_path, dtype):
    shape = (30, 32, 12)
    affine = affine_of("RPI", (1.0, 1.0, 4.0), shape)
    voxels = brain_phantom(world_of(shape, affine), SPOT * 0) // 5
    header = nibabel.Nifti1Header(endianness=">" if dtype.startswith(">") else "<")
    image = nibabel.Nifti1Image(voxels.astype(dtype), affine, header)
    image.set_data_dtype(np.dtype(dtype))
    nibabel.save(image, tmp_path / "a.nii")
    (scan,) = read_nifti(tmp_path / "a.nii")
    assert scan.voxels.dtype == (np.float32 if "f" in dtype else np.int16)
    np.testing.assert_array_equal(scan.voxels, voxels)
    assert open_input(tmp_path / "a.nii", BRAIN).views[0].values.max() == 255


def test_large_integers_become_floats(tmp_path):
    voxels = np.arange(27, dtype=np.int32).reshape(3, 3, 3) * 10_000
    (scan,) = read_nifti(write_nifti(tmp_path / "a.nii", voxels, np.eye(4)))
    assert scan.voxels.dtype == np.float32
    np.testing.assert_array_equal(scan.voxels, voxels)


def test_what_is_no_scan(tmp_path):
    with pytest.raises(BadSampleError, match="no such file or folder"):
        open_input(tmp_path / "nowhere", BRAIN)
    with pytest.raises(BadSampleError, match="holds no scan"):
        open_input(tmp_path, CHEST)
    flat = write_nifti(tmp_path / "flat.nii", np.zeros((9, 9), np.int16), np.eye(4))
    with pytest.raises(BadSampleError, match="expected a NIfTI volume of slices"):
        open_input(flat, CHEST)
    singular = np.eye(4)
    singular[0, 0] = 0
    bad = nibabel.Nifti1Image(np.zeros((9, 9, 9), np.int16), None)
    bad.header.set_sform(singular, code=1)
    nibabel.save(bad, tmp_path / "singular.nii")
    with pytest.raises(BadSampleError, match="its affine has no inverse"):
        open_input(tmp_path / "singular.nii", BRAIN)
    nans = np.full((9, 9, 9), np.nan, np.float32)
    with pytest.raises(BadSampleError, match="729 of 729 values are NaN"):
        open_input(write_nifti(tmp_path / "nan.nii", nans, np.eye(4)), CHEST)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(BadSampleError, match="holds no scan"):
        open_input(tmp_path / "notes.txt", BRAIN)
    for number in range(2):
        torch.save(torch.zeros(4, 4, 4), tmp_path / f"{number}.pt")
    with pytest.raises(BadSampleError, match="holds 2 scans, and a chest model reads one"):
        open_input(tmp_path, CHEST)


def test_chest_as_the_checkpoint_was_trained_with_its_report(tmp_path):
    write_ct_rate(tmp_path, num_train=1, num_valid=1)
    path = tmp_path / "train" / "train_1" / "train_1_a" / "train_1_a_1.pt"
    trained = LoadedModel(None, CHEST.config, None, {"transform": {"input_info": ["-1000", "400", "resize"]}})
    opened = open_input(path, trained)
    assert opened.views[0].window_hu == (-1000, 400)
    size = tuple(CHEST.config["vision_cfg"]["volume_size"])
    expected = load_chest_volume(path, ChestInput(HounsfieldWindow(-1000, 400), "resize", size)).image
    torch.testing.assert_close(opened.image, expected, rtol=0, atol=1e-5)
    index = json.loads((tmp_path / "itemized.json").read_text())
    assert opened.items == [item.lower() for item in index["train_1_a"]["report"]]


def test_which_body_a_model_reads():
    names = ("HLIPSN_BiomedBERT_81616_itemizedclip", "CTRATE_HLIP_BiomedBERT_itemizedclip")
    assert [body_of(load_model_config(name)) for name in names] == ["brain", "chest"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t1 mprage", "AX_t1_mprage"),
        ("SAG T2", "SAG_T2"),
        ("Axial FLAIR", "Axial_FLAIR"),
        ("max_b", "AX_max_b"),
        ("", "AX_series"),
    ],
)
def test_series_text(name, text):
    assert series_text(name, "AX") == text


def test_units_are_told_apart():
    grid = world_of((40, 40, 20), affine_of("LPS", (2.5, 2.5, 4.0), (40, 40, 20)))
    assert looks_like_hu(chest_phantom(grid, SPOT))
    assert not looks_like_hu(brain_phantom(grid, SPOT))


# --- DICOM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codes", "tilt"), [("LPS", 0.0), ("LPI", 0.0), ("LPS", 0.2)])
def test_dicom_chest(tmp_path, codes, tilt):
    """Slices in any order of file names, with a localizer and a report beside them."""
    shape, spacing = (104, 100, 30), (1.0, 1.0, 3.3)
    affine = affine_of(codes, spacing, shape, tilt)
    hu = chest_phantom(world_of(shape, affine), SPOT)
    write_dicom(tmp_path / "exam" / "series", hu, affine, number=2)
    write_dicom(tmp_path / "exam" / "scout", hu[:, :, :1], affine, description="scout", kind="LOCALIZER", number=1)
    (tmp_path / "exam" / "readme.md").write_text("not DICOM")
    opened = open_input(tmp_path / "exam", CHEST)
    assert any("scout: a localizer" in note for note in opened.notes)
    view = opened.views[0]
    for mode in ("nearest", "smooth"):
        check_way_back(opened, 0, CHEST_PATCH, SPOT, mode)
    # As the same voxels in a NIfTI file.
    nifti = open_input(write_nifti(tmp_path / "same.nii.gz", hu, affine), CHEST)
    np.testing.assert_array_equal(view.values, nifti.views[0].values)
    np.testing.assert_allclose(view.affine, nifti.views[0].affine, atol=1e-3)
    torch.testing.assert_close(opened.image, nifti.image, atol=1e-3, rtol=0)


@pytest.mark.parametrize("codes", ["LPS", "RAI", "PIR"])
@pytest.mark.parametrize("tilt", [0, 12])
def test_slices_are_labelled_with_their_images_and_places(tmp_path, codes, tilt):
    shape, spacing = (104, 100, 30), (1.0, 1.0, 3.3)
    affine = affine_of(codes, spacing, shape, tilt)
    write_dicom(tmp_path, chest_phantom(world_of(shape, affine), SPOT), affine, number=2, drop=(7,))
    view = open_input(tmp_path, CHEST).views[0]
    assert view.frame == "1.2.4"
    labels = view.slice_labels
    assert len(labels.texts) == view.values.shape[labels.axis] == 30
    assert labels.texts.count("") == 1
    for n, text in enumerate(labels.texts):
        if not text:
            continue
        series, image, place = text.split(" · ")
        k = int(image.removeprefix("image ")) - 1
        assert (series, k != 7) == ("series 2", True)
        # The first pixel of the image, in the view's own voxels.
        voxel = np.linalg.inv(view.affine) @ affine @ [0, 0, k, 1]
        assert voxel[labels.axis] == pytest.approx(n, abs=0.05)
        side, mm, _ = place.split(" ")
        world = (affine @ [0, 0, k, 1])[["LR", "PA", "IS"].index(next(p for p in ("LR", "PA", "IS") if side in p))]
        assert float(mm) == pytest.approx(abs(world), abs=0.06)
        assert (side in "RAS") == (world > 0) or abs(world) < 0.06


def test_dicom_study_of_several_mri_series(tmp_path):
    for number, (name, codes) in enumerate((("T2 FLAIR", "LPS"), ("t1_sag", "PIL"))):
        shape = (60, 56, 12)
        affine = affine_of(codes, (1.0, 1.0, 5.0), shape)
        voxels = brain_phantom(world_of(shape, affine), SPOT)
        write_dicom(tmp_path, voxels, affine, description=name, modality="MR", number=number + 1)
    opened = open_input(tmp_path, BRAIN)
    assert [view.name for view in opened.views] == ["AX_T2_FLAIR", "t1_sag"]
    for number, mode in itertools.product(range(2), ("nearest", "smooth")):
        check_way_back(opened, number, BRAIN_PATCH, SPOT, mode)


def test_dicom_series_are_chosen_by_a_file(tmp_path):
    shape = (100, 100, 32)
    affine = affine_of("LPS", (1.0, 1.0, 3.0), shape)
    hu = chest_phantom(world_of(shape, affine), SPOT)
    for number, name in enumerate(("lung", "soft"), start=1):
        write_dicom(tmp_path, hu, affine, description=name, number=number)
    with pytest.raises(BadSampleError, match=r"holds 2 scans.*(?s:.)*lung, CT, 32 slices.*(?s:.)*soft, CT, 32 slices"):
        open_input(tmp_path, CHEST)
    opened = open_input(tmp_path / "s2_000.dcm", CHEST)
    assert opened.views[0].name == "soft"
    assert opened.views[0].values.shape == (32, 100, 100)


def test_any_file_may_lie_in_a_dicom_folder():
    """pydicom's own collection of odd and damaged files: sorted without an error, none of them a scan."""
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    kept, notes = usable_series(find_dicom_series(folder))
    assert kept == []
    assert any("modality" in note for note in notes)
    assert any("fewer than 8" in note for note in notes)


def test_dicom_remarks(tmp_path):
    shape = (64, 64, 20)
    affine = affine_of("LPS", (2.0, 2.0, 5.0), shape)
    hu = chest_phantom(world_of(shape, affine), SPOT)
    write_dicom(tmp_path / "gap", hu, affine, drop=(7,))
    one = find_dicom_series(tmp_path / "gap")[0]
    assert one.num_slices == 19
    scan = read_dicom(one)
    np.testing.assert_array_equal(np.delete(scan.voxels, 7, axis=2), np.delete(hu, 7, axis=2))
    assert (scan.voxels[:, :, 7] == -1000).all()
    np.testing.assert_allclose(scan.affine, affine, atol=1e-4)
    (warning,) = scan.warnings
    assert (
        "1 slices are missing between images 7 and 9 (a gap of 10.0 mm, steps are 5.0 mm); they are left blank"
        in warning
    )
    write_dicom(tmp_path / "thin", hu[:, :, :5], affine)
    assert find_dicom_series(tmp_path / "thin")[0].reason == "5 slices, fewer than 8"
    # Two images at every position, as in diffusion imaging.
    uid = write_dicom(tmp_path / "twice", hu, affine, number=3)
    for path in sorted((tmp_path / "twice").iterdir()):
        data = pydicom.dcmread(path)
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        data.InstanceNumber += 100
        data.PixelData = b"\0" * len(data.PixelData)
        pydicom.dcmwrite(path.with_stem(f"again_{path.stem}"), data)
    first, second = find_dicom_series(tmp_path / "twice")
    assert [(one.uid, one.num_slices) for one in (first, second)] == [(uid, 20)] * 2
    assert [one.description for one in (first, second)] == ["chest_volume1", "chest_volume2"]
    np.testing.assert_array_equal(read_dicom(first).voxels, hu)
    assert (read_dicom(second).voxels == -1024).all()
    assert any("2 volumes in one series" in warning for warning in read_dicom(first).warnings)
    next((tmp_path / "twice").glob("again_*")).unlink()
    one = find_dicom_series(tmp_path / "twice")[0]
    np.testing.assert_array_equal(read_dicom(one).voxels, hu)
    assert any("39 files at 20 positions; the first of each" in warning for warning in read_dicom(one).warnings)


# --- what is written -------------------------------------------------------------------------------------------------


def planted(opened: ModelInput, patch: tuple[int, int, int], where: list[tuple[int, torch.Tensor]]) -> Explanation:
    """One item per (series, map (d, h, w)), two heads: 0.8 of its attention on the map, the rest even, none nowhere."""
    S = len(opened.views)
    cells = [n // p for n, p in zip(opened.image.shape[2:], patch)]
    weights = torch.full((len(where), 2, S, *cells), 0.2 / (S * np.prod(cells)))
    for k, (series, values) in enumerate(where):
        weights[k, :, series] += 0.8 * values / values.sum()
    maps = ItemMaps(weights, torch.zeros(len(where), 2), torch.linspace(0.1, 0.9, len(where)))
    return Explanation(opened, [f"finding {k}" for k in range(len(where))], maps)


@pytest.mark.parametrize("mode", ["nearest", "smooth"])
@pytest.mark.parametrize(
    ("codes", "tilt", "spacing"), [("RAS", 0.0, (1.0, 1.0, 3.0)), ("PIR", 0.2, (3.0, 0.9, 1.1)), ("LSA", 0, (1, 1, 3))]
)
def test_nifti_lies_over_the_scan(tmp_path, codes, tilt, spacing, mode):
    """Same shape, same affine, and the largest value within a patch of the spot in world coordinates."""
    for loaded, phantom, patch in ((BRAIN, brain_phantom, BRAIN_PATCH), (CHEST, chest_phantom, CHEST_PATCH)):
        shape = (36, 100, 88) if codes == "PIR" else (90, 96, 36)
        affine = affine_of(codes, spacing, shape, tilt)
        path = write_nifti(tmp_path / phantom.__name__ / "a.nii.gz", phantom(world_of(shape, affine), SPOT), affine)
        opened = open_input(path, loaded)
        explanation = planted(opened, patch, [(0, token_map(opened.image[0], patch))])
        written = write_attention_volumes(explanation, tmp_path / "out", mode=mode, per_head=True)
        assert [p.name for p in written] == [f"item01_finding_0{head}.nii.gz" for head in ("", "_head1", "_head2")]
        original, volume = nibabel.load(path), nibabel.load(written[0])
        assert volume.shape == shape
        np.testing.assert_array_equal(volume.affine, original.affine)
        np.testing.assert_allclose(volume.get_qform(), original.affine, atol=1e-3)
        assert volume.header["sform_code"] == volume.header["qform_code"] == 1
        values = volume.get_fdata()
        peak = np.array(peak_of(np.where(values > 0, values, np.nan)))
        world = (volume.affine @ np.append(peak, 1))[:3]
        patch_mm = np.array(patch) / opened.views[0].geometry.scale * opened.views[0].spacing_mm
        along_view = np.abs(np.linalg.inv(opened.views[0].affine)[:3, :3] @ (world - SPOT)) * opened.views[0].spacing_mm
        assert (along_view <= patch_mm).all()
        # Slice by slice the same as all at once, and as the view shows it.
        view, grid_map = opened.views[0], explanation.times_uniform(0)[0]
        direct = np.nan_to_num(map_to_input(grid_map, view.geometry, mode))
        np.testing.assert_allclose(volume_of_map(grid_map, view, mode), direct, atol=1e-4)
        np.testing.assert_allclose(values, view.file_grid.from_view(direct), atol=0.003 * direct.max())  # 255 steps
        place = place_of_token(explanation, int(explanation.maps.weights[0].argmax()))
        np.testing.assert_allclose(volume.affine @ [*place.file_voxel, 1], [*place.world_mm, 1], atol=1e-3)


def study(tmp_path: Path) -> ModelInput:
    """Two series of different size and orientation, and one whose name stands twice."""
    for name, codes, shape, spacing in (
        ("b-T1", "LAS", (60, 70, 20), (1.0, 1.0, 4.0)),
        ("c_SAG_T2", "ASL", (64, 60, 18), (1.0, 1.0, 4.5)),
        ("d-T1", "RPI", (50, 50, 16), (1.5, 1.5, 5.0)),
    ):
        affine = affine_of(codes, spacing, shape)
        write_nifti(tmp_path / "study" / f"{name}.nii.gz", brain_phantom(world_of(shape, affine), SPOT), affine)
    return open_input(tmp_path / "study", BRAIN)


def test_every_series_has_its_own_volume(tmp_path):
    opened = study(tmp_path)
    flat = torch.ones(2, 4, 4)
    explanation = planted(opened, BRAIN_PATCH, [(1, flat), (2, flat)])
    written = write_attention_volumes(explanation, tmp_path / "out")
    names = [f"item01_finding_0__{series}.nii.gz" for series in ("AX_T1_1", "c_SAG_T2", "AX_T1_3")]
    assert [p.name for p in written[:3]] == names
    assert [nibabel.load(p).shape for p in written[:3]] == [(60, 70, 20), (64, 60, 18), (50, 50, 16)]
    means = [nibabel.load(p).get_fdata() for p in written]
    means = [values[values > 0].mean() for values in means]
    # 0.8 of an item's attention lies evenly on one of three series: 0.2 + 2.4 of an even spread there, 0.2 elsewhere.
    np.testing.assert_allclose(means, [0.2, 2.6, 0.2, 0.2, 0.2, 2.6], rtol=4e-3)


def test_file_names_stay_apart():
    assert file_names(["T1", "t1", "T2 flair/x"]) == ["T1_1", "t1_2", "T2_flair_x"]


def test_slabs_and_json(tmp_path):
    opened = study(tmp_path)
    values = torch.zeros(2, 4, 4)
    values[1, 2, 1] = 1
    explanation = planted(opened, BRAIN_PATCH, [(1, values)])
    slabs = slabs_by_attention(explanation, 0)
    assert len(slabs) == 6
    assert (slabs[0].view, slabs[0].middle) == (1, 13)  # the second half of 18 slices
    assert sum(slab.share for slab in slabs) == pytest.approx(1.0)
    assert slabs[0].share == pytest.approx(0.8 + 0.2 / 6, abs=1e-5)
    item = describe(explanation)["items"][0]
    assert item["peak"]["series"] == "c_SAG_T2"
    d, h, w = item["peak"]["slice_row_column"]
    view = opened.views[1]
    centre = view.geometry.to_input((12, 40, 24))
    assert np.abs(np.array([d, h, w]) - (np.array(centre) - 0.5)).max() <= 0.5
    np.testing.assert_allclose(view.affine @ [d, h, w, 1], [*item["peak"]["world_mm_ras"], 1])
    in_file = view.file_grid.affine @ [*item["peak"]["file_voxel"], 1]
    np.testing.assert_allclose(in_file, view.affine @ [d, h, w, 1], atol=1e-4)
    assert [share["series"] for share in item["share_of_series"]] == ["AX_T1", "c_SAG_T2", "AX_T1"]
    assert sum(share["share"] for share in item["share_of_series"]) == pytest.approx(1)


def texts_of(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_montage(tmp_path):
    opened = study(tmp_path)
    values = torch.zeros(2, 4, 4)
    values[1, 2, 1] = 1
    explanation = planted(opened, BRAIN_PATCH, [(1, values), (0, values)])
    figure = montage_figure(explanation, num_slices=3)
    texts = texts_of(figure)
    assert "1. finding 0  (TCSim 0.100)" in texts
    assert "c_SAG_T2 87 % · AX_T1 7 % · AX_T1 7 % · nowhere 0 % · peak 77.0×" in texts
    # Slice 13 of the view, counted from 0 to the right, is slice 5 of the file, counted from 1 to the left.
    assert "peak slice 5 of 18 · 83 % of attention" in texts
    assert sum(text.startswith("peak slice") for text in texts) == 2
    # At the edges of each: A P S I on sagittal slices, R L A P on axial ones.
    sagittal, axial = texts.count("c_SAG_T2"), texts.count("AX_T1")
    assert [texts.count(letter) for letter in "SIRL"] == [sagittal, sagittal, axial, axial]
    assert texts.count("A") == texts.count("P") == sagittal + axial
    images = [axes for axes in figure.axes if axes.images]
    assert len(images) == 2 * (1 + 3) + 1  # and the colour bar
    plain = images[0].images[0].get_array()
    np.testing.assert_array_equal(plain[..., 0], opened.views[1].values[13])
    # Columns of an axial brain run to the right in the model's view, and to the left where people read it.
    axial_slice = images[4].images[0].get_array()[..., 0]
    slab = slabs_by_attention(explanation, 1)[0]
    np.testing.assert_array_equal(axial_slice, opened.views[0].values[slab.middle][:, ::-1])
    overlay = images[5].images[0].get_array().astype(int)
    coloured = np.argwhere(np.ptp(overlay, axis=-1) == np.ptp(overlay, axis=-1).max()).mean(0)
    expected = slice_of_map(explanation.times_uniform(0)[1], opened.views[0], slab.middle, "smooth")[:, ::-1]
    assert np.abs(coloured - np.argwhere(expected == np.nanmax(expected)).mean(0)).max() < 8
    box = images[0].get_position()
    shown = box.width * figure.get_figwidth() / (box.height * figure.get_figheight())
    spacing, (_, H, W) = opened.views[1].spacing_mm, opened.views[1].values.shape
    assert shown == pytest.approx(W * spacing[2] / (H * spacing[1]), rel=1e-3)
    first = save_figure(figure, tmp_path / "a.png").read_bytes()
    assert first == save_figure(montage_figure(explanation, num_slices=3), tmp_path / "b.png").read_bytes()
    with pytest.raises(ValueError, match="at least one item"):
        montage_figure(explanation, [])


def test_montage_of_an_even_map_says_no_localisation(tmp_path):
    opened = study(tmp_path)
    values = torch.ones(2, 4, 4)
    values[0, 1, 2] = 1.5
    explanation = planted(opened, BRAIN_PATCH, [(1, values)])
    explanation.maps.head_weights[:] = 0.5 / explanation.maps.head_weights[0, 0].numel()
    explanation.maps.head_weights[0, :, 1, 0, 1, 2] *= 1.5
    figure = montage_figure(explanation, num_slices=3)
    texts = texts_of(figure)
    assert any(text.endswith("no localisation") for text in texts)
    assert not any("peak slice" in text for text in texts)
    pictures = [axes.images[0].get_array() for axes in figure.axes if axes.images][:-1]
    assert len(pictures) == 3
    for picture in pictures:
        assert np.ptp(picture[..., :3].astype(int), axis=-1).max() == 0
    assert describe(explanation)["items"][0]["is_localised"] is False


def test_folder_of_an_explanation(tmp_path):
    opened = study(tmp_path)
    flat = torch.ones(2, 4, 4)
    explanation = planted(opened, BRAIN_PATCH, [(0, flat)] * 9)
    written = write_explanation(explanation, tmp_path / "out", ExplanationFiles(slices=1), {"checkpoint": "c.pt"})
    names = [str(p.relative_to(tmp_path / "out")) for p in written]
    assert names[:2] == ["montage_1.png", "montage_2.png"]
    assert names[-1] == "explanation.json"
    assert names[-4:-1] == [f"volumes/image__{n}.nii.gz" for n in ("AX_T1_1", "c_SAG_T2", "AX_T1_3")]
    assert len(names) == 2 + 9 * 3 + 3 + 1
    image = nibabel.load(written[-2])
    view = opened.views[2]
    np.testing.assert_array_equal(view.file_grid.to_view(np.asarray(image.dataobj)), view.original)


def test_chest_tensor_is_written_in_its_formats_grid(tmp_path):
    affine = affine_of("SPL", (3.0, 1.0, 1.0), (35, 101, 99))
    torch.save(torch.from_numpy(chest_phantom(world_of((35, 101, 99), affine), SPOT)), tmp_path / "a.pt")
    opened = open_input(tmp_path / "a.pt", CHEST)
    explanation = planted(opened, CHEST_PATCH, [(0, torch.ones(4, 4, 4))])
    volume = nibabel.load(write_attention_volumes(explanation, tmp_path / "out")[0])
    assert volume.shape == (99, 101, 35)
    np.testing.assert_array_equal(volume.affine, np.diag([-1, -1, 3, 1]))
    assert nibabel.aff2axcodes(volume.affine) == ("L", "P", "S")


# --- masks into the model's view -------------------------------------------------------------------------------------


def test_masks_meet_the_models_view():
    """Enlarged without holes, shrunk without loss, cut by the crop, nothing in the padding."""
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 2] = True
    enlarged = mask_to_view(mask, Geometry.of_input((4, 4)).resize((12, 12)))
    assert enlarged.nonzero().min(0)[0].tolist() == [3, 6]
    assert enlarged.sum() == 9
    fine = torch.zeros(2, 30, 30, dtype=torch.bool)
    fine[0, 7, 22] = True
    shrunk = mask_to_view(fine, Geometry.of_input((30, 30)).resize((3, 3)))
    assert shrunk.nonzero().tolist() == [[0, 0, 2]]
    moved = mask_to_view(mask, Geometry.of_input((4, 4)).crop((-2, 1), (8, 3)))
    assert moved.nonzero().tolist() == [[3, 1]]
    cut = mask_to_view(mask, Geometry.of_input((4, 4)).crop((2, 0), (2, 4)))
    assert not cut.any()
    with pytest.raises(ValueError, match="expected bool"):
        mask_to_view(mask[:3], Geometry.of_input((4, 4)))


@pytest.mark.parametrize("shape", [(24, 61, 90), (40, 120, 97)])
def test_masks_and_maps_are_each_others_way_back(shape):
    """A box of the input, carried to the view and back by a map: the same box to a voxel at its edges."""
    geometry = Geometry.of_input(shape).resize((32, 96, 96)).crop((-2, 5, 5), (32, 90, 80))
    mask = np.zeros(shape, dtype=bool)
    mask[6:14, 20:45, 30:60] = True
    back = map_to_input(mask_to_view(mask, geometry).float(), geometry)
    inside = np.nan_to_num(back) > 0
    grown = np.zeros(shape, dtype=bool)
    grown[5:15, 19:46, 29:61] = True
    assert (inside >= mask).all()
    assert (inside <= grown).all()
