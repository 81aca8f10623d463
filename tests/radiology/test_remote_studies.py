"""Studies at an address are the studies themselves, also when answers are cut or damaged."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import torch
from faulty_server import FaultyServer
from itemizedclip_radiology.data.brain import BrainStudies, find_study_files
from itemizedclip_radiology.data.chest import ChestInput, ChestScans, HounsfieldWindow, find_ct_rate_root
from itemizedclip_radiology.data.volume_cache import VolumeCache
from itemizedclip_radiology.data.volumes import read_volume
from test_chest_data import SIZE as CHEST_SIZE
from test_chest_data import write_tree
from test_study_data import SIZE, STUDIES, write_studies

from itemizedclip.data.batch import BadSampleError
from itemizedclip.runtime import remote
from itemizedclip.runtime.errors import MissingFileError
from itemizedclip.runtime.remote import Place, place


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ITEMIZEDCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "patience", remote.Patience(attempts=4, first_pause_s=0.01, timeout_s=2.0))
    remote.start_afresh()
    yield
    remote.start_afresh()


def to_memory(folder: Path, name: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            fsspec.filesystem("memory").pipe(f"/{name}/{path.relative_to(folder)}", path.read_bytes())
    return f"memory://{name}"


def open_split(root: Place | str, json_path: Path) -> BrainStudies:
    return BrainStudies(
        data_root=root, json_path=json_path, is_train=True, num_items=2, seed=0, num_series=5, volume_size=SIZE
    )


def assert_same(there, local) -> None:
    assert there.fingerprint == local.fingerprint
    for epoch, row in ((0, 0), (1, 0), (0, len(local) - 1)):
        one, other = there[(epoch, row)], local[(epoch, row)]
        assert one.items == other.items
        assert torch.equal(one.image, other.image)


def test_a_store_that_lists_folders(tmp_path):
    write_studies(tmp_path / "data")
    write_studies(tmp_path / "data", split="valid", level="valid")
    local = find_study_files(tmp_path / "data")
    there = find_study_files(Path(to_memory(tmp_path / "data", "studies")))  # as a flag of type Path folds it
    assert there.valid_json.name == "valid.json"
    ours = open_split(there.data_root, there.train_json)
    assert_same(ours, open_split(local.data_root, local.train_json))
    assert ours.without_folder() == []
    fsspec.filesystem("memory").rm("/studies/train/S2", recursive=True)
    fsspec.filesystem("memory").pipe("/studies/train/S1/AX_T1/img.pt", b"broken")
    assert ours.without_folder() == ["S2"]
    with pytest.raises(BadSampleError, match=r"memory://studies/train/S2/AX_DWI/img\.pt: no such file"):
        ours[(0, 1)]
    remote.start_afresh()
    assert "AX_T1" in " ".join(message for _, message in ours.load(0, None).skipped)
    with pytest.raises(MissingFileError, match=r"memory://nowhere/train\.json: no such file; expected the index"):
        find_study_files("memory://nowhere")


@pytest.mark.parametrize("fault", ["cut", "corrupt"])
def test_a_web_server_that_lists_nothing_and_answers_badly(tmp_path, fault):
    json_path = write_studies(tmp_path / "data")
    local = open_split(tmp_path / "data", json_path)
    with FaultyServer(tmp_path / "data") as server:
        server.fault = lambda path, number: fault if number % 3 == 0 else ""
        there = open_split(server.url, json_path)
        assert there.without_folder() == []
        assert_same(there, local)
        asked = server.gets()
        assert_same(there, local)
        assert server.gets() == asked  # volumes stay in the cache


def test_what_lies_there_damaged_is_a_bad_sample(tmp_path):
    json_path = write_studies(tmp_path / "data", {"S2": STUDIES["S2"]})
    path = tmp_path / "data/train/S2/AX_DWI/img.pt"
    path.write_bytes(path.read_bytes()[:-200])
    with FaultyServer(tmp_path / "data") as server:
        with pytest.raises(BadSampleError, match=r"http://127.*/S2/AX_DWI/img\.pt: truncated or damaged"):
            open_split(server.url, json_path)[(0, 0)]
        assert server.gets() <= 6


def test_chest_scans(tmp_path):
    items = write_tree(tmp_path / "ct")
    root = find_ct_rate_root(to_memory(tmp_path / "ct", "chest"))
    options = ChestInput(HounsfieldWindow(), "crop", CHEST_SIZE)

    def scans(data_root: Place, cache: VolumeCache | None = None) -> ChestScans:
        return ChestScans(
            data_root=data_root, items_json=items, is_train=True, num_items=2, seed=0, options=options, cache=cache
        )

    assert_same(scans(root), scans(tmp_path / "ct"))
    assert scans(root).without_folder() == []
    windowed = VolumeCache(tmp_path / "windowed", window=options.window)
    local = VolumeCache(tmp_path / "windowed_local", window=options.window)
    for _ in range(2):
        assert_same(scans(root, windowed), scans(tmp_path / "ct", local))


def test_reading_one_volume(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(torch.arange(60).reshape(3, 4, 5), path)
    address = place(to_memory(tmp_path, "one")) / "a.pt"
    assert torch.equal(read_volume(address), read_volume(path))
    assert torch.equal(read_volume(address, memory_map=True)[1], read_volume(path)[1])
