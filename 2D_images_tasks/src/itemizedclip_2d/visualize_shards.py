"""Attention pictures of images in webdataset shards: the image and, for each text item, where the model looked.

    python 2D_images_tasks/src/visualize/shards.py --resume epoch_100.pt --val-data 'DIR/{00058..00059}.tar' \\
        --external-captions first_300000_rewrites.json --viz-id 3,17-25

`visualize_itemized_cc3m.sh` is the same with its paths in environment variables.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchvision.transforms.functional import pil_to_tensor

from itemizedclip.data.items import load_item_lists
from itemizedclip.runtime.flags import read_flags
from itemizedclip_2d.pictures import Picture, VisualizeOptions, visualize
from itemizedclip_2d.shard_index import expand_shards, open_shards
from itemizedclip_2d.shards import ShardDataset

PROG = "visualize_itemized_cc3m.sh"
DESCRIPTION = "Draw where the model looks in the images of shards: one figure per image, one overlay per text item."


@dataclass(frozen=True)
class ShardPictures:
    """Natural images: the shards to show."""

    val_data: str
    """Shards: brace ranges such as 'DIR/{00058..00059}.tar', joined by '::'; --viz-id counts their usable samples."""

    external_captions: str = "captions"
    """Item file {"0": ["item", …], …} by sample index; captions: the samples' own captions for all."""

    caption_field: str = "shortIB_captions"
    """JSON field of a sample's own captions, which stand in where the item file has none."""

    cache_dir: Path | None = None
    """Folder for the indices of the shards; default beside them."""


@dataclass(frozen=True, kw_only=True)
class ShardVisualize(VisualizeOptions):
    """Attention pictures of shards."""

    data: ShardPictures = field()


class ShardPictureSource:
    """The usable samples of some shards as pictures.

    Args:
        data: the shards.
        own_items: texts to ask every image instead of its items, or None.

    Raises:
        PreflightError, FileNotFoundError, ValueError: shards or an item file that cannot be used.
    """

    def __init__(self, data: ShardPictures, own_items: list[str] | None) -> None:
        items_path = None if data.external_captions == "captions" else Path(data.external_captions)
        self._own_items = own_items
        self._dataset = ShardDataset(
            open_shards(expand_shards(data.val_data), caption_field=data.caption_field, cache_dir=data.cache_dir),
            transform=pil_to_tensor,
            items=None if items_path is None else load_item_lists(items_path, integer_keys=True),
            items_path=items_path,
            num_items=sys.maxsize,  # every item is shown
            is_train=False,
            seed=0,
            on_bad_sample="skip",
            max_bad_fraction=1.0,
        )

    def __len__(self) -> int:
        return len(self._dataset)

    def usable(self) -> Sequence[int]:
        return range(len(self._dataset))

    def picture(self, number: int) -> Picture:
        items = self._own_items or self._dataset.items(number)
        return Picture(number, self._dataset.name(number), self._dataset.image(number), items)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of visualize_itemized_cc3m.sh."""
    options = read_flags(ShardVisualize, argv, prog=PROG, description=DESCRIPTION, published=True)
    visualize(options, lambda: ShardPictureSource(options.data, options.selection.own_items), PROG)
