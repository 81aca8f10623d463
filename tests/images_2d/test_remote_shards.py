"""Shards at addresses are the same data set as the files themselves: order, samples, resuming, and under faults."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Callable

import fsspec
import numpy as np
import pytest
import torch
from faulty_server import FaultyServer
from itemizedclip_2d.shard_index import expand_shards, open_shards
from itemizedclip_2d.shards import ShardDataset, ShardSampler
from natural_files import ShardFolder, write_shards
from PIL import Image

from itemizedclip.data.batch import BadSampleError, ItemBatch, ItemCollator
from itemizedclip.data.preflight import PreflightError
from itemizedclip.runtime import remote
from itemizedclip.runtime.processes import Ranks
from itemizedclip.runtime.remote import RemoteError
from itemizedclip.training.loading import MapSource
from itemizedclip.training.options import LoadingSettings

FIELD = "shortIB_captions"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_and_quick(tmp_path, monkeypatch):
    monkeypatch.setenv("ITEMIZEDCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "BLOCK_BYTES", 2**12)
    monkeypatch.setattr(remote, "patience", remote.Patience(attempts=6, first_pause_s=0.01, timeout_s=2.0))
    remote.start_afresh()
    yield
    remote.start_afresh()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> ShardFolder:
    return write_shards(tmp_path_factory.mktemp("shards"), num_shards=3, per_shard=6, gaps=["000010002"], sizes=True)


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() + torch.rand(3, 1, 1)


def tokenize(texts) -> torch.Tensor:
    return torch.tensor([[1 + hash(text) % 1000] for text in texts])


def open_dataset(sources: str, written: ShardFolder, **changes) -> ShardDataset:
    shards = open_shards(expand_shards(sources), caption_field=FIELD, decode_images=changes.pop("decode", False))
    settings = {"transform": to_tensor, "items": written.items, "num_items": 3, "is_train": True, "seed": 5}
    return ShardDataset(shards, **{**settings, **changes})


def batches(dataset: ShardDataset, *, start_step: int = 0, workers: int = 0, window: int = 0) -> list[ItemBatch]:
    loading = LoadingSettings(batch_size=4, workers=workers)
    sampler = ShardSampler(dataset.shard_of, batch_size=4, seed=5, window=window)
    source = MapSource(dataset, ItemCollator(tokenize, 3), loading, Ranks(0, 0, 1, CPU), seed=5, sampler=sampler)
    return [step.batch for epoch in (0, 1) for step in source.epoch(epoch, start_step)]


def assert_same(ours: list[ItemBatch], expected: list[ItemBatch]) -> None:
    assert len(ours) == len(expected) > 0
    for one, other in zip(ours, expected):
        assert one.sample_ids == other.sample_ids
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.item_tokens, other.item_tokens)


def in_memory(written: ShardFolder, name: str) -> str:
    for path in [*written.shards, written.folder / "sizes.json"]:
        fsspec.filesystem("memory").pipe(f"/{name}/{path.name}", path.read_bytes())
    return f"memory://{name}"


def test_patterns_of_addresses(written):
    root = in_memory(written, "patterns")
    names = [f"{root}/{path.name}" for path in written.shards]
    for sources in (root, f"{root}/{{00000..00002}}.tar", f"{root}/*.tar", "::".join(names)):
        assert list(map(str, expand_shards(sources))) == names
    with pytest.raises(PreflightError, match=r"1 of 4 files do not exist: memory://patterns/00003\.tar"):
        expand_shards(f"{root}/{{00000..00003}}.tar")


def test_a_memory_store_is_the_same_data_set(written):
    local, there = open_dataset(written.pattern(), written), open_dataset(in_memory(written, "same"), written)
    assert there.fingerprint == local.fingerprint
    assert there.summary == local.summary
    assert_same(batches(there), batches(local))
    for decode in (False, True):
        again = open_dataset(in_memory(written, "same"), written, is_train=False, decode=decode)
        assert [again.name(row) for row in range(len(again))] == [local.name(row) for row in range(len(local))]


def every_third(fault: str) -> Callable[[str, int], str]:
    return lambda path, number: fault if number % 3 == 1 and path.endswith(".tar") else ""


@pytest.mark.parametrize("fault", ["cut", "corrupt", "503"])
@pytest.mark.parametrize("keeps", ["blocks", "nothing"])
def test_resuming_is_equal_to_the_bit_under_faults(written, monkeypatch, fault, keeps):
    expected = batches(open_dataset(written.pattern(), written))
    with FaultyServer(written.folder) as server:
        there = open_dataset(f"{server.url}/{{00000..00002}}.tar", written)  # the index is made of sound bytes
        shutil.rmtree(remote.cache().folder / "entries")
        if keeps == "nothing":
            monkeypatch.setenv("ITEMIZEDCLIP_CACHE_GB", "0.00001")
            remote.start_afresh()
            there = open_dataset(f"{server.url}/{{00000..00002}}.tar", written)
        assert there._files._keeps_blocks == (keeps == "blocks")
        server.fault = every_third(fault)
        assert_same(batches(there), expected)
        assert_same(batches(there, start_step=2), expected[2:4] + expected[6:8])


def test_loader_processes_and_windows(written):
    local = open_dataset(written.pattern(), written, read_ahead=True)
    with FaultyServer(written.folder, every_third("delay"), delay_s=0.05) as server:
        there = open_dataset(f"{server.url}/{{00000..00002}}.tar", written, read_ahead=True)
        assert_same(batches(there, workers=2, window=1), batches(local, window=1))
        before = server.gets()
        assert_same(batches(pickle.loads(pickle.dumps(there)), window=1), batches(local, window=1))
        assert server.gets() == before  # all of it is in the cache


def test_checksums_of_whole_shards(written, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(written.folder, folder)
    shutil.rmtree(folder / ".itemizedclip_cache", ignore_errors=True)
    sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in written.shards)
    (folder / "SHA256SUMS").write_text(sums)
    says = r"0000\d\.tar: SHA-256 is .*SHA256SUMS beside it says"
    one_bad = FaultyServer(folder, lambda path, number: "corrupt" if number == 3 else "")
    with one_bad as server, pytest.raises(PreflightError, match=says):
        open_dataset(f"{server.url}/{{00000..00002}}.tar", written)
    with FaultyServer(folder) as server:
        assert len(open_dataset(f"{server.url}/{{00000..00002}}.tar", written)) == 17


def test_a_shard_that_changed_and_a_store_that_is_gone(written, monkeypatch):
    monkeypatch.setattr(remote, "patience", remote.Patience(attempts=2, first_pause_s=0.01, timeout_s=1.0))
    monkeypatch.setenv("ITEMIZEDCLIP_CACHE_GB", "0.00001")
    remote.start_afresh()
    root = in_memory(written, "changing")
    there = open_dataset(root, written)
    store = fsspec.filesystem("memory")
    store.pipe("/changing/00000.tar", bytes(written.shards[0].stat().st_size))
    with pytest.raises(BadSampleError, match=r"00000\.tar: 000000000\.jpg: is not what it was when its index was made"):
        there.image(0)
    with FaultyServer(written.folder) as server:
        there = open_dataset(f"{server.url}/00000.tar", written)
        server.fault = lambda path, number: "503"
        # Not a bad sample: others would silently take its place.
        with pytest.raises(RemoteError, match=r"00000\.tar: the server answers 503, 2 times; .* --resume latest"):
            there.image(0)


def test_an_s3_server(written, monkeypatch):
    """A real S3 protocol on loopback; credentials come from the environment and are said nowhere."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    try:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing-key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setattr(fsspec.config, "conf", {"s3": {"endpoint_url": f"http://{host}:{port}"}})
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        store.mkdir("bucket")
        for path in written.shards:
            store.pipe(f"bucket/cc/{path.name}", path.read_bytes())
        there = open_dataset("s3://bucket/cc", written)
        local = open_dataset(written.pattern(), written)
        assert there.fingerprint == local.fingerprint
        assert_same(batches(there), batches(local))
        with pytest.raises(PreflightError, match=r"1 of 1 files do not exist: s3://bucket/cc/9\.tar"):
            open_dataset("s3://bucket/cc/9.tar", written)
        with pytest.raises(RemoteError, match=r"s3://elsewhere/x\.tar|1 of 1 files do not exist"):
            open_dataset("s3://elsewhere/x.tar", written)
    finally:
        server.stop()
