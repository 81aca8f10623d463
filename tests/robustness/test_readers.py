"""Files that are not as they should be: every reader takes them or refuses them in one sentence, quickly, in bounds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .bounds import taken_or_refused
from .corpus import FELL
from .mutations import changed_bytes, changed_data
from .readers import BYTE_READERS, HEADERS, JSON_READERS, Reader, checkpoint_fields, load_checkpoint

EXAMPLES = int(os.environ.get("ROBUSTNESS_EXAMPLES", "16"))
"""Of each reader; more, and other ones, with ROBUSTNESS_EXAMPLES=1000."""

bounded_search = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=EXAMPLES == 16,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def read(reader: Reader, content: bytes) -> bool:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "own" / reader.file
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        taken = taken_or_refused(reader.read, path, names=reader.names)
    assert taken or not reader.always
    return taken


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize("name", [*JSON_READERS, *BYTE_READERS])
def test_sound_files_are_taken(name):
    reader = JSON_READERS.get(name) or BYTE_READERS[name]
    sound = reader.sound()
    if name in ("COCO", "Karpathy", "Flickr30k"):
        pytest.skip("refused for its pictures, which are not there")
    assert read(reader, sound if isinstance(sound, bytes) else as_json(sound))


@pytest.mark.parametrize("reader", [*JSON_READERS.values(), *HEADERS.values()], ids=[*JSON_READERS, *HEADERS])
def test_strange_fields(reader):

    @bounded_search
    @given(changed_data(reader.sound()))
    def check(value: object) -> None:
        read(reader, as_json(value))

    check()


@pytest.mark.parametrize("name", [*BYTE_READERS, *JSON_READERS])
def test_damaged_bytes(name):
    reader = BYTE_READERS.get(name) or JSON_READERS[name]
    sound = reader.sound()

    @bounded_search
    @given(changed_bytes(sound if isinstance(sound, bytes) else as_json(sound)))
    def check(content: bytes) -> None:
        read(reader, content)

    check()


@pytest.mark.parametrize("name", [*BYTE_READERS, *JSON_READERS])
def test_files_of_something_else(name):
    reader = BYTE_READERS.get(name) or JSON_READERS[name]
    for content in (b"", b"\n", b"\0" * 3000, b"[" * 10**6, b'{"a":' * 10**5, b"\x89PNG\r\n", os.urandom(500)):
        read(reader, content)


@pytest.mark.parametrize(
    "name",
    ["masks .npz", "masks .pt", "shard", "features", "queries", "own images", "reports", "labels", "JPEG", "NIfTI",
     "volume .pt", "checkpoint", "item lists", "index.json", "studies of the brain", "config of photographs"],
)  # fmt: skip
def test_what_is_no_file(name):
    """A device that never ends, a pipe that nobody writes to, a folder."""
    reader = BYTE_READERS.get(name) or JSON_READERS[name]
    for make in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo, os.mkdir):
        with TemporaryDirectory() as folder:
            path = Path(folder) / "own" / reader.file
            path.parent.mkdir(parents=True)
            make(path)
            taken_or_refused(reader.read, path, names=reader.names)


@bounded_search
@given(changed_data({key: value for key, value in checkpoint_fields().items() if key != "state_dict"}))
def test_strange_fields_of_a_checkpoint(value: object) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "epoch_1.pt"
        contents = {"state_dict": {"w": torch.zeros(2)}, **value} if isinstance(value, dict) else value
        torch.save(contents, path)
        taken_or_refused(load_checkpoint, path)


@bounded_search
@given(st.data())
def test_strange_fields_of_a_shards_json(data: st.DataObject) -> None:
    from .readers import JPEG, shard, tar_bytes

    value = data.draw(changed_data({"key": "000000000", "index": 3, "shortIB_captions": ["a lake", "it"]}))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        path.write_bytes(tar_bytes({"000000000.jpg": JPEG, "000000000.json": as_json(value)}))
        assert taken_or_refused(shard, path)


@pytest.mark.parametrize(("name", "content"), FELL.values(), ids=FELL)
def test_what_once_fell(name, content):
    reader = BYTE_READERS.get(name) or JSON_READERS[name]
    read(reader, content() if callable(content) else content)
