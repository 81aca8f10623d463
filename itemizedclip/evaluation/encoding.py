"""What every evaluator does first: read images batch by batch on all ranks, encode them, encode each text once.

Axes: N images of a data set, B images of a batch, U different texts, C text context length, D joint width, W ranks.

Ranks share the work in whole batches (rank r takes batches r, r + W, …), for images and for texts. A batch is the same
whatever the number of ranks, and so is every number computed from it, to the last digit.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from itemizedclip.data.batch import BadSampleError, ItemSample, Tokenizer, trim_padding
from itemizedclip.data.workers import LOADER_TIMEOUT_S, RoomyCollator, delivered
from itemizedclip.evaluation.evaluator import ItemDataset, has_parts, items_of, parts_of
from itemizedclip.models.dual_encoder import DualEncoder, ImageFeatures
from itemizedclip.runtime import collectives
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.logs import OnProgress
from itemizedclip.runtime.processes import shield_loader_worker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodingOptions:
    """How images and texts are read and encoded.

    Raises ValueError for a batch size below 1 or a negative number of workers.
    """

    batch_size: int = 32
    """Images per forward pass."""
    text_batch_size: int = 256
    """Texts per forward pass."""
    num_workers: int = 0
    """Processes that read images; 0 reads in this one."""
    autocast_dtype: torch.dtype | None = None
    """Precision of the towers under autocast; None leaves them in the precision of their weights."""
    on_bad_sample: Literal["skip", "stop"] = "stop"
    """An image that cannot be used is left out, named and counted, or ends the evaluation."""

    def __post_init__(self) -> None:
        for name, lowest in (("batch_size", 1), ("text_batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < lowest:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least {lowest}")


# --- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageBatch:
    """Images `rows_B` of the data set, with their features; of each, why parts of it could not be used."""

    rows_B: Tensor
    features: ImageFeatures
    skipped: list[list[str]]


def plan_batches(num_parts: Mapping[int, int], batch_size: int) -> list[list[int]]:
    """Rows in batches of one number of parts, most first, in order of rows among equals.

    Args:
        num_parts: row → parts of the image.
        batch_size: rows of a batch.
    """
    order = sorted(num_parts, key=lambda row: (-num_parts[row], row))
    batches: list[list[int]] = []
    for row in order:
        if batches and len(batches[-1]) < batch_size and num_parts[batches[-1][0]] == num_parts[row]:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def own_batches(count: int, batch_size: int) -> list[list[int]]:
    """This rank's batches of 0 … count − 1."""
    return plan_batches(dict.fromkeys(range(count), 0), batch_size)[collectives.rank() :: collectives.world_size()]


_Read = tuple[int, "ItemSample | str"]
"""An image of a row, or why it cannot be used."""

_Group = tuple[Tensor, Tensor, "Tensor | None", list[list[str]]]
"""Images of one shape: rows, images, series names, skipped parts; a plain tuple, so that the loader can pin it."""


@dataclass
class _Images(Dataset[_Read]):
    dataset: ItemDataset
    skip: bool

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> _Read:
        try:
            return row, self.dataset[row]
        except BadSampleError as error:
            if not self.skip:
                raise
            return row, str(error)


def _collate(entries: list[_Read], *, one_shape: bool) -> tuple[list[_Group], list[tuple[int, str]]]:
    """Images stacked by shape, and the rows that cannot be used."""
    by_shape: dict[tuple[int, ...], list[tuple[int, ItemSample]]] = {}
    unusable = []
    for row, sample in entries:
        if isinstance(sample, str):
            unusable.append((row, sample))
        else:
            by_shape.setdefault(tuple(sample.image.shape), []).append((row, sample))
    if one_shape and len(by_shape) > 1:
        (_, first), (_, other) = (group[0] for group in list(by_shape.values())[:2])
        raise BadSampleError(
            f"{other.sample_id} is {tuple(other.image.shape)}, {first.sample_id} is {tuple(first.image.shape)}: images "
            "of one batch must have one shape. Resize them alike, or use batch size 1."
        )
    groups: list[_Group] = []
    for group in by_shape.values():
        rows, samples = [row for row, _ in group], [sample for _, sample in group]
        names = [sample.series_names for sample in samples if sample.series_names is not None]
        images = torch.stack([sample.image for sample in samples])
        series_names = torch.stack(names) if names else None
        groups.append((torch.tensor(rows), images, series_names, [sample.skipped for sample in samples]))
    return groups, unusable


def encode_images(
    model: DualEncoder,
    dataset: ItemDataset,
    options: EncodingOptions,
    *,
    rows: Sequence[int] | None = None,
    known: Container[int] = (),
    unusable: dict[int, str] | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[ImageBatch]:
    """This rank's share of the images, encoded.

    Args:
        model: in eval mode.
        dataset: the images.
        options: batch size, workers, precision, what to do about images that cannot be used.
        rows: which images; all of them when None.
        known: rows that need not be encoded any more; which others share a batch does not depend on it.
        unusable: gets row → why for images that cannot be used, with on_bad_sample="skip".
        on_progress: called with (done, to do) after each batch.

    Raises:
        BadSampleError: an image that cannot be used, with on_bad_sample="stop", or images of one batch that differ in
            shape, in a data set without parts.
    """
    device = model_device(model)
    rows = range(len(dataset)) if rows is None else rows
    planned = plan_batches({row: len(parts_of(dataset, row)) for row in rows}, options.batch_size)
    left = [[row for row in batch if row not in known] for batch in planned]
    batches = [batch for batch in left if batch][collectives.rank() :: collectives.world_size()]
    loader = DataLoader(
        _Images(dataset, skip=options.on_bad_sample == "skip"),
        batch_sampler=batches,
        num_workers=options.num_workers,
        collate_fn=RoomyCollator(partial(_collate, one_shape=not has_parts(dataset))),
        worker_init_fn=shield_loader_worker,
        pin_memory=device.type == "cuda",
        timeout=LOADER_TIMEOUT_S if options.num_workers else 0,
    )
    done, to_do = 0, sum(map(len, batches))
    for batch, (groups, failed) in zip(batches, delivered(loader)):
        for row, why in failed:
            if unusable is not None and row not in unusable:
                logger.warning("%s", why)
                unusable[row] = why
        for rows_B, images, series_names, skipped in groups:
            for message in (message for messages in skipped for message in messages):
                logger.warning("%s", message)
            features = encode_image_batch(model, images, options, series_names=series_names)
            yield ImageBatch(rows_B.to(device), features, skipped)
        done += len(batch)
        if on_progress:
            on_progress(done, to_do)


@torch.no_grad()
def encode_image_batch(
    model: DualEncoder, images: Tensor, options: EncodingOptions, *, series_names: Tensor | None = None
) -> ImageFeatures:
    """Features of one batch of images, which are moved to the model's device and precision."""
    parameter = next(model.parameters())
    images = images.to(parameter.device, parameter.dtype, non_blocking=True)
    if series_names is not None:
        series_names = series_names.to(parameter.device, non_blocking=True)
    with _autocast(parameter.device, options.autocast_dtype):
        return model.encode_image(images, series_names=series_names)


# --- texts -----------------------------------------------------------------------------------------------------------


def read_items(dataset: ItemDataset, options: EncodingOptions, unusable: dict[int, str]) -> dict[int, list[str]]:
    """Row → items of all images that can be used, in order, on every rank; each rank reads its share.

    Args:
        dataset: the images.
        options: see `EncodingOptions.on_bad_sample`.
        unusable: gets row → why for images of this rank's share that cannot be used, or have no item.

    Raises:
        BadSampleError: such an image, with on_bad_sample="stop".
    """
    own: dict[int, list[str]] = {}
    for row in (row for batch in own_batches(len(dataset), options.batch_size) for row in batch):
        try:
            own[row] = items_of(dataset, row)
        except BadSampleError as error:
            if options.on_bad_sample == "stop":
                raise
            unusable[row] = str(error)
    merged = dict(sorted(entry for share in collectives.gather_objects(own) for entry in share.items()))
    for row in [row for row, items in merged.items() if not items]:
        why = f"image {row} of {type(dataset).__name__} has no text item; expected at least one"
        if options.on_bad_sample == "stop":
            raise BadSampleError(why)
        del merged[row]
        if row in own:
            unusable[row] = why
    return merged


@torch.no_grad()
def encode_texts(model: DualEncoder, tokenizer: Tokenizer, texts: Sequence[str], options: EncodingOptions) -> Tensor:
    """Features (U, D) of U different texts, float32, not normalised, on every rank; each rank encodes its share."""
    device = model_device(model)
    batches = own_batches(len(texts), options.text_batch_size)
    parts = [torch.empty((0, model.head.width), device=device)]
    for batch in batches:
        tokens_NC = trim_padding(tokenizer([texts[u] for u in batch])).to(device)
        with _autocast(device, options.autocast_dtype):
            parts.append(model.encode_text(tokens_NC).float())
    order = torch.tensor([u for batch in batches for u in batch], dtype=torch.int64, device=device)
    features, order = collectives.gather_rows(torch.cat(parts)), collectives.gather_rows(order)
    return features[order.argsort()]


def number_texts(texts: Sequence[str]) -> tuple[list[str], Tensor]:
    """The U different texts in order of first appearance, and for each text its number among them, int64."""
    number_of: dict[str, int] = {}
    numbers = [number_of.setdefault(text, len(number_of)) for text in texts]
    return list(number_of), torch.tensor(numbers, dtype=torch.int64)


def in_order_of_rows(rows_n: Tensor, values: Tensor) -> Tensor:
    """Join what the ranks hold, `values[i]` belonging to image `rows_n[i]`, and sort it by image."""
    rows_n, values = collectives.gather_rows(rows_n), collectives.gather_rows(values)
    return values[rows_n.argsort()]


@contextmanager
def evaluation_mode(model: DualEncoder) -> Iterator[None]:
    """The model in eval mode inside the block, as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def model_device(model: DualEncoder) -> torch.device:
    """Where the model's parameters lie."""
    return next(model.parameters()).device


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
