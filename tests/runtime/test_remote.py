"""Addresses: what they may hold, ranges through a cache that stays bounded, faults that pass and faults that stay."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from faulty_server import FaultyServer

from itemizedclip.runtime import remote
from itemizedclip.runtime.cache import FileCache
from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.runtime.remote import Address, RemoteError, listed_sums, place, relative_path

CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ITEMIZEDCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "BLOCK_BYTES", 2**14)
    monkeypatch.setattr(remote, "patience", remote.Patience(attempts=4, first_pause_s=0.01, timeout_s=0.5))
    remote.start_afresh()
    yield
    remote.start_afresh()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.bin").write_bytes(CONTENT)
    return tmp_path / "data"


def test_what_is_an_address():
    assert place("/data/x") == Path("/data/x")
    assert place("~/x") == Path.home() / "x"
    assert place("s3://bucket/a/b.tar") == Address("s3", "bucket/a/b.tar") == place(Path("s3://bucket/a/b.tar"))
    address = place("hf://datasets/owner/name@main/train/") / "a b" / "c.tar.gz"
    assert str(address) == "hf://datasets/owner/name@main/train/a b/c.tar.gz"
    assert (address.name, address.stem, address.suffix, address.parent.name) == ("c.tar.gz", "c.tar", ".gz", "a b")
    assert str(place("https://host/x") / "a?b#c") == "https://host/x/a%3Fb%23c"
    assert relative_path(address, place("hf://datasets/owner/name@main")) == Path("train/a b/c.tar.gz")
    assert not isinstance(address, os.PathLike)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ftp://host/x", r"ftp://…: addresses of this kind are not followed; expected a path or s3://"),
        ("https://me:secret@host/x", "holds a user name or password"),
        ("s3://KEY:se/cret@bucket/x", "holds a user name or password"),
        ("https://host/x?X-Amz-Signature=secret", "holds a query"),
    ],
)
def test_addresses_that_are_refused(given, message):
    with pytest.raises(UserError, match=message) as caught:
        place(given)
    assert "secret" not in str(caught.value)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize("part", ["../x", "/etc/passwd", "http://other/x", "a/../../b"])
def test_nothing_leads_out_of_an_address(part):
    with pytest.raises(UserError, match="does not lie below it"):
        place("s3://bucket/data") / part


def test_memory_store_answers_as_a_folder():
    fsspec.filesystem("memory").pipe({"/lots/a.tar": b"12345", "/lots/b.tar": b"", "/lots/c/d.txt": b"x"})
    lots = place("memory://lots")
    assert lots.is_dir()
    assert lots.names() == {"a.tar", "b.tar", "c"}
    assert list(map(str, lots.glob("*.tar"))) == ["memory://lots/a.tar", "memory://lots/b.tar"]
    assert not (lots / "e").exists()
    assert (lots / "a.tar").file().read(1, 3) == b"234"
    assert (lots / "a.tar").local().read_bytes() == b"12345"
    assert (lots / "b.tar").file().read(0, 10) == b""
    with pytest.raises(MissingFileError, match="memory://lots/e: no such file there"):
        (lots / "e").file()


def test_ranges_are_those_of_the_file_and_come_once(folder):
    with FaultyServer(folder) as server:
        file = (place(server.url) / "a.bin").file()
        assert file.size == len(CONTENT)
        rng = np.random.default_rng(1)
        for start, size in rng.integers(0, len(CONTENT), (40, 2)).tolist():
            assert file.read(start, size) == CONTENT[start : start + size]
        assert server.gets() <= -(-len(CONTENT) // remote.BLOCK_BYTES)
        asked = server.gets()
        remote.start_afresh()  # as another process
        assert file.read(0, len(CONTENT)) == CONTENT
        assert server.gets() <= max(asked, -(-len(CONTENT) // remote.BLOCK_BYTES))
        assert file.fetch(5, 7) == CONTENT[5:12]
        assert server.requests[-1][2] == "bytes=5-11"
        with file.open() as stream:
            assert hashlib.sha256(stream.read()).digest() == hashlib.sha256(CONTENT).digest()


@pytest.mark.parametrize("fault", ["cut", "delay", "503"])
def test_faults_that_pass(folder, fault):
    """Every second answer is bad; what is read is good all the same."""
    with FaultyServer(folder, lambda path, number: fault if number % 2 == 0 else "") as server:
        file = (place(server.url) / "a.bin").file()
        start = 100_000
        assert file.read(start, 20_000) == CONTENT[start : start + 20_000]
        assert server.gets() == 2 * 2


def test_corrupted_answers_are_asked_for_again(folder):
    import zlib

    check = remote.crc32_check(zlib.crc32(CONTENT[:5000]))
    with FaultyServer(folder, lambda path, number: "corrupt" if number < 2 else "") as server:
        assert (place(server.url) / "a.bin").file().fetch(0, 5000, check) == CONTENT[:5000]
        assert server.gets() == 3


@pytest.mark.parametrize(
    ("fault", "gets", "message"),
    [
        ("503", 4, "the server answers 503, 4 times; check the network"),
        ("cut", 4, "no answer .*, 4 times; check the network"),
        ("403", 1, "the store refuses access; give credentials"),
        ("whole", 1, "sends the whole file where a part was asked for"),
    ],
)
def test_faults_that_stay(folder, fault, gets, message):
    with FaultyServer(folder, lambda path, number: fault) as server:
        file = (place(server.url) / "a.bin").file()
        with pytest.raises(RemoteError, match=message):
            file.fetch(10, 1000)
        assert server.gets() == gets


def test_a_server_that_is_not_there(monkeypatch, folder):
    with FaultyServer(folder) as server:
        url = server.url
    with pytest.raises(RemoteError, match=r"a\.bin: no answer \(\w+\), 4 times"):
        (place(url) / "a.bin").file()


def test_nothing_secret_is_said(folder, monkeypatch, caplog):
    monkeypatch.setenv("FSSPEC_HTTP", "")
    caplog.set_level(logging.DEBUG, logger="itemizedclip")

    class Leaking:
        async_impl = False

        def info(self, path):
            raise OSError("https://host/x?X-Amz-Signature=SECRET")

    remote._process().systems["s3"] = Leaking()
    with pytest.raises(RemoteError) as caught:
        place("s3://bucket/x").file()
    assert "SECRET" not in str(caught.value) + caplog.text


def test_cache_stays_within_its_limit(tmp_path):
    cache = FileCache(tmp_path / "bounded", 100_000)
    for number in range(50):
        path = cache.get(f"entry {number}", lambda part: part.write_bytes(bytes(7000)))
        assert path.stat().st_size == 7000
        assert cache.size() <= 100_000
        cache.get("entry 0", lambda part: part.write_bytes(bytes(7000)))  # in use: it stays
        os.utime(cache.path("entry 0"))
    assert cache.path("entry 0").is_file()
    assert not cache.path("entry 1").is_file()


def test_cache_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"nothing can be kept there .*ITEMIZEDCLIP_CACHE"):
        FileCache(tmp_path / "file", 1000).get("x", lambda part: part.write_bytes(b""))


def test_wrong_limit(monkeypatch):
    monkeypatch.setenv("ITEMIZEDCLIP_CACHE_GB", "much")
    remote.start_afresh()
    with pytest.raises(UserError, match="ITEMIZEDCLIP_CACHE_GB is 'much'; expected gigabytes above 0"):
        remote.cache()


def test_forked_processes_read_too(folder):
    with FaultyServer(folder) as server:
        file = (place(server.url) / "a.bin").file()
        assert file.read(0, 100) == CONTENT[:100]
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.write(writer, file.read(200_000, 100))
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(reader, 200) == CONTENT[200_000:200_100]


def test_importing_reaches_for_no_store():
    code = "import sys, itemizedclip.runtime.remote; print({'fsspec', 'aiohttp', 's3fs'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_listed_sums(tmp_path):
    assert listed_sums(tmp_path) == {}
    (tmp_path / "SHA256SUMS").write_text(f"{'AB' * 32}  ./a.tar\n{'01' * 32} *b.tar\n")
    assert listed_sums(tmp_path) == {"a.tar": "ab" * 32, "b.tar": "01" * 32}
    (tmp_path / "SHA256SUMS").write_text("a.tar\n")
    with pytest.raises(UserError, match="line 1 is not as sha256sum writes it"):
        listed_sums(tmp_path)
