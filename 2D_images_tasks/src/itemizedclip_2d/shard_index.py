"""What is inside webdataset shards: which samples a tar file holds and where, found once and kept in a cache.

Shards (img2dataset's layout) are uncompressed tar files whose members `<key>.jpg|jpeg|png|webp` and `<key>.json` make
a sample. The first use of a shard reads it once from end to end and writes a small index; later starts read the index
and afterwards nothing but the images they need.

Fields of a sample's JSON:
    key              the sample's number as text, nine digits: shard (5) and position in it (4, below 5000)
    index            optional, its index in the item file; otherwise it follows from the key (`item_index`)
    shortIB_captions the captions that stand in for items the item file lacks; the field's name can be chosen

Index file `<cache>/<shard name>-<key>.npz`; the key covers the shard's path, size and modification time (of an address:
what the store says that changes with the content) and the name of the caption field. It appears under its name only
when complete.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, cast

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.images import DECODER_VERSION, decode_photograph
from itemizedclip.data.preflight import PreflightError
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import check_readable, parse_json, read_json, written_whole
from itemizedclip.runtime.logs import progress_bar
from itemizedclip.runtime.remote import (
    SUMS_FILE,
    Address,
    Place,
    RemoteFile,
    cache,
    files_of,
    is_address,
    listed_sums,
    place,
)
from itemizedclip_2d.packed_items import PackedItems
from itemizedclip_2d.rsicd_table import CACHE_FOLDER

logger = logging.getLogger(__name__)

SAMPLES_PER_SHARD = 5000
"""Samples of a published shard; keys leave room for 10,000."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

MAX_SHARDS = 100_000
"""Shards of one argument: a range with a digit too many would take minutes and all memory."""

MAX_MEMBER_BYTES = 2**28
"""Of an image or JSON in a shard; photographs have a thousandth of it."""

SHARD_REMEDY = "Download the shard again."

_INDEX_FORMAT = 2
_ARRAYS = ("keys", "names", "indices", "starts", "sizes")
_READ_BYTES = 2**20
_BUILD_THREADS = 4


def item_index(key: str) -> int:
    """Index in the item file of the sample with a nine-digit key: (key mod 10000) + 5000 · (key div 10000).

    Raises:
        ValueError: no number, or a position that a shard of 5000 samples does not have.
    """
    is_number = key.isascii() and key.isdigit() and len(key) <= 18
    shard, position = divmod(int(key), 10_000) if is_number else (0, SAMPLES_PER_SHARD)
    if position >= SAMPLES_PER_SHARD:
        raise UserError(no_index(key))
    return position + SAMPLES_PER_SHARD * shard


def no_index(key: str) -> str:
    """Why a key gives no index."""
    return (
        f"key {key[:40]!r} gives no index into the item file; expected digits whose last four, the position in the "
        f"shard, are below {SAMPLES_PER_SHARD}, or a JSON field index"
    )


def endings_found(shards: Sequence[ShardIndex]) -> str:
    """A sentence for shards without a usable sample: what their members end in, and what is expected."""
    counts: Counter[str] = Counter()
    for shard in {shard.path: shard for shard in shards}.values():
        counts.update(shard.extensions)
    listed = [f"{'.' + ending if ending else 'nothing'} ({count:,})" for ending, count in counts.most_common(8)]
    found = f"members that end in {', '.join(listed)}{', …' if len(counts) > 8 else ''}" if listed else "no member"
    return (
        f"expected for each sample a member <key>.{'|'.join(IMAGE_EXTENSIONS)} and <key>.json, where <key> has no full "
        f"stop; found {found}"
    )


def fallback_items(value: object) -> list[str]:
    """Items of a caption field: a list of strings as it is, a string split at line breaks, `</s>` and full stops."""
    if isinstance(value, str):
        value = re.split(r"\n|</s>|\.(?=\s|$)", value)
    if not isinstance(value, list):
        return []
    return [text for entry in value if isinstance(entry, str) and (text := entry.strip())]


# --- which shards ----------------------------------------------------------------------------------------------------


def expand_shards(sources: str) -> list[Place]:
    """The shards of one argument, as webdataset writes it: several sources joined by "::", brace ranges in each.

    A source may also be a folder (its *.tar files) or a pattern with * or ?, here or at an address
    (`runtime.remote`). The order is that of the argument.

    Raises:
        PreflightError: nothing given, braces that do not close, a command instead of a path, or missing files.
        RemoteError: a store that does not answer.
    """
    paths: list[Place] = []
    for source in sources.split("::"):
        source = source.strip()
        if not source:
            raise PreflightError(f"shards {sources!r}: a source is empty; expected such as 'DIR/{{00000..00057}}.tar'")
        if source.startswith("pipe:"):
            raise PreflightError(
                f"shards {source!r}: commands are followed with --stream only, where an epoch is approximate; give "
                "the address itself for random access"
            )
        paths += _expand_source(source)
    addresses = list(dict.fromkeys(path for path in paths if isinstance(path, Address)))
    absent = {address for address, file in zip(addresses, files_of(addresses)) if file is None}
    missing = [path for path in paths if (path in absent if isinstance(path, Address) else not path.is_file())]
    if missing:
        names = ", ".join(map(str, missing[:3])) + (" …" if len(missing) > 3 else "")
        raise PreflightError(
            f"shards {sources!r}: {len(missing)} of {len(paths)} files do not exist: {names}; check the path and "
            "the range, and quote it, because a shell expands braces too"
        )
    return paths


def _size_of_braces(source: str) -> int:
    """At most so many names come of expanding a source; counted without expanding it."""
    size = 1
    for first, last in re.findall(r"\{([^{},.]+)\.\.([^{},.]+)(?:\.\.[^{},.]*)?\}", source):
        if not (first.lstrip("-").isdecimal() and last.lstrip("-").isdecimal()):
            size *= 64  # letters
        elif max(len(first), len(last)) > 18:
            return MAX_SHARDS + 1
        else:
            size *= abs(int(last) - int(first)) + 1
    for words in re.findall(r"\{([^{}]*,[^{}]*)\}", source):
        size *= words.count(",") + 1
    return size


def _expand_source(source: str) -> list[Place]:
    given = _placed(source)
    if not set("{*?") & set(source) and not source.endswith(".tar") and given.is_dir():
        found: list[Place] = sorted(given.glob("*.tar"), key=str)
        if not found:
            raise PreflightError(f"shards {source!r}: the folder holds no *.tar file")
        return found
    if _size_of_braces(source) > MAX_SHARDS:
        raise PreflightError(f"shards {source!r}: the braces stand for more than {MAX_SHARDS:,} files; check the range")
    try:
        patterns = list(braceexpand(source))
    except ValueError:
        raise PreflightError(
            f"shards {source!r}: a brace is not closed; expected such as 'DIR/{{00000..00057}}.tar'"
        ) from None
    paths: list[Place] = []
    for pattern in patterns:
        matches = _matches(pattern) if set(pattern) & set("*?") else [_placed(pattern)]
        if not matches:
            raise PreflightError(f"shards {pattern!r}: no file matches")
        paths += matches
    return paths


def _placed(source: str) -> Place:
    return place(source) if is_address(source) else Path(source)


def _matches(pattern: str) -> list[Place]:
    given = _placed(pattern)
    return [*given.matches()] if isinstance(given, Address) else [*sorted(map(Path, glob.glob(pattern)))]


def listed_counts(shards: Sequence[Place]) -> dict[Place, int]:
    """Number of samples each shard should have, from the `sizes.json` beside it, where there is one.

    Raises:
        ValueError: a sizes.json that is no object of whole numbers.
    """
    counts: dict[Place, int] = {}
    for folder in {path.parent for path in shards}:
        path = folder / "sizes.json"
        if not path.is_file():
            continue
        if isinstance(path, Address):
            sizes = parse_json(path.read_bytes(), source=path, holding="samples per shard")
        else:
            sizes = read_json(path, holding="samples per shard")
        if not isinstance(sizes, dict) or not all(type(value) is int for value in sizes.values()):
            raise UserError(f'{path}: expected an object of whole numbers such as {{"00000.tar": 4312}}')
        counts |= {shard: sizes[shard.name] for shard in shards if shard.parent == folder and shard.name in sizes}
    return counts


# --- one shard -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, in file order; n is their number.

    Attributes:
        path: the tar file.
        remote: the same with its size, when it lies elsewhere.
        keys: str (n,), the samples' keys.
        names: str (n,), names of the image members.
        indices: int64 (n,), indices in the item file; −1 where the sample gives none.
        starts: int64 (n,), first byte of each image in the tar file.
        sizes: int64 (n,), bytes of each image.
        crcs: int64 (n,), CRC-32 of each image; −1 in indices that were made without.
        captions: the fallback items of each sample.
        bad: (sample, reason) of samples that cannot be used.
        damage: why the tar file could not be read to its end; "" if it could.
        digest: identity of the content.
        extensions: endings of all members and how many have each, read or not.
    """

    path: Place
    keys: NDArray[np.str_]
    names: NDArray[np.str_]
    indices: NDArray[np.int64]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    crcs: NDArray[np.int64]
    captions: PackedItems
    bad: list[tuple[str, str]]
    damage: str
    digest: str
    extensions: dict[str, int]
    remote: RemoteFile | None = None

    def __len__(self) -> int:
        """Samples that can be used, as far as the index tells."""
        return len(self.keys)

    def save(self, path: Path) -> None:
        """Write the index; the file appears whole or not at all."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in (*_ARRAYS, "crcs")}
        arrays |= self.captions.arrays("captions")
        rest = json.dumps({name: getattr(self, name) for name in ("bad", "damage", "digest", "extensions")})
        with written_whole(path) as file:
            np.savez(file, rest=np.array(rest), **arrays)

    @staticmethod
    def load(path: Path, shard: Place) -> ShardIndex:
        """Read the index of `shard`; raises OSError, ValueError, LookupError or zipfile's errors for a damaged file."""
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        rest = json.loads(str(arrays["rest"]))
        return ShardIndex(
            path=shard,
            **{name: arrays[name] for name in _ARRAYS},
            crcs=arrays.get("crcs", np.full(len(arrays["keys"]), -1)),
            captions=PackedItems.of_arrays(arrays, "captions"),
            bad=[(name, reason) for name, reason in rest["bad"]],
            damage=rest["damage"],
            digest=rest["digest"],
            extensions=rest["extensions"],
        )


@dataclass
class _Members:
    """What a shard holds under one name."""

    image_name: str = ""
    image_start: int = 0
    image_size: int = 0
    image_crc: int = 0
    problem: str = ""
    json_text: bytes | None = None
    extensions: list[str] = field(default_factory=list)


def read_shard(
    path: Place, *, caption_field: str, decode_images: bool, remote: RemoteFile | None = None, sha256: str = ""
) -> ShardIndex:
    """Read a shard from end to end.

    Args:
        path: the tar file.
        remote: the same with its size, when it is at an address.
        sha256: of the whole file, compared when it is given.
        caption_field: JSON field of the fallback captions.
        decode_images: also decode every image, and count those that cannot be as bad.

    Raises:
        PreflightError: a compressed tar file, which allows no random access, or one that cannot be opened.
        UserError: a folder, a device, a pipe.
    """
    groups: dict[str, _Members] = {}
    endings: Counter[str] = Counter()
    if isinstance(path, Path) and path.exists():
        check_readable(path, holding="a tar file of images")
    try:
        # A large buffer makes one sequential read of the many small ones.
        with remote.open() if remote else open(cast(Path, path), "rb", buffering=_READ_BYTES) as file:
            damage = _read_members(file, path, groups, endings, decode_images=decode_images)
            if sha256:
                file.seek(0)
                _check_sum(file, path, sha256)
    except OSError as error:
        reason = error.strerror or error
        raise PreflightError(f"{path}: cannot be read ({reason}); check the disk and the permissions") from error
    keys, names, indices, starts, sizes, crcs, captions, bad = [], [], [], [], [], [], [], []
    digest = hashlib.sha256()
    for name, members in groups.items():
        try:
            key, index, items = _read_sample(name, members, caption_field)
        except BadSampleError as error:
            bad.append((name, str(error)))
            digest.update(repr((name, str(error))).encode())
            continue
        keys.append(key)
        names.append(members.image_name)
        indices.append(index)
        starts.append(members.image_start)
        sizes.append(members.image_size)
        crcs.append(members.image_crc)
        captions.append(items)
        digest.update(repr((key, index, members.image_size, members.image_crc, items)).encode())
    return ShardIndex(
        path, np.array(keys, str), np.array(names, str), np.array(indices, np.int64), np.array(starts, np.int64),
        np.array(sizes, np.int64), np.array(crcs, np.int64), PackedItems.pack(captions), bad, damage,
        digest.hexdigest(), dict(endings), remote,
    )  # fmt: skip


def _read_members(
    file: BinaryIO, path: Place, groups: dict[str, _Members], endings: Counter[str], *, decode_images: bool
) -> str:
    """Fill `groups`, in file order, and `endings`; returns why the file could not be read to its end, or ""."""
    magic = file.read(2)
    file.seek(0)
    if magic in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5"):
        raise PreflightError(
            f"{path}: a compressed tar file, in which no image can be found without reading all before it; "
            "unpack it to a plain .tar (images hardly shrink)"
        )
    try:
        bounded = _Bounded(file)
        with tarfile.open(fileobj=cast(IO[bytes], bounded), mode="r:") as tar:
            place = -1
            for member in tar:
                if tar.offset <= place:
                    raise tarfile.ReadError("a member's size leads backwards")
                place = tar.offset
                if member.isreg():
                    endings[os.path.basename(member.name).partition(".")[2].lower()] += 1
                    _take_member(tar, member, groups, decode_images=decode_images)
            bounded.seek(tar.offset)
            # tarfile stops without a word at a damaged header and at a file that ends between two members; a
            # complete archive ends in a block of zeros.
            if file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE):
                return ""
            return f"no member and no end of archive at byte {tar.offset}"
    except RecursionError:
        return "headers that describe headers without end"
    except (tarfile.TarError, EOFError, ValueError, LookupError, OverflowError) as error:
        return str(error) or type(error).__name__


def _check_sum(file: BinaryIO, path: Place, sha256: str) -> None:
    digest = hashlib.sha256()
    while part := file.read(_READ_BYTES):
        digest.update(part)
    if digest.hexdigest() != sha256:
        raise PreflightError(
            f"{path}: SHA-256 is {digest.hexdigest()[:12]}…, {SUMS_FILE} beside it says {sha256[:12]}…. {SHARD_REMEDY} "
            f"Or make {SUMS_FILE} anew"
        )


class _Bounded:
    """A file that is read no further than it goes: headers may name any size, which Python would allocate."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = file.seek(0, os.SEEK_END)
        file.seek(0)

    def read(self, size: int) -> bytes:
        return self._file.read(max(0, min(size, self._size - self._file.tell())))

    def seek(self, offset: int) -> int:
        return self._file.seek(min(offset, self._size))

    def tell(self) -> int:
        return self._file.tell()


def _take_member(
    tar: tarfile.TarFile, member: tarfile.TarInfo, groups: dict[str, _Members], *, decode_images: bool
) -> None:
    folder, base = os.path.split(member.name)
    stem, _, extension = base.partition(".")
    extension = extension.lower()
    if not stem or not (extension == "json" or extension in IMAGE_EXTENSIONS):
        return
    members = groups.setdefault(str(PurePosixPath(folder) / stem), _Members())
    members.extensions.append(extension)
    if member.issparse() or member.size > MAX_MEMBER_BYTES:
        # Kilobytes of a sparse file unpack to gigabytes of zeros.
        what = "sparse" if member.issparse() else f"{member.size:,} bytes"
        members.problem = f"{member.name}: is {what}; expected a plain member of at most {MAX_MEMBER_BYTES:,} bytes"
        return
    content = tar.extractfile(member)
    assert content is not None  # a regular file
    encoded = content.read()
    if len(encoded) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    if extension == "json":
        members.json_text = encoded
        return
    members.image_name, members.image_start, members.image_size = member.name, member.offset_data, member.size
    members.image_crc = zlib.crc32(encoded)
    if decode_images:
        try:
            decode_photograph(encoded, source=member.name)
        except BadSampleError as error:
            members.problem = str(error)


def _read_sample(name: str, members: _Members, caption_field: str) -> tuple[str, int, list[str]]:
    """Key, index in the item file (−1: none) and fallback items.

    Raises:
        BadSampleError: members that make no sample.
    """
    if len(set(members.extensions)) < len(members.extensions):
        raise BadSampleError(f"members {', '.join(members.extensions)}; expected each once")
    if members.problem:
        raise BadSampleError(members.problem)
    if not members.image_name:
        raise BadSampleError(f"no image; expected a member {name}.{'|'.join(IMAGE_EXTENSIONS)}")
    if members.json_text is None:
        raise BadSampleError(f"no member {name}.json; expected one with the sample's key")
    try:
        # Downloaders write NaN into fields that are not read here.
        fields = parse_json(members.json_text, source=f"{name}.json", holding="the sample's key", finite=False)
    except UserError as error:
        raise BadSampleError(str(error)) from None
    if not isinstance(fields, dict):
        raise BadSampleError(f"{name}.json: expected an object with the sample's key")
    key = fields.get("key", PurePosixPath(name).name)
    if not isinstance(key, str):
        raise BadSampleError(f"{name}.json: field key is {str(key)[:40]!r}; expected a string such as '000120034'")
    if "\0" in key:
        raise BadSampleError(f"{name}.json: field key {key[:40]!r} holds NUL; expected a string such as '000120034'")
    return key, _index_of(name, key, fields.get("index")), fallback_items(fields.get(caption_field))


def parse_members(name: str, extension: str, json_text: bytes | None, caption_field: str) -> tuple[str, int, list[str]]:
    """Key, index in the item file (−1: none) and own captions of a sample that came without its shard.

    Args:
        name: its name in the shard.
        extension: ending of its image; "" when it has none.
        json_text: its JSON, if it has any.
        caption_field: JSON field of its own captions.

    Raises:
        BadSampleError: members that make no sample.
    """
    members = _Members(image_name=f"{name}.{extension}" if extension else "", json_text=json_text)
    return _read_sample(name, members, caption_field)


def _index_of(name: str, key: str, index: object) -> int:
    """Index in the item file; −1 for a key that gives none, which matters only where there is an item file."""
    if index is None:
        try:
            return item_index(key)
        except ValueError:
            return -1
    if type(index) is not int or index < 0 or index >= 2**63:
        raise BadSampleError(f"{name}.json: field index is {str(index)[:40]!r}; expected a whole number from 0")
    return index


# --- all shards ------------------------------------------------------------------------------------------------------


def open_shards(
    shards: Sequence[Place], *, caption_field: str, decode_images: bool = False, cache_dir: Path | None = None
) -> list[ShardIndex]:
    """Indices of shards, from the cache; shards without one are read, four at a time, with a progress bar.

    Shards at an address are compared with the `SHA256SUMS` beside them, where there is one, when they are read.

    Args:
        shards: tar files; the same one may stand more than once.
        caption_field: JSON field of the fallback captions.
        decode_images: also find images that cannot be decoded (validation, where none may be replaced).
        cache_dir: folder of the indices; default `.itemizedclip_cache` beside each shard, and for addresses the
            folder of `runtime.cache`.

    Raises:
        PreflightError: a compressed shard, one that is not what its checksum says, or a cache folder that cannot be
            written.
        RemoteError: a store that does not answer.
    """
    settings = f"{caption_field} {decode_images and DECODER_VERSION}"
    addresses = list(dict.fromkeys(path for path in shards if isinstance(path, Address)))
    remotes: dict[Place, RemoteFile | None] = {**dict(zip(addresses, files_of(addresses)))}
    files = {path: _index_file(path, remotes.get(path), cache_dir, settings) for path in shards}
    found: dict[Place, ShardIndex] = {}
    for path, file in files.items():
        index = _cached(path, file)
        if index is not None:
            found[path] = replace(index, remote=remotes.get(path))
    to_read = [path for path in files if path not in found]
    sums = {folder: listed_sums(folder) for folder in {path.parent for path in to_read if isinstance(path, Address)}}

    def build(path: Place) -> ShardIndex:
        index = read_shard(
            path,
            caption_field=caption_field,
            decode_images=decode_images,
            remote=remotes.get(path),
            sha256=sums[path.parent].get(path.name, "") if isinstance(path, Address) else "",
        )
        with _writable(files[path].parent):
            files[path].parent.mkdir(parents=True, exist_ok=True)
            index.save(files[path])
        return index

    if to_read:
        logger.info("Reading shards without an index once: %d, into %s", len(to_read), files[to_read[0]].parent)
        with progress_bar("Reading shards once") as advance, ThreadPoolExecutor(_BUILD_THREADS) as pool:
            for path, index in zip(to_read, pool.map(build, to_read)):
                found[path] = index
                advance(len(found), len(files))
    return [found[path] for path in shards]


def _index_file(path: Place, remote: RemoteFile | None, cache_dir: Path | None, settings: str) -> Path:
    if isinstance(path, Address):
        if remote is None:
            raise PreflightError(f"{path}: no such file there any more; check the address")
        key = f"{_INDEX_FORMAT} {path} {remote.size} {remote.identity} {settings}"
        folder = cache_dir if cache_dir is not None else cache().folder / "shards"
    else:
        stat = path.stat()
        key = f"{_INDEX_FORMAT} {path.resolve()} {stat.st_size} {stat.st_mtime_ns} {settings}"
        folder = cache_dir if cache_dir is not None else path.parent / CACHE_FOLDER
    return folder / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"


def _cached(path: Place, file: Path) -> ShardIndex | None:
    if not file.is_file():
        return None
    try:
        return ShardIndex.load(file, path)
    except Exception as error:  # NumPy and zipfile raise many types for damaged files
        logger.warning("%s: damaged index (%s), made anew", file, type(error).__name__)
        return None


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PreflightError(
            f"{folder}: cannot write the index of the shards here ({error.strerror or error}); "
            "give a writable folder with --cache-dir"
        ) from error
