"""What is to be done to bring an index up to date: images found, compared with what is encoded, cut into shards.

Axes: n images of a shard.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from itemizedclip.data.images import SUFFIXES
from itemizedclip.data.items import is_text
from itemizedclip.evaluation.encoding import EncodingOptions
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import PART_SUFFIX
from itemizedclip.runtime.logs import shown
from itemizedclip.search.store import (
    INDEX_FILE,
    FeatureSource,
    ImageIndexError,
    IndexedImage,
    ShardHeader,
    UnreadableImage,
    read_manifest,
    read_shard_header,
    shard_files,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildOptions:
    """How images are encoded and kept.

    Raises ValueError for a shard of no images or a fraction outside 0 … 1.
    """

    encoding: EncodingOptions = field(default_factory=EncodingOptions)
    """Batch size, workers, precision of the image tower."""

    shard_size: int = 256
    """Images per shard."""

    max_bad_fraction: float = 0.01
    """Share of the images that may be unreadable."""

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise UserError(f"--shard-size is {self.shard_size}; expected at least 1")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"--max-bad-fraction is {self.max_bad_fraction}; expected a share from 0 to 1")


# --- finding images --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoundImage:
    """A file below the image folder; see `IndexedImage`."""

    path: str
    size: int
    mtime_ns: int

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells whether a file is still the one that was encoded."""
        return self.path, self.size, self.mtime_ns


def find_images(folder: Path, output: Path) -> tuple[list[FoundImage], int]:
    """Image files below a folder by path, and the number of other files.

    Hidden files and folders, and the index itself, are passed over; linked folders are followed once.

    Raises:
        ImageIndexError: no such folder, or none with an image.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ImageIndexError(f"{folder}: {what}; expected a folder of images")
    found: list[FoundImage] = []
    others = 0
    seen = {output.resolve()}
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_warn_of_folder):
        real = Path(place).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(place) / name
            if name.startswith(".") or not path.is_file():
                continue
            if path.suffix.lower() not in SUFFIXES:
                others += 1
                continue
            relative = path.relative_to(folder).as_posix()
            if not is_text(relative):
                logger.warning("%s: its name is no UTF-8 text, and is passed over; rename it", shown(path))
                others += 1
                continue
            status = path.stat()
            found.append(FoundImage(relative, status.st_size, status.st_mtime_ns))
    if not found:
        what = f"only {others} other files, none" if others else "no file"
        raise ImageIndexError(f"{folder}: holds {what} that is an image by its name ({' '.join(SUFFIXES)})")
    return sorted(found, key=lambda image: image.path), others


def _warn_of_folder(error: OSError) -> None:
    logger.warning("%s: cannot be opened (%s) and is passed over", shown(error.filename), error.strerror)


# --- planning --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """Images that become one shard."""

    number: int
    images: list[FoundImage]


@dataclass(frozen=True)
class Plan:
    """What is to be done; the same on every rank.

    Attributes:
        kept: images whose features are there.
        chunks: shards to write.
        dropped: images of the index before that are gone or changed.
        unreadable: files that a stopped build found unreadable.
        allowed_bad: unreadable files up to here are skipped.
    """

    kept: list[IndexedImage]
    chunks: list[Chunk]
    dropped: int
    unreadable: list[UnreadableImage]
    allowed_bad: int


def plan_build(
    output: Path, folder: Path, found: Sequence[FoundImage], source: FeatureSource, options: BuildOptions
) -> Plan:
    """Compare what is there with what is wanted; damaged shards are deleted, nothing else is changed.

    Raises:
        ImageIndexError: an index of another checkpoint, other settings or other images.
    """
    headers = _sound_shards(output)
    manifest = read_manifest(output) if (output / INDEX_FILE).is_file() else None
    for held in [manifest.source] if manifest else [header.source for header in headers.values()]:
        if difference := held.difference(source):
            raise ImageIndexError(
                f"{output}: this index was made with {difference}; give another --output, or delete the folder to "
                "make it anew"
            )
    listed = [image for image in manifest.images if image.shard in headers] if manifest else []
    known = {image.path: image for image in listed}
    if manifest and Path(manifest.folder) != folder and not known.keys() & {image.path for image in found}:
        raise ImageIndexError(
            f"{output}: this index is of {manifest.folder}, and {folder} has none of its {len(manifest.images)} "
            "images; give another --output, or delete the folder to make it anew"
        )
    # Shards that no index.json names: a build that was stopped.
    used = {image.shard for image in listed}
    unfinished = [header for number, header in headers.items() if number not in used]
    wanted = {image.key for image in found}
    for header in unfinished:
        for image in header.images:
            if _key(image) in wanted and _key(known.get(image.path)) not in wanted:
                known[image.path] = image
    bad = {_key(image): image for header in unfinished for image in header.unreadable if _key(image) in wanted}
    kept = [known[image.path] for image in found if _key(known.get(image.path)) == image.key]
    have = {_key(image) for image in kept} | bad.keys()
    to_do = [image for image in found if image.key not in have]
    free = (number for number in count() if number not in headers)
    starts = range(0, len(to_do), options.shard_size)
    return Plan(
        kept=kept,
        chunks=[Chunk(next(free), to_do[start : start + options.shard_size]) for start in starts],
        dropped=sum(_key(image) not in wanted for image in manifest.images) if manifest else 0,
        unreadable=list(bad.values()),
        allowed_bad=int(options.max_bad_fraction * len(found)),
    )


def _key(image: IndexedImage | UnreadableImage | None) -> tuple[str, int, int] | None:
    return None if image is None else (image.path, image.size, image.mtime_ns)


def _sound_shards(output: Path) -> dict[int, ShardHeader]:
    """Headers of the shards that can be read; the others are deleted."""
    headers = {}
    for part in output.glob(f".*{PART_SUFFIX}"):
        part.unlink()
    for number, path in shard_files(output).items():
        try:
            headers[number] = read_shard_header(path)
        except ImageIndexError:
            logger.warning("%s: damaged; its images are encoded anew", path)
            path.unlink()
    return headers
