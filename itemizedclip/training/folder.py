"""The run folder at the start of a run: which one, whose, with how much room.

logs/<name>/    params.json  log.txt  metrics.jsonl  checkpoints/    and .claim while a run is at work there
"""

from __future__ import annotations

import errno
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from itemizedclip.runtime.claims import Claim, check_unclaimed, claimed
from itemizedclip.runtime.errors import NoSpaceError, UserError
from itemizedclip.runtime.files import remove_leftovers
from itemizedclip.training.checkpoint import find_resume, has_checkpoints, remove_orphans
from itemizedclip.training.options import RunSettings

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


class TrackingError(UserError):
    """The run cannot be recorded as asked: the message says what to do."""


# --- which -----------------------------------------------------------------------------------------------------------


def choose_run_folder(settings: RunSettings, resumed_from: Path | None, now: datetime | None = None) -> Path:
    """The folder of a run, made: --logs/--name, the folder of the resumed checkpoint, or --logs/recipe-date-time.

    A folder of the last kind is a new one, also when two runs start in the same second.

    Raises:
        TrackingError: a run of that name exists and is not being continued.
    """
    if not settings.name:
        if resumed_from is not None and resumed_from.resolve().parent.name == "checkpoints":
            return resumed_from.resolve().parent.parent
        stamp = (now or datetime.now()).strftime("%Y%m%d-%H%M%S")
        return _make_new(settings.logs / f"{settings.recipe or 'run'}-{stamp}")
    folder = settings.logs / settings.name
    _check_name(folder, settings, resumed_from)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_name(folder: Path, settings: RunSettings, resumed_from: Path | None) -> None:
    if resumed_from is None and settings.resume is None and has_checkpoints(folder):
        raise TrackingError(
            f"{folder}: a run of this name exists; continue it with --resume latest, or choose another --name"
        )


def standing_folder(path: Path) -> Path:
    """A folder, or the nearest one above it that there is."""
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        if path.exists():
            raise TrackingError(f"{path}: is no folder; give another place with --logs")
        path = path.parent
    return path


def foresee_folder(settings: RunSettings) -> tuple[Path, Path | None]:
    """What `opened_folder` would open, without making or claiming it: the folder, and the checkpoint to go on from.

    Raises:
        TrackingError, CheckpointError, ClaimedError: what would be raised there.
        OSError: nothing can be written there.
    """
    resumed_from = None
    if settings.resume is not None:
        resumed_from = find_resume(settings.resume, settings.logs, settings.name, recipe=settings.recipe)
    if settings.name:
        folder = settings.logs / settings.name
        _check_name(folder, settings, resumed_from)
        _check_branch(folder, resumed_from)
    elif resumed_from is not None and resumed_from.resolve().parent.name == "checkpoints":
        folder = resumed_from.resolve().parent.parent
    else:
        folder = settings.logs / f"{settings.recipe or 'run'}-(date and time)"
    standing = standing_folder(folder)
    check_unclaimed(folder)
    try:
        with tempfile.TemporaryFile(dir=standing) as file:
            file.write(bytes(2**12))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(standing)) from None
    return folder, resumed_from


def _make_new(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    candidate, number = path, 2
    while True:
        try:
            candidate.mkdir()
            return candidate
        except FileExistsError:
            candidate, number = path.with_name(f"{path.name}-{number}"), number + 1


# --- whose -----------------------------------------------------------------------------------------------------------


@dataclass
class OpenedFolder:
    """A run folder that belongs to this run.

    Attributes:
        path: the folder.
        resumed_from: a verified checkpoint to go on from, or None.
        claim: what makes it ours; None on ranks but the main one.
    """

    path: Path
    resumed_from: Path | None
    claim: Claim | None


@contextmanager
def opened_folder(settings: RunSettings) -> Iterator[OpenedFolder]:
    """Choose the folder, claim it for the block, clear it of what killed runs left; on the main rank.

    Raises:
        TrackingError, CheckpointError, ClaimedError: see `choose_run_folder`, `find_resume`, `claimed`.
    """
    resumed_from = None
    if settings.resume is not None and not settings.name:
        # The checkpoint tells the folder.
        resumed_from = find_resume(settings.resume, settings.logs, "", recipe=settings.recipe)
    was_there = bool(settings.name) and (settings.logs / settings.name).is_dir()
    folder = choose_run_folder(settings, resumed_from)
    with ExitStack() as stack:
        try:
            claim = stack.enter_context(claimed(folder))
            if settings.resume is not None and settings.name:
                resumed_from = find_resume(settings.resume, settings.logs, settings.name, recipe=settings.recipe)
                _check_branch(folder, resumed_from)
        except BaseException:
            stack.close()
            if not was_there and not any(folder.iterdir()):
                folder.rmdir()
            raise
        leftovers = [*remove_leftovers(folder), *remove_leftovers(folder / "checkpoints"), *remove_orphans(folder)]
        for path in leftovers:
            logger.info("removed %s, which a killed run left behind", path)
        if resumed_from is None and settings.resume is None and (folder / "metrics.jsonl").is_file():
            logger.warning("%s: an earlier run of this name left no checkpoint; its metrics are replaced", folder)
        yield OpenedFolder(folder, resumed_from, claim)


def _check_branch(folder: Path, resumed_from: Path | None) -> None:
    """A checkpoint from elsewhere starts a new run, never in the folder of another one."""
    own = resumed_from is None or resumed_from.resolve().is_relative_to(folder.resolve())
    if not own and has_checkpoints(folder):
        raise TrackingError(
            f"{folder}: holds checkpoints of its own, which a run that goes on from {resumed_from} would replace; "
            "choose another --name"
        )


# --- how much room ---------------------------------------------------------------------------------------------------


def check_space(folder: Path, checkpoint_bytes: int, *, is_resumed: bool) -> None:
    """Whether the checkpoints fit: one stays while the next is written.

    Args:
        folder: the run folder.
        checkpoint_bytes: of one checkpoint.
        is_resumed: one is there already.

    Raises:
        NoSpaceError: they do not.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0] if resource is not None else -1
    if 0 <= limit < checkpoint_bytes:
        raise NoSpaceError(
            f"{folder}: a checkpoint takes {size(checkpoint_bytes)}, and this process may write files of at most "
            f"{size(limit)} (ulimit -f); raise that limit"
        )
    count = 1 if is_resumed else 2
    free = shutil.disk_usage(folder).free
    if free < count * checkpoint_bytes:
        raise NoSpaceError(
            f"{folder}: {'a checkpoint takes' if is_resumed else 'two checkpoints take'} "
            f"{size(count * checkpoint_bytes)} (one stays while the next is written), and {size(free)} are free; make "
            "room, or give another place with --logs"
        )


def explain_failed_write(error: OSError, path: Path, last: Path | None, need: int | None = None) -> UserError:
    """One sentence of a write that the disk refused during a run."""
    kept = f"the last good checkpoint is {last}; --resume latest goes on from it" if last else "no checkpoint yet"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"{path}: cannot be written ({error.strerror or error}); {kept}")
    try:
        free = size(shutil.disk_usage(path.parent).free)
    except OSError:
        free = "an unknown number of bytes"
    needed = f"{size(need)} are needed" if need else "more is needed"
    why = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the quota is used up",
        errno.EFBIG: "over the file size limit",
    }
    return NoSpaceError(f"{path}: {why[error.errno]}: {needed}, {free} are free; make room; {kept}")


def size(count: float) -> str:
    """Bytes as people write them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
