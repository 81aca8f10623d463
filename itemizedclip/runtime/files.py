"""Reading and writing files: whole or not at all, UTF-8, JSON that means what it says.

Every text, JSON and CSV file that a user gives is read here, so that a byte-order mark, a lone surrogate, a NaN, a
repeated key or an open quote mean the same everywhere; every file of ours is written here.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import json
import math
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from itemizedclip.runtime.errors import MissingFileError, UserError

# --- writing ---------------------------------------------------------------------------------------------------------

PART_SUFFIX = ".part"
"""Ending of a file that is being written; one that stays behind belongs to a killed process."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when a disk, a quota or a limit (ulimit -f) is used up."""

LEFTOVER_S = 24 * 3600.0
"""Age in seconds at which a file that is still being written is taken for one of a killed process."""


@contextmanager
def replacing(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` at the end of the block; after an error nothing changed.

    Several processes may write the same file at once, on one machine or several: the last one wins whole.

    Args:
        path: the file; folders above it are made.
        durable: return only when the disk has it (checkpoints, indices).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    part = path.with_name(f".{path.name}.{writer}{PART_SUFFIX}")
    try:
        yield part
        if durable:
            _sync(part)
        os.replace(part, path)
    except OSError as error:
        if error.errno in DISK_FULL and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        part.unlink(missing_ok=True)
    if durable and os.name == "posix":
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_whole(path: str | Path, *, text: bool = False, durable: bool = False) -> Iterator[IO[Any]]:
    """`replacing` with the file open: for bytes, or for text in UTF-8 whose line ends stay as they are written."""
    how: dict[str, Any] = {"mode": "w", "encoding": "utf-8", "newline": ""} if text else {"mode": "wb"}
    with replacing(path, durable=durable) as part, part.open(**how) as file:
        yield file


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole."""
    with written_whole(path, text=True) as file:
        file.write(text)


def write_json(path: str | Path, value: Any, *, indent: int | None = 2) -> None:
    """Write plain data as JSON, whole.

    Raises:
        UserError: a number that JSON does not have (NaN, infinity), or an object that is no plain data.
    """
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be written as JSON ({error})") from None
    write_text(path, text + "\n")


def check_writable(folder: str | Path, flag: str) -> Path:
    """Before anything is computed: a folder that results can be written to; made when it is not there.

    Args:
        folder: the folder.
        flag: the flag that names another one, for the message.

    Raises:
        UserError: it cannot be made or written to.
    """
    folder = Path(folder).expanduser()
    reason = "no permission"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        writable, reason = False, error.strerror or type(error).__name__
    if not writable:
        raise UserError(f"{folder}: results cannot be written there ({reason}); give another folder with {flag}")
    return folder


def remove_leftovers(folder: str | Path) -> list[Path]:
    """Remove what killed writers left behind in a folder; returns what was removed.

    Those are files being written whose writer ran on this machine and is gone, and any that nobody has touched for
    `LEFTOVER_S`.
    """
    removed = []
    for path in Path(folder).glob(".*"):
        if path.is_file() and _is_leftover(path):
            with contextlib.suppress(OSError):
                path.unlink()
                removed.append(path)
    return removed


def _is_leftover(path: Path) -> bool:
    part = re.fullmatch(r"(?P<before>\..+)\.(?P<pid>\d+)\.[0-9a-f]{8}" + re.escape(PART_SUFFIX), path.name)
    # Versions before 0.2 named the writer's process alone.
    old = re.fullmatch(r"\..+\.(?P<pid>\d+)\.tmp", path.name)
    claim = re.fullmatch(r"\.claim\.[0-9a-f]{32}.*", path.name)
    try:
        age_s = time.time() - path.stat().st_mtime
    except OSError:
        return False
    if part and part["before"].endswith("." + socket.gethostname()):
        return not _is_running(int(part["pid"])) or age_s > LEFTOVER_S
    if old and not _is_running(int(old["pid"])):
        return age_s > LEFTOVER_S / 24
    return bool(part or old or claim) and age_s > LEFTOVER_S


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


# --- reading ---------------------------------------------------------------------------------------------------------


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, which says which checkpoint or annotation file a result came from."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


OPEN_PIPES = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
"""Where a shell puts what it gives a command to read, such as `<(sort texts.txt)`."""


def check_readable(path: Path, *, holding: str) -> None:
    """Whether a path is a file, or a pipe that the shell has opened; others give bytes without end, or wait for ever.

    Args:
        path: the path.
        holding: what it should hold, for messages.

    Raises:
        MissingFileError: no such file.
        UserError: a folder, a device, or a pipe that nobody may ever write to.
    """
    if path.is_file() or (path.is_fifo() and str(path).startswith(OPEN_PIPES)):
        return
    if not path.exists():
        raise MissingFileError(f"{path}: no such file; expected {holding}")
    what = "it is a folder" if path.is_dir() else "it is no regular file"
    raise UserError(f"{path}: cannot be read ({what}); expected {holding}")


def read_text(path: str | Path, *, holding: str) -> str:
    """Content of a text file in UTF-8; a byte-order mark is no part of it.

    Args:
        path: the file.
        holding: what the file should hold, for messages, such as "one text per line".

    Raises:
        MissingFileError: no such file.
        UserError: a folder, no permission, or not UTF-8.
    """
    path = Path(path).expanduser()
    check_readable(path, holding=holding)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is no UTF-8 text ({error.reason}); expected {holding}: save it as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected {holding}") from None


def read_lines(path: str | Path, *, holding: str) -> list[str]:
    """The lines of a text file, without outer white space and without blank ones; otherwise as `read_text`.

    Line feeds and carriage returns end a line, nothing else: a form feed or U+2028 is part of a text.
    """
    return [line.strip() for line in read_text(path, holding=holding).split("\n") if line.strip()]


def read_json(path: str | Path, *, holding: str) -> Any:
    """Content of a JSON file in UTF-8.

    Args:
        path: the file.
        holding: what the file should hold, for messages, such as "class labels".

    Raises:
        MissingFileError: no such file.
        UserError: see `read_text` and `parse_json`.
    """
    path = Path(path).expanduser()
    return parse_json(read_text(path, holding=f"a JSON file with {holding}"), source=path, holding=holding)


def parse_json(text: str | bytes, *, source: object, holding: str, finite: bool = True) -> Any:
    """JSON as the standard has it: no NaN or infinity, no key twice in one object, no half of a character.

    Args:
        text: the JSON, or its bytes in UTF-8, of which a byte-order mark is no part.
        source: where it comes from, for messages.
        holding: what it should hold, for messages.
        finite: False takes NaN and infinity, which others write into fields that are not ours.

    Raises:
        UserError: anything else, or nested too deeply.
    """
    numbers: dict[str, Any] = {"parse_constant": _no_constant, "parse_float": _finite} if finite else {}
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_object_without_repeats, **numbers)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except _RefusedError as error:
        raise UserError(f"{source}: {error}; expected {holding}") from None
    except RecursionError:
        raise UserError(f"{source}: nested too deeply; expected {holding}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: byte {error.start} is no UTF-8 text ({error.reason}); expected {holding}") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise UserError(f"{source}: {half} is half of a character (a lone surrogate); expected {holding}") from None
    except ValueError as error:
        raise UserError(f"{source}: not valid JSON ({error}); expected {holding}") from None
    return value


class _RefusedError(ValueError):
    """JSON that Python would take and we do not."""


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedError(f"key {key!r} appears twice; keep one of the entries")
            seen.add(key)
    return entries


def _no_constant(name: str) -> NoReturn:
    raise _RefusedError(f"{name} is no number in JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _RefusedError(f"{digits} is no number that a computer holds")
    return value


class CsvRows:
    """The rows of a CSV, read strictly: a quote that never closes is an error, not the end of the file.

    Otherwise one study would silently get the findings of all that follow it.

    Attributes:
        line: first line of the row at hand, counted from 1.
    """

    def __init__(self, lines: Iterable[str], *, source: object, holding: str) -> None:
        """Begin reading.

        Args:
            lines: of the text, their ends as they are (`newline=""`), without a byte-order mark (`utf-8-sig`).
            source: where they come from, for messages.
            holding: what the CSV should hold, for messages.
        """
        self.line = 1
        self._rows = self._read(lines, source, f"a CSV with {holding}")

    def __iter__(self) -> Iterator[list[str]]:
        """The rows; raises UserError, which names the line where the row at hand begins."""
        return self._rows

    def __next__(self) -> list[str]:
        return next(self._rows)

    def _read(self, lines: Iterable[str], source: object, expected: str) -> Iterator[list[str]]:
        reader = csv.reader(lines, strict=True)
        try:
            for row in reader:
                if any("\0" in cell for cell in row):
                    raise UserError(f"{source}: row starting at line {self.line}: holds NUL; expected {expected}")
                yield row
                self.line = reader.line_num + 1
        except csv.Error as error:
            reason = "a quote opens in it that never closes" if "end of data" in str(error) else str(error)
            reason += " (a quote may be open)" if "limit" in reason or "expected after" in reason else ""
            raise UserError(f"{source}: row starting at line {self.line}: {reason}; expected {expected}") from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"{source}: is no UTF-8 text at or after line {self.line} ({error.reason}); expected {expected}: save "
                "it as UTF-8"
            ) from None


@contextmanager
def open_csv(path: str | Path, *, holding: str) -> Iterator[CsvRows]:
    """The rows of a CSV file in UTF-8.

    Args:
        path: the file.
        holding: what it should hold, for messages.

    Raises:
        MissingFileError: no such file.
        UserError: it cannot be opened; see `CsvRows` for what is raised while rows are read.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; expected a CSV with {holding}")
    try:
        file = path.open(newline="", encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a CSV with {holding}") from None
    with file:
        yield CsvRows(file, source=path, holding=holding)


def column_key(name: str) -> str:
    """What two spellings of a column's name have in common: its letters and digits, in lower case."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


class CsvTable:
    """A CSV whose first row names the columns; a name matches without regard to case, blanks and punctuation.

    Attributes:
        path: the file.
        header: names of the columns.
    """

    def __init__(self, path: Path, rows: CsvRows) -> None:
        self.path = path
        self.header = [name.strip() for name in next(rows, [])]
        self._keys = [column_key(name) for name in self.header]
        self._rows = rows

    def find(self, *names: str) -> int | None:
        """Place of the first of these columns that is there, None when none is.

        Raises:
            UserError: two columns of that name.
        """
        for name in names:
            found = [place for place, key in enumerate(self._keys) if key == column_key(name)]
            if len(found) > 1:
                raise UserError(f"{self.path}: {len(found)} columns are called {name!r}; keep one")
            if found:
                return found[0]
        return None

    def place(self, *names: str) -> int:
        """Place of the first of these columns that is there.

        Raises:
            UserError: none of them is, or two are called the same.
        """
        found = self.find(*names)
        if found is None:
            shown = ", ".join(self.header[:24]) + (", …" if len(self.header) > 24 else "")
            raise UserError(f"{self.path}: no column {' or '.join(map(repr, names))}; found {shown or 'an empty file'}")
        return found

    def rows(self) -> Iterator[tuple[str, list[str]]]:
        """(where it stands, for messages; its cells) of every row below the header that is not blank.

        Raises:
            UserError: a row of another width.
        """
        for row in self._rows:
            if not any(cell.strip() for cell in row):
                continue
            where = f"{self.path}: line {self._rows.line}"
            if len(row) != len(self.header):
                raise UserError(f"{where}: {len(row)} values for {len(self.header)} columns; expected one per column")
            yield where, row


@contextmanager
def open_table(path: str | Path, *, holding: str) -> Iterator[CsvTable]:
    """A CSV file with a header; see `open_csv`."""
    with open_csv(path, holding=holding) as rows:
        yield CsvTable(Path(path).expanduser(), rows)
