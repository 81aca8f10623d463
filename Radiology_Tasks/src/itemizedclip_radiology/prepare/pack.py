"""`itemizedclip prepare pack FOLDER --to OUT`: `.pt` volumes → packed ones, smaller and readable in parts.

Each file is read back and compared before it counts. Files that are packed already stay, so a stopped command goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from itemizedclip.data.batch import BadSampleError
from itemizedclip.runtime.errors import MissingFileError, UserError, reported_errors
from itemizedclip.runtime.files import check_writable
from itemizedclip.runtime.flags import loader_processes, read_flags
from itemizedclip.runtime.logs import logging_to_console, progress_bar
from itemizedclip_radiology.data.packed_volumes import PACKED_SUFFIX, PackedVolume, write_packed
from itemizedclip_radiology.data.volumes import read_volume

logger = logging.getLogger(__name__)

PROG = "itemizedclip prepare pack"
DESCRIPTION = (
    "Volumes (.pt) below a folder, in compressed chunks: smaller files, of which a crop reads a part. Values stay the "
    "same to the bit. Training, evaluation and the viewers take a packed file wherever the .pt of its name is missing."
)


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What to pack, and where it goes."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder of .pt volumes, searched with all folders below."""

    to: Path
    """Folder for the packed volumes, at the same places below it; may be FOLDER itself, where both then lie."""

    level: int = 5
    """Of the compression, 1 (quick) to 9 (small)."""

    workers: int | None = None
    """Processes that pack; None: one per core that this process has, at most 8; 0: none besides this one."""

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 9:
            raise UserError(f"--level is {self.level}; expected 1 to 9")


@dataclass(frozen=True)
class PackReport:
    """What was done.

    Attributes:
        packed, kept: files packed now, and before.
        bytes_before, bytes_after: of the files packed now.
        unreadable: why files were left out.
    """

    packed: int
    kept: int
    bytes_before: int
    bytes_after: int
    unreadable: list[str]


def pack_folder(options: PackOptions) -> PackReport:
    """Pack every volume; those that cannot be read are named and left out.

    Raises:
        UserError: no such folder, no volume in it, or one that cannot be written to.
    """
    folder = options.folder.expanduser()
    if not folder.is_dir():
        raise MissingFileError(f"{folder}: no such folder")
    to = check_writable(options.to, "--to")
    sources = sorted(folder.rglob("*.pt"))
    if not sources:
        raise UserError(f"{folder}: no .pt file below it; expected volumes such as STUDY/SERIES/img.pt")
    jobs = [(path, to / path.relative_to(folder).with_suffix(PACKED_SUFFIX)) for path in sources]
    waiting = [(*job, options.level) for job in jobs if not job[1].is_file()]
    unreadable: list[str] = []
    before = after = 0
    with progress_bar("Packing volumes") as advance:
        for done, (source_bytes, packed_bytes, problem) in enumerate(_mapped(_pack_one, waiting, options.workers), 1):
            before, after = before + source_bytes, after + packed_bytes
            if problem:
                logger.warning("%s; left out", problem)
                unreadable.append(problem)
            advance(done, len(waiting))
    return PackReport(len(waiting) - len(unreadable), len(jobs) - len(waiting), before, after, unreadable)


def _mapped(
    call: Callable[[tuple[Path, Path, int]], tuple[int, int, str]],
    jobs: Sequence[tuple[Path, Path, int]],
    workers: int | None,
) -> Iterable[tuple[int, int, str]]:
    processes = loader_processes(workers)
    if not processes or len(jobs) < 2:
        yield from map(call, jobs)
        return
    with ProcessPoolExecutor(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(call, jobs, chunksize=4)


def _pack_one(job: tuple[Path, Path, int]) -> tuple[int, int, str]:
    """Bytes before and after, and what is wrong."""
    source, target, level = job
    try:
        volume = read_volume(source)
        write_packed(target, volume, level=level)
    except BadSampleError as error:
        return 0, 0, str(error)
    except UserError as error:
        return 0, 0, f"{source}: {error}"
    if not torch.equal(PackedVolume(target).whole(), volume):
        target.unlink()
        return 0, 0, f"{source}: its packed file does not hold the same values; check the disk"
    return source.stat().st_size, target.stat().st_size, ""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `itemizedclip prepare pack`."""
    options = read_flags(PackOptions, argv, prog=PROG, description=DESCRIPTION)
    with reported_errors(PROG), logging_to_console(0):
        report = pack_folder(options)
        logger.info(
            "%d volumes packed (%d were already): %.1f MB became %.1f MB", report.packed, report.kept,
            report.bytes_before / 1e6, report.bytes_after / 1e6,
        )  # fmt: skip
        if report.unreadable and not report.packed and not report.kept:
            raise UserError(f"{options.folder}: no volume could be packed; the first: {report.unreadable[0]}")


if __name__ == "__main__":
    main()
