"""Packed volumes: the same values to the bit, in parts, wherever a `.pt` may stand; damaged files are bad samples."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from itemizedclip_radiology.data.packed_volumes import PackedVolume, write_packed
from itemizedclip_radiology.data.volume_cache import VolumeCache
from itemizedclip_radiology.data.volumes import read_volume
from itemizedclip_radiology.own import OwnBrainStudies, OwnChestScans
from itemizedclip_radiology.prepare.pack import PackOptions, pack_folder
from safetensors.torch import load_file, save_file
from test_chest_data import open_scans, write_tree
from test_study_data import open_dataset, write_studies

from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.jsonl import read_own
from itemizedclip.runtime.errors import UserError

DTYPES = [torch.uint8, torch.int16, torch.int32, torch.float16, torch.float32]


def values(dtype: torch.dtype, shape=(37, 70, 129)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator).cumsum(2) * 20).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_part_is_that_of_the_volume(tmp_path, dtype):
    volume = values(dtype)
    write_packed(tmp_path / "a.packed", volume)
    packed = PackedVolume(tmp_path / "a.packed")
    assert (packed.shape, packed.dtype) == (tuple(volume.shape), dtype)
    assert torch.equal(packed.whole(), volume)
    assert torch.equal(read_volume(tmp_path / "a.packed"), volume)
    rng = np.random.default_rng(1)
    for _ in range(30):
        edges = [np.sort(rng.integers(-3, n + 4, 2)).clip(0) for n in volume.shape]
        box = [slice(int(low), int(high)) for low, high in edges]
        assert torch.equal(packed.read(box), volume[tuple(box)])


def test_a_crop_reads_only_its_chunks(tmp_path, monkeypatch):
    write_packed(tmp_path / "a.packed", values(torch.int16), chunk=(8, 32, 32))
    packed = PackedVolume(tmp_path / "a.packed")
    read = []
    true_read = PackedVolume._decompressed
    monkeypatch.setattr(
        PackedVolume, "_decompressed", lambda self, number, sizes: read.append(number) or true_read(self, number, sizes)
    )
    packed.read([slice(0, 8), slice(0, 32), slice(0, 33)])
    assert read == [0, 1]


def test_damage_is_named(tmp_path):
    path = tmp_path / "a.packed"
    write_packed(path, values(torch.int16))
    sound = path.read_bytes()
    path.write_bytes(sound[:-40] + bytes(40))
    with pytest.raises(BadSampleError, match=r"a\.packed: chunk \d+ is damaged \(CRC-32\)"):
        read_volume(path)
    path.write_bytes(sound[:-40])
    with pytest.raises(BadSampleError, match="is no packed volume, or damaged"):
        read_volume(path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(BadSampleError, match="is no packed volume, or damaged"):
        read_volume(path)
    with pytest.raises(UserError, match="expected D × H × W"):
        write_packed(path, torch.zeros(3, 4))


@pytest.mark.parametrize(
    "facts",
    [
        {"shape": [3, 4], "chunk": [1, 1, 1], "dtype": "int16"},
        {"shape": [60000, 60000, 60000], "chunk": [1, 1, 1], "dtype": "int16"},
        {"shape": [37, 70, 128], "chunk": [16, 64, 64], "dtype": "object"},
        {"shape": [370, 700, 1290], "chunk": [160, 640, 640], "dtype": "int16"},
    ],
)
def test_headers_that_lie(tmp_path, facts):
    path = tmp_path / "a.packed"
    write_packed(path, values(torch.int16))
    save_file(load_file(path), path, metadata={"volume": json.dumps(facts)})
    with pytest.raises(BadSampleError, match=r"packed volume, or damaged|chunk 0 cannot be unpacked"):
        read_volume(path)


def test_packed_studies_and_scans_are_the_same_samples(tmp_path):
    json_path = write_studies(tmp_path / "brain", shape=(2, 8, 8))
    items = write_tree(tmp_path / "ct")
    for name in ("brain", "ct"):
        report = pack_folder(PackOptions(folder=tmp_path / name, to=tmp_path / f"{name}_packed", workers=0))
        assert report.packed == len(list((tmp_path / name).rglob("*.pt")))
        assert not report.unreadable
        again = pack_folder(PackOptions(folder=tmp_path / name, to=tmp_path / f"{name}_packed", workers=0))
        assert (again.packed, again.kept) == (0, report.packed)
    shutil.copy(items, tmp_path / "ct_packed")
    pairs = [
        (open_dataset(tmp_path / "brain", json_path), open_dataset(tmp_path / "brain_packed", json_path)),
        (open_scans(tmp_path / "ct"), open_scans(tmp_path / "ct_packed")),
    ]
    cache = [VolumeCache(tmp_path / name, window=pairs[1][0].options.window) for name in ("c", "d")]
    pairs.append((open_scans(tmp_path / "ct", cache=cache[0]), open_scans(tmp_path / "ct_packed", cache=cache[1])))
    for plain, packed in pairs:
        for key in ((0, 0), (3, 0), (0, 1)):
            assert torch.equal(packed[key].image, plain[key].image)
            assert packed[key].items == plain[key].items
        assert packed.why_unusable(0) is None
    (tmp_path / "ct_packed/train/train_1/train_1_a/train_1_a_1.pt").write_bytes(b"")  # a .pt comes before a packed one
    with pytest.raises(BadSampleError, match=r"train_1_a_1\.pt"):
        read_volume(tmp_path / "ct_packed/train/train_1/train_1_a/train_1_a_1.pt")


def test_a_folder_without_volumes(tmp_path):
    with pytest.raises(UserError, match=r"no \.pt file below it"):
        pack_folder(PackOptions(folder=tmp_path, to=tmp_path / "to"))


@pytest.mark.parametrize(("kind", "shape"), [(OwnBrainStudies, (48, 224, 224)), (OwnChestScans, (118, 390, 390))])
def test_own_data_name_packed_volumes_as_they_name_others(tmp_path, kind, shape):
    volume = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    # Grey values of a brain; HU of a chest, half of it air.
    volume = (volume * 255).to(torch.uint8) if kind is OwnBrainStudies else (volume * 2000 - 1000).to(torch.int16)
    torch.save(volume, tmp_path / "a.pt")
    write_packed(tmp_path / "b.packed", volume)
    lines = [
        {"id": name, "series": {"AX_T2": file}, "items": ["an infarct"], "split": "train"}
        for name, file in (("plain", "a.pt"), ("packed", "b.packed"))
    ]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, lines)))
    studies = kind(read_own(tmp_path / "my.jsonl"), is_train=False, num_items=1)
    assert studies.why_unusable(1) is None
    assert torch.equal(studies.load(0, None).image, studies.load(1, None).image)
