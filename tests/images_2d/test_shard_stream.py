"""Shards read from end to end: what comes is what the shards hold, reproducibly, from files, commands and addresses."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from faulty_server import FaultyServer
from itemizedclip_2d.recipes import ShardData
from itemizedclip_2d.shard_stream import ShardStream, StreamSource, check_stream, stream_sources
from natural_files import ShardFolder, write_shards
from PIL import Image

from itemizedclip.data.batch import BadSampleError, ItemBatch, ItemCollator
from itemizedclip.data.preflight import PreflightError
from itemizedclip.runtime import remote
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.processes import Ranks
from itemizedclip.training.options import LoadingSettings


@pytest.fixture(autouse=True)
def _quick(tmp_path, monkeypatch):
    monkeypatch.setenv("ITEMIZEDCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "patience", remote.Patience(attempts=4, first_pause_s=0.01, timeout_s=2.0))
    remote.start_afresh()
    yield
    remote.start_afresh()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> ShardFolder:
    return write_shards(tmp_path_factory.mktemp("streamed"), num_shards=3, per_shard=6, without_items=["000000001"])


def mean_and_noise(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().mean((1, 2), keepdim=True) + torch.rand(3, 1, 1)


def stream_of(sources: str, written: ShardFolder, **changes) -> ShardStream:
    settings = {
        "transform": mean_and_noise, "items": written.items, "num_items": 3, "seed": 3, "rank": 0,
        "caption_field": "shortIB_captions",
    }  # fmt: skip
    return ShardStream(stream_sources(sources), **{**settings, **changes})


def epochs(stream: ShardStream, *starts: tuple[int, int], workers: int = 0, samples: int = 48) -> list[ItemBatch]:
    def tokenize(texts):
        return torch.tensor([[1 + sum(map(ord, text)) % 1000] for text in texts])

    loading = LoadingSettings(batch_size=4, accum_batch=2, workers=workers)
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    source = StreamSource(stream, ItemCollator(tokenize, 3), loading, ranks, samples_per_epoch=samples)
    return [step.batch for epoch, start in starts for step in source.epoch(epoch, start)]


def ids(batches: list[ItemBatch]) -> list[str]:
    return [name for batch in batches for name in batch.sample_ids]


def test_what_comes_is_what_the_shards_hold(written):
    batches = epochs(stream_of(written.pattern(), written), (0, 0), samples=240)
    counts = Counter(ids(batches))
    assert set(counts) == {f"{key}.jpg" for key in written.scenes}
    assert sum(counts.values()) == 240
    assert len(batches) == 30
    check_stream(stream_of(written.pattern(), written))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_start_gives_the_same_batches(written, workers):
    once = epochs(stream_of(written.pattern(), written), (0, 0), (1, 2), workers=workers)
    again = epochs(stream_of(written.pattern(), written), (0, 0), (1, 2), workers=workers)
    assert len(once) == 6 + 4
    for one, other in zip(once, again):
        assert one.sample_ids == other.sample_ids
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.item_tokens, other.item_tokens)
    other_rank = epochs(stream_of(written.pattern(), written, rank=1), (0, 0), workers=workers)
    assert ids(other_rank) != ids(once)[: len(ids(other_rank))]
    assert ids(once)[:48] != ids(epochs(stream_of(written.pattern(), written), (1, 0), workers=workers))


def test_files_commands_and_addresses_give_the_same(written):
    expected = epochs(stream_of(written.pattern(), written), (0, 0))
    commands = f"pipe:cat {written.folder}/{{00000..00002}}.tar"
    with FaultyServer(written.folder, lambda path, number: "cut" if number % 3 == 0 else "") as server:
        for sources in (commands, f"{server.url}/{{00000..00002}}.tar"):
            ours = epochs(stream_of(sources, written), (0, 0))
            assert ids(ours) == ids(expected)
            assert all(torch.equal(one.images, other.images) for one, other in zip(ours, expected))


def test_what_cannot_be_read_is_said(written, tmp_path):
    broken = tmp_path / "broken.tar"
    broken.write_bytes(written.shards[0].read_bytes()[:9000] + b"x" * 5000)
    with pytest.raises(BadSampleError, match=r"damaged|no member"):
        epochs(stream_of(str(broken), written), (0, 0))
    skipped = []
    stream = stream_of(f"{written.shards[1]}::{broken}", written, on_bad_sample="skip")
    for number, (_, messages) in enumerate(stream):
        skipped += messages
        if number > 60:
            break
    assert any("damaged" in message or "no member" in message for message in skipped)
    with pytest.raises(UserError, match=r"pipe:cat …"):
        check_stream(stream_of("pipe:cat /nowhere/secret.tar", written, on_bad_sample="skip"))
    with pytest.raises(PreflightError, match="is less than a step"):
        epochs(stream_of(written.pattern(), written), (0, 0), samples=7)


def test_flags_that_do_not_go_together():
    with pytest.raises(UserError, match="--stream has no epochs of its own"):
        ShardData(train_data="x", stream=True)
    with pytest.raises(UserError, match="--shard-window belongs to reading at places"):
        ShardData(train_data="x", stream=True, train_num_samples=9, shard_window=2)
