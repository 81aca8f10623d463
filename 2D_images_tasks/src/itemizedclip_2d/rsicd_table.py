"""One RSICD CSV as a table of encoded images and captions, parsed once into a cache on disk.

The Kaggle CSV keeps each image as text, so reading it takes minutes of parsing per gigabyte. The first use writes a
cache folder; later starts map it into memory. A *row* is a data row of the CSV counted from 0, bad rows included: the
key of the item files and the position in the label file.

Cache folder `<csv name>-<key>/`:
    images.bin   encoded JPEG/PNG bytes of all rows, one after another
    index.json   where each row's image starts, file names, captions, bad rows, SHA-256 of the CSV
The key covers the CSV's size, modification time and a sample of its content. A folder appears under its name only
when complete, so a killed build leaves nothing that could be mistaken for a cache.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image

from itemizedclip.data.images import decode_photograph
from itemizedclip.data.literals import LiteralError, parse_flat_record, parse_string_array
from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.runtime.files import CsvRows
from itemizedclip.runtime.logs import progress_bar

logger = logging.getLogger(__name__)

CACHE_FOLDER = ".itemizedclip_cache"
"""Name of the folder beside the CSV that holds its cache unless another is given."""

MAX_CELL_CHARS = 16 * 2**20
"""Longest CSV cell that is read; an RSICD image takes about 0.1 million characters."""

COLUMNS = ("filename", "captions", "image")
_CACHE_FORMAT = 1
_SAMPLED_BLOCKS, _BLOCK_BYTES = 16, 65536


@dataclass(frozen=True)
class BadRow:
    """A CSV row that cannot be used: row counted from 0, first line in the file counted from 1, and why."""

    row: int
    line: int
    reason: str


class RsicdTable:
    """The rows of one RSICD CSV, read from its cache. Pickles as a path, so loader workers share the mapped file.

    Attributes:
        csv_path: the CSV.
        filenames: name of each row's image; "" for a bad row.
        captions: the captions of each row as written; empty for a bad row.
        lines: first line of each row in the CSV, counted from 1.
        bad_rows: rows whose cells could not be read.
        csv_sha256: hash of the CSV, equal for equal files on any machine.
    """

    def __init__(self, csv_path: Path, cache_folder: Path) -> None:
        self._open(csv_path, cache_folder)

    def _open(self, csv_path: Path, cache_folder: Path) -> None:
        self.csv_path = csv_path
        self.cache_folder = cache_folder
        index = _read_index(cache_folder)
        self.filenames: list[str] = index["filenames"]
        self.captions: list[list[str]] = index["captions"]
        self.lines: list[int] = index["lines"]
        self.bad_rows = [BadRow(**entry) for entry in index["bad_rows"]]
        self.csv_sha256: str = index["csv_sha256"]
        self._starts: list[int] = index["image_starts"]
        with open(cache_folder / "images.bin", "rb") as file:
            # An empty file cannot be mapped; a table without one good row has nothing to map.
            self._images = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self._starts[-1] else b""

    def __len__(self) -> int:
        """Rows of the CSV, bad ones included."""
        return len(self.filenames)

    def __getstate__(self) -> tuple[Path, Path]:
        return self.csv_path, self.cache_folder

    def __setstate__(self, state: tuple[Path, Path]) -> None:
        self._open(*state)

    def describe(self, row: int) -> str:
        """Name of a row for messages."""
        filename = self.filenames[row] or "no file name"
        return f"{self.csv_path} row {row} (counted from 0, line {self.lines[row]}, {filename})"

    def image_bytes(self, row: int) -> bytes:
        """Encoded image of a row; empty for a bad row."""
        return self._images[self._starts[row] : self._starts[row + 1]]

    def image(self, row: int) -> Image.Image:
        """Decoded photograph of a row.

        Raises:
            BadSampleError: the bytes are no readable image.
        """
        return decode_photograph(self.image_bytes(row), source=f"{self.describe(row)}: column 'image'")


def open_rsicd_table(csv_path: str | Path, cache_dir: str | Path | None = None) -> RsicdTable:
    """Table of an RSICD CSV; the first call for a file builds its cache, with a progress bar on the error stream.

    Several processes may call this together: one builds, and shows the bar, while the others wait for it.

    Args:
        csv_path: CSV with columns filename, captions and image, in any order.
        cache_dir: folder for caches; default `.itemizedclip_cache` beside the CSV. About 0.4 times the CSV's size.

    Raises:
        FileNotFoundError: no such CSV.
        ValueError: not a CSV of this kind, or a cache folder that cannot be written.
    """
    csv_path = Path(csv_path)
    if not csv_path.is_file():
        raise MissingFileError(
            f"{csv_path}: no such file; expected an RSICD CSV (train.csv, valid.csv or test.csv) with the columns "
            f"{', '.join(COLUMNS)}"
        )
    root = Path(cache_dir) if cache_dir is not None else csv_path.parent / CACHE_FOLDER
    folder = root / f"{csv_path.stem}-{_cache_key(csv_path)}"
    if not _is_complete(folder):
        with _writable(root), _only_builder(folder):
            if not _is_complete(folder):  # another process may have finished it while this one waited
                _publish_cache(csv_path, folder)
    return RsicdTable(csv_path, folder)


def _cache_key(csv_path: Path) -> str:
    """Fast fingerprint: size, modification time and evenly spaced blocks of the content (1 MiB in all)."""
    stat = csv_path.stat()
    digest = hashlib.sha256(f"{_CACHE_FORMAT} {stat.st_size} {stat.st_mtime_ns}".encode())
    with open(csv_path, "rb") as file:
        for block in range(_SAMPLED_BLOCKS):
            file.seek(max(stat.st_size - _BLOCK_BYTES, 0) * block // (_SAMPLED_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def _read_index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "index.json").read_text(encoding="utf-8"))


def _is_complete(folder: Path) -> bool:
    """Whether the folder holds a cache whose image file has the size its index tells."""
    try:
        return (folder / "images.bin").stat().st_size == _read_index(folder)["image_starts"][-1]
    except (OSError, ValueError, LookupError, TypeError):
        return False


@contextmanager
def _writable(root: Path) -> Iterator[None]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"{root}: cannot build the image cache here ({error.strerror or error}); "
            "give a cache folder that is writable and has room for about 0.4 times the size of the CSV"
        ) from error


@contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """Hold the build lock of one cache folder; processes that come later wait here."""
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("Waiting for another process to finish the image cache %s", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _publish_cache(csv_path: Path, folder: Path) -> None:
    """Build in a folder of another name, then rename it. Call with the build lock held."""
    prefix = f"{folder.name}.building-"
    for leftover in [*folder.parent.glob(f"{prefix}*"), folder]:  # of a killed build; or a damaged cache
        shutil.rmtree(leftover, ignore_errors=True)
    building = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        _write_cache(csv_path, building)
        building.chmod(0o755)  # mkdtemp's folders are private; a cache beside shared data is shared
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_cache(csv_path: Path, folder: Path) -> None:
    started_s = time.monotonic()
    before = csv_path.stat()
    logger.info("Reading %s once into the image cache %s", csv_path, folder.parent)
    filenames: list[str] = []
    captions: list[list[str]] = []
    lines: list[int] = []
    image_starts = [0]
    bad_rows: list[BadRow] = []
    source = _HashedFile(csv_path)
    reading = progress_bar(f"Reading {csv_path.name} once (bytes)")
    with source, open(folder / "images.bin", "wb") as images, _raised_field_limit(), reading as advance:
        for row, (line, cells) in enumerate(_read_rows(csv_path, source)):
            try:
                filename, row_captions, image = _parse_cells(cells)
            except LiteralError as error:
                bad_rows.append(BadRow(row, line, str(error)))
                filename, row_captions, image = "", [], b""
            lines.append(line)
            filenames.append(filename)
            captions.append(row_captions)
            images.write(image)
            image_starts.append(image_starts[-1] + len(image))
            advance(source.position, before.st_size)
        images.flush()
        os.fsync(images.fileno())
    after = csv_path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{csv_path}: changed while it was read; start again when the file is complete")
    if not filenames:
        raise UserError(f"{csv_path}: no row below the header; expected one image per row")
    index = {
        "csv_sha256": source.sha256.hexdigest(),
        "filenames": filenames,
        "captions": captions,
        "lines": lines,
        "image_starts": image_starts,
        "bad_rows": [asdict(bad) for bad in bad_rows],
    }
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    logger.info(
        "Read %d rows of %s in %.1f s, %d of them bad", len(filenames), csv_path, time.monotonic() - started_s,
        len(bad_rows),
    )  # fmt: skip


class _HashedFile(io.RawIOBase):
    """Binary file that hashes what is read from it and knows how far it got."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  closed in close()
        self.sha256 = hashlib.sha256()
        self.position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:count])
        self.position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_rows(csv_path: Path, source: _HashedFile) -> Iterator[tuple[int, dict[str, str] | None]]:
    """(first line in the file, cells by column) of each data row; None for a row with more or fewer fields.

    Empty lines are no rows, as in pandas, whose row numbers the item files use.
    """
    text = io.TextIOWrapper(io.BufferedReader(source, 2**20), encoding="utf-8-sig", newline="")
    rows = CsvRows(text, source=csv_path, holding=f"the columns {', '.join(COLUMNS)}")
    header = [name.strip() for name in next(rows, [])]
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        found = ", ".join(ascii(name[:40]) for name in header[:10]) or "an empty file"
        raise UserError(
            f"{csv_path}: column {', '.join(map(repr, missing))} missing; expected a header with "
            f"{', '.join(COLUMNS)}, found {found}"
        )
    for fields in rows:
        if fields:
            yield rows.line, dict(zip(header, fields)) if len(fields) == len(header) else None


@contextmanager
def _raised_field_limit() -> Iterator[None]:
    previous = csv.field_size_limit(MAX_CELL_CHARS)
    try:
        yield
    finally:
        csv.field_size_limit(previous)


def _parse_cells(cells: dict[str, str] | None) -> tuple[str, list[str], bytes]:
    """File name, captions and encoded image of a row.

    Raises:
        LiteralError: a cell that does not hold what its column should; the message names the column.
    """
    if cells is None:
        raise LiteralError("the row has not as many fields as the header (is the file cut short?)")
    filename = cells["filename"].strip()
    if not filename or not filename.isprintable():
        raise LiteralError(f"column 'filename': expected a file name, found {filename[:40]!a}")
    try:
        captions = parse_string_array(cells["captions"])
    except LiteralError as error:
        raise LiteralError(f"column 'captions': {error}") from None
    try:
        image = parse_flat_record(cells["image"]).get("bytes")
    except LiteralError as error:
        raise LiteralError(f"column 'image': {error}") from None
    if not isinstance(image, bytes) or not image:
        raise LiteralError("column 'image': expected {'bytes': b'...'} with the encoded image under 'bytes'")
    return filename, captions, image
