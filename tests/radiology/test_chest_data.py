"""Chest CT volumes: window, pad, crop, resize, double rescale, reconstructions, cache of windowed volumes."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from itemizedclip_radiology.data import warm_cache
from itemizedclip_radiology.data.chest import (
    ChestInput,
    ChestScans,
    find_ct_rate_root,
    load_chest_volume,
    parse_input_info,
)
from itemizedclip_radiology.data.ct_rate_tree import EXCLUDED_RECONSTRUCTIONS, is_scan_name, parse_volume_name
from itemizedclip_radiology.data.volume_cache import VolumeCache, body_box
from itemizedclip_radiology.data.volumes import HounsfieldWindow

from itemizedclip.data.batch import BadSampleError

SIZE = (12, 40, 40)


def chest_hu(shape=(16, 48, 44), *, seed: int = 0) -> torch.Tensor:
    """A body with two lungs in air, in HU, off-centre along the rows."""
    rng = np.random.default_rng(seed)
    D, H, W = shape
    y, x = np.meshgrid(np.linspace(-1, 1, H), np.linspace(-1, 1, W), indexing="ij")
    slice_hu = np.full((H, W), -1000.0)
    slice_hu[((y + 0.1) / 0.7) ** 2 + (x / 0.9) ** 2 < 1] = 40
    for side in (-1, 1):
        slice_hu[((y + 0.1) / 0.45) ** 2 + ((x - side * 0.4) / 0.25) ** 2 < 1] = -820
    volume = slice_hu + 10 * rng.standard_normal((D, H, W))
    return torch.from_numpy(np.rint(volume).astype(np.float32))


def plain_input(hu: np.ndarray, start, size=SIZE, low=-1150.0, high=350.0) -> np.ndarray:
    """Window, pad with 0 by far enough, slice, normalise: in that order, on the whole volume."""
    windowed = (np.clip(hu.astype(np.float64), low, high) - low) / (high - low)
    padded = np.pad(windowed, 60)
    box = padded[tuple(slice(60 + s, 60 + s + n) for s, n in zip(start, size))]
    return (box - 0.449) / 0.226


def save(path: Path, volume: torch.Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(volume, path)
    return path


# --- one volume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "start"), [((16, 48, 44), (2, 4, 2)), ((9, 48, 37), (-1, 4, -1)), ((12, 40, 40), (0, 0, 0))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int16])
def test_centred_input_equals_plain_numpy(tmp_path, shape, start, dtype):
    hu = chest_hu(shape).to(dtype)
    loaded = load_chest_volume(save(tmp_path / "v.pt", hu), ChestInput(size=SIZE))
    assert loaded.image.shape == (1, 1, *SIZE)
    assert loaded.image.dtype == torch.float32
    assert loaded.voxel_map.offset == start
    np.testing.assert_allclose(loaded.image[0, 0].numpy(), plain_input(hu.numpy(), start), atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 48, 44), (9, 36, 52)])
def test_training_input_is_a_random_padded_crop(tmp_path, shape):
    hu = chest_hu(shape)
    path = save(tmp_path / "v.pt", hu)
    starts = set()
    for seed in range(12):
        loaded = load_chest_volume(path, ChestInput(size=SIZE), generator=np.random.default_rng(seed))
        start = tuple(int(s) for s in loaded.voxel_map.offset)
        np.testing.assert_allclose(loaded.image[0, 0].numpy(), plain_input(hu.numpy(), start), atol=1e-5)
        for s, n, m in zip(start, shape, SIZE):
            assert min(0, n - m) <= s <= max(0, n - m)
        starts.add(start)
    assert len(starts) > 6


def test_resize_keeps_the_whole_volume(tmp_path):
    hu = chest_hu((24, 80, 80))
    options = ChestInput(window=HounsfieldWindow(-1000, 200), fit="resize", size=SIZE)
    loaded = load_chest_volume(save(tmp_path / "v.pt", hu), options)
    windowed = (hu.clamp(-1000, 200) + 1000) / 1200
    # Halving every axis without antialiasing averages blocks of 2×2×2.
    expected = torch.nn.functional.avg_pool3d(windowed[None, None], 2)[0, 0]
    torch.testing.assert_close(loaded.image[0, 0], (expected - 0.449) / 0.226, atol=1e-4, rtol=0)
    assert loaded.voxel_map.to_input((0, 0, 0)) == (0.5, 0.5, 0.5)


def test_input_info():
    assert parse_input_info(["-1150", "350", "crop"]) == (HounsfieldWindow(), "crop")
    assert parse_input_info(["-1000", "200.5", "resize"]) == (HounsfieldWindow(-1000, 200.5), "resize")
    for words in (["-1150", "350"], ["a", "350", "crop"], ["350", "-1150", "crop"], ["-1150", "350", "squash"]):
        with pytest.raises(ValueError, match=r"--input-info.*expected lower HU, upper HU and crop or resize"):
            parse_input_info(words)


@pytest.mark.parametrize("shift", [1024, 8192])
@pytest.mark.parametrize("fit", ["crop", "resize"])
def test_double_rescale_is_refused_or_undone(tmp_path, shift, fit):
    hu = chest_hu()
    good, shifted = save(tmp_path / "good.pt", hu), save(tmp_path / "shifted.pt", hu - shift)
    with pytest.raises(BadSampleError, match=rf"shifted\.pt: values are HU minus {shift}.*--double-rescale undo"):
        load_chest_volume(shifted, ChestInput(size=SIZE, fit=fit))
    undone = load_chest_volume(shifted, ChestInput(size=SIZE, fit=fit, double_rescale="undo"))
    assert torch.equal(undone.image, load_chest_volume(good, ChestInput(size=SIZE, fit=fit)).image)


def test_unusable_volumes(tmp_path):
    nan = chest_hu()
    nan[8, 20, 20] = float("nan")
    for name, volume, words in [
        ("nan", nan, "NaN"),
        ("raw", chest_hu() + 1024, "not yet rescaled"),
        ("scaled", chest_hu() / 1500, "do not look like a chest CT"),
        ("flat", chest_hu()[0], "2 axes"),
    ]:
        with pytest.raises(BadSampleError, match=rf"{name}\.pt: .*{words}"):
            load_chest_volume(save(tmp_path / f"{name}.pt", volume), ChestInput(size=SIZE))
    for cache in (None, VolumeCache(tmp_path / "cache", window=HounsfieldWindow())):
        with pytest.raises(BadSampleError, match=r"absent\.pt: no such file"):
            load_chest_volume(tmp_path / "absent.pt", ChestInput(size=SIZE), cache=cache)


# --- the cache -------------------------------------------------------------------------------------------------------


def big_chest() -> torch.Tensor:
    """A body with plenty of air around it, so that cropping to the body matters."""
    return torch.nn.functional.pad(chest_hu((16, 48, 44)), (24, 30, 20, 36, 0, 0), value=-1000.0)


def test_body_box_holds_the_body_and_little_else():
    hu = big_chest()
    start, size = body_box(hu)
    rows, columns = np.nonzero((hu > -500).any(0).numpy())
    assert start[0] == 0
    assert size[0] == 16
    for axis, hit in ((1, rows), (2, columns)):
        assert 0 < hit.min() - start[axis] <= 16
        assert 0 <= start[axis] + size[axis] - 1 - hit.max() <= 16
    assert body_box(torch.full((5, 6, 7), -1000.0)) == ((0, 0, 0), (5, 6, 7))


@pytest.mark.parametrize(("dtype", "tolerance"), [("uint8", 0.5 / 255), ("float16", 0.5 / 2048)])
@pytest.mark.parametrize("crop_to_body", [True, False])
def test_cached_volume_gives_the_same_crops(tmp_path, dtype, tolerance, crop_to_body):
    hu = big_chest()
    path = save(tmp_path / "v.pt", hu)
    cache = VolumeCache(tmp_path / "cache", window=HounsfieldWindow(), dtype=dtype, crop_to_body=crop_to_body)
    start, size = body_box(hu)
    for seed in range(10):
        for options in (ChestInput(size=SIZE), ChestInput(size=(20, 60, 120))):
            plain, cached = (
                load_chest_volume(path, options, generator=np.random.default_rng(seed), cache=use)
                for use in (None, cache)
            )
            assert plain.voxel_map == cached.voxel_map
            difference = (plain.image - cached.image).abs()[0, 0] * 0.226
            offset = [int(o) for o in plain.voxel_map.offset]
            inside = torch.zeros(options.size, dtype=torch.bool)
            inside[tuple(slice(max(0, s - o), max(0, s + n - o)) for s, n, o in zip(start, size, offset))] = True
            assert float(difference[inside].max()) <= tolerance * 1.01 + 1e-6
            # Outside the box the one value stands for air whose noise was left out (here ± 40 HU of 1500).
            assert float(difference.max()) <= (40 / 1500 if crop_to_body else tolerance * 1.01 + 1e-6)
    stored = next((tmp_path / "cache").rglob("*.safetensors")).stat().st_size
    assert stored < path.stat().st_size / (3.9 if dtype == "uint8" else 1.9)


def test_cached_resize(tmp_path):
    path = save(tmp_path / "v.pt", big_chest())
    options = ChestInput(size=SIZE, fit="resize")
    cache = VolumeCache(tmp_path / "cache", window=options.window, dtype="float16", crop_to_body=False)
    plain, cached = (load_chest_volume(path, options, cache=use).image for use in (None, cache))
    torch.testing.assert_close(plain, cached, atol=3e-3, rtol=0)


def test_cache_is_built_once_and_again_when_the_source_changes(tmp_path):
    path = save(tmp_path / "v.pt", chest_hu())
    cache = VolumeCache(tmp_path / "cache", window=HounsfieldWindow(), dtype="float16")
    reads = []

    def read():
        reads.append(1)
        return torch.load(path)

    for _ in range(3):
        cached = cache.open(Path("train/v.pt"), path, read)
    assert len(reads) == 1
    assert cached.path == cache.folder / "train" / "v.safetensors"
    save(path, chest_hu(seed=1))
    os.utime(path, ns=(1, 1))
    cache.open(Path("train/v.pt"), path, read)
    assert len(reads) == 2
    cached.path.write_bytes(cached.path.read_bytes()[:200])
    cache.open(Path("train/v.pt"), path, read)
    assert len(reads) == 3
    assert [file.name for file in cached.path.parent.iterdir()] == ["v.safetensors"]  # no temporary file is left


def test_failed_build_leaves_nothing_behind(tmp_path):
    path = save(tmp_path / "v.pt", chest_hu() - 1024)
    cache = VolumeCache(tmp_path / "cache", window=HounsfieldWindow())
    with pytest.raises(BadSampleError, match="HU minus 1024"):
        load_chest_volume(path, ChestInput(size=SIZE), cache=cache)
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []
    undo = ChestInput(size=SIZE, double_rescale="undo")
    assert load_chest_volume(path, undo, cache=cache).image.shape == (1, 1, *SIZE)


def test_ranks_that_build_at_once_read_whole_files(tmp_path):
    path = save(tmp_path / "v.pt", chest_hu())
    cache = VolumeCache(tmp_path / "cache", window=HounsfieldWindow())
    expected = load_chest_volume(path, ChestInput(size=SIZE)).image
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda _: load_chest_volume(path, ChestInput(size=SIZE), cache=cache).image, range(24)))
    assert all(float((image - expected).abs().max()) < 0.01 for image in images)


def test_cache_settings_do_not_mix(tmp_path):
    folders = {
        VolumeCache(tmp_path, window=HounsfieldWindow(low, 350), dtype=dtype, crop_to_body=body).folder
        for low in (-1150, -1000)
        for dtype in ("uint8", "float16")
        for body in (True, False)
    }
    assert len(folders) == 8
    with pytest.raises(ValueError, match="uint8 or float16"):
        VolumeCache(tmp_path, window=HounsfieldWindow(), dtype="int4")
    path = save(tmp_path / "v.pt", chest_hu())
    other = VolumeCache(tmp_path, window=HounsfieldWindow(-1000, 350))
    with pytest.raises(ValueError, match="give both the same"):
        load_chest_volume(path, ChestInput(size=SIZE), cache=other)


# --- CT-RATE ---------------------------------------------------------------------------------------------------------

SCANS = {
    "train_1_a": {
        "recons": ["train_1_a_1.nii.gz", "train_1_a_2.nii.gz", "train_1_a_3.nii.gz"],
        "report": ["Emphysema.", "No Nodule", "Effusion"],
    },
    "train_1267_a": {"recons": ["train_1267_a_1.nii.gz", "train_1267_a_4.nii.gz"], "report": ["Hernia"]},
    "train_20_b": {"recons": ["train_20_b_1.nii.gz"], "report": ["No significant abnormalities"]},
}


def write_tree(root: Path, scans=SCANS) -> Path:
    """Reconstructions told apart by their depth: reconstruction r has 12 + r slices."""
    for entry in scans.values():
        for name in entry["recons"]:
            volume = parse_volume_name(name)
            save(root / volume.path, chest_hu((12 + volume.reconstruction, 40, 40)))
    path = root / "itemized.json"
    path.write_text(json.dumps(scans))
    return path


def open_scans(root: Path, **changes) -> ChestScans:
    options = {"is_train": True, "num_items": 2, "seed": 0, "options": ChestInput(size=SIZE)}
    return ChestScans(data_root=root, items_json=root / "itemized.json", **(options | changes))


def test_volume_names():
    name = parse_volume_name("train_12_ab_3.nii.gz")
    assert (name.split, name.patient, name.scan_letters, name.reconstruction) == ("train", 12, "ab", 3)
    assert name.path == Path("train/train_12/train_12_ab/train_12_ab_3.pt")
    assert parse_volume_name(" valid_1_a_2 ").stem == parse_volume_name("valid_1_a_2.pt").stem == "valid_1_a_2"
    assert is_scan_name("train_12_ab")
    assert not is_scan_name("train_12_ab_1")
    for bad in ("", "train_1_a", "test_1_a_1", "train_1_a_1.npz", "../train_1_a_1"):
        with pytest.raises(ValueError, match="expected a CT-RATE volume name"):
            parse_volume_name(bad)


def test_training_scan(tmp_path):
    write_tree(tmp_path)
    dataset = open_scans(tmp_path)
    sample = dataset[(0, 0)]
    assert sample.sample_id == "train_1_a"
    assert sample.image.shape == (1, 1, *SIZE)
    assert sample.series_names is None
    assert len(sample.items) == 2
    assert set(sample.items) < {"emphysema.", "no nodule", "effusion"}
    assert not sample.is_normal
    assert dataset[2].is_normal
    again = open_scans(tmp_path)[(0, 0)]
    assert torch.equal(sample.image, again.image)
    assert sample.items == again.items


def test_reconstructions_are_drawn_anew_each_epoch(tmp_path):
    write_tree(tmp_path)
    for entry in SCANS.values():
        for name in entry["recons"]:
            volume = parse_volume_name(name)
            hu = chest_hu(SIZE)
            hu[0, 0, 0] = -1000 + 100 * volume.reconstruction
            save(tmp_path / volume.path, hu)

    def recon(dataset, key):
        return round(((float(dataset[key].image[0, 0, 0, 0, 0]) * 0.226 + 0.449) * 1500 - 1150 + 1000) / 100)

    dataset = open_scans(tmp_path)
    drawn = [recon(dataset, (epoch, 0)) for epoch in range(60)]
    assert set(drawn) == {1, 2, 3}
    assert min(drawn.count(r) for r in (1, 2, 3)) >= 10
    assert {recon(dataset, (epoch, 1)) for epoch in range(20)} == {1}  # train_1267_a_4 is excluded
    assert recon(open_scans(tmp_path, is_train=False), 0) == 1


def test_excluded_reconstructions():
    assert {"train_1267_a_4", "train_11755_a_3", "train_11755_a_4"} == EXCLUDED_RECONSTRUCTIONS


def test_evaluation_scan_keeps_all_items(tmp_path):
    write_tree(tmp_path)
    dataset = open_scans(tmp_path, is_train=False)
    assert dataset[0].items == dataset.items(0) == ["emphysema.", "no nodule", "effusion"]
    hu = chest_hu((13, 40, 40))
    np.testing.assert_allclose(dataset[0].image[0, 0].numpy(), plain_input(hu.numpy(), (0, 0, 0)), atol=1e-5)


def test_broken_reconstruction_gives_way_to_another(tmp_path):
    write_tree(tmp_path)
    (tmp_path / parse_volume_name("train_1_a_2").path).write_bytes(b"PK\x03\x04 cut off")
    (tmp_path / parse_volume_name("train_1_a_3").path).unlink()
    dataset = open_scans(tmp_path)
    items = [open_scans(tmp_path)[(epoch, 0)].items for epoch in range(8)]
    assert all(dataset[(epoch, 0)].image.shape == (1, 1, *SIZE) for epoch in range(8))
    assert list(dataset.skipped) == [(0, 1), (0, 2)]
    (tmp_path / parse_volume_name("train_1_a_1").path).unlink()
    with pytest.raises(BadSampleError, match=r"scan train_1_a: .*2 more.*no reconstruction of this scan"):
        dataset[(0, 0)]
    write_tree(tmp_path)
    assert [dataset[(epoch, 0)].items for epoch in range(8)] == items


@pytest.mark.parametrize(
    ("scan", "entry", "words"),
    [
        ("train_1", {"recons": [], "report": ["a"]}, "expected a scan name"),
        ("train_1_a", {"report": ["a"]}, "field 'recons'"),
        ("train_1_a", {"recons": "x", "report": ["a"]}, "field 'recons'"),
        ("train_1_a", {"recons": ["train_1_a_1.mha"], "report": ["a"]}, "field 'recons'"),
        ("train_1_a", {"recons": ["train_2_a_1.nii.gz"], "report": ["a"]}, "no reconstruction of this scan"),
        ("train_1267_a", {"recons": ["train_1267_a_4.nii.gz"], "report": ["a"]}, "no reconstruction left"),
        ("train_1_a", {"recons": ["train_1_a_1.nii.gz"]}, "field 'report' is missing"),
        ("train_1_a", {"recons": ["train_1_a_1.nii.gz"], "report": []}, "field 'report'"),
    ],
)
def test_bad_entry_names_scan_and_field(tmp_path, scan, entry, words):
    write_tree(tmp_path)
    (tmp_path / "itemized.json").write_text(json.dumps(SCANS | {scan: entry}))
    with pytest.raises(BadSampleError) as error:
        open_scans(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'itemized.json'}: study '{scan}': ")
    assert words in str(error.value)


def test_warm_cache_builds_every_volume_once(tmp_path, capsys):
    write_tree(tmp_path / "data")
    save(tmp_path / "data" / parse_volume_name("train_20_b_1").path, chest_hu((13, 40, 40)) - 1024)
    cache = VolumeCache(tmp_path / "cache", window=HounsfieldWindow())
    command = ["--data-root", str(tmp_path / "data"), "--cache-dir", str(tmp_path / "cache"), "--workers", "0"]
    assert warm_cache.main(command) == 1
    assert "train_20_b_1.pt: values are HU minus 1024" in capsys.readouterr().err
    built = {path: path.stat().st_mtime_ns for path in cache.folder.rglob("*.safetensors")}
    # Not train_1267_a_4, which is left out everywhere, nor the one that was rescaled twice.
    assert sorted(path.stem for path in built) == ["train_1267_a_1", "train_1_a_1", "train_1_a_2", "train_1_a_3"]
    assert warm_cache.main([*command, "--double-rescale", "undo"]) == 0
    after = {path: path.stat().st_mtime_ns for path in cache.folder.rglob("*.safetensors")}
    assert len(after) == 5
    assert built.items() < after.items()
    cached, plain = open_scans(tmp_path / "data", cache=cache), open_scans(tmp_path / "data")
    for epoch in range(3):
        assert float((cached[(epoch, 0)].image - plain[(epoch, 0)].image).abs().max()) < 0.5 / 255 / 0.226 + 1e-3


def test_warm_cache_takes_volumes_only(tmp_path):
    used = ["valid/valid_1/valid_1_a/valid_1_a_1.pt", "trn00001/trn00001.pt", "tst00002.pt"]
    others = ["masks/valid_1_a.pt", "masks/trn00001.pt", "valid/valid_1_a_2.pt", "notes.pt",
              "train/train_1267/train_1267_a/train_1267_a_4.pt"]  # fmt: skip
    for name in used + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(map(str, warm_cache.volume_names(tmp_path))) == sorted(used)


def test_warm_cache_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    cases = [
        (["--data-root", str(tmp_path / "nowhere"), "--cache-dir", "c"], "no such folder"),
        (["--data-root", str(tmp_path / "empty"), "--cache-dir", "c"], "no volume below it"),
        (["--data-root", str(tmp_path)], "--cache-dir"),
        (["--data-root", str(tmp_path), "--cache-dir", "c", "--input-info", "9", "-9", "crop"], "lower limit first"),
    ]
    for command, expected in cases:
        with pytest.raises(SystemExit) as stop:
            warm_cache.main(command)
        assert stop.value.code != 0
        assert expected in " ".join(capsys.readouterr().err.split()), command


def test_root_from_flag_and_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("DATA_ROOT", raising=False)
    with pytest.raises(ValueError, match="DATA_ROOT"):
        find_ct_rate_root()
    with pytest.raises(FileNotFoundError, match="neither train/ nor valid/"):
        find_ct_rate_root(tmp_path)
    (tmp_path / "valid").mkdir()
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    assert find_ct_rate_root() == tmp_path
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_ct_rate_root(tmp_path / "nowhere")
