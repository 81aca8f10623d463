"""What a user can mend is a `UserError`: one sentence that names file, flag or sample and says what to do.

It is raised anywhere, crosses loader workers unchanged, and is reported here and nowhere else.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from itemizedclip.runtime.logs import shown

EXIT_WRONG_FILE = 1
"""Exit status when something read, written or reached is not as needed."""

EXIT_WRONG_FLAG = 2
"""Exit status when a flag, a value or a combination of flags cannot be."""

EXIT_NO_SPACE = 74
"""Exit status when the disk is full, or would be before the end (sysexits.h: EX_IOERR)."""

EXIT_STOPPED = 75
"""Exit status of a training run that a signal stopped: `--resume latest` goes on (sysexits.h: EX_TEMPFAIL)."""


class UserError(ValueError):
    """Something the user can mend; the message is the whole report.

    `exit_code` is the exit status of a command that ends with it.

    A loader worker's error arrives in the training process as a new object of the same class, made of the worker's
    trace: the constructor brings that back to the one sentence, so that nobody else has to.
    """

    exit_code = EXIT_WRONG_FILE

    def __init__(self, message: object = "") -> None:
        super().__init__(_readable(_sentence_of(str(message), type(self).__name__)))


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that is not there."""


class NoSpaceError(UserError):
    """A disk that is full, or too small for what will be written."""

    exit_code = EXIT_NO_SPACE


def _sentence_of(message: str, class_name: str) -> str:
    """The message itself, or what stands behind the class name in the trace that PyTorch's loader makes of one."""
    if not message.startswith(f"Caught {class_name} in "):
        return message
    return message.rpartition(f"{class_name}: ")[2].strip()


_LONG_WORD = re.compile(r"\S{600,}")
_LONGEST_MESSAGE = 20_000


def _readable(message: str) -> str:
    """A message without the middle of what is too long to be read: values that somebody's file holds."""
    message = _LONG_WORD.sub(lambda word: f"{word[0][:200]}…{word[0][-60:]}", message)
    return message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]} …"


@contextmanager
def about(source: object) -> Iterator[None]:
    """Put the name of a file before the messages raised in the block that do not name it yet."""
    try:
        yield
    except UserError as error:
        if not str(source) or str(source) in str(error):
            raise
        raise type(error)(f"{source}: {error}") from error.__cause__


@contextmanager
def reported_errors(prog: str | None = None) -> Iterator[None]:
    """Turn errors a user can mend into one line on standard error and an exit status; others keep their trace.

    Those are `UserError`s, files that cannot be opened or written, and, on several ranks, connections that broke
    because another rank failed: its message is the one to read. The exit status is the error's own, mostly 1.
    """
    try:
        yield
    except UserError as error:
        _end(prog, str(error), error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        _end(prog, f"{error.filename}: {error.strerror}", EXIT_NO_SPACE if full else EXIT_WRONG_FILE)
    except RuntimeError as error:
        if "by peer" in str(error):
            print("another process of this run failed; see its message", file=sys.stderr)
            raise SystemExit(EXIT_WRONG_FILE) from None
        if "Timed out waiting" not in str(error):
            raise
        _end(prog, "the other processes gave no sign for --dist-timeout minutes; see what they or their machines say")


def _end(prog: str | None, message: str, exit_code: int = EXIT_WRONG_FILE) -> None:
    print(f"{prog or Path(sys.argv[0]).name}: error: {shown(message)}", file=sys.stderr)
    raise SystemExit(exit_code) from None
