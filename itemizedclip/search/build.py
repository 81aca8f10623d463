"""Encoding a folder of images into an index, and keeping it up to date.

What is encoded already, of this size and time of change, stays; new and changed images are encoded, deleted ones
dropped. Work is cut into shards beforehand and shards are shared by the ranks, so the files are the same whatever the
number of processes, and a build that was stopped loses at most one unfinished shard per process.

Axes: n images of a shard, B images of a batch, L image tokens, D joint width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from time import perf_counter

import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.images import decode_photograph
from itemizedclip.data.workers import LOADER_TIMEOUT_S, RoomyCollator, delivered
from itemizedclip.evaluation.encoding import EncodingOptions, encode_image_batch, evaluation_mode
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.runtime import collectives
from itemizedclip.runtime.logs import OnProgress
from itemizedclip.runtime.processes import on_main, shield_loader_worker
from itemizedclip.search.plan import BuildOptions, Chunk, FoundImage, Plan, find_images, plan_build
from itemizedclip.search.store import (
    INDEX_FILE,
    STORAGE_DTYPES,
    FeatureSource,
    ImageIndexError,
    IndexedImage,
    Manifest,
    ShardHeader,
    UnreadableImage,
    map_shard,
    read_manifest,
    shard_files,
    shard_path,
    write_manifest,
    write_shard,
)

LEAST_LIVE_FRACTION = 0.5
"""A shard with fewer rows in use than this fraction is written again without the others."""

SECONDS_BETWEEN_REPORTS = 60.0
"""Of a long build, in the log."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        kept: images whose features were there.
        encoded: images encoded now.
        dropped: images of the index before that are gone or changed.
        unreadable: files left out.
        others: files that are no images by their names.
        num_bytes: of the index on disk.
    """

    kept: int
    encoded: int
    dropped: int
    unreadable: list[UnreadableImage]
    others: int
    num_bytes: int

    @property
    def num_images(self) -> int:
        """Images of the index."""
        return self.kept + self.encoded


# --- encoding --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loaded:
    """An image as the tower takes it, or why there is none."""

    found: FoundImage
    pixels: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    reason: str = ""


@dataclass
class _Photographs(Dataset):
    """Images read from files, in worker processes."""

    folder: Path
    images: list[FoundImage]
    transform: Callable[[Image.Image], Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> _Loaded:
        found = self.images[index]
        path = self.folder / found.path
        try:
            picture = decode_photograph(path, source=str(path))
        except BadSampleError as error:
            return _Loaded(found, reason=str(error))
        return _Loaded(found, self.transform(picture), (picture.height, picture.width))


def _as_list(loaded: list[_Loaded]) -> list[_Loaded]:
    return loaded


@dataclass
class _Written:
    """What this rank wrote and left out."""

    images: list[IndexedImage] = field(default_factory=list)
    unreadable: list[UnreadableImage] = field(default_factory=list)


def encode_chunks(
    model: DualEncoder,
    folder: Path,
    output: Path,
    plan: Plan,
    transform: Callable[[Image.Image], Tensor],
    source: FeatureSource,
    options: BuildOptions,
    on_progress: OnProgress | None = None,
) -> _Written:
    """Write this rank's shards.

    Raises:
        BadSampleError: more unreadable files than allowed.
        ImageIndexError: features that the storage type cannot hold, or a folder that cannot be written to.
    """
    own = plan.chunks[collectives.rank() :: collectives.world_size()]
    images = [image for chunk in own for image in chunk.images]
    loads = delivered(_loader(folder, images, own, transform, options.encoding))
    written = _Written()
    told = perf_counter()
    for chunk in own:
        num_batches = -(-len(chunk.images) // options.encoding.batch_size)
        parts: list[tuple[Tensor, Tensor]] = []
        header = ShardHeader(source, [], [])
        for loaded in islice(loads, num_batches):
            good = _sort_out(loaded, chunk, header)
            if good:
                parts.append(_encode(model, torch.stack(good), source, options.encoding))
            if on_progress:
                on_progress(len(written.images) + len(written.unreadable) + _done(header), len(images))
        if parts:
            global_nD, tokens_nLD = (torch.cat(part) for part in zip(*parts))
            write_shard(output, chunk.number, global_nD, tokens_nLD, header)
        written.images += header.images
        written.unreadable += header.unreadable
        if perf_counter() - told > SECONDS_BETWEEN_REPORTS:
            told = perf_counter()
            done = len(written.images) + len(written.unreadable)
            logger.info("%s of %s images encoded by this process", f"{done:,}", f"{len(images):,}")
        check_bad(len(plan.unreadable) + len(written.unreadable), plan, header.unreadable)
    return written


def _loader(
    folder: Path,
    images: list[FoundImage],
    chunks: Sequence[Chunk],
    transform: Callable[[Image.Image], Tensor],
    encoding: EncodingOptions,
) -> DataLoader:
    """Batches of images that never reach over the end of a chunk."""
    batches: list[list[int]] = []
    first = 0
    for chunk in chunks:
        last = first + len(chunk.images)
        starts = range(first, last, encoding.batch_size)
        batches += [list(range(start, min(start + encoding.batch_size, last))) for start in starts]
        first = last
    dataset = _Photographs(folder, images, transform)
    collate = RoomyCollator(_as_list)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=encoding.num_workers,
        collate_fn=collate,
        worker_init_fn=shield_loader_worker,
        timeout=LOADER_TIMEOUT_S if encoding.num_workers else 0,
    )


def _sort_out(loaded: Sequence[_Loaded], chunk: Chunk, header: ShardHeader) -> list[Tensor]:
    """Note a batch in the header; returns the images that can be encoded."""
    good = []
    for one in loaded:
        found = one.found
        if one.pixels is None:
            logger.warning("%s; skipped", one.reason)
            header.unreadable.append(UnreadableImage(*found.key, one.reason))
            continue
        header.images.append(IndexedImage(*found.key, *one.size, chunk.number, len(header.images)))
        good.append(one.pixels)
    return good


def _done(header: ShardHeader) -> int:
    return len(header.images) + len(header.unreadable)


def _encode(
    model: DualEncoder, images: Tensor, source: FeatureSource, encoding: EncodingOptions
) -> tuple[Tensor, Tensor]:
    """Global features and tokens in the storage type, on the CPU."""
    features = encode_image_batch(model, images, encoding)
    stored = []
    for values in (features.global_BD, features.tokens_BLD):
        kept = values.to(STORAGE_DTYPES[source.storage])
        if not torch.isfinite(kept).all():
            if torch.isfinite(values).all():
                raise ImageIndexError(
                    f"features reach {values.abs().max():.3g}, more than {source.storage} holds; use --storage bfloat16"
                )
            raise ImageIndexError("the model's features are not finite; check the checkpoint and --precision")
        stored.append(kept.cpu())
    return stored[0], stored[1]


def check_bad(num_bad: int, plan: Plan, newest: Sequence[UnreadableImage]) -> None:
    """Stop when too many files are unreadable; what is encoded stays.

    Raises:
        BadSampleError: naming one of them.
    """
    if num_bad > plan.allowed_bad and newest:
        raise BadSampleError(
            f"{num_bad} unreadable images, more than --max-bad-fraction allows ({plan.allowed_bad}); the last: "
            f"{newest[-1].reason}. Mend or remove them, or raise the limit; what is encoded stays"
        )


# --- the whole build -------------------------------------------------------------------------------------------------


def build_index(
    model: DualEncoder,
    folder: Path,
    output: Path,
    *,
    checkpoint: Path,
    transform: Callable[[Image.Image], Tensor],
    source: FeatureSource,
    options: BuildOptions,
    on_progress: OnProgress | None = None,
) -> BuildReport:
    """Bring the index of a folder up to date; all ranks call it, the model on their device.

    Args:
        model: a model of photographs.
        folder: image folder, absolute.
        output: index folder.
        checkpoint: where the model came from, absolute; looked up again by searches.
        transform: picture → what the model takes.
        source: what the features depend on.
        options: how to encode.
        on_progress: called after each batch with images done and to do.

    Raises:
        ImageIndexError: wrong folders, an index of another model, a folder that cannot be written to.
        BadSampleError: too many unreadable images, or no readable one.
    """
    with _locked(output), evaluation_mode(model):
        found, others = on_main(lambda: find_images(folder, output))
        plan = on_main(lambda: plan_build(output, folder, found, source, options))
        written = encode_chunks(model, folder, output, plan, transform, source, options, on_progress)
        shares = collectives.gather_objects((written.images, written.unreadable))
        encoded = [image for images, _ in shares for image in images]
        unreadable = sorted([*plan.unreadable, *(bad for _, bads in shares for bad in bads)], key=lambda bad: bad.path)
        on_main(lambda: check_bad(len(unreadable), plan, unreadable))
        images = sorted([*plan.kept, *encoded], key=lambda image: image.path)
        num_bytes = on_main(lambda: _finish(output, folder, checkpoint, source, images, unreadable))
        return BuildReport(len(plan.kept), len(encoded), plan.dropped, unreadable, others, num_bytes)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """The main rank keeps other builds out of the folder."""
    lock = FileLock(output / ".lock")

    def acquire() -> None:
        try:
            output.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise ImageIndexError(f"{output}: another process is building this index; wait for it") from None
        except OSError as error:
            raise ImageIndexError(
                f"{output}: an index cannot be kept there ({error.strerror or error}); give a writable folder by "
                "--output"
            ) from error

    on_main(acquire)
    try:
        yield
    finally:
        lock.release()


def _finish(
    output: Path,
    folder: Path,
    checkpoint: Path,
    source: FeatureSource,
    images: list[IndexedImage],
    unreadable: list[UnreadableImage],
) -> int:
    """Write index.json, then delete what it does not name; returns the bytes on disk."""
    if not images:
        raise BadSampleError(f"{folder}: no image can be read; the first: {unreadable[0].reason}")
    images = _without_waste(output, source, images)
    before = read_manifest(output) if (output / INDEX_FILE).is_file() else None
    grid = _grid(source, map_shard(shard_path(output, images[0].shard)).grid)
    recall = before.recall if before else None
    write_manifest(output, Manifest(str(folder), str(checkpoint), source, grid, images, unreadable, recall))
    used = {image.shard for image in images}
    for number, path in shard_files(output).items():
        if number not in used:
            path.unlink()
    return sum(path.stat().st_size for path in [output / INDEX_FILE, *shard_files(output).values()])


def _grid(source: FeatureSource, tokens: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of patches, which fill the square view of a model of photographs."""
    vision = source.model_config["vision_cfg"]
    size, patch = vision["image_size"], vision["patch_size"]
    rows, columns = (length // patch for length in (size if isinstance(size, (list, tuple)) else (size, size)))
    if rows * columns != tokens[0]:
        raise ImageIndexError(f"{tokens[0]} image tokens do not fill a grid of {rows} × {columns} patches")
    return rows, columns


def _without_waste(output: Path, source: FeatureSource, images: list[IndexedImage]) -> list[IndexedImage]:
    """Write shards again of which most rows are no longer used; returns the images where they lie then."""
    rows_of: dict[int, list[IndexedImage]] = {}
    for image in images:
        rows_of.setdefault(image.shard, []).append(image)
    present = shard_files(output)
    free = (number for number in count() if number not in present)
    moved: dict[str, IndexedImage] = {}
    for number, live in sorted(rows_of.items()):
        shard = map_shard(present[number])
        if len(live) >= LEAST_LIVE_FRACTION * len(shard.global_BD):
            continue
        rows = torch.tensor([image.row for image in live])
        new = next(free)
        placed = [replace(image, shard=new, row=row) for row, image in enumerate(live)]
        write_shard(output, new, shard.global_BD[rows], shard.tokens_BLD[rows], ShardHeader(source, placed, []))
        moved |= {image.path: image for image in placed}
    return [moved.get(image.path, image) for image in images]
