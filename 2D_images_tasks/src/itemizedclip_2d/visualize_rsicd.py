"""Attention pictures of RSICD images: the image and, for each text item, where the model looked.

    python 2D_images_tasks/src/visualize/main.py --resume epoch_100.pt --rsicd-data-dir DIR \\
        --external-captions 'train.json;test.json' --viz-id 3,17-25

`visualize_rsicd.sh` is the same with its paths in environment variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torchvision.transforms.functional import pil_to_tensor

from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.items import load_item_lists
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.flags import read_flags
from itemizedclip_2d.pictures import Picture, VisualizeOptions, visualize
from itemizedclip_2d.recipes import RsicdData
from itemizedclip_2d.rsicd import RsicdDataset, load_external_captions
from itemizedclip_2d.rsicd_table import open_rsicd_table

PROG = "visualize_rsicd.sh"
DESCRIPTION = "Draw where the model looks in RSICD images: one figure per image, one overlay per text item."


@dataclass(frozen=True)
class RsicdPictures(RsicdData):
    """Remote sensing: where RSICD lies and which split to show."""

    split: Literal["train", "valid", "test"] = "test"
    """The CSV whose rows --viz-id counts, the first row below the header being 0."""


@dataclass(frozen=True)
class RsicdVisualize(VisualizeOptions):
    """Attention pictures of RSICD."""

    data: RsicdPictures = field(default_factory=RsicdPictures)


class RsicdSource:
    """The rows of one RSICD split as pictures; rows that cannot be used are left out.

    Args:
        data: where the split lies.
        own_items: texts to ask every image instead of its items, or None.

    Raises:
        FileNotFoundError: a CSV or an item file that does not exist.
        ValueError: no folder given, no item file for the split, or files that do not belong together.
    """

    def __init__(self, data: RsicdPictures, own_items: list[str] | None) -> None:
        if data.rsicd_dir is None:
            raise UserError(f"--rsicd-data-dir is not set; give the folder with {data.split}.csv")
        csv_path = data.rsicd_dir / f"{data.split}.csv"
        items_path = None if own_items else _items_path(data)
        items: dict[int, list[str]] | None = None
        if own_items:
            items = dict.fromkeys(range(len(open_rsicd_table(csv_path, data.cache_dir))), own_items)
        elif items_path is not None:
            items = load_item_lists(items_path, integer_keys=True)
        self._own_items = own_items
        self._dataset = RsicdDataset(
            csv_path=csv_path,
            transform=pil_to_tensor,
            items=items,
            items_path=items_path,
            num_items=1,
            is_train=False,
            seed=0,
            cache_dir=data.cache_dir,
            on_bad_sample="skip",
        )
        self._index_of_row = {row: index for index, row in enumerate(self._dataset.rows)}

    def __len__(self) -> int:
        return len(self._dataset.table)

    def usable(self) -> Sequence[int]:
        return self._dataset.rows

    def picture(self, number: int) -> Picture:
        table = self._dataset.table
        if number not in self._index_of_row:
            reason = next(bad.reason for bad in self._dataset.skipped if bad.row == number)
            raise BadSampleError(f"{table.describe(number)}: {reason}. Leave it out of --viz-id, or mend it.")
        items = self._own_items or self._dataset.items(self._index_of_row[number])
        return Picture(number, table.filenames[number], table.image(number), items)


def _items_path(data: RsicdPictures) -> Path | None:
    """The split's item file; None for its captions."""
    if data.external_captions == "captions":
        return None
    files = load_external_captions(data.external_captions)
    if data.split not in files:
        raise UserError(
            f"--external-captions {data.external_captions!r} has no item file for --split {data.split}; give "
            "'train.json;valid.json;test.json', or captions for the CSV's own sentences"
        )
    return files[data.split]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of visualize_rsicd.sh."""
    options = read_flags(RsicdVisualize, argv, prog=PROG, description=DESCRIPTION, published=True)
    visualize(options, lambda: RsicdSource(options.data, options.selection.own_items), PROG)
