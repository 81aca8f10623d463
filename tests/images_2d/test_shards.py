"""Webdataset shards: what the index finds, what a sample is, the order of an epoch, and what damaged files do."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import logging
import pickle
import re
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from itemizedclip_2d import shard_index
from itemizedclip_2d import shards as webdataset_shards
from itemizedclip_2d.packed_items import PackedItems
from itemizedclip_2d.shard_index import (
    expand_shards,
    fallback_items,
    item_index,
    listed_counts,
    open_shards,
    read_shard,
)
from itemizedclip_2d.shards import ShardDataset, ShardSampler
from natural_files import ShardFolder, sample_key, write_shards
from PIL import Image

from itemizedclip.data.batch import BadSampleError, ItemCollator
from itemizedclip.data.items import load_item_lists
from itemizedclip.data.preflight import PreflightError
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.processes import Ranks
from itemizedclip.training.loading import MapSource
from itemizedclip.training.options import LoadingSettings

FIELD = "shortIB_captions"


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def noisy(image: Image.Image) -> torch.Tensor:
    """A random transform: the mean colour, plus noise."""
    return to_tensor(image).mean((1, 2), keepdim=True) + torch.rand(3, 1, 1)


def open_dataset(written: ShardFolder, **changes) -> ShardDataset:
    decode_images = changes.pop("decode_images", False)
    shards = open_shards(
        changes.pop("paths", written.shards), caption_field=changes.pop("caption_field", FIELD),
        decode_images=decode_images,
    )  # fmt: skip
    settings = {
        "transform": to_tensor, "items": written.items, "items_path": written.items_path, "num_items": 7,
        "is_train": False, "seed": 0,
    }  # fmt: skip
    return ShardDataset(shards, **{**settings, **changes})


def retar(path: Path, change) -> None:
    """Write a tar file anew, its members passed through `change(name, content)`, a list of such pairs."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for name, content in itertools.chain.from_iterable(change(*member) for member in members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def change_json(path: Path, change) -> None:
    def one(name: str, content: bytes):
        if name.endswith(".json"):
            content = json.dumps(change(json.loads(content))).encode()
        return [(name, content)]

    retar(path, one)


# --- keys, captions, packing, patterns -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "index"),
    [
        ("000000000", 0), ("000010000", 5000), ("000574999", 289_999), ("000580000", 290_000), ("000594999", 299_999),
        ("000120034", 60_034),
    ],
)  # fmt: skip
def test_item_index_follows_the_published_arithmetic(key, index):
    assert item_index(key) == index


@pytest.mark.parametrize("key", ["000005000", "000019999", "abc", "", "-1", "12.5", "１２"])
def test_keys_without_an_index_are_refused(key):
    with pytest.raises(ValueError, match="gives no index into the item file; expected digits"):
        item_index(key)


def test_fallback_items():
    assert fallback_items(["A cat sits", " it is grey ", ""]) == ["A cat sits", "it is grey"]
    assert fallback_items("A cat. It is 3.5 kg.\nGrey</s>Old.") == ["A cat", "It is 3.5 kg", "Grey", "Old"]
    assert fallback_items(None) == fallback_items(12) == fallback_items([1, None]) == []


def test_packed_items_give_back_every_list():
    lists = [["a", "bär"], [], ["", "語"], [], ["x" * 300]]
    packed = PackedItems.pack(iter(lists))
    assert [packed[row] for row in range(len(packed))] == lists
    again = PackedItems.of_arrays(packed.arrays("t"), "t")
    assert [again[row] for row in range(5)] == lists
    assert again.sha256 == packed.sha256 != PackedItems.pack([["a"], ["bär"]]).sha256
    assert PackedItems.pack([["\ud800"]])[0] == ["?"]
    assert len(PackedItems.pack([])) == 0


def test_expand_shards(tmp_path):
    names = ["00000.tar", "00001.tar", "00002.tar", "b/00000.tar"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    root = str(tmp_path)

    def expanded(sources: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in expand_shards(sources)]

    assert expanded(f"{root}/{{00000..00002}}.tar") == names[:3]
    assert expanded(f"{root}/{{00002,00000}}.tar::{root}/b/00000.tar") == ["00002.tar", "00000.tar", "b/00000.tar"]
    assert expanded(root) == names[:3]
    assert expanded(f"{root}/0000[!]*.tar".replace("[!]", "")) == names[:3]
    assert expanded(f"{root}/00001.tar::{root}/00001.tar") == ["00001.tar"] * 2
    # webdataset agrees on what such an argument means.
    argument = f"{root}/{{00000..00002}}.tar::{root}/b/00000.tar"
    assert [str(path) for path in expand_shards(argument)] == webdataset.shardlists.expand_urls(argument)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("", "a source is empty"),
        ("a.tar::", "a source is empty"),
        ("pipe:cat a.tar", "commands are followed with --stream only"),
        ("ftp://host/a.tar", "addresses of this kind are not followed"),
        ("/nowhere/{00000..00003}.tar", r"4 of 4 files do not exist: /nowhere/00000.tar, .* …; check"),
        ("/nowhere/{00000..00003.tar", "a brace is not closed"),
        ("/nowhere/*.tar", "no file matches"),
    ],
)
def test_wrong_shard_arguments(sources, message):
    with pytest.raises(UserError, match=message):
        expand_shards(sources)


def test_folder_without_shards(tmp_path):
    with pytest.raises(PreflightError, match=r"holds no \*\.tar file"):
        expand_shards(str(tmp_path))


# --- the index -------------------------------------------------------------------------------------------------------


def test_index_finds_what_webdataset_reads(tmp_path):
    written = write_shards(tmp_path, num_shards=2, per_shard=5, gaps=["000000002"])
    streamed = list(webdataset.WebDataset([str(p) for p in written.shards], shardshuffle=False, empty_check=False))
    indices = open_shards(written.shards, caption_field=FIELD)
    found = [
        (str(index.keys[row]), path, index, row)
        for path, index in zip(written.shards, indices)
        for row in range(len(index))
    ]
    assert [key for key, *_ in found] == [sample["__key__"] for sample in streamed]
    assert len(found) == 9
    for (_, path, index, row), sample in zip(found, streamed):
        start = int(index.starts[row])
        assert path.read_bytes()[start : start + int(index.sizes[row])] == sample["jpg"]
        fields = json.loads(sample["json"])
        assert index.captions[row] == [text.strip() for text in fields[FIELD]]
        assert index.indices[row] == item_index(fields["key"])
        assert index.names[row] == f"{fields['key']}.jpg"


def test_index_is_read_once_and_again_when_the_shard_changes(tmp_path, monkeypatch):
    written = write_shards(tmp_path, num_shards=2)
    first = open_shards(written.shards, caption_field=FIELD)
    reads = []
    true_read = shard_index.read_shard
    monkeypatch.setattr(shard_index, "read_shard", lambda path, **kw: reads.append(path) or true_read(path, **kw))
    again = open_shards(written.shards, caption_field=FIELD)
    assert reads == []
    for a, b in zip(first, again):
        assert (a.digest, a.bad, a.damage) == (b.digest, b.bad, b.damage)
        for name in ("keys", "names", "indices", "starts", "sizes"):
            assert np.array_equal(getattr(a, name), getattr(b, name))
        assert a.captions.sha256 == b.captions.sha256
    change_json(written.shards[1], lambda fields: {**fields, FIELD: ["new text"]})
    changed = open_shards(written.shards, caption_field=FIELD)
    assert reads == [written.shards[1]]
    assert changed[0].digest == first[0].digest
    assert changed[1].digest != first[1].digest
    assert changed[1].captions[0] == ["new text"]
    for file in (tmp_path / ".itemizedclip_cache").glob("00000-*.npz"):
        file.write_bytes(file.read_bytes()[:100])
    assert open_shards(written.shards, caption_field=FIELD)[0].digest == first[0].digest
    assert reads == [written.shards[1], written.shards[0]]


def test_index_goes_to_the_cache_folder_given(tmp_path):
    written = write_shards(tmp_path / "shards", num_shards=1)
    open_shards(written.shards, caption_field=FIELD, cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 1
    assert not (tmp_path / "shards" / ".itemizedclip_cache").exists()
    with pytest.raises(PreflightError, match=r"cannot write the index .* --cache-dir"):
        open_shards(written.shards, caption_field=FIELD, cache_dir=written.shards[0])


def test_key_and_index_come_from_the_json(tmp_path):
    written = write_shards(tmp_path, num_shards=1, per_shard=4)
    changes = iter([{"key": "000000007"}, {"index": 12}, {"key": "my photo"}, {}])
    change_json(written.shards[0], lambda fields: {**fields, **next(changes)})
    (index,) = open_shards(written.shards, caption_field=FIELD)
    assert index.indices.tolist() == [7, 12, -1, 3]
    assert index.keys.tolist() == ["000000007", "000000001", "my photo", "000000003"]


def test_members_in_folders_and_other_files(tmp_path):
    written = write_shards(tmp_path, num_shards=1, per_shard=2)

    def move(name: str, content: bytes):
        return [(f"part.1/{name.replace('.jpg', '.JPEG')}", content), (f"__MACOSX/._{name}", b"x")]

    retar(written.shards[0], move)
    (index,) = open_shards(written.shards, caption_field=FIELD)
    assert index.names.tolist() == ["part.1/000000000.JPEG", "part.1/000000001.JPEG"]
    assert index.indices.tolist() == [0, 1]
    assert not index.bad


# --- samples ---------------------------------------------------------------------------------------------------------


def test_evaluation_samples(tmp_path):
    written = write_shards(tmp_path, num_shards=2, per_shard=4, gaps=["000000001"], without_items=["000010002"])
    dataset = open_dataset(written, num_items=3)
    keys = [sample_key(s, p) for s in range(2) for p in range(4) if (s, p) != (0, 1)]
    assert len(dataset) == len(keys) == 7
    for index, key in enumerate(keys):
        scene, sample = written.scenes[key], dataset[index]
        texts = scene.captions[:2] if key == "000010002" else scene.items
        assert sample.items == dataset.items(index) == [text.strip() for text in texts][:3]
        assert sample.sample_id == f"{key[:5]}.tar/{key}.jpg"
        assert torch.equal(sample.image, to_tensor(Image.open(io.BytesIO(scene.jpeg)).convert("RGB")))
    assert dataset.num_fallback == 1
    assert dataset.summary.startswith("7 images (shards: 2); their own captions instead of items")
    with pytest.raises(IndexError, match="index 7 of shards with 7 samples"):
        dataset[7]
    with pytest.raises(IndexError):
        dataset[-1]


def test_captions_alone_need_no_numbers_as_keys(tmp_path):
    written = write_shards(tmp_path, num_shards=1, per_shard=2)
    change_json(written.shards[0], lambda fields: {"key": f"photo {fields['key']}", "caption": "One thing. Another."})
    dataset = open_dataset(written, items=None, caption_field="caption")
    assert dataset.items(1) == ["One thing", "Another"]


def test_training_samples_join_own_items(tmp_path):
    written = write_shards(tmp_path, num_shards=1, per_shard=3)
    written.items[0] = ["left", "right"]
    dataset = open_dataset(written, is_train=True, num_items=300, transform=noisy)
    for index in range(3):
        sample, own = dataset[0, index], written.items[index]
        assert len(sample.items) == 300
        parts = [text.split(". ") for text in sample.items]
        assert {part for text in parts for part in text} == set(own)
        assert all(len(set(text)) == len(text) <= 3 for text in parts)
    # One, two or three items with equal chance; of two items, three are two.
    joined = Counter(len(text.split(". ")) for text in dataset[0, 0].items)
    assert set(joined) == {1, 2}
    assert 160 < joined[2] < 240
    joined = Counter(len(text.split(". ")) for text in dataset[0, 1].items)
    assert all(70 < joined[m] < 130 for m in (1, 2, 3))


def test_training_samples_follow_seed_epoch_and_index_alone(tmp_path):
    written = write_shards(tmp_path, num_shards=2, per_shard=3)

    def draw(key, **changes):
        sample = open_dataset(written, is_train=True, transform=noisy, **changes)[key]
        return sample.items, sample.image.flatten().tolist()

    torch.manual_seed(1)
    first = draw((3, 4))
    torch.manual_seed(2)
    assert draw((3, 4)) == first
    assert draw((4, 4))[0] != first[0]
    assert draw((4, 4))[1] != first[1]
    assert draw((3, 4), seed=1) != first
    assert draw((3, 4), read_ahead=True) == first


def test_dataset_pickles_without_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset_shards, "_MAX_OPEN_SHARDS", 2)
    written = write_shards(tmp_path, num_shards=4, per_shard=2)
    dataset = open_dataset(written)
    images = [dataset[index].image for index in range(8)]  # more shards than may be open
    copy = pickle.loads(pickle.dumps(dataset))
    for index in (7, 0, 5, 2):
        assert torch.equal(copy[index].image, images[index])


def test_fingerprint_tells_content(tmp_path):
    written = write_shards(tmp_path / "a", num_shards=2)
    fingerprint = open_dataset(written).fingerprint
    copy = write_shards(tmp_path / "b", num_shards=2)
    assert open_dataset(copy).fingerprint == fingerprint
    assert open_dataset(written, items=None).fingerprint != fingerprint
    assert open_dataset(written, paths=written.shards[:1]).fingerprint != fingerprint
    other = write_shards(tmp_path / "c", num_shards=2, seed=1)
    assert open_dataset(other, items=written.items).fingerprint != fingerprint


def test_first_samples_only(tmp_path):
    written = write_shards(tmp_path, num_shards=2, per_shard=4)
    whole, part = open_dataset(written), open_dataset(written, max_samples=5)
    assert len(part) == 5
    assert [part.name(i) for i in range(5)] == [whole.name(i) for i in range(5)]
    assert [part.items(i) for i in range(5)] == [whole.items(i) for i in range(5)]
    assert part.shard_of.tolist() == [0, 0, 0, 0, 1]


# --- samples and shards that cannot be used ------------------------------------------------------------------------


BAD_SAMPLES = {
    "no image": (lambda n, c: [] if n == "000000001.jpg" else [(n, c)], "no image; expected a member 000000001.jpg"),
    "no json": (lambda n, c: [] if n == "000000001.json" else [(n, c)], "no member 000000001.json"),
    "json": (lambda n, c: [(n, b"{oops" if n == "000000001.json" else c)], "000000001.json: not valid JSON"),
    "list": (lambda n, c: [(n, b"[1]" if n == "000000001.json" else c)], "expected an object with the sample's key"),
    "key": (lambda n, c: [(n, b'{"key": 1}' if n == "000000001.json" else c)], "field key is '1'; expected a string"),
    "index": (lambda n, c: [(n, b'{"index": -1}' if n == "000000001.json" else c)], "field index is '-1'"),
    "position": (
        lambda n, c: [(n, b'{"key": "000005000"}' if n == "000000001.json" else c)], "key '000005000' gives no index",
    ),
    "twice": (lambda n, c: [(n, c)] * (1 + (n == "000000001.jpg")), "members jpg, jpg, json; expected each once"),
    "no text": (
        lambda n, c: [(n, b'{"key": "000000077"}' if n == "000000001.json" else c)],
        "no item under key '77' and its own JSON no caption",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_bad_samples_are_named_and_left_out(tmp_path, caplog, case):
    change, message = BAD_SAMPLES[case]
    written = write_shards(tmp_path, num_shards=1, per_shard=4)
    retar(written.shards[0], change)
    with pytest.raises(PreflightError, match=r"1 of 4 samples cannot be used:\n.*\n.*--on-bad-sample skip") as stopped:
        open_dataset(written)
    assert message in str(stopped.value)
    assert str(written.shards[0]) in str(stopped.value)
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(written, on_bad_sample="skip", max_bad_fraction=0.25)
    assert message in caplog.text
    assert [dataset.name(i)[10:] for i in range(len(dataset))] == [f"{i:09d}.jpg" for i in (0, 2, 3)]
    assert dataset.items(1) == written.items[2]
    assert dataset.num_bad == 1
    with pytest.raises(PreflightError, match=r"more than --max-bad-fraction 0.2 allows"):
        open_dataset(written, on_bad_sample="skip", max_bad_fraction=0.2)


def cut_in_a_member(path: Path) -> None:
    with tarfile.open(path) as tar:
        start = tar.getmember("000010002.jpg").offset_data
    path.write_bytes(path.read_bytes()[: start + 100])


def cut_between_members(path: Path) -> None:
    with tarfile.open(path) as tar:
        start = tar.getmember("000010002.jpg").offset
    path.write_bytes(path.read_bytes()[:start])


def damage_a_header(path: Path) -> None:
    with tarfile.open(path) as tar:
        start = tar.getmember("000010002.jpg").offset
    content = bytearray(path.read_bytes())
    content[start : start + 512] = b"\xa5" * 512
    path.write_bytes(content)


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "found"), [(cut_in_a_member, 2), (cut_between_members, 2), (damage_a_header, 2), (make_empty, 0)]
)
@pytest.mark.parametrize("sizes", [False, True])
def test_damaged_shards_are_counted(tmp_path, caplog, damage, found, sizes):
    written = write_shards(tmp_path, num_shards=3, per_shard=6, sizes=sizes)
    damage(written.shards[1])
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(written, on_bad_sample="skip", max_bad_fraction=0.5)
    assert len(dataset) == 12 + found
    # In the half-lost sample some members may be left: it counts once, as bad or as lost.
    assert dataset.num_bad == 6 - found
    assert re.search(rf"00001.tar: damaged after \d samples .*{shard_index.SHARD_REMEDY}", caplog.text)
    with pytest.raises(PreflightError, match=f"{6 - found} of 18 samples cannot be used"):
        open_dataset(written, on_bad_sample="skip", max_bad_fraction=0.1)
    with pytest.raises(PreflightError, match="--on-bad-sample skip"):
        open_dataset(written)


def test_sizes_json_tells_a_shard_that_is_too_short(tmp_path):
    written = write_shards(tmp_path, num_shards=2, per_shard=3, sizes=True)
    assert listed_counts(written.shards) == dict.fromkeys(written.shards, 3)
    assert open_dataset(written).num_bad == 0
    (tmp_path / "sizes.json").write_text('{"00001.tar": 5}')
    with pytest.raises(PreflightError, match=r"2 of 8 .*\n.*00001.tar: 3 samples, its sizes.json says 5"):
        open_dataset(written)
    (tmp_path / "sizes.json").write_text('{"00001.tar": "5"}')
    with pytest.raises(ValueError, match=r"sizes.json: expected an object of whole numbers"):
        open_dataset(written)


def test_compressed_shards_are_refused(tmp_path):
    written = write_shards(tmp_path, num_shards=1)
    written.shards[0].write_bytes(gzip.compress(written.shards[0].read_bytes()))
    with pytest.raises(PreflightError, match=r"a compressed tar file.*unpack it"):
        open_dataset(written)


def test_shards_without_any_sample(tmp_path):
    path = tmp_path / "00000.tar"
    with webdataset.TarWriter(str(path)) as tar:
        tar.write({"__key__": "a", "cls": b"1"})
    written = ShardFolder(tmp_path, [path], tmp_path / "items.json")
    with pytest.raises(PreflightError, match="the shards hold no sample"):
        open_dataset(written, items=None)
    with webdataset.TarWriter(str(path)) as tar:
        for number in range(3):
            tar.write({"__key__": f"a{number}", "cls": b"1", "jpg": b"2"})
    with pytest.raises(PreflightError, match=r"3 of 3 samples .*\n.*no member a0.json(.|\n)*No sample is left"):
        open_dataset(written, items=None, on_bad_sample="skip", max_bad_fraction=1.0)


def test_item_file_of_other_shards(tmp_path):
    written = write_shards(tmp_path, num_shards=1, per_shard=3)
    with pytest.raises(PreflightError, match=r"rewrites.json has no entry for any of the 3 samples \(indices 0 to 2\)"):
        open_dataset(written, items={5000: ["x"]})


def test_two_sources_with_the_same_indices(tmp_path):
    a, b = write_shards(tmp_path / "a", num_shards=1), write_shards(tmp_path / "b", num_shards=1)
    with pytest.raises(PreflightError, match=r"6 indices .* belong to two samples, the first, 0, .*/a/.*/b/"):
        open_dataset(a, paths=a.shards + b.shards)
    assert len(open_dataset(a, paths=a.shards + b.shards, items=None)) == 12
    assert len(open_dataset(a, paths=a.shards * 2)) == 12  # one source twice: no conflict
    change_json(b.shards[0], lambda fields: {**fields, "index": 100 + int(fields["key"])})
    items = a.items | {100 + index: [f"second {index}"] for index in range(6)}
    dataset = open_dataset(a, paths=a.shards + b.shards, items=items)
    assert dataset.items(1) == a.items[1]
    assert dataset.items(7) == ["second 1"]


def spoil_image(path: Path, key: str) -> None:
    retar(path, lambda name, content: [(name, content[:700] if name == f"{key}.jpg" else content)])


def test_images_that_cannot_be_decoded(tmp_path):
    written = write_shards(tmp_path, num_shards=1, per_shard=4)
    spoil_image(written.shards[0], "000000002")
    dataset = open_dataset(written)
    with pytest.raises(BadSampleError, match=r"00000.tar: 000000002.jpg: no readable image.*copy it again"):
        dataset[2]
    assert dataset.items(2) == written.items[2]
    # Validation finds it beforehand.
    with pytest.raises(PreflightError, match=r"000000002.jpg: no readable image"):
        open_dataset(written, decode_images=True)
    checked = open_dataset(written, decode_images=True, on_bad_sample="skip", max_bad_fraction=0.5)
    assert [checked.name(i)[-5] for i in range(3)] == ["0", "1", "3"]


def test_a_shard_that_vanishes_or_shrinks(tmp_path):
    written = write_shards(tmp_path, num_shards=2, per_shard=2)
    dataset = open_dataset(written)
    written.shards[0].write_bytes(b"")
    with pytest.raises(BadSampleError, match="no readable image"):
        dataset[0]
    written.shards[1].unlink()
    with pytest.raises(BadSampleError, match=r"00001.tar: 000010000.jpg: cannot be read \(No such file"):
        dataset[2]


def test_unreadable_shard_is_one_sentence(tmp_path):
    folder = tmp_path / "00000.tar"
    folder.mkdir()
    with pytest.raises(UserError, match=r"00000.tar: cannot be read"):
        read_shard(folder, caption_field=FIELD, decode_images=False)


# --- order -----------------------------------------------------------------------------------------------------------


def keys_of(sampler: ShardSampler, epoch: int, start_step: int = 0) -> list[tuple[int, int]]:
    sampler.set_epoch(epoch, start_step)
    return list(sampler)


SHARD_OF = np.repeat(np.arange(5), [7, 3, 9, 0, 5])[:24]


@pytest.mark.parametrize("window", [0, 1, 2, 9])
def test_an_epoch_is_every_sample_once_in_an_order_of_its_own(window):
    sampler = ShardSampler(SHARD_OF, batch_size=4, window=window, seed=3)
    epochs = [keys_of(sampler, epoch) for epoch in range(3)]
    for epoch, keys in enumerate(epochs):
        assert sorted(keys) == [(epoch, index) for index in range(24)]
        assert sampler.order(epoch).tolist() == [index for _, index in keys]
    orders = [[index for _, index in keys] for keys in epochs]
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != list(range(24))
    again = ShardSampler(SHARD_OF, batch_size=4, window=window, seed=3)
    assert keys_of(again, 2) == epochs[2]
    assert keys_of(ShardSampler(SHARD_OF, batch_size=4, window=window, seed=4), 2) != epochs[2]


@pytest.mark.parametrize("window", [1, 2])
def test_window_reads_few_shards_at_a_time(window):
    seen = set()
    for epoch in range(20):
        order = ShardSampler(SHARD_OF, batch_size=1, window=window).order(epoch)
        shards = SHARD_OF[order.numpy()].tolist()
        first = {shard: shards.index(shard) for shard in set(shards)}
        last = {shard: len(shards) - 1 - shards[::-1].index(shard) for shard in set(shards)}
        by_start = sorted(first, key=first.get)
        for group in range(0, len(by_start), window):
            # Once a group is left, its shards are not touched again.
            later = by_start[group + window :]
            assert max(last[shard] for shard in by_start[group : group + window]) < min(
                (first[shard] for shard in later), default=99
            )
        seen.add(tuple(by_start))
    assert len(seen) > 5  # the shards themselves are shuffled


@pytest.mark.parametrize("settings", [{}, {"window": 2}, {"samples_per_epoch": 40}, {"resampled": True}])
def test_order_is_the_same_for_any_number_of_ranks_and_after_resuming(settings):
    whole = ShardSampler(SHARD_OF, batch_size=6, seed=1, **settings)
    steps = [keys_of(whole, 1)[start : start + 6] for start in range(0, len(whole), 6)]
    for W in (2, 3):
        ranks = [ShardSampler(SHARD_OF, batch_size=6 // W, rank=r, world_size=W, seed=1, **settings) for r in range(W)]
        assert {rank.steps_per_epoch for rank in ranks} == {len(steps)}
        parts = [keys_of(rank, 1) for rank in ranks]
        b = 6 // W
        for step, expected in enumerate(steps):
            assert [key for part in parts for key in part[step * b : (step + 1) * b]] == expected
    for start in range(len(steps) + 1):
        assert keys_of(whole, 1, start) == [key for step in steps[start:] for key in step]


def test_shorter_epochs_go_on_where_the_last_one_ended():
    sampler = ShardSampler(SHARD_OF, batch_size=2, samples_per_epoch=10)
    assert sampler.steps_per_epoch == 5
    stream = [key for epoch in range(12) for key in keys_of(sampler, epoch)]
    whole = ShardSampler(SHARD_OF, batch_size=2)
    assert stream == [key for epoch in range(5) for key in keys_of(whole, epoch)]  # 120 samples are 5 passes


def test_longer_epochs_hold_several_passes():
    sampler = ShardSampler(SHARD_OF, batch_size=4, samples_per_epoch=60)
    keys = keys_of(sampler, 1)
    assert len(keys) == len(set(keys)) == 60  # a sample met twice is drawn anew
    whole = ShardSampler(SHARD_OF, batch_size=4)
    assert keys == [key for number in range(2, 5) for key in keys_of(whole, number)][12:72]


def test_resampling_draws_with_replacement():
    sampler = ShardSampler(SHARD_OF, batch_size=1, samples_per_epoch=24_000, resampled=True)
    keys = keys_of(sampler, 0)
    counts = Counter(index for _, index in keys)
    assert len(keys) == len(set(keys)) == 24_000
    assert set(counts) == set(range(24))
    assert 0.8 * 1000 < min(counts.values()) < max(counts.values()) < 1.2 * 1000
    assert keys_of(sampler, 1) != keys
    small = ShardSampler(SHARD_OF, batch_size=1, resampled=True)
    assert len({index for _, index in keys_of(small, 0)}) < 24  # not a permutation


def test_too_little_for_one_step():
    with pytest.raises(PreflightError, match=r"24 samples do not fill one step of 26 .*--train-num-samples"):
        ShardSampler(SHARD_OF, batch_size=13, world_size=2)


# --- batches ---------------------------------------------------------------------------------------------------------


def tokens_of(texts):
    """int64 (N, 12): the first letters' code points."""
    return torch.tensor([[ord(c) for c in text[:12].ljust(12)] for text in texts])


def batches(dataset, *, workers=0, rank=0, world_size=1, start_step=0, batch_size=4, on_bad_sample="stop"):
    settings = LoadingSettings(
        batch_size=batch_size, workers=workers, num_sampled_captions=3, on_bad_sample=on_bad_sample
    )
    ranks = Ranks(rank, rank, world_size, torch.device("cpu"))
    sampler = ShardSampler(dataset.shard_of, batch_size=batch_size, rank=rank, world_size=world_size, seed=dataset.seed)
    source = MapSource(dataset, ItemCollator(tokens_of, 3), settings, ranks, seed=dataset.seed, sampler=sampler)
    return list(source.epoch(2, start_step))


def assert_same_batches(a, b):
    assert len(a) == len(b) > 0
    for left, right in zip(a, b):
        assert left.batch.sample_ids == right.batch.sample_ids
        assert torch.equal(left.batch.images, right.batch.images)
        assert torch.equal(left.batch.item_tokens, right.batch.item_tokens)
        assert left.skipped == right.skipped


def test_batches_do_not_depend_on_workers_ranks_or_resuming(tmp_path):
    written = write_shards(tmp_path, num_shards=3, per_shard=6)
    dataset = open_dataset(written, is_train=True, transform=noisy, num_items=3)
    whole = batches(dataset)
    assert len(whole) == 4
    assert len({name for load in whole for name in load.batch.sample_ids}) == 16
    for workers in (1, 2):
        assert_same_batches(batches(dataset, workers=workers), whole)
    assert_same_batches(batches(dataset, start_step=3), whole[3:])
    halves = [batches(dataset, rank=rank, world_size=2, batch_size=2) for rank in range(2)]
    for first, second, step in zip(*halves, whole):
        assert torch.equal(torch.cat([first.batch.images, second.batch.images]), step.batch.images)
        assert first.batch.sample_ids + second.batch.sample_ids == step.batch.sample_ids


def test_bad_images_are_replaced_and_reported(tmp_path):
    written = write_shards(tmp_path, num_shards=2, per_shard=4)
    spoil_image(written.shards[1], "000010001")
    dataset = open_dataset(written, is_train=True, transform=noisy, num_items=3)
    loads = batches(dataset, on_bad_sample="skip")
    (message,) = [message for load in loads for message in load.skipped]
    assert "00001.tar: 000010001.jpg: no readable image" in message
    assert all(len(load.batch) == 4 for load in loads)
    assert_same_batches(batches(dataset, on_bad_sample="skip", workers=2), loads)
    with pytest.raises(BadSampleError, match=r"000010001.jpg"):
        batches(dataset)


def test_item_file_keys_are_indices(tmp_path):
    written = write_shards(tmp_path, num_shards=2, per_shard=2)
    assert sorted(load_item_lists(written.items_path, integer_keys=True)) == [0, 1, 5000, 5001]


# --- archives of strangers -------------------------------------------------------------------------------------------


def header(name: str, *, size: int = 0, kind: bytes = b"0", size_field: bytes | None = None) -> bytes:
    """A tar header with any size field."""
    block = bytearray(512)
    block[0 : len(name)] = name.encode()
    block[100:108] = b"0000644\0"
    block[124:136] = size_field or b"%011o\0" % size
    block[136:148] = b"%011o\0" % 0
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def pax(**records: str) -> bytes:
    lines = b""
    for key, value in records.items():
        rest = f" {key.replace('_', '.')}={value}\n".encode()
        length = next(n for n in range(len(rest), len(rest) + 9) if n == len(rest) + len(str(n)))
        lines += str(length).encode() + rest
    return header("pax", size=len(lines), kind=b"x") + padded(lines)


TWO_GB = 2 * 2**30
END = bytes(1024)
SAMPLE = header("000000000.json", size=2) + padded(b"{}")

ARCHIVES = {
    "a sparse image of 2 GB in kilobytes, by pax": (
        pax(GNU_sparse_major="1", GNU_sparse_minor="0", GNU_sparse_name="000000000.png",
            GNU_sparse_realsize=str(TWO_GB))
        + header("GNUSparseFile.0/000000000.png", size=512) + padded(b"1\n0\n0\n") + END
    ),
    "a sparse image, its map in the header": (
        pax(GNU_sparse_size=str(TWO_GB), GNU_sparse_map="0,1") + header("000000000.png", size=512) + padded(b"x") + END
    ),
    "a size of 2**62": pax(size=str(2**62)) + header("000000000.png") + END,
    "a size beyond 64 bits": pax(size=str(10**30)) + header("000000000.png") + END,
    "a negative size": pax(size="-1536") + header("000000000.png") + END,
    "a size of 8 GB in octal": header("000000000.png", size_field=b"77777777777\0") + b"PNG" + END,
    "a size of 2**62 in base 256": header("000000000.png", size_field=b"\x80" + (2**62).to_bytes(11, "big")) + END,
    "a long name of 8 GB": header("name", size_field=b"77777777777\0", kind=b"L") + b"a" * 512 + END,
    "a pax header of 8 GB": header("name", size_field=b"77777777777\0", kind=b"x") + b"a" * 512 + END,
    "headers of headers": (header("name", size=1, kind=b"L") + padded(b"a")) * 3000 + END,
    "a sparse map without end": (
        pax(GNU_sparse_major="1", GNU_sparse_minor="0", GNU_sparse_realsize="5")
        + header("000000000.png", size=512) + padded(b"9999999999\n" + b"1\n" * 200)
    ),
    "no archive": b"\0\xff" * 1000,
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_sizes_in_an_archive_are_not_believed(name, tmp_path):
    path = tmp_path / "00000.tar"
    path.write_bytes(SAMPLE + ARCHIVES[name])
    tracemalloc.start()
    try:
        found = read_shard(path, caption_field=FIELD, decode_images=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30_000_000
    assert len(found) == 0
    assert found.damage or found.bad
    with pytest.raises(PreflightError, match=re.escape(str(path))):
        open_dataset(ShardFolder(tmp_path, [path], tmp_path / "items.json"))


def test_a_sparse_image_is_a_bad_sample(tmp_path):
    path = tmp_path / "00000.tar"
    path.write_bytes(SAMPLE + ARCHIVES["a sparse image of 2 GB in kilobytes, by pax"])
    ((name, reason),) = read_shard(path, caption_field=FIELD, decode_images=False).bad
    assert name == "000000000"
    assert "000000000.png: is sparse; expected a plain member" in reason
