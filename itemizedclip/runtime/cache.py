"""Files kept on this machine of what lies elsewhere: at most so many bytes, shared by the processes of a machine.

    <folder>/entries/ab/ab12….bin      an entry, whole or not there
    <folder>/locks/0a3                 whoever holds it is making an entry; others wait and then find it

The entries used longest ago go first. Nothing here is needed again once it is gone: an entry is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from itemizedclip.runtime.errors import NoSpaceError, UserError
from itemizedclip.runtime.files import DISK_FULL, remove_leftovers, replacing

FOLDER_VARIABLE = "ITEMIZEDCLIP_CACHE"
"""Environment variable that names the folder."""

LIMIT_VARIABLE = "ITEMIZEDCLIP_CACHE_GB"
"""Environment variable that gives the most it may hold, in units of 10⁹ bytes."""

DEFAULT_LIMIT_GB = 20.0

_LOCKS = 4096
_SCAN_SHARE = 1 / 64
"""A process looks at the whole folder each time it has added this share of the limit."""
_KEPT_SHARE = 7 / 8
"""What is left when room is made: with up to eight processes that write, the limit holds at every moment."""


@dataclass
class FileCache:
    """A bounded folder of entries.

    Attributes:
        folder: where they lie.
        limit: bytes of all of them; one that is larger than that alone is kept until the next one comes.
    """

    folder: Path
    limit: int
    _added: int | None = field(default=None, repr=False)

    def get(self, name: str, make: Callable[[Path], None]) -> Path:
        """The file of an entry; made by `make(path to write)` when it is not there, by one process at a time.

        Raises:
            UserError: the folder cannot be written to; NoSpaceError: the disk is full. What `make` raises.
        """
        path = self.path(name)
        if self._is_used(path):
            return path
        try:
            lock = self.folder / "locks" / f"{int(path.stem[:8], 16) % _LOCKS:03x}"
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                if self._is_used(path):
                    return path
                with replacing(path) as part:
                    make(part)
                    size = part.stat().st_size
        except UserError:
            raise
        except OSError as error:
            if error.errno in DISK_FULL:
                raise NoSpaceError(
                    f"{self.folder}: the disk is full; lower {LIMIT_VARIABLE} (it is {self.limit / 1e9:g}), or name a "
                    f"folder with more room in {FOLDER_VARIABLE}"
                ) from error
            raise UserError(
                f"{self.folder}: nothing can be kept there ({error.strerror or error}); name a writable folder in "
                f"{FOLDER_VARIABLE}"
            ) from error
        self._make_room(size, path)
        return path

    def path(self, name: str) -> Path:
        """Where an entry lies, whether it is there or not."""
        digest = hashlib.sha256(name.encode()).hexdigest()[:40]
        return self.folder / "entries" / digest[:2] / f"{digest}.bin"

    def drop(self, name: str) -> None:
        """Forget an entry, such as one that turned out to be damaged."""
        self.path(name).unlink(missing_ok=True)

    def size(self) -> int:
        """Bytes of all entries."""
        return sum(size for _, size, _ in self._entries())

    @staticmethod
    def _is_used(path: Path) -> bool:
        try:
            os.utime(path)
        except OSError:
            return False
        return True

    def _make_room(self, size: int, newest: Path) -> None:
        with _making_room:
            if self._added is not None and self._added + size < self.limit * _SCAN_SHARE:
                self._added += size
                return
            self._added = 0
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        if total <= self.limit * (1 - _SCAN_SHARE):
            return
        for _, size, path in entries:
            if total <= self.limit * _KEPT_SHARE:
                break
            if path != newest:
                with contextlib.suppress(OSError):
                    path.unlink()
                    total -= size

    def _entries(self) -> list[tuple[int, int, Path]]:
        """(last use in ns, bytes, file) of each."""
        found = []
        for folder in (self.folder / "entries").glob("*"):
            remove_leftovers(folder)
            for path in folder.glob("*.bin"):
                with contextlib.suppress(OSError):  # another process made room
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
        return found


_making_room = threading.Lock()


def default_cache() -> FileCache:
    """The cache of this user on this machine, as the environment says it.

    Raises:
        UserError: a limit that is no number above 0.
    """
    given = os.environ.get(FOLDER_VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(given).expanduser() if given else Path(base) / "itemizedclip"
    words = os.environ.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT_GB))
    try:
        limit = int(float(words) * 1e9)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise UserError(f"{LIMIT_VARIABLE} is {words[:40]!r}; expected gigabytes above 0, such as 20")
    return FileCache(folder, limit)
