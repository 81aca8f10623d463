"""Every voxel that is shown, measured or learnt from is where and what its file says.

Cubes are planted at known millimetres in files of every format and orientation, and read back through the series' view,
the model's grid and the NIfTI files that are written. What cannot be read truly is refused with the file's name.
"""

from __future__ import annotations

import gzip
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from itemizedclip_radiology.data.dicom import find_dicom_series, read_dicom
from itemizedclip_radiology.data.nifti import read_nifti
from itemizedclip_radiology.data.scans import looks_like_shifted_hu, series_text, straightened
from itemizedclip_radiology.viewing.inputs import open_input
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedMRImageStorage, RLELossless
from scan_files import affine_of, chest_phantom, world_of, write_dicom, write_nifti

from itemizedclip.data.batch import BadSampleError
from itemizedclip.models.factory import LoadedModel, load_model_config
from itemizedclip.viewer.inputs import InputView, SeriesChoice, SeriesListed
from itemizedclip.viewer.volumes import write_volume

BRAIN = LoadedModel(None, load_model_config("HLIPSN_debug"), lambda texts: None, {})
CHEST = LoadedModel(None, load_model_config("CTRATE_HLIP_debug"), lambda texts: None, {})

CUBE = np.array([12.0, -15.0, 9.0])
SIDE_MM = 28.0  # so that it is not cut at the 99.5 percentile


def head(world: np.ndarray, cube: np.ndarray = CUBE) -> np.ndarray:
    """A grey head with a bright cube along the world's axes."""
    grey = np.zeros(world.shape[:-1], dtype=np.int16)
    grey[((world / np.array([45.0, 55.0, 50.0])) ** 2).sum(-1) < 1] = 300
    grey[(np.abs(world - cube) < SIDE_MM / 2).all(-1)] = 1200
    return grey


def head_hu(world: np.ndarray) -> np.ndarray:
    """The same as a head CT: air, bone, brain, and a cube of metal."""
    hu = np.full(world.shape[:-1], -1000, dtype=np.int16)
    radius = ((world / np.array([45.0, 55.0, 50.0])) ** 2).sum(-1)
    hu[radius < 1] = 1200
    hu[radius < 0.85] = 35
    hu[(np.abs(world - CUBE) < SIDE_MM / 2).all(-1)] = 2500
    return hu


def cube_of(view: InputView) -> np.ndarray:
    """Middle of the bright voxels of a view, mm RAS."""
    values = view.values.astype(float)
    bright = np.argwhere(values > 0.75 * values.max())
    return (view.affine @ np.append(bright.mean(0), 1))[:3]


def cube_of_model_grid(image: np.ndarray, view: InputView) -> np.ndarray:
    """The same of what the model is given, carried back by the view's geometry."""
    middle = np.argwhere(image > image.min() + 0.9 * (image.max() - image.min())).mean(0) + 0.5
    return (view.affine @ np.append(np.array(view.geometry.to_input(middle)) - 0.5, 1))[:3]


def cube_of_nifti(path: Path, *, by_itk: bool) -> np.ndarray:
    """The same of a written file, by either of the two libraries that viewers are built on."""
    if by_itk:
        image = sitk.ReadImage(str(path))
        values = sitk.GetArrayFromImage(image)
        middle = np.argwhere(values > 0.75 * values.max()).mean(0)[::-1]
        return np.array(image.TransformContinuousIndexToPhysicalPoint(middle.tolist())) * [-1, -1, 1]
    image = nibabel.load(path)
    values = np.asarray(image.dataobj).astype(float)
    return (image.affine @ np.append(np.argwhere(values > 0.75 * values.max()).mean(0), 1))[:3]


def assert_cube(
    source: Path, tmp_path: Path, largest_mm: float, loaded: LoadedModel = BRAIN, series: int = 0
) -> InputView:
    """The cube lies where it was planted in a series, in all three places."""
    opened = open_input(source, loaded)
    view = opened.views[series]
    np.testing.assert_allclose(cube_of(view), CUBE, atol=largest_mm / 2)
    np.testing.assert_allclose(cube_of_model_grid(opened.image[series, 0].numpy(), view), CUBE, atol=largest_mm)
    values = view.values if view.original is None else view.original
    written = write_volume(values, view, tmp_path / "written.nii.gz")
    for by_itk in (False, True):
        np.testing.assert_allclose(cube_of_nifti(written, by_itk=by_itk), CUBE, atol=largest_mm / 2)
    return view


# --- planted cubes ---------------------------------------------------------------------------------------------------

SPACING = (2.0, 2.0, 5.0)
SHAPE = (70, 72, 28)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "ASL", "SRA", "LIP", "IAL"])
@pytest.mark.parametrize("tilt", [0.0, 0.2])
def test_nifti_of_every_orientation(tmp_path, codes, tilt):
    affine = affine_of(codes, SPACING, SHAPE, tilt)
    path = write_nifti(tmp_path / "t2.nii.gz", head(world_of(SHAPE, affine)), affine)
    assert_cube(path, tmp_path, max(SPACING))


@pytest.mark.parametrize(
    ("codes", "plane"), [("LPS", "AX"), ("LPI", "AX"), ("LIP", "COR"), ("PIL", "SAG"), ("PIR", "SAG")]
)
@pytest.mark.parametrize("tilt", [0.0, 0.2])
def test_dicom_of_every_plane(tmp_path, codes, plane, tilt):
    affine = affine_of(codes, SPACING, SHAPE, tilt)
    write_dicom(tmp_path / "dicom", head(world_of(SHAPE, affine)), affine, description="t2 tse", modality="MR")
    view = assert_cube(tmp_path / "dicom", tmp_path, max(SPACING))
    assert view.name == f"{plane}_t2_tse"


@pytest.mark.parametrize("kind", ["compressed", "enhanced"])
def test_dicom_of_other_kinds(tmp_path, kind):
    affine = affine_of("LPS", SPACING, SHAPE, 0.2)
    voxels = head(world_of(SHAPE, affine))
    write_dicom(tmp_path / "dicom", voxels, affine, description="t2", modality="MR")
    if kind == "compressed":
        change(tmp_path / "dicom", lambda data: data.compress(RLELossless))
    else:
        make_enhanced(tmp_path / "dicom")
    view = assert_cube(tmp_path / "dicom", tmp_path, max(SPACING))
    np.testing.assert_array_equal(view.original, view.file_grid.to_view(voxels))


Edit = Callable[[pydicom.FileDataset], object]


def change(folder: Path, edit: Edit, *, only: Callable[[int], bool] = lambda n: True) -> None:
    """Edit the files of a series in order of their instances."""
    files = sorted(folder.glob("*.dcm"), key=lambda path: pydicom.dcmread(path, stop_before_pixels=True).InstanceNumber)
    for number, path in enumerate(files):
        if only(number):
            data = pydicom.dcmread(path)
            edit(data)
            pydicom.dcmwrite(path, data)


def make_enhanced(folder: Path, *, groups: bool = True) -> None:
    """One file of many frames instead of one file per slice, the frames in another order."""
    single = sorted(
        (pydicom.dcmread(path) for path in folder.glob("*.dcm")), key=lambda data: (data.InstanceNumber * 7) % 29
    )
    first = single[0]
    frames = []
    for data in single:
        frame, place, turn, size = Dataset(), Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient, turn.ImageOrientationPatient = (
            data.ImagePositionPatient,
            data.ImageOrientationPatient,
        )
        size.PixelSpacing, size.SliceThickness = data.PixelSpacing, data.SliceThickness
        frame.PlanePositionSequence, frame.PlaneOrientationSequence = Sequence([place]), Sequence([turn])
        frame.PixelMeasuresSequence = Sequence([size])
        frames.append(frame)
    pixels = b"".join(data.PixelData for data in single)
    shutil.rmtree(folder)
    folder.mkdir()
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(first, tag)
    first.SOPClassUID = first.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    first.NumberOfFrames, first.PixelData = len(single), pixels
    if groups:
        first.PerFrameFunctionalGroupsSequence = Sequence(frames)
        first.SharedFunctionalGroupsSequence = Sequence([Dataset()])
    pydicom.dcmwrite(folder / "frames.dcm", first)


# --- a tilted gantry, sheared affines --------------------------------------------------------------------------------


def tilted(degrees: float, spacing: tuple[float, float, float], shape: tuple[int, int, int]) -> np.ndarray:
    """Affine of a head CT whose slices are tilted about the left-right axis while the table moves along the body."""
    affine = affine_of("LPS", spacing, shape)
    angle = np.radians(degrees)
    affine[:3, 1] = np.array([0, -np.cos(angle), -np.sin(angle)]) * spacing[1]
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine


@pytest.mark.parametrize("degrees", [20.0, -15.0])
def test_tilted_gantry(tmp_path, degrees):
    affine = tilted(degrees, SPACING, SHAPE)
    hu = head_hu(world_of(SHAPE, affine))
    write_dicom(tmp_path / "dicom", hu, affine, description="head")
    bone = 1  # brain saturates in the others
    view = assert_cube(tmp_path / "dicom", tmp_path, max(SPACING), series=bone)
    # Planes at right angles: every reformat and ruler is true.
    axes = view.affine[:3, :3] / np.linalg.norm(view.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    opened = open_input(tmp_path / "dicom", BRAIN)
    assert any(f"shifted against each other by {abs(degrees):.1f}° (a tilted gantry)" in w for w in opened.warnings)
    path = write_nifti(tmp_path / "head.nii.gz", hu, affine)
    assert_cube(path, tmp_path, max(SPACING), series=bone)


def test_sheared_nifti_of_a_chest(tmp_path):
    shape, spacing = (90, 90, 40), (1.5, 1.5, 4.0)
    affine = affine_of("LPS", spacing, shape)
    affine[0, 2] += 1.2
    world = world_of(shape, affine)
    hu = chest_phantom(world, np.zeros(3) + 1e4)
    hu[(np.abs(world - CUBE) < SIDE_MM / 2).all(-1)] = 2000
    assert_cube(write_nifti(tmp_path / "chest.nii.gz", hu, affine), tmp_path, max(spacing), CHEST)


def test_straight_grids_stay_as_they_are():
    affine = affine_of("PIR", SPACING, SHAPE, 0.3)
    scan = nifti_scan(head(world_of(SHAPE, affine)), affine)
    assert straightened(scan) is scan
    slightly = affine.copy()
    slightly[:3, 2] += affine[:3, 0] * 0.1 / SHAPE[2]  # a tenth of a voxel over the whole stack
    scan = nifti_scan(head(world_of(SHAPE, affine)), slightly)
    assert straightened(scan) is scan


def nifti_scan(voxels: np.ndarray, affine: np.ndarray):
    from itemizedclip_radiology.data.scans import Scan

    return Scan("t2", voxels, affine, Path("t2.nii"))


def test_axes_that_are_nearly_one_are_refused():
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[:3, 2] = [40, 0, 1]
    with pytest.raises(BadSampleError, match=r"t2\.nii: its axes are far from right angles"):
        straightened(nifti_scan(np.zeros((20, 20, 40), np.int16), affine))


# --- units, absent sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1000.0), ("micron", 0.001)])
def test_units_are_converted(tmp_path, unit, factor):
    affine = affine_of("RAS", SPACING, SHAPE)
    image = nibabel.Nifti1Image(head(world_of(SHAPE, affine)), np.diag([1 / factor] * 3 + [1]) @ affine)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "t2.nii.gz")
    assert_cube(tmp_path / "t2.nii.gz", tmp_path, max(SPACING))
    assert any("converted to mm" in w for w in open_input(tmp_path / "t2.nii.gz", BRAIN).warnings)
    # A unit that is wrong itself is not believed.
    image = nibabel.Nifti1Image(head(world_of(SHAPE, affine)), affine)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "t1.nii.gz")
    assert_cube(tmp_path / "t1.nii.gz", tmp_path, max(SPACING))
    assert any("taken as mm" in w for w in open_input(tmp_path / "t1.nii.gz", BRAIN).warnings)


@pytest.mark.parametrize("mm", [0.01, 90.0])
def test_sizes_of_no_body_are_refused(tmp_path, mm):
    affine = affine_of("LPS", (mm, mm, 2 * mm), SHAPE)
    voxels = head(world_of(SHAPE, affine_of("LPS", SPACING, SHAPE)))
    path = write_nifti(tmp_path / "t2.nii.gz", voxels, affine)
    with pytest.raises(BadSampleError, match=r"t2\.nii\.gz: covers .* mm; expected a brain of 40 to 700 mm"):
        open_input(path, BRAIN)
    with pytest.raises(BadSampleError, match=r"t2\.nii\.gz: covers .* mm; expected a chest"):
        open_input(path, CHEST)


def mr(folder: Path, **more: object) -> Path:
    affine = affine_of("LPS", SPACING, SHAPE)
    write_dicom(folder, head(world_of(SHAPE, affine)), affine, description="t2", modality="MR", **more)
    return folder


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: delattr(data, "PixelSpacing"), "no PixelSpacing, so that nothing says how large its voxels are"),
        (lambda data: setattr(data, "PixelSpacing", [0, 0]), "PixelSpacing 0×0, so that nothing says"),
        (lambda data: setattr(data, "PixelSpacing", [-1, 2]), "PixelSpacing -1×2, so that nothing says"),
        (lambda data: delattr(data, "ImagePositionPatient"), "slices without position or orientation"),
        (lambda data: setattr(data, "ImageOrientationPatient", [1, 0, 0, 1, 0, 0]), "have no right angle"),
        (lambda data: setattr(data, "RescaleSlope", "0"), r"RescaleSlope and RescaleIntercept are \(0.0, 0.0\)"),
        (
            lambda data: setattr(data, "RescaleSlope", "1e300"),
            r"RescaleSlope and RescaleIntercept are \(1e\+300, 0.0\)",
        ),
        (
            lambda data: setattr(data, "Rows", 65535),
            "bytes of pixels expected, .* there: cut short and 27 more files; copy",
        ),
        (lambda data: setattr(data, "PixelData", data.PixelData[:-900]), "bytes of pixels expected.*cut short"),
    ],
)
def test_series_that_cannot_be_read_truly_are_refused(tmp_path, edit, message):
    change(mr(tmp_path / "dicom"), edit)
    with pytest.raises(BadSampleError, match=message):
        open_input(tmp_path / "dicom", BRAIN)


def test_one_damaged_slice_is_named(tmp_path):
    change(
        mr(tmp_path / "dicom"), lambda data: setattr(data, "PixelData", data.PixelData[:1000]), only=lambda n: n == 9
    )
    (one,) = find_dicom_series(tmp_path / "dicom")
    short = min((tmp_path / "dicom").iterdir(), key=lambda path: path.stat().st_size)
    assert one.reason.startswith(f"{short}: 10,080 bytes of pixels expected, 1,000 there: cut short")
    assert one.reason.endswith("copy it again")


def test_many_frames_without_places_are_refused(tmp_path):
    make_enhanced(mr(tmp_path / "dicom"), groups=False)
    with pytest.raises(BadSampleError, match="many frames without functional groups; convert it with its positions"):
        open_input(tmp_path / "dicom", BRAIN)


def test_half_of_the_slices_without_rescale(tmp_path):
    affine = affine_of("LPS", SPACING, SHAPE)
    write_dicom(tmp_path / "ct", head_hu(world_of(SHAPE, affine)), affine)

    def bare(data: pydicom.FileDataset) -> None:
        del data.RescaleSlope, data.RescaleIntercept

    change(tmp_path / "ct", bare, only=lambda n: n % 2 == 1)
    with pytest.raises(BadSampleError, match=r"14 of 28 slices have no RescaleSlope.*others have \(1.0, -1024.0\)"):
        open_input(tmp_path / "ct", BRAIN)


def test_sform_and_qform_that_disagree(tmp_path):
    affine = affine_of("RAS", SPACING, SHAPE)
    image = nibabel.Nifti1Image(head(world_of(SHAPE, affine)), affine)
    image.set_sform(affine, code=1)
    image.set_qform(np.diag([-1.0, 1, 1, 1]) @ affine, code=1)
    nibabel.save(image, tmp_path / "t2.nii.gz")
    opened = open_input(tmp_path / "t2.nii.gz", BRAIN)
    np.testing.assert_allclose(cube_of(opened.views[0]), CUBE, atol=2.5)
    (warning,) = opened.warnings
    assert "sform and qform lie up to 138 mm apart, and one mirrors the other; the sform is taken" in warning


def test_an_sform_of_unit_voxels_gives_way(tmp_path):
    affine = affine_of("RAS", SPACING, SHAPE)
    image = nibabel.Nifti1Image(head(world_of(SHAPE, affine)), affine)
    image.set_qform(affine, code=1)
    image.set_sform(np.eye(4), code=1)
    image.header.set_zooms(SPACING)
    nibabel.save(image, tmp_path / "t2.nii.gz")
    assert_cube(tmp_path / "t2.nii.gz", tmp_path, max(SPACING))
    (warning,) = open_input(tmp_path / "t2.nii.gz", BRAIN).warnings
    assert "the qform is taken, whose voxel sizes are the header's" in warning


# --- several volumes, other images, gaps -----------------------------------------------------------------------------


def add_volume(folder: Path, number: int, edit: Edit, factor: float = 0.5) -> None:
    """Copies of a series' files in the same series, changed, with other pixels."""
    for path in list(folder.glob("s1_*.dcm")):
        data = pydicom.dcmread(path)
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        data.InstanceNumber += 1000 * number
        pixels = np.frombuffer(data.PixelData, np.uint16) * factor
        data.PixelData = pixels.astype(np.uint16).tobytes()
        edit(data)
        pydicom.dcmwrite(path.with_stem(f"v{number}_{path.stem}"), data)


def set_b(data: pydicom.FileDataset, value: float) -> None:
    data.DiffusionBValue = value


def set_siemens_b(data: pydicom.FileDataset, value: int) -> None:
    block = data.private_block(0x0019, "SIEMENS MR HEADER", create=True)
    block.add_new(0x0C, "IS", value)


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        (lambda d: set_b(d, 0.0), lambda d: set_b(d, 1000.0), ["b0", "b1000"]),
        (lambda d: set_siemens_b(d, 0), lambda d: set_siemens_b(d, 800), ["b0", "b800"]),
        (lambda d: None, lambda d: set_b(d, 1000.0), ["b0", "b1000"]),
        (lambda d: setattr(d, "EchoTime", 12), lambda d: setattr(d, "EchoTime", 90), ["TE12", "TE90"]),
        (lambda d: setattr(d, "ImageType", ["ORIGINAL", "PRIMARY", "M"]),
         lambda d: setattr(d, "ImageType", ["ORIGINAL", "PRIMARY", "P"]), ["M", "P"]),
        (lambda d: setattr(d, "TemporalPositionIdentifier", 1), lambda d: setattr(d, "TemporalPositionIdentifier", 2),
         ["phase1", "phase2"]),
        (lambda d: setattr(d, "AcquisitionNumber", 1), lambda d: setattr(d, "AcquisitionNumber", 2),
         ["acquisition1", "acquisition2"]),
    ],
)  # fmt: skip
def test_volumes_of_one_series_are_told_apart(tmp_path, first, second, names):
    folder = mr(tmp_path / "dicom")
    change(folder, first)
    add_volume(folder, 2, second)
    opened = open_input(folder, BRAIN)
    assert [view.name for view in opened.views] == [f"AX_t2_{name}" for name in names]
    np.testing.assert_array_equal(opened.views[0].original // 2, opened.views[1].original)
    assert any("2 volumes in one series, read as series of their own" in warning for warning in opened.warnings)


def test_dynamics_give_their_first_volume(tmp_path):
    folder = mr(tmp_path / "dicom")
    change(folder, lambda data: setattr(data, "TemporalPositionIdentifier", 1))
    for number in range(2, 9):
        add_volume(folder, number, lambda data, n=number: setattr(data, "TemporalPositionIdentifier", n))
    opened = open_input(folder, BRAIN)
    assert [view.name for view in opened.views] == ["AX_t2_phase1"]
    assert any("8 volumes in one series (phase1, phase2, phase3, …); the first is read" in w for w in opened.warnings)


def test_a_scout_inside_a_series_is_left_out(tmp_path):
    affine = affine_of("LPS", SPACING, SHAPE)
    voxels = head(world_of(SHAPE, affine))
    uid = write_dicom(tmp_path / "dicom", voxels, affine, description="t2", modality="MR")
    write_dicom(tmp_path / "other", voxels[:60, :50, :1], affine, description="t2", modality="MR", number=2)
    change(tmp_path / "other", lambda data: setattr(data, "SeriesInstanceUID", uid))
    shutil.copy(next((tmp_path / "other").iterdir()), tmp_path / "dicom/scout.dcm")
    opened = open_input(tmp_path / "dicom", BRAIN)
    np.testing.assert_array_equal(opened.views[0].original, opened.views[0].file_grid.to_view(voxels))
    assert any(
        "1 images of another size or direction (scouts) are left out, such as scout.dcm" in w for w in opened.warnings
    )


def test_missing_slices_keep_their_place(tmp_path):
    affine = affine_of("LPS", SPACING, SHAPE, 0.1)
    write_dicom(tmp_path / "dicom", head(world_of(SHAPE, affine)), affine, modality="MR", drop=(3, 4))
    assert_cube(tmp_path / "dicom", tmp_path, max(SPACING))
    opened = open_input(tmp_path / "dicom", BRAIN)
    assert any(
        "2 slices are missing between images 3 and 6 (a gap of 15.0 mm" in warning for warning in opened.warnings
    )


def test_spacing_that_varies_by_design_is_interpolated(tmp_path):
    """Thin slices below, every second one above, as head CT is often taken."""
    affine = affine_of("LPS", SPACING, SHAPE)
    drop = tuple(range(1, 15, 2))
    write_dicom(tmp_path / "dicom", head(world_of(SHAPE, affine)), affine, modality="MR", drop=drop)
    (one,) = find_dicom_series(tmp_path / "dicom")
    scan = read_dicom(one)
    assert scan.voxels.shape == SHAPE
    np.testing.assert_allclose(scan.affine, affine, atol=1e-4)
    whole = head(world_of(SHAPE, affine)).astype(int)
    np.testing.assert_array_equal(scan.voxels[:, :, 15:], whole[:, :, 15:])
    np.testing.assert_array_equal(scan.voxels[:, :, 1], np.rint((whole[:, :, 0] + whole[:, :, 2]) / 2))
    assert any("slices 5.00 to 10.00 mm apart; interpolated to steps of 5.00 mm" in w for w in scan.warnings)


def test_slices_off_the_stack_are_refused(tmp_path):
    def moved(data: pydicom.FileDataset) -> None:
        data.ImagePositionPatient = [data.ImagePositionPatient[0] + 20, *data.ImagePositionPatient[1:]]

    change(mr(tmp_path / "dicom"), moved, only=lambda n: n == 5)
    with pytest.raises(BadSampleError, match=r"lie up to 20\.0 mm off a straight stack"):
        open_input(tmp_path / "dicom", BRAIN)


# --- names, choice ---------------------------------------------------------------------------------------------------


def test_names_follow_the_measured_plane(tmp_path):
    assert series_text("AX T1", "COR", is_certain=True) == "COR_T1"
    assert series_text("AX T1 COR", "COR", is_certain=True) == "AX_T1_COR"
    assert series_text("AX T1", "COR") == "AX_T1"
    assert series_text("axial", "SAG", is_certain=True) == "SAG_series"
    affine = affine_of("LIP", SPACING, SHAPE)
    write_dicom(tmp_path / "ct", head_hu(world_of(SHAPE, affine)), affine, description="AX BRAIN MPR", kind="MPR")
    opened = open_input(tmp_path / "ct", BRAIN)
    names = [view.name for view in opened.views]
    assert names == [f"BRAIN_MPR_COR_{window}" for window in ("BloodWindow", "BoneWindow", "BrainWindow")]
    assert any("a reformat (mpr), derived from another series, in the plane COR" in note for note in opened.notes)


def test_a_second_reconstruction_is_said(tmp_path):
    affine = affine_of("LPS", SPACING, SHAPE)
    hu = head_hu(world_of(SHAPE, affine))
    for number, kernel in ((1, "H30s"), (2, "H60s")):
        write_dicom(tmp_path / f"dicom/{number}", hu, affine, description=f"head {kernel}", number=number)
        change(tmp_path / f"dicom/{number}", lambda data, kernel=kernel: setattr(data, "ConvolutionKernel", kernel))
    notes = open_input(tmp_path / "dicom", BRAIN).notes
    assert any("a second reconstruction of series 1 (kernels H30s and H60s)" in note for note in notes)


@pytest.mark.parametrize("kind", ["MIP", "SCREEN SAVE"])
def test_pictures_of_slices_are_no_series(tmp_path, kind):
    mr(tmp_path / "study/a")
    affine = affine_of("LPS", SPACING, SHAPE)
    write_dicom(tmp_path / "study/b", head(world_of(SHAPE, affine)), affine, modality="MR", kind=kind, number=2)
    opened = open_input(tmp_path / "study", BRAIN)
    assert [view.name for view in opened.views] == ["AX_t2"]
    assert any(f"no slices but pictures of them ({kind.lower()})" in note for note in opened.notes)


def test_series_are_chosen_by_name_or_number(tmp_path):
    affine = affine_of("LPS", SPACING, SHAPE)
    voxels = head(world_of(SHAPE, affine))
    for number, name in ((3, "t1 mprage"), (4, "t2 tse"), (5, "t2 flair")):
        write_dicom(tmp_path / name, voxels, affine, description=name, modality="MR", number=number)

    def names(**choice: object) -> list[str]:
        return [view.name for view in open_input(tmp_path, BRAIN, SeriesChoice(**choice)).views]

    assert names(wanted=("T2",)) == ["AX_t2_tse", "AX_t2_flair"]
    assert names(wanted=("t2",), unwanted=("flair",)) == ["AX_t2_tse"]
    assert names(wanted=("3",)) == ["AX_t1_mprage"]
    with pytest.raises(BadSampleError, match="no series is left by --series swi"):
        names(wanted=("swi",))
    with pytest.raises(SeriesListed, match=r"3 series\n  series 3: t1 mprage, MR, 28 slices"):
        names(list_only=True)


# --- values ----------------------------------------------------------------------------------------------------------


def test_values_of_the_file_are_kept(tmp_path):
    affine = affine_of("RAS", SPACING, SHAPE)
    values = head(world_of(SHAPE, affine)).astype(np.float32) * 1.7
    values[0, 0, 0] = 90_000.0  # beyond the percentile that the screen and the model are cut at
    path = write_nifti(tmp_path / "t2.nii.gz", values, affine)
    (view,) = open_input(path, BRAIN).views
    written = nibabel.load(write_volume(view.original, view, tmp_path / "back.nii.gz"))
    np.testing.assert_array_equal(np.asarray(written.dataobj), values)
    np.testing.assert_allclose(written.affine, affine, atol=1e-5)


def test_values_that_are_none_are_filled_when_asked(tmp_path):
    affine = affine_of("LPS", (2.0, 2.0, 4.0), (64, 64, 40))
    hu = chest_phantom(world_of((64, 64, 40), affine), CUBE).astype(np.float32)
    hu[:3] = np.nan
    path = write_nifti(tmp_path / "chest.nii.gz", hu, affine)
    with pytest.raises(BadSampleError, match=r"values are NaN or infinite; expected .* --fill-nan"):
        open_input(path, CHEST)
    opened = open_input(path, CHEST, SeriesChoice(fill_nan=True))
    np.testing.assert_array_equal(
        opened.views[0].values, opened.views[0].file_grid.to_view(np.nan_to_num(hu, nan=-1000).astype(np.int16))
    )


def test_head_ct_that_is_not_in_hu_is_refused(tmp_path):
    affine = affine_of("LPS", SPACING, SHAPE)
    hu = head_hu(world_of(SHAPE, affine))
    assert looks_like_shifted_hu(hu + 1024)
    assert not looks_like_shifted_hu(hu)
    assert not looks_like_shifted_hu(head(world_of(SHAPE, affine)))
    for name, values in (
        ("series.nii.gz", hu + 1024),
        ("head_ct.nii.gz", np.clip(hu / 10 + 100, 0, 255).astype(np.uint8)),
    ):
        path = write_nifti(tmp_path / name, values, affine)
        with pytest.raises(BadSampleError, match=rf"{name}: a CT with values from .* expected HU"):
            open_input(path, BRAIN)


def test_files_that_tell_of_more_than_they_hold(tmp_path):
    affine = affine_of("RAS", SPACING, SHAPE)
    path = write_nifti(tmp_path / "t2.nii.gz", head(world_of(SHAPE, affine)), affine)
    plain = bytearray(gzip.decompress(path.read_bytes()))
    cut = tmp_path / "cut.nii"
    cut.write_bytes(plain[:5000])
    with pytest.raises(BadSampleError, match=r"cut\.nii: its header tells of 282,240 bytes of voxels, .* 5,000"):
        read_nifti(cut)
    plain[40:56] = np.array([3, 32000, 32000, 32000, 1, 1, 1, 1], "<i2").tobytes()
    for name in ("huge.nii", "huge.nii.gz"):
        (tmp_path / name).write_bytes(gzip.compress(plain) if name.endswith("gz") else plain)
        with pytest.raises(BadSampleError, match=rf"{name}: its header tells of 32000×32000×32000 voxels"):
            read_nifti(tmp_path / name)


# --- packed studies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_packed_studies_are_read(tmp_path, suffix):
    folder = mr(tmp_path / "study")
    packed = tmp_path / f"packed{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in folder.iterdir():
                archive.write(path, f"exam/{path.name}")
            archive.writestr("../../outside.txt", "x")
    else:
        with tarfile.open(packed, "w:gz" if suffix.endswith("gz") else "w") as archive:
            archive.add(folder, "exam")
    opened = open_input(packed, BRAIN)
    assert opened.name == packed.name
    np.testing.assert_array_equal(opened.views[0].original, open_input(folder, BRAIN).views[0].original)
    assert not (tmp_path.parent / "outside.txt").exists()


def test_messages_about_packed_studies_name_the_archive(tmp_path):
    folder = mr(tmp_path / "study")
    change(folder, lambda data: setattr(data, "PixelData", data.PixelData[:-900]), only=lambda n: n == 3)
    packed = tmp_path / "packed.tar"
    with tarfile.open(packed, "w") as archive:
        archive.add(folder, "study")
    with pytest.raises(BadSampleError, match=r"packed\.tar/study/s1_\d+\.dcm: .* cut short; copy it again") as caught:
        open_input(packed, BRAIN)
    assert "itemizedclip-study" not in str(caught.value)


def test_packed_studies_that_cannot_be_unpacked(tmp_path):
    (tmp_path / "torn.zip").write_bytes(b"PK\x03\x04 nothing")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.dcm", bytes(2**29))
    head_of_tar = tarfile.TarInfo("huge.dcm")
    head_of_tar.size = 2**62
    (tmp_path / "huge.tar").write_bytes(head_of_tar.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    for name, message in (
        ("torn.zip", "cannot be unpacked"),
        ("bomb.zip", "holds 1 or more files of 0.5 GB in 0.5 MB; expected one study"),
        ("huge.tar", "holds 1 or more files of 4,611,686,018.4 GB"),
    ):
        with pytest.raises(BadSampleError, match=rf"{name}: {message}"):
            open_input(tmp_path / name, BRAIN)
