"""A study that comes packed: unpacked into a folder of its own for as long as it is read."""

from __future__ import annotations

import contextlib
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from itemizedclip.data.batch import BadSampleError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")

MAX_BYTES = 32 * 2**30
MAX_FILES = 200_000
_MOST_PACKED = 200
"""Bytes of pixels that one packed byte becomes at most; more is made to fill disks."""


def is_archive(path: Path) -> bool:
    """By its name."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


@contextlib.contextmanager
def unpacked_archive(source: Path) -> Iterator[Path]:
    """The folder that an archive holds, removed after the block; anything else as it is.

    Only files are unpacked, and only to places inside the folder.

    Raises:
        BadSampleError: damaged, encrypted, or larger than a study can be.
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
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
            if isinstance(error, BadSampleError):
                raise
            raise BadSampleError(f"{source}: cannot be unpacked ({error}); copy it again, or give its folder") from None
        except OSError as error:
            raise BadSampleError(f"{source}: cannot be unpacked into {made} ({error.strerror or error})") from None
        entries = list(folder.iterdir())
        opened = entries[0] if len(entries) == 1 and entries[0].is_dir() else folder
        try:
            yield opened
        except BadSampleError as error:
            # The folder is gone when this is read.
            raise BadSampleError(str(error).replace(str(opened), str(source))) from None


def _check(source: Path, sizes: list[int]) -> None:
    packed = source.stat().st_size
    if len(sizes) > MAX_FILES or sum(sizes) > min(MAX_BYTES, max(2**28, packed * _MOST_PACKED)):
        raise BadSampleError(
            f"{source}: holds {len(sizes):,} files of {sum(sizes) / 1e9:,.1f} GB in {packed / 1e6:,.1f} MB; expected "
            "one study: unpack it yourself and give its folder"
        )


def _target(folder: Path, name: str) -> Path | None:
    """Where a member goes; None for one that would lie outside."""
    target = (folder / name).resolve()
    return target if target.is_relative_to(folder.resolve()) and target != folder.resolve() else None


def _unzip(source: Path, folder: Path) -> None:
    with zipfile.ZipFile(source) as archive:
        members = [one for one in archive.infolist() if not one.is_dir()]
        _check(source, [one.file_size for one in members])
        for member in members:
            target = _target(folder, member.filename)
            if target is None:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            # The module reads no more than the size the archive tells, which was judged.
            with archive.open(member) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file)


def _untar(source: Path, folder: Path) -> None:
    with tarfile.open(source) as archive:
        sizes: list[int] = []
        for member in archive:
            if not member.isreg():
                continue
            sizes.append(member.size)
            _check(source, sizes)
            target = _target(folder, member.name)
            packed = archive.extractfile(member) if target is not None else None
            if target is None or packed is None:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                shutil.copyfileobj(packed, file)
