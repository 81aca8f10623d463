"""Attention as DICOM lies over the images it refers to, however these lie: cubes read back from the written headers."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from itemizedclip_radiology.viewing.inputs import open_input
from perfect_maps import perfect_explanation
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import RLELossless
from scan_files import affine_of, world_of, write_dicom, write_nifti
from test_scan_geometry import (
    BRAIN,
    CUBE,
    SHAPE,
    SPACING,
    add_volume,
    change,
    head,
    head_hu,
    make_enhanced,
    mr,
    tilted,
)

from itemizedclip.commands.cli import main as cli
from itemizedclip.evaluation.attention import ItemMaps
from itemizedclip.models.factory import create_model
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import file_sha256
from itemizedclip.viewer import dicom
from itemizedclip.viewer.dicom import DicomOrigin
from itemizedclip.viewer.dicom import write_dicom as write_results
from itemizedclip.viewer.explanation import Explanation
from itemizedclip.viewer.inputs import SeriesChoice

pytest.importorskip("highdicom")
pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR:UserWarning")

ORIGIN = DicomOrigin("a model", "0123456789abcdef" * 4)


def frames_in_world(path: Path) -> tuple[pydicom.Dataset, np.ndarray, np.ndarray]:
    """A written object, its frames, and per frame the affine (row, column) → mm RAS, from the headers alone."""
    data = pydicom.dcmread(path)
    shared = data.SharedFunctionalGroupsSequence[0]
    turn = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
    rows_mm, columns_mm = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    affines = []
    for group in data.PerFrameFunctionalGroupsSequence:
        affine = np.zeros((3, 3))
        affine[:, 0], affine[:, 1] = turn[3:] * rows_mm, turn[:3] * columns_mm
        affine[:, 2] = np.array(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        affines.append(np.diag([-1, -1, 1]) @ affine)
    return data, data.pixel_array, np.stack(affines)


def middle(path: Path) -> np.ndarray:
    """Weighted middle of all values above half the largest, mm RAS."""
    _, frames, affines = frames_in_world(path)
    n, y, x = np.nonzero(frames > frames.max() / 2)
    return np.einsum("nij,nj->ni", affines[n], np.stack([y, x, np.ones(len(y))], 1).astype(float)).mean(0)


def results(folder: Path, output: Path, series: int = 0) -> list[Path]:
    opened = open_input(folder, BRAIN, SeriesChoice(keep_headers=True))
    return write_results(perfect_explanation(opened, series), output, ORIGIN)


def source_of(group: Dataset) -> Dataset:
    return group.DerivationImageSequence[0].SourceImageSequence[0]


def assert_refers_to_images(path: Path, folder: Path) -> None:
    """Every frame names the source image, and its frame, that lies in the same plane."""
    sources = {one.SOPInstanceUID: one for one in map(pydicom.dcmread, folder.rglob("*.dcm"))}
    data = pydicom.dcmread(path)
    assert data.StudyInstanceUID == next(iter(sources.values())).StudyInstanceUID
    assert data.FrameOfReferenceUID == next(iter(sources.values())).FrameOfReferenceUID
    (series,) = data.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == next(iter(sources.values())).SeriesInstanceUID
    for group in data.PerFrameFunctionalGroupsSequence:
        reference = source_of(group)
        source = sources[reference.ReferencedSOPInstanceUID]
        if "NumberOfFrames" in source:
            frame = source.PerFrameFunctionalGroupsSequence[int(reference.ReferencedFrameNumber) - 1]
            place = frame.PlanePositionSequence[0].ImagePositionPatient
        else:
            place = source.ImagePositionPatient
        np.testing.assert_allclose(group.PlanePositionSequence[0].ImagePositionPatient, place, atol=1e-3)


def enhanced(folder: Path) -> None:
    make_enhanced(folder)


def compressed(folder: Path) -> None:
    change(folder, lambda data: data.compress(RLELossless))


@pytest.mark.parametrize(
    ("codes", "tilt", "drop", "edit"),
    [
        ("LPS", 0.0, (), None),
        ("LPI", 0.2, (), None),
        ("LIP", 0.2, (), None),
        ("PIR", 0.1, (), compressed),
        ("LPS", 0.2, (), enhanced),
        ("LPS", 0.1, (3, 4), None),
        ("LPS", 0.1, tuple(range(1, 11, 2)), None),
    ],
    ids=["axial", "oblique", "coronal", "sagittal", "enhanced", "missing", "uneven"],
)
def test_maps_and_segments_lie_where_the_cube_is(tmp_path, codes, tilt, drop, edit: Callable[[Path], None] | None):
    affine = affine_of(codes, SPACING, SHAPE, tilt)
    write_dicom(
        tmp_path / "dicom", head(world_of(SHAPE, affine)), affine, description="t2", modality="MR", drop=drop, number=4
    )
    if edit is not None:
        edit(tmp_path / "dicom")
    attention, segments = results(tmp_path / "dicom", tmp_path / "out")
    assert [path.name for path in (attention, segments)] == [
        f"item01_bright_cube__{name}_t2.map.dcm".replace("item01_bright_cube", stem).replace(".map", kind)
        for stem, kind in (("item01_bright_cube", ".map"), ("segments", ".seg"))
        for name in [{"I": "AX", "S": "AX", "P": "COR", "R": "SAG"}[codes[2]]]
    ]
    for path in (attention, segments):
        np.testing.assert_allclose(middle(path), CUBE, atol=max(SPACING) / 2)
        assert_refers_to_images(path, tmp_path / "dicom")


def test_a_tilted_head_ct(tmp_path):
    """The maps lie over the tilted slices themselves, not over the straight grid that the model saw."""
    affine = tilted(20.0, SPACING, SHAPE)
    write_dicom(tmp_path / "dicom", head_hu(world_of(SHAPE, affine)), affine, description="head")
    written = results(tmp_path / "dicom", tmp_path / "out", series=1)
    assert [path.name for path in written if ".seg." in path.name] == ["segments__head_AX_BoneWindow.seg.dcm"]
    for path in written[1:3]:
        np.testing.assert_allclose(middle(path), CUBE, atol=max(SPACING) / 2)
        assert_refers_to_images(path, tmp_path / "dicom")
    frames = pydicom.dcmread(written[1])
    assert (frames.NumberOfFrames, frames.Columns, frames.Rows) == (SHAPE[2], SHAPE[0], SHAPE[1])


def test_each_volume_of_a_series_refers_to_its_own_images(tmp_path):
    folder = mr(tmp_path / "dicom")
    change(folder, lambda data: setattr(data, "DiffusionBValue", 0.0))
    add_volume(folder, 2, lambda data: setattr(data, "DiffusionBValue", 1000.0))
    b_of = {one.SOPInstanceUID: one.DiffusionBValue for one in map(pydicom.dcmread, folder.glob("*.dcm"))}
    written = results(folder, tmp_path / "out", series=1)
    assert [path.name for path in written][1:] == [
        "item01_bright_cube__AX_t2_b1000.map.dcm",
        "segments__AX_t2_b1000.seg.dcm",
    ]
    for path, b in zip(written, (0.0, 1000.0, 1000.0)):
        groups = pydicom.dcmread(path).PerFrameFunctionalGroupsSequence
        assert {b_of[source_of(group).ReferencedSOPInstanceUID] for group in groups} == {b}


def test_each_volume_of_one_file_refers_to_its_own_frames(tmp_path):
    """Frames of b 0 and 1000 lie at the same places, in turn, with their orientation in each of them."""
    make_enhanced(mr(tmp_path / "dicom"))
    (path,) = (tmp_path / "dicom").iterdir()
    data = pydicom.dcmread(path)
    frames = []
    for group in data.PerFrameFunctionalGroupsSequence:
        for b in (0.0, 1000.0):
            frame, diffusion = Dataset(), Dataset()
            frame.update({element.tag: element for element in group})
            diffusion.DiffusionBValue = b
            frame.MRDiffusionSequence = Sequence([diffusion])
            frames.append(frame)
    size = data.Rows * data.Columns * 2
    pixels = [data.PixelData[at : at + size] for at in range(0, len(data.PixelData), size)]
    data.PerFrameFunctionalGroupsSequence = Sequence(frames)
    data.NumberOfFrames, data.PixelData = len(frames), b"".join(pixel * 2 for pixel in pixels)
    pydicom.dcmwrite(path, data)
    written = results(tmp_path / "dicom", tmp_path / "out", series=1)
    for path, odd in zip(written, (1, 0, 0)):
        groups = pydicom.dcmread(path).PerFrameFunctionalGroupsSequence
        assert {int(source_of(group).ReferencedFrameNumber) % 2 for group in groups} == {odd}
    for path in written[1:]:
        np.testing.assert_allclose(middle(path), CUBE, atol=max(SPACING) / 2)
        assert_refers_to_images(path, tmp_path / "dicom")


def test_values_and_what_is_said_of_them(tmp_path):
    folder = mr(tmp_path / "dicom")
    opened = open_input(folder, BRAIN, SeriesChoice(keep_headers=True))
    weights = torch.full((2, 1, 1, 2, 4, 4), 0.9 / 32)
    weights[0, 0, 0, 1, 2, 1] *= 6
    explanation = Explanation(
        opened, ["weiße Substanz, 白质", "even"], ItemMaps(weights, torch.zeros(2, 1), torch.zeros(2))
    )
    peaked, even, segments = write_results(explanation, tmp_path / "out", ORIGIN, mode="nearest", threshold=3.0)
    data, frames, _ = frames_in_world(peaked)
    assert data.ContentDescription == "weiße Substanz, 白质"
    assert (data.SeriesDescription, data.SeriesNumber) == ("Attention: weiße Substanz, 白质 (AX_t2)", 1001)
    (mapping,) = data.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence
    assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1, 0)
    np.testing.assert_allclose(np.unique(frames), [0.0, 0.9, 5.4], atol=1e-5)  # 0: outside the crop
    np.testing.assert_allclose(np.unique(pydicom.dcmread(even).pixel_array), [0.0, 0.9], rtol=1e-6)
    # An even map has no segment.
    data, masks, _ = frames_in_world(segments)
    (segment,) = data.SegmentSequence
    assert segment.SegmentLabel == "weiße Substanz, 白质"
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    assert masks.sum() == (frames > 3).sum()


def test_large_maps_take_several_pixels_as_one(tmp_path, monkeypatch):
    affine = affine_of("LPS", SPACING, SHAPE, 0.2)
    write_dicom(tmp_path / "dicom", head(world_of(SHAPE, affine)), affine, description="t2", modality="MR")
    monkeypatch.setattr(dicom, "MOST_MAP_VOXELS", np.prod(SHAPE) // 8)
    attention, segments = results(tmp_path / "dicom", tmp_path / "out")
    data = pydicom.dcmread(attention)
    assert (data.Columns, data.Rows) == (24, 24)  # three by three of 70 × 72
    assert data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing == [6, 6]
    assert pydicom.dcmread(segments).Columns == SHAPE[0]
    for path in (attention, segments):
        np.testing.assert_allclose(middle(path), CUBE, atol=max(SPACING) / 2)
    assert_refers_to_images(segments, tmp_path / "dicom")


def test_series_that_results_cannot_refer_to(tmp_path):
    folder = mr(tmp_path / "dicom")
    opened = open_input(folder, BRAIN)
    with pytest.raises(UserError, match="AX_t2: is no DICOM series"):
        write_results(perfect_explanation(opened), tmp_path / "out", ORIGIN)
    change(folder, lambda data: delattr(data, "FrameOfReferenceUID"))
    with pytest.raises(UserError, match="AX_t2: its DICOM files have no FrameOfReferenceUID"):
        results(folder, tmp_path / "out")


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="Debian's dicom3tools are not installed")
@pytest.mark.parametrize("kind", ["single", "enhanced"])
def test_a_validator_finds_no_error(tmp_path, kind):
    folder = mr(tmp_path / "dicom")
    if kind == "enhanced":
        make_enhanced(folder)
    for path in results(folder, tmp_path / "out"):
        said = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, check=False)
        assert "Error" not in said.stdout + said.stderr, said.stderr


def test_from_the_command_line(tmp_path, capsys):
    """Of a packed study, whose files are gone when the results are written."""
    model = create_model("HLIPSN_debug")
    weights = tmp_path / "epoch_1.pt"
    torch.save({"state_dict": model.state_dict(), "model_config": model.config}, weights)
    folder = mr(tmp_path / "study")
    with tarfile.open(tmp_path / "study.tar.gz", "w:gz") as archive:
        archive.add(folder, "study")
    command = ["explain", str(tmp_path / "study.tar.gz"), "--checkpoint", str(weights), "--items", "a mass;a cyst"]
    cli([*command, "--output", str(tmp_path / "out"), "--dicom", "--seg-threshold", "0.5", "--no-nifti"])
    assert "2 files in dicom/" in capsys.readouterr().out.replace("\n", " ")
    maps = sorted((tmp_path / "out/dicom").iterdir())
    assert [path.name for path in maps] == ["item01_a_mass__AX_t2.map.dcm", "item02_a_cyst__AX_t2.map.dcm"]
    for path in maps:
        assert_refers_to_images(path, folder)
        assert pydicom.dcmread(path).DeviceSerialNumber == file_sha256(weights)[:16]
    files = json.loads((tmp_path / "out/explanation.json").read_text())["files"]
    assert files[-2:] == [f"dicom/{path.name}" for path in maps]
    affine = affine_of("RAS", SPACING, SHAPE)
    command[1] = str(write_nifti(tmp_path / "t2.nii.gz", head(world_of(SHAPE, affine)), affine))
    with pytest.raises(SystemExit):
        cli([*command, "--output", str(tmp_path / "other"), "--dicom"])
    assert "is no DICOM study; --dicom writes results that refer to one" in " ".join(capsys.readouterr().err.split())
