"""Reading and preparing volumes, against plain numpy."""

from __future__ import annotations

import pickle
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from itemizedclip_radiology.data.studies import SeriesFile, load_study
from itemizedclip_radiology.data.volumes import (
    HounsfieldWindow,
    VoxelMap,
    centre_start,
    chest_start,
    crop_series,
    detect_grey_range,
    excess_rescale_hu,
    nearest_slices,
    normalise_grey,
    padded_in_plane,
    random_start,
    read_volume,
    resample_brain,
    resize_chest,
    take_box,
)

from itemizedclip.data.batch import BadSampleError


def grey(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8))


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16, torch.float32, torch.float64])
def test_read_returns_what_was_saved(tmp_path, dtype, memory_map):
    volume = grey(3, 4, 5).to(dtype)
    torch.save(volume, tmp_path / "img.pt")
    loaded = read_volume(tmp_path / "img.pt", memory_map=memory_map)
    assert loaded.dtype == dtype
    assert torch.equal(loaded, volume)


def test_read_accepts_parameters_and_old_files(tmp_path):
    torch.save(torch.nn.Parameter(torch.ones(2, 3, 4)), tmp_path / "parameter.pt")
    assert not read_volume(tmp_path / "parameter.pt").requires_grad
    torch.save(torch.ones(2, 3, 4), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for memory_map in (False, True):
        assert torch.equal(read_volume(tmp_path / "old.pt", memory_map=memory_map), torch.ones(2, 3, 4))


class Evil:
    """Writes a file when it is unpickled by a loader that executes."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (open, (self.target, "w"))


def bad_file(tmp_path, case: str):
    path = tmp_path / f"{case}.pt"
    good = torch.arange(24.0).reshape(2, 3, 4)
    if case == "truncated":
        torch.save(torch.rand(8, 32, 32), path)
        path.write_bytes(path.read_bytes()[:9000])
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "text":
        path.write_text("this is no tensor")
    elif case == "code":
        torch.save(Evil(tmp_path / "pwned"), path)
    elif case == "code in a bare pickle":
        path.write_bytes(pickle.dumps(Evil(tmp_path / "pwned")))
    elif case == "dict":
        torch.save({"img": good}, path)
    elif case == "4-D":
        torch.save(good[..., None], path)
    elif case == "2-D":
        torch.save(good[0], path)
    elif case == "no voxels":
        torch.save(good[:0], path)
    elif case == "NaN":
        good[1, 2, 3] = float("nan")
        good[0, 0, 0] = float("inf")
        torch.save(good, path)
    elif case == "bool":
        torch.save(good > 3, path)
    elif case == "sparse":
        torch.save(good.to_sparse(), path)
    elif case == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("absent", "no such file"),
        ("folder", "no such file"),
        ("truncated", "truncated or damaged"),
        ("empty", "no tensor file, or damaged"),
        ("text", "no tensor file"),
        ("code", "can run code"),
        ("code in a bare pickle", "can run code"),
        ("dict", "holds a dict"),
        ("4-D", "4 axes (2×3×4×1)"),
        ("2-D", "2 axes (3×4)"),
        ("no voxels", "is empty"),
        ("NaN", "2 of 24 values are NaN or infinite"),
        ("bool", "torch.bool"),
        ("sparse", "dense"),
    ],
)
def test_bad_file_gets_one_message_with_its_path(tmp_path, case, words):
    path = bad_file(tmp_path, case)
    with pytest.raises(BadSampleError) as error:
        read_volume(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert words in message
    assert "expected" in message
    assert "\n" not in message
    assert not (tmp_path / "pwned").exists()


def test_last_axis_of_a_4d_file_is_taken_only_when_asked(tmp_path):
    volume = grey(2, 3, 4, 5)
    torch.save(volume, tmp_path / "img.pt")
    assert torch.equal(read_volume(tmp_path / "img.pt", allow_channels=True), volume[..., 0])


# --- grey values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("volume", "expected"),
    [
        (torch.tensor([[[0, 1, 1]]], dtype=torch.uint8), "0-255"),
        (torch.tensor([[[0.0, 0.4, 1.0]]]), "0-1"),
        (torch.tensor([[[0.0, 0.4, 0.9]]], dtype=torch.float16), "0-1"),
        (torch.tensor([[[0.0, 12.5, 255.0]]]), "0-255"),
        (torch.tensor([[[0, 12, 40]]], dtype=torch.int16), "0-255"),
        (torch.zeros(1, 1, 3), "0-1"),
    ],
)
def test_grey_range(volume, expected):
    assert detect_grey_range(volume, source="f") == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.0, 0.5, 1.3], "0…1 or as 0…255"),
        ([0.0, 1.0, 1.0], "only 0 and 1"),
        ([-1000.0, 40.0, 900.0], "from -1000 to 900"),
        ([-0.5, 0.2, 0.9], "from -0.5 to 0.9"),
        ([0.0, 900.0, 4095.0], "from 0 to 4095"),
    ],
)
def test_ambiguous_grey_range_is_refused(values, words):
    with pytest.raises(BadSampleError, match=r"^folder/img\.pt: ") as error:
        detect_grey_range(torch.tensor([[values]]), source="folder/img.pt")
    assert words in str(error.value)


def test_normalisation():
    volume = grey(4, 5, 6)
    expected = (volume.numpy() / 255.0 - 0.449) / 0.226
    np.testing.assert_allclose(normalise_grey(volume, "0-255").numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(normalise_grey(volume / 255, "0-1").numpy(), expected, atol=1e-6)
    ends = normalise_grey(torch.tensor([[[0, 255]]], dtype=torch.uint8), "0-255")
    np.testing.assert_allclose(ends.flatten(), [-1.98673, 2.43805], atol=1e-5)
    out = torch.empty(4, 5, 6)
    assert normalise_grey(volume, "0-255", out=out) is out


# --- boxes and crops -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_box_equals_pad_then_slice(seed):
    rng = np.random.default_rng(seed)
    shape, size = rng.integers(1, 9, 3), rng.integers(1, 9, 3)
    start = rng.integers(-8, 9, 3)
    volume = rng.integers(1, 99, shape)
    padded = np.pad(volume, 20, constant_values=-7)
    expected = padded[tuple(slice(20 + s, 20 + s + n) for s, n in zip(start, size))]
    got = take_box(torch.from_numpy(volume), start.tolist(), size.tolist(), fill=-7)
    np.testing.assert_array_equal(got.numpy(), expected)


def test_centre_rounds_halves_towards_zero():
    assert centre_start(256, 224) == 16
    assert centre_start(113, 112) == 0
    assert centre_start(115, 112) == 1
    assert centre_start(109, 112) == -1  # pad one before, two after
    assert centre_start(224, 224) == 0


def test_random_start_covers_all_positions_evenly():
    rng = np.random.default_rng(0)
    crops = np.bincount([random_start(10, 7, rng) for _ in range(4000)], minlength=4)
    pads = np.bincount([-random_start(7, 10, rng) for _ in range(4000)], minlength=4)
    for counts in (crops, pads):
        assert len(counts) == 4
        assert counts.min() > 850
    assert random_start(5, 5, rng) == 0


def test_crop_of_a_series():
    size = (4, 28, 28)
    assert padded_in_plane(224) == 256
    assert padded_in_plane(28) == 32
    volume = grey(4, 32, 32)
    centred, where = crop_series(volume, size, source="f")
    assert torch.equal(centred, volume[:, 2:30, 2:30])
    assert where.to_input((0, 0, 0)) == (0, 2, 2)
    corner, where = crop_series(volume, size, source="f", at=(0.999, 0.0))
    assert torch.equal(corner, volume[:, 4:32, 0:28])
    assert where.offset == (0, 4, 0)
    whole, _ = crop_series(volume[:, :28, :28], size, source="f", at=(0.7, 0.7))
    assert torch.equal(whole, volume[:, :28, :28])


@pytest.mark.parametrize("shape", [(5, 32, 32), (4, 27, 32), (4, 33, 32), (4, 28, 64)])
def test_series_of_another_size_is_refused(shape):
    with pytest.raises(BadSampleError, match=r"^a/img\.pt: volume of .* voxels; expected 4×28×28 or 4×32×32"):
        crop_series(grey(*shape), (4, 28, 28), source="a/img.pt")


# --- resampling ------------------------------------------------------------------------------------------------------


def plain_bilinear(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Bilinear interpolation with aligned edges (not centres), one output pixel at a time."""
    out = np.zeros((rows, columns))
    for r in range(rows):
        for c in range(columns):
            y = max((r + 0.5) * image.shape[0] / rows - 0.5, 0)
            x = max((c + 0.5) * image.shape[1] / columns - 0.5, 0)
            y0, x0 = min(int(y), image.shape[0] - 1), min(int(x), image.shape[1] - 1)
            y1, x1 = min(y0 + 1, image.shape[0] - 1), min(x0 + 1, image.shape[1] - 1)
            fy, fx = y - y0, x - x0
            top = image[y0, x0] * (1 - fx) + image[y0, x1] * fx
            bottom = image[y1, x0] * (1 - fx) + image[y1, x1] * fx
            out[r, c] = top * (1 - fy) + bottom * fy
    return out


@pytest.mark.parametrize("shape", [(5, 20, 13), (9, 12, 12), (3, 7, 24), (1, 9, 10)])
def test_resampling_equals_plain_numpy(shape):
    """Pad to a square, bilinear to the padded size, nearest slice, centre crop; for 14 pixels the padded size is 16."""
    volume = np.random.default_rng(1).random(shape).astype(np.float32)
    size = (4, 14, 14)
    side = max(shape[1:])
    above, left = (side - shape[1]) // 2, (side - shape[2]) // 2
    square = np.pad(volume, ((0, 0), (above, side - shape[1] - above), (left, side - shape[2] - left)))
    expected = np.zeros((4, 14, 14))
    for d in range(4):
        source = min(int(np.floor((d + 0.5) * shape[0] / 4)), shape[0] - 1)
        expected[d] = plain_bilinear(square[source], 16, 16)[1:15, 1:15]
    got, where = resample_brain(torch.from_numpy(volume), size)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)
    # The map must lead from an output voxel to the input coordinates that the loop above used.
    d, y, x = where.to_input((2, 6, 9))
    assert d == pytest.approx((2 + 0.5) * shape[0] / 4 - 0.5)
    assert y == pytest.approx((7 + 0.5) * side / 16 - 0.5 - above)
    assert x == pytest.approx((10 + 0.5) * side / 16 - 0.5 - left)


def test_resampling_at_the_published_size_takes_rows_16_to_239():
    volume = torch.zeros(96, 256, 256)
    volume[:, 16, 16] = 1
    volume[:, 239, 239] = 2
    got, _ = resample_brain(volume, (48, 224, 224))
    assert got.shape == (48, 224, 224)
    assert (got[:, 0, 0] == 1).all()
    assert (got[:, 223, 223] == 2).all()


def test_nearest_slices_are_the_ones_interpolation_copies():
    for num_slices in (1, 3, 24, 47, 48, 100, 155):
        volume = torch.arange(num_slices, dtype=torch.float32)[None, None, :, None, None]
        expected = torch.nn.functional.interpolate(volume, size=(48, 1, 1), mode="nearest-exact").flatten()
        assert torch.equal(nearest_slices(num_slices, 48).float(), expected)


def test_voxel_maps_compose():
    first = VoxelMap((2.0, 1.0, 0.5), (3.0, -1.0, 0.0))
    second = VoxelMap((0.5, 3.0, 1.0), (1.0, 2.0, 4.0))
    index = (5.0, 6.0, 7.0)
    assert first.then(second).to_input(index) == pytest.approx(first.to_input(second.to_input(index)))


# --- chest CT --------------------------------------------------------------------------------------------------------


def test_window():
    hu = torch.tensor([[[-3000.0, -1150.0, -400.0, 350.0, 2000.0]]])
    np.testing.assert_allclose(HounsfieldWindow().apply(hu).flatten(), [0, 0, 0.5, 1, 1])
    assert hu[0, 0, 0] == -3000  # the input is left alone
    np.testing.assert_allclose(HounsfieldWindow(0, 80).apply(hu.half()).flatten(), [0, 0, 0, 1, 1])
    with pytest.raises(ValueError, match="lower limit first"):
        HounsfieldWindow(100, -100)


def test_chest_start():
    assert chest_start((120, 330, 337), (112, 336, 336), None) == (4, -3, 0)
    drawn = {chest_start((6, 3, 5), (4, 4, 5), np.random.default_rng(seed)) for seed in range(60)}
    assert drawn == {(d, h, 0) for d in (0, 1, 2) for h in (0, -1)}


def test_chest_resize_keeps_constants_and_corners():
    ramp = torch.linspace(0, 1, 8)[:, None, None].expand(8, 6, 6)
    resized, where = resize_chest(ramp, (4, 3, 12))
    # Two slices are averaged into one: no slice lies on an edge that interpolation would clamp.
    np.testing.assert_allclose(resized[:, 0, 0], (ramp[0::2, 0, 0] + ramp[1::2, 0, 0]) / 2, atol=1e-6)
    assert where.to_input((0, 0, 0)) == (0.5, 0.5, -0.25)


def chest_hu(seed: int = 0) -> torch.Tensor:
    """Air, soft tissue, lung and a little bone, in HU."""
    rng = np.random.default_rng(seed)
    hu = np.full((24, 48, 48), -1000.0)
    hu[:, 8:40, 6:42] = 40
    hu[:, 14:34, 10:20] = -830
    hu[:, 14:34, 28:38] = -830
    hu[:, 36:39, 22:26] = 500
    return torch.from_numpy(np.rint(hu + 12 * rng.standard_normal(hu.shape)).astype(np.float32))


def test_second_rescale_is_recognised():
    hu = chest_hu()
    assert excess_rescale_hu(hu, source="f") == 0
    assert excess_rescale_hu(hu - 1024, source="f") == 1024
    assert excess_rescale_hu(hu - 8192, source="f") == 8192
    clipped = hu.clamp(-1000, 1000)
    assert excess_rescale_hu(clipped, source="f") == 0
    assert excess_rescale_hu(hu.half(), source="f") == 0
    # Padding outside the scanner's circle far below air is no sign of a shift.
    padded = hu.clone()
    padded[:, :10] = -3024
    assert excess_rescale_hu(padded, source="f") == 0


@pytest.mark.parametrize(
    ("volume", "words"),
    [
        (chest_hu() + 1024, "not yet rescaled"),
        (torch.full((16, 16, 16), -1000.0), "do not look like a chest CT"),
        (chest_hu() / 1500, "do not look like a chest CT"),
    ],
)
def test_values_that_are_no_hu_are_refused(volume, words):
    with pytest.raises(BadSampleError, match=f"^scan.pt: .*({words})"):
        excess_rescale_hu(volume, source="scan.pt")


def bomb(path: Path, kind: str) -> Path:
    """A small file that tells of gigabytes."""
    if kind == "expanded":
        torch.save(torch.zeros(1).expand(16, 40_000, 4_000), path)
    elif kind == "meta":
        torch.save(torch.empty(1024, 1024, 1024, device="meta"), path)
    elif kind == "overlapping":
        torch.save(torch.zeros(1000).as_strided((500, 1000, 500), (1, 0, 1)), path)
    else:
        torch.save(torch.zeros(64, 1024, 1024), path)
        with zipfile.ZipFile(path) as archive:
            entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries:
                archive.writestr(name, content)
    assert path.stat().st_size < 1e6
    return path


@pytest.mark.parametrize("kind", ["expanded", "meta", "overlapping", "deflated"])
@pytest.mark.parametrize("memory_map", [False, True])
def test_small_files_that_tell_of_gigabytes_are_refused_from_their_header(tmp_path, kind, memory_map):
    path = bomb(tmp_path / "img.pt", kind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadSampleError, match=r"img\.pt: "):
        read_volume(path, memory_map=memory_map)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize("kind", ["expanded", "meta", "deflated"])
def test_such_a_series_is_left_out_of_its_study(tmp_path, kind):
    bomb(tmp_path / "a.pt", kind)
    torch.save(torch.rand(48, 224, 224), tmp_path / "b.pt")
    files = [SeriesFile(name, tmp_path / f"{name}.pt") for name in "ab"]
    loaded = load_study("study", files, size=(48, 224, 224), prepare="crop")
    assert loaded.names == ["b"]
    assert [name for name, _ in loaded.skipped] == ["a"] or "a.pt" in str(loaded.skipped[0])
