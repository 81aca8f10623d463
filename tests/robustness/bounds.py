"""Limits of time and memory around what is tested, in this process, and what a refusal must be like."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from itemizedclip.runtime.errors import UserError

with suppress(ModuleNotFoundError):
    # pandas takes it for texts where it is there; it reserves a gigabyte of addresses, not of memory, at its first use.
    import pyarrow as pa

    pa.array(["a text"])

MEMORY_BYTES = 2**30
"""What reading any damaged file may take beyond what the process holds: hostile ones ask for far more."""

SECONDS = 20.0
"""What it may last, on a machine that does other things too."""

LONGEST_MESSAGE = 2500


class TooSlowError(BaseException):
    """The block took too long; no reader takes this for an error of a file."""


@contextmanager
def bounded(memory_bytes: int = MEMORY_BYTES, seconds: float = SECONDS) -> Iterator[None]:
    """MemoryError or TooSlowError in the block when it takes more; nothing is changed afterwards."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None

    def too_slow(number: int, frame: object) -> None:
        raise TooSlowError(f"more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, too_slow)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def taken_or_refused(read: Callable[[Path], object], path: Path, *, names: str = "") -> bool:
    """Whether a file was taken. A refusal is one sentence of the project's own that names the file; all else fails.

    Args:
        read: the reader.
        path: the file.
        names: what the message must hold instead of the file's name.
    """
    try:
        with bounded():
            read(path)
    except UserError as error:
        message = str(error)
        assert (names or path.name) in message, message
        assert len(message) < LONGEST_MESSAGE, message
        assert "Traceback" not in message
        return False
    return True
