"""A study that comes packed: unpacked into a folder of its own for as long as it is read."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from itemizedclip.data.batch import BadSampleError
from itemizedclip.runtime.errors import UserError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")

MAX_BYTES = 32 * 2**30
MAX_FILES = 200_000
_MOST_PACKED = 200
"""Bytes of pixels that one packed byte becomes at most; more is made to fill disks."""
_LARGEST_READ = 2**20
"""Bytes that are asked for at once while an archive is read, headers included."""


def is_archive(path: Path) -> bool:
    """By its name."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


@contextlib.contextmanager
def unpacked_archive(source: Path) -> Iterator[Path]:
    """The folder that an archive holds, removed after the block; anything else as it is.

    Only files are unpacked, and only to places inside the folder.

    Raises:
        BadSampleError: damaged, encrypted, or larger than a study can be.
        UserError: what the block raises, with the archive's name instead of the folder's.
    """
    if not (source.is_file() and is_archive(source)):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="itemizedclip-study-") as made:
        folder = Path(made) / "study"
        folder.mkdir()
        try:
            if source.suffix.lower() == ".zip":
                _unzip(source, folder)
            else:
                _untar(source, folder)
        except BadSampleError:
            raise
        except OSError as error:
            raise BadSampleError(f"{source}: cannot be unpacked into {made} ({error.strerror or error})") from None
        except Exception as error:  # damaged bytes make the readers fail in any way
            reason = str(error) or type(error).__name__
            raise BadSampleError(
                f"{source}: cannot be unpacked ({reason}); copy it again, or give its folder"
            ) from None
        entries = list(folder.iterdir())
        try:
            yield entries[0] if len(entries) == 1 and entries[0].is_dir() else folder
        except UserError as error:
            # The folder will be gone when somebody reads its name.
            told = str(error).replace(str(folder), str(source))
            raise type(error)(told if str(source) in told else f"{source}: {told}") from error.__cause__


def _most(source: Path) -> int:
    """Bytes that an archive may hold."""
    return min(MAX_BYTES, max(2**28, source.stat().st_size * _MOST_PACKED))


def _refuse(source: Path, files: int, size: int) -> NoReturn:
    packed = source.stat().st_size
    raise BadSampleError(
        f"{source}: holds {files:,} or more files of {size / 1e9:,.1f} GB in {packed / 1e6:,.1f} MB; expected one "
        "study: unpack it yourself and give its folder"
    )


def _target(folder: Path, name: str) -> Path | None:
    """Where a member goes; None for one that would lie outside."""
    target = (folder / name).resolve()
    return target if target.is_relative_to(folder.resolve()) and target != folder.resolve() else None


def _unzip(source: Path, folder: Path) -> None:
    with zipfile.ZipFile(source) as archive:
        members = [one for one in archive.infolist() if not one.is_dir()]
        size = sum(one.file_size for one in members)
        if len(members) > MAX_FILES or size > _most(source):
            _refuse(source, len(members), size)
        for member in members:
            target = _target(folder, member.filename)
            if target is None:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            # The module reads no more than the size the archive tells, which was judged.
            with archive.open(member) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file)


def _untar(source: Path, folder: Path) -> None:
    with source.open("rb") as file:
        opener = _OPENERS.get(file.read(2), open)
    with opener(source, "rb") as stream:
        bounded = _Bounded(stream, source)
        with tarfile.open(fileobj=cast(IO[bytes], bounded), mode="r:") as archive:
            for number, member in enumerate(archive):
                if number > MAX_FILES or member.size > _most(source):
                    _refuse(source, number + 1, member.size)
                target = _target(folder, member.name)
                # Kilobytes of a sparse file unpack to gigabytes of zeros.
                if not member.isreg() or member.issparse() or target is None:
                    continue
                packed = archive.extractfile(member)
                if packed is None:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    shutil.copyfileobj(packed, file)


_OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
"""First two bytes of a packed file → what unpacks it."""


class _Bounded:
    """An unpacked stream that is read no further than a study goes, and not at once: headers may name any size."""

    def __init__(self, stream: Any, source: Path) -> None:
        self._stream = stream
        self._source = source
        self._most = _most(source)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LARGEST_READ:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        content: bytes = self._stream.read(size)
        self._check(self.tell())
        return content

    def seek(self, offset: int) -> int:
        self._check(offset)
        return int(self._stream.seek(offset))

    def tell(self) -> int:
        return int(self._stream.tell())

    def _check(self, offset: int) -> None:
        if offset > self._most:
            _refuse(self._source, 1, offset)
