"""What a user can mend is a `UserError`: one sentence that names file, flag or sample and says what to do.

It is raised anywhere, crosses loader workers unchanged, and is reported here and nowhere else.
"""

from __future__ import annotations

import errno
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from itemizedclip.runtime.logs import shown

EXIT_WRONG_FILE = 1
"""Exit status when something read, written or reached is not as needed."""

EXIT_WRONG_FLAG = 2
"""Exit status when a flag, a value or a combination of flags cannot be."""

EXIT_FAULT = 70
"""Exit status of an error that nobody foresaw (sysexits.h: EX_SOFTWARE)."""

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


DEBUG_FLAG = "--debug"
"""Taken by every command: an unexpected error shows its whole trace."""

_traces_are_shown = False


def show_traces() -> None:
    """From now on unexpected errors show their trace."""
    global _traces_are_shown
    _traces_are_shown = True


@contextmanager
def reported_errors(prog: str | None = None) -> Iterator[None]:
    """Turn errors into one line on standard error and an exit status.

    Those a user can mend are `UserError`s, files that cannot be opened or written, and, on several ranks, connections
    that broke because another rank failed: its message is the one to read. Their exit status is their own, mostly 1.
    All others are faults of ours or of a library: their trace goes to a file that the line names, or, with --debug, to
    standard error; the exit status is 70.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # whoever reads the output had enough of it
    except Exception as error:
        known = foreseen(error)
        if known is None:
            if _traces_are_shown:
                raise
            known = _unexpected(error), EXIT_FAULT
        message, exit_code = known
        if not message:
            print("another process of this run failed; see its message", file=sys.stderr)
            raise SystemExit(exit_code) from None
        _end(prog, message, exit_code)


_UNREPEATABLE = re.compile(r"(\S+) does not have a deterministic implementation")

_OUT_OF_GPU_MEMORY = (
    "the GPU's memory is too small; lower --batch-size (in training a higher --accum-freq keeps the contrastive "
    "batch), or train with --grad-checkpointing"
)


def foreseen(error: Exception) -> tuple[str, int] | None:
    """What to say of an error that was foreseen, "" where another rank says it, and the exit status; None of others."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return f"{error.filename}: {error.strerror}", EXIT_NO_SPACE if full else EXIT_WRONG_FILE
    if isinstance(error, RuntimeError) and (found := _UNREPEATABLE.search(str(error))):
        return (
            f"--deterministic: PyTorch has no repeatable form of {found[1]} on this device; drop --deterministic, or "
            "use another --device",
            EXIT_WRONG_FILE,
        )
    if isinstance(error, RuntimeError) and "out of memory" in str(error) and "CUDA" in str(error):
        return _OUT_OF_GPU_MEMORY, EXIT_WRONG_FILE
    if isinstance(error, RuntimeError) and "by peer" in str(error):
        return "", EXIT_WRONG_FILE
    if isinstance(error, RuntimeError) and "Timed out waiting" in str(error):
        return (
            "the other processes gave no sign for --dist-timeout minutes; see what they or their machines say",
            EXIT_WRONG_FILE,
        )
    return None


def _unexpected(error: Exception) -> str:
    """What to say of an error that nobody foresaw; its trace is kept in a file."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" at {Path(last[0].filename).name}:{last[0].lineno}" if last else ""
    first = (str(error).strip().splitlines() or ["no message"])[0][:300]
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="itemizedclip-", suffix=".trace.txt", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.writelines(traceback.format_exception(error))
        where = f"its trace is in {file.name}"
    except OSError:
        where = f"run again with {DEBUG_FLAG} for its trace"
    return (
        f"unexpected {type(error).__name__}{place}: {first}; this is a fault of the program or of a library, {where}: "
        "please report it with the command"
    )


def _end(prog: str | None, message: str, exit_code: int = EXIT_WRONG_FILE) -> None:
    print(f"{prog or Path(sys.argv[0]).name}: error: {shown(message)}", file=sys.stderr)
    raise SystemExit(exit_code) from None
