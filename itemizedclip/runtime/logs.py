"""What a program shows while it works: its log on standard error, its log file, progress.

Progress is a bar on a terminal and a line a minute otherwise, in every command.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from functools import lru_cache
from logging.handlers import WatchedFileHandler
from pathlib import Path

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
"""Called with (done, to do) as work goes on."""

LINE_EVERY_S = 60.0
"""Seconds between two lines of progress where there is no terminal."""

OWN_PACKAGES = ("itemizedclip", "__main__")
"""What the names of the project's packages begin with: their log is shown; of others, warnings only."""

# --- texts of others -------------------------------------------------------------------------------------------------

_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys instead of showing it (all control characters but tab and line break, changes of direction),
and halves of characters, which cannot be written."""


def shown(text: object) -> str:
    """A text as logs, messages and tables show it: what a terminal would obey is escaped, such as \\x1b.

    Models get the text itself.
    """
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def literal(text: object) -> Text:
    """`shown` for a rich console or table, where "[red]" and ":warning:" stay what they are."""
    return Text(shown(text))


# --- the log ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def standard_error() -> Console:
    """The console on standard error, shared by log and live progress so that they do not overwrite each other."""
    return Console(stderr=True)


@contextmanager
def logging_to_console(rank: int) -> Iterator[None]:
    """Show the project's log and warnings on standard error; ranks but the main one show warnings only.

    Does nothing inside another such block.
    """
    if any(isinstance(handler.formatter, _Formatter) for handler in logging.getLogger().handlers):
        yield
        return
    handler: logging.Handler
    if rank == 0 and standard_error().is_terminal:
        handler = RichHandler(
            console=standard_error(), show_path=False, show_level=False, log_time_format="%H:%M:%S",
            highlighter=NullHighlighter(),
        )  # fmt: skip
        handler.setFormatter(_Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        prefix = "" if rank == 0 else f"[rank {rank}] "
        handler.setFormatter(_Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    with _handling(handler):
        yield


@contextmanager
def only_errors_of(name: str, *, enabled: bool = True) -> Iterator[None]:
    """Keep a logger quiet inside the block, because another rank says the same."""
    target = logging.getLogger(name)
    level = target.level
    if enabled:
        target.setLevel(logging.ERROR)
    try:
        yield
    finally:
        target.setLevel(level)


class _ShownFormatter(logging.Formatter):
    """Lines hold nothing that a terminal obeys, whatever stands in names and items."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


class _Formatter(_ShownFormatter):
    """Says "warning:" where one is meant; information comes as it is."""

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno < logging.WARNING:
            return super().format(record)
        marked = copy(record)
        marked.msg, marked.args = f"{record.levelname.lower()}: {record.getMessage()}", None
        return super().format(marked)


class _LogFile(WatchedFileHandler):
    """A log file that is made again when somebody removed it; what cannot be written is on standard error only."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk is reported by whoever writes checkpoints and metrics, once."""

    def close(self) -> None:
        try:
            super().close()
        except OSError:
            self.stream = None


@contextmanager
def logging_to_file(folder: Path) -> Iterator[None]:
    """Append the project's log, and the error that ends the block, to log.txt of the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(folder / "log.txt", encoding="utf-8")
    handler.setFormatter(_ShownFormatter("%(asctime)s %(levelname)s %(message)s"))
    with _handling(handler):
        try:
            yield
        except Exception as error:
            text = f"ended by {type(error).__name__}: {error}"
            handler.emit(logging.makeLogRecord({"levelno": logging.ERROR, "levelname": "ERROR", "msg": text}))
            raise


@contextmanager
def _handling(handler: logging.Handler) -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    root.setLevel(min(level, logging.INFO))
    # Libraries' chatter stays out; their warnings do not.
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith(OWN_PACKAGES))
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


# --- progress --------------------------------------------------------------------------------------------------------


@contextmanager
def progress_bar(label: str, *, enabled: bool = True) -> Iterator[OnProgress]:
    """Progress on standard error, fed with (done, to do): a bar on a terminal, otherwise a line a minute.

    Args:
        label: what is being done, such as "Reading images".
        enabled: off on ranks that do not print.
    """
    console = standard_error()
    if not enabled or not console.is_terminal:
        yield _lines(label) if enabled else lambda done, to_do: None
        return
    name = TextColumn("{task.description}", markup=False)
    columns = name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(shown(label), total=None)
        yield lambda done, to_do: bar.update(task, completed=done, total=to_do)


def _lines(label: str) -> OnProgress:
    started = last_said = time.monotonic()

    def say(done: int, to_do: int) -> None:
        nonlocal last_said
        now = time.monotonic()
        if now - last_said < LINE_EVERY_S or not 0 < done < to_do:
            return
        last_said = now
        left = (now - started) / done * (to_do - done)
        logger.info("%s: %s of %s, %s left", label.lower(), f"{done:,}", f"{to_do:,}", duration(left))

    return say


def duration(seconds: float) -> str:
    """h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
