"""Checks before the first step: a run that cannot work says why at once, with the remedy, instead of hanging later.

Axes: B images, K item slots, C text context length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from itemizedclip.data.batch import BadSampleError, ItemBatch, ItemSample
from itemizedclip.runtime.errors import UserError

DUPLICATE_SHARE = 0.05
"""Share of a batch's items with a text that another image has too, above which a warning is due."""


class PreflightError(UserError):
    """Training cannot start: the message says what is wrong and what to do."""


def check_dataset(
    dataset: Any, collator: Callable[[Sequence[ItemSample]], ItemBatch], *, step_batch: int, world_size: int
) -> ItemBatch:
    """Load and collate the first usable sample; every failure is one sentence with its remedy.

    Args:
        dataset: takes keys (epoch, index).
        collator: as used in training.
        step_batch: images per process and optimizer step.
        world_size: processes.

    Returns:
        The collated sample, B = 1.

    Raises:
        PreflightError: too little data, no sample that loads, or a sample of the wrong form.
    """
    try:
        num_samples = len(dataset)
    except TypeError as error:
        raise PreflightError(f"the dataset {type(dataset).__name__} has no length; give one that has") from error
    if num_samples == 0:
        raise PreflightError("the training data holds no sample; check its paths and its item file")
    needed = step_batch * world_size
    if num_samples < needed:
        raise PreflightError(
            f"the training data holds {num_samples} samples, one step needs {needed} "
            f"({world_size} processes × {step_batch} images): "
            "lower --batch-size, --accum-batch or --accum-freq, use fewer processes, or give more data"
        )
    sample = _first_sample(dataset, num_samples)
    _check_sample(sample)
    batch = collator([sample])
    _check_batch(batch, sample.sample_id)
    return batch


def _first_sample(dataset: Any, num_samples: int, attempts: int = 10) -> ItemSample:
    """The first of `attempts` samples that loads."""
    messages = []
    for index in range(min(attempts, num_samples)):
        try:
            return dataset[(0, index)]
        except BadSampleError as error:
            messages.append(str(error))
        except FileNotFoundError as error:
            raise PreflightError(f"sample {index}: {error}; check the data's paths") from error
    raise PreflightError(f"none of the first {len(messages)} samples can be used; the first: {messages[0]}")


def _check_sample(sample: ItemSample) -> None:
    name = sample.sample_id
    if not sample.items:
        raise PreflightError(f"{name}: has no text item; expected at least one. Check the item file")
    image = sample.image
    photograph = image.dim() == 3 and image.shape[0] == 3
    study = image.dim() == 5 and image.shape[1] == 1
    if not (photograph or study):
        raise PreflightError(
            f"{name}: image is {tuple(image.shape)}; expected (3, H, W) for a photograph or (S, 1, D, H, W) for a study"
        )
    if not image.is_floating_point():
        raise PreflightError(f"{name}: image is {image.dtype}; expected normalised floating-point values")
    if not torch.isfinite(image).all():
        raise PreflightError(f"{name}: image holds values that are not finite; check its normalisation")


def _check_batch(batch: ItemBatch, name: str) -> None:
    tokens, mask = batch.item_tokens, batch.item_mask
    if tokens.dim() != 3 or tokens.dtype != torch.int64 or tokens.shape[1] < 1:
        raise PreflightError(
            f"{name}: the collator made item tokens of {tokens.dtype} {tuple(tokens.shape)}; expected int64 (B, K, C) "
            "with K of at least 1"
        )
    if mask.dtype != torch.bool or mask.shape != tokens.shape[:2]:
        raise PreflightError(
            f"{name}: the collator made an item mask of {mask.dtype} {tuple(mask.shape)}; "
            f"expected bool {tuple(tokens.shape[:2])}"
        )
    if not mask.any():
        raise PreflightError(f"{name}: every item slot is masked; the sample has no usable item")


def duplicate_items(batch: ItemBatch) -> tuple[int, int]:
    """(items whose text another image of the batch has too, items): false negatives of the objectives."""
    real = batch.item_mask.nonzero()
    texts = batch.item_tokens[batch.item_mask]
    owners: dict[bytes, set[int]] = {}
    keys = [row.tobytes() for row in texts.cpu().numpy()]
    for key, (image, _) in zip(keys, real.tolist()):
        owners.setdefault(key, set()).add(image)
    return sum(len(owners[key]) > 1 for key in keys), len(keys)


def duplicate_warning(batch: ItemBatch, *, normal_check: bool) -> str | None:
    """A sentence when many items of a batch also belong to another image, else None.

    With the normal check, items of normal studies do not count: their pairs carry no loss.
    """
    if normal_check:
        keep = (~batch.is_normal).nonzero()[:, 0]
        if len(keep) == 0:
            return None
        batch = ItemBatch(
            batch.images[keep], batch.item_tokens[keep], batch.item_mask[keep], batch.is_normal[keep],
            [batch.sample_ids[i] for i in keep.tolist()],
        )  # fmt: skip
    duplicates, total = duplicate_items(batch)
    if duplicates <= DUPLICATE_SHARE * total:
        return None
    return (
        f"{duplicates} of {total} items of the first batch have a text that another image has too; such pairs are "
        "trained as negatives although they match. --mask-duplicates leaves such pairs out"
    )
