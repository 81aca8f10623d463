"""Your own images: a JSONL file, one image with its text items per line.

    {"image": "a/0001.jpg", "items": ["a red roof", "two parked cars"]}
    {"image": "a/0002.jpg", "items": ["a lake"]}

Paths are relative to the file, or to another folder. Items are independent: each is one fact, in its own words.

Axes: K item slots.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from itemizedclip.data.batch import BadSampleError, ItemSample
from itemizedclip.data.images import decode_photograph
from itemizedclip.data.items import diverse_sample, sample_items, sample_rng, seeded_transforms
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import parse_json, read_text

logger = logging.getLogger(__name__)

HOLDING = '{"image": "PATH", "items": ["text", …]} on each line'

_MOST_LISTED = 5


class ImageItems(Dataset[ItemSample]):
    """Images of a JSONL file and their items.

    Training draws K texts per image and crops at random; evaluation gives every item, in order. All random choices of
    a training sample, those of the transform included, follow from (seed, epoch, index).

    Args:
        path: the JSONL file.
        transform: RGB image → float tensor (3, H, W).
        num_items: K, texts drawn per training image; not used in evaluation.
        is_train: see above.
        seed: seed of the draws.
        join_items: training texts are 1 … 3 items joined (paper: diverse sampling) instead of single ones.
        image_root: folder the paths are relative to; default the file's.
        on_bad_sample: a line that cannot be used is left out and named, or ends everything.

    Raises:
        MissingFileError: no such file.
        UserError: not such a file, or no usable line.
        BadSampleError: a line that cannot be used, with "stop".
    """

    def __init__(
        self,
        path: str | Path,
        transform: Callable[[Image.Image], Tensor],
        *,
        num_items: int,
        is_train: bool,
        seed: int = 0,
        join_items: bool = False,
        image_root: str | Path | None = None,
        on_bad_sample: Literal["skip", "stop"] = "stop",
    ) -> None:
        self.path = Path(path).expanduser()
        self.transform = transform
        self.num_items = num_items
        self.is_train = is_train
        self.seed = seed
        self.join_items = join_items
        self.root = self.path.parent if image_root is None else Path(image_root).expanduser()
        self.images: list[str] = []
        self._items: list[list[str]] = []
        self._read(on_bad_sample)

    def _read(self, on_bad_sample: str) -> None:
        bad = []
        for number, line in enumerate(read_text(self.path, holding=HOLDING).splitlines(), start=1):
            if not line.strip():
                continue
            where = f"{self.path}: line {number}"
            try:
                image, items = _entry(parse_json(line, source=where, holding=HOLDING), where)
            except UserError as error:
                if on_bad_sample == "stop":
                    raise BadSampleError(f"{error}. Fix it (--on-bad-sample skip goes on without it)") from None
                bad.append(str(error))
                continue
            self.images.append(image)
            self._items.append(items)
        if not self.images:
            raise UserError(bad[0] if bad else f"{self.path}: holds no line; expected {HOLDING}")
        if bad:
            listed = "\n  ".join(bad[:_MOST_LISTED])
            logger.warning("%s: %d lines left out:\n  %s", self.path, len(bad), listed)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> ItemSample:
        """Sample of an index, or of (epoch, index); an index alone means epoch 0.

        Raises:
            IndexError: index outside the dataset.
            BadSampleError: an image that is missing or cannot be decoded.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        name, items = self.images[index], self._items[index]
        picture = decode_photograph(self.root / name, source=str(self.root / name))
        if not self.is_train:
            return ItemSample(name, self.transform(picture), list(items))
        generator = sample_rng(self.seed, epoch, index)
        if self.join_items:
            texts = diverse_sample(items, self.num_items, generator, limit_joined_to_items=True)
        else:
            texts = sample_items(items, self.num_items, generator)
        with seeded_transforms(generator):
            return ItemSample(name, self.transform(picture), texts)

    def items(self, index: int) -> list[str]:
        """All items of an image, in order; the image is not read."""
        return list(self._items[index])

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the images' names and items, the same on any machine. For checkpoints."""
        return hashlib.sha256(json.dumps([self.images, self._items]).encode()).hexdigest()


def _entry(value: object, where: str) -> tuple[str, list[str]]:
    """Path and items of one line."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected {HOLDING}")
    image, items = value.get("image"), value.get("items")
    if not isinstance(image, str) or not image.strip() or "\0" in image:
        raise UserError(f"{where}: field 'image': expected the path of an image, found {json.dumps(image)[:60]}")
    if not isinstance(items, Sequence) or isinstance(items, str) or not all(isinstance(text, str) for text in items):
        raise UserError(f"{where}: field 'items': expected a list of texts, found {json.dumps(items)[:60]}")
    texts = [text.strip() for text in items if text.strip()]
    if not texts:
        raise UserError(f"{where}: field 'items' holds no text; expected at least one")
    return image, texts
