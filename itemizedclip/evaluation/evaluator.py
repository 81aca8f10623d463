"""What an evaluation is made of: a data set that is read and an evaluator that measures.

Axes: N images of a data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from itemizedclip.data.batch import BadSampleError, ItemSample
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.runtime.collectives import gather_objects
from itemizedclip.runtime.logs import OnProgress


class Evaluator(Protocol):
    """A measurement shared by training and scripts.

    `run` is called on every rank with the bare model in evaluation mode, without gradients and under the run's
    autocast; it shards its work and returns the same numbers on every rank.
    """

    name: str

    def run(self, model: DualEncoder) -> dict[str, float]: ...


class ReportingEvaluator(Evaluator, Protocol):
    """An evaluator that can say what it did.

    Attributes:
        unit: what it reads, such as "images" or "studies".
        on_progress: called with (done, to do) after each batch of this rank.
        facts: after `run`: what result files say besides the measures.
        unusable: after `run`: image number → why it was left out.
    """

    unit: str
    on_progress: OnProgress | None
    facts: dict[str, Any]
    unusable: dict[int, str]


class ItemDataset(Protocol):
    """A data set in evaluation mode: images with all their atomic items, in a fixed order.

    It may also answer the following without reading an image:

        items(row) -> list[str]     its items; without this, each image is read twice where items are needed
        sample_id(row) -> str       its name in result files and stored scores
        parts(row) -> list[str]     names of what it is made of, such as the series of a study. Images of such a data
                                    set may differ in shape; those of as many parts share a forward pass, the largest
                                    first: what does not fit into memory fails at once. Stored scores of an image are
                                    taken over while its parts are the same.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> ItemSample:
        """Raises BadSampleError when the image cannot be used."""


def items_of(dataset: ItemDataset, row: int) -> list[str]:
    """All items of an image."""
    items = getattr(dataset, "items", None)
    return list(items(row) if callable(items) else dataset[row].items)


def sample_id_of(dataset: ItemDataset, row: int) -> str:
    """The name of an image."""
    sample_id = getattr(dataset, "sample_id", None)
    return str(sample_id(row)) if callable(sample_id) else f"image {row}"


def has_parts(dataset: ItemDataset) -> bool:
    """Whether images of the data set are made of parts."""
    return callable(getattr(dataset, "parts", None))


def parts_of(dataset: ItemDataset, row: int) -> list[str]:
    """Names of an image's parts."""
    return list(dataset.parts(row)) if has_parts(dataset) else []  # type: ignore[attr-defined]


def joined_unusable(evaluator: ReportingEvaluator, unusable: Mapping[int, str], count: int) -> dict[int, str]:
    """Row → why an image cannot be used, of all ranks, in order; every rank must call it.

    Raises:
        BadSampleError: it is every one of the `count` images.
    """
    merged = dict(sorted(entry for share in gather_objects(dict(unusable)) for entry in share.items()))
    if len(merged) == count:
        first = merged[min(merged)]
        raise BadSampleError(
            f"{evaluator.name}: none of the {count:,} {evaluator.unit} can be used; the first: {first}"
        )
    return merged


def facts_of_unusable(dataset: ItemDataset, unusable: Mapping[int, str]) -> dict[str, dict[str, str]]:
    """What result files say of images that were left out; nothing when there are none."""
    return {"unusable": {sample_id_of(dataset, row): why for row, why in unusable.items()}} if unusable else {}
