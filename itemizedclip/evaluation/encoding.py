"""What every evaluator does first: read images batch by batch on all ranks, encode them, encode each text once.

Axes: N images of a data set, B images of a batch, U different texts, C text context length, D joint width, W ranks.

Ranks share the work in whole batches (rank r takes batches r, r + W, …), for images and for texts. A batch is the same
whatever the number of ranks, and so is every number computed from it, to the last digit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from itemizedclip.data.batch import BadSampleError, ItemSample, Tokenizer, trim_padding
from itemizedclip.data.workers import RoomyCollator, unpacked
from itemizedclip.models.dual_encoder import DualEncoder, ImageFeatures
from itemizedclip.runtime import collectives
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.logs import OnProgress
from itemizedclip.runtime.processes import shield_loader_worker


class ItemDataset(Protocol):
    """A data set in evaluation mode: atomic items, all of them, in a fixed order.

    A data set may also have `items(index) -> list[str]`, which spares decoding each image twice.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> ItemSample: ...


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

    def __post_init__(self) -> None:
        for name, lowest in (("batch_size", 1), ("text_batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < lowest:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least {lowest}")


@dataclass(frozen=True)
class ImageBatch:
    """Images `rows_B` of the data set, with their features."""

    rows_B: Tensor
    features: ImageFeatures


@dataclass
class _Images(Dataset):
    """Samples without their texts: (row, image, series names)."""

    dataset: ItemDataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> tuple[int, str, Tensor, Tensor | None]:
        sample = self.dataset[row]
        return row, sample.sample_id, sample.image, sample.series_names


def _collate(samples: list[tuple[int, str, Tensor, Tensor | None]]) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, names, images, series_names = zip(*samples)
    for name, image in zip(names, images):
        if image.shape != images[0].shape:
            raise BadSampleError(
                f"{name} is {tuple(image.shape)}, {names[0]} is {tuple(images[0].shape)}: images of one batch must "
                "have one shape. Resize them alike, or use batch size 1."
            )
    known = [series for series in series_names if series is not None]
    return torch.tensor(rows), torch.stack(images), torch.stack(known) if known else None


def own_batches(count: int, batch_size: int) -> list[list[int]]:
    """This rank's batches of 0 … count − 1."""
    starts = range(0, count, batch_size)[collectives.rank() :: collectives.world_size()]
    return [list(range(start, min(start + batch_size, count))) for start in starts]


def encode_images(
    model: DualEncoder,
    dataset: ItemDataset,
    options: EncodingOptions,
    *,
    num_images: int | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[ImageBatch]:
    """This rank's share of the first `num_images` images (default: all), encoded.

    Raises:
        BadSampleError: images of one batch differ in shape.
    """
    device = model_device(model)
    batches = own_batches(len(dataset) if num_images is None else num_images, options.batch_size)
    loader = DataLoader(
        _Images(dataset),
        batch_sampler=batches,
        num_workers=options.num_workers,
        collate_fn=RoomyCollator(_collate),
        worker_init_fn=shield_loader_worker,
        pin_memory=device.type == "cuda",
    )
    done, to_do = 0, sum(map(len, batches))
    for rows_B, images, series_names in map(unpacked, loader):
        yield ImageBatch(rows_B.to(device), encode_image_batch(model, images, options, series_names=series_names))
        done += len(rows_B)
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


def read_items(dataset: ItemDataset, batch_size: int) -> list[list[str]]:
    """The items of all N images, on every rank; each rank reads its share.

    Raises:
        BadSampleError: an image without an item.
    """
    own = {row: _items_of(dataset, row) for batch in own_batches(len(dataset), batch_size) for row in batch}
    merged: dict[int, list[str]] = {}
    for share in collectives.gather_objects(own):
        merged |= share
    for row in range(len(dataset)):
        if not merged[row]:
            raise BadSampleError(f"image {row} of {type(dataset).__name__} has no text item; expected at least one")
    return [merged[row] for row in range(len(dataset))]


def _items_of(dataset: ItemDataset, row: int) -> list[str]:
    items = getattr(dataset, "items", None)
    return list(items(row) if callable(items) else dataset[row].items)


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
