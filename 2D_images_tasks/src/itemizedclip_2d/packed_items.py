"""Item lists of many images in three arrays.

A list of lists of strings costs a Python object per string, and loader processes that only read it still copy it page
by page (reference counts). Arrays are small and stay shared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PackedItems:
    """`packed[row]` is the item list of an image.

    Attributes:
        text: uint8, all items in UTF-8, one after another.
        item_ends: int64, where each item ends in `text`.
        row_ends: int64, where each image's items end in `item_ends`.
    """

    text: NDArray[np.uint8]
    item_ends: NDArray[np.int64]
    row_ends: NDArray[np.int64]

    @staticmethod
    def pack(lists: Iterable[Sequence[str]]) -> PackedItems:
        """The item lists of all images, in order."""
        text = bytearray()
        item_ends, row_ends = [], []
        for items in lists:
            for item in items:
                text += item.encode("utf-8", "replace")  # JSON may hold half a surrogate pair
                item_ends.append(len(text))
            row_ends.append(len(item_ends))
        return PackedItems(
            np.frombuffer(bytes(text), np.uint8), np.array(item_ends, np.int64), np.array(row_ends, np.int64)
        )

    def __len__(self) -> int:
        return len(self.row_ends)

    def __getitem__(self, row: int) -> list[str]:
        """Items of an image; a new list."""
        first, last = (int(self.row_ends[row - 1]) if row else 0), int(self.row_ends[row])
        bounds = [int(self.item_ends[first - 1]) if first else 0, *self.item_ends[first:last].tolist()]
        return [self.text[start:end].tobytes().decode() for start, end in pairwise(bounds)]

    @property
    def sha256(self) -> str:
        """Identity of all lists."""
        digest = hashlib.sha256()
        for array in (self.text, self.item_ends, self.row_ends):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def arrays(self, prefix: str) -> dict[str, NDArray]:
        """The arrays by name, for a file."""
        return {f"{prefix}_{name}": getattr(self, name) for name in ("text", "item_ends", "row_ends")}

    @staticmethod
    def of_arrays(arrays: Mapping[str, NDArray], prefix: str) -> PackedItems:
        """The inverse of `arrays`."""
        return PackedItems(*(arrays[f"{prefix}_{name}"] for name in ("text", "item_ends", "row_ends")))
