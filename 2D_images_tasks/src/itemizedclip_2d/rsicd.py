"""RSICD, remote-sensing photographs with captions: dataset, item files, validation split, the 30 scene classes.

Files (Kaggle layout): train.csv, valid.csv, test.csv with the columns filename, captions, image; item files
{"0": ["item", …], …} keyed by CSV row; large_label.json, one class number per test.csv row.

A *row* is a CSV data row counted from 0; an *index* counts the usable rows of a dataset. They differ once a bad row
has been skipped.

Axes: K item slots.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from itemizedclip.data.batch import BadSampleError, ItemSample
from itemizedclip.data.items import diverse_sample, normalise_item, sample_rng, seeded_transforms, split_captions
from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.runtime.files import read_json
from itemizedclip_2d.rsicd_table import BadRow, open_rsicd_table

logger = logging.getLogger(__name__)

# The order of the label numbers; not alphabetical throughout (stadium stands before school).
RSICD_CLASSES = (
    "airport", "bareland", "baseball field", "beach", "bridge", "center", "church", "commercial",
    "dense residential area", "desert", "farmland", "forest", "industrial area", "meadow", "medium residential area",
    "mountain", "park", "parking", "playground", "pond", "port", "railway station", "resort", "river", "stadium",
    "school", "sparse residential area", "square", "storage tanks", "viaduct",
)  # fmt: skip

OnBadSample = Literal["skip", "stop"]

_MAX_LISTED_ROWS = 5


def caption_items(captions: Sequence[str]) -> list[str]:
    """Items of an image that has captions but no item list: its captions split at full stops, lower-cased.

    The CSV writes the captions side by side, so that they read as one text. A caption that lacks its full stop still
    ends its item here instead of running into the next caption.
    """
    return split_captions(".".join(captions))


class RsicdDataset(Dataset[ItemSample]):
    """Images and text items of one RSICD split.

    Training draws K texts per image, most of them several items joined (`diverse_sample`, the number joined limited
    to the items the image has). Evaluation gives every item, in order and alone. All random choices of a training
    sample, those of the transform included, follow from (seed, epoch, row).

    Attributes:
        rows: CSV row of each index.
        skipped: rows left out, with reasons.
        table: all rows of the CSV.
    """

    def __init__(
        self,
        *,
        csv_path: str | Path,
        transform: Callable[[Image.Image], Tensor],
        items: Mapping[int, Sequence[str]] | None,
        num_items: int,
        is_train: bool,
        seed: int,
        items_path: str | Path | None = None,
        cache_dir: str | Path | None = None,
        on_bad_sample: OnBadSample = "stop",
    ) -> None:
        """Open a split; the first use of a CSV builds its image cache (see `open_rsicd_table`).

        Args:
            csv_path: the split's CSV.
            transform: RGB image → float tensor (3, H, W).
            items: CSV row → item list, as `load_item_lists(path, integer_keys=True)` returns it. None takes the
                captions, split at full stops.
            num_items: K, texts drawn per training image; not used in evaluation.
            is_train: draw texts at random, or give all items.
            seed: seed of the draws.
            items_path: where `items` come from, for messages.
            cache_dir: folder for the image cache; default beside the CSV.
            on_bad_sample: "stop" raises for the first row that cannot be used, "skip" leaves such rows out and logs
                them.

        Raises:
            FileNotFoundError: no such CSV.
            ValueError: K < 1, an unknown policy, a file that is no RSICD CSV, items for rows that the CSV does not
                have (an item file of another split), or no usable row.
            BadSampleError: a row that cannot be used, with on_bad_sample="stop".
        """
        if num_items < 1:
            raise UserError(f"num_items (K, texts per image) must be at least 1, got {num_items}")
        if on_bad_sample not in ("skip", "stop"):
            raise UserError(f'on_bad_sample must be "skip" or "stop", got {on_bad_sample!r}')
        self.table = open_rsicd_table(csv_path, cache_dir)
        self.transform = transform
        self.num_items = num_items
        self.is_train = is_train
        self.seed = seed
        self._items_source = str(items_path) if items_path is not None else "the item file"
        self._has_item_file = items is not None
        self._row_items = self._items_of_rows(items)
        self.skipped = self._unusable_rows()
        self._report_skipped(on_bad_sample)
        left_out = {bad.row for bad in self.skipped}
        self.rows = [row for row in range(len(self.table)) if row not in left_out]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> ItemSample:
        """Sample of an index, or of (epoch, index); an index alone means epoch 0.

        Raises:
            IndexError: index outside the dataset.
            BadSampleError: the row's image cannot be decoded.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self.rows):
            raise IndexError(f"index {index} of an RSICD split with {len(self.rows)} images")
        row = self.rows[index]
        image, items = self.table.image(row), self._row_items[row]
        if self.is_train:
            generator = sample_rng(self.seed, epoch, row)
            texts = diverse_sample(items, self.num_items, generator, limit_joined_to_items=True)
            with seeded_transforms(generator):
                pixels = self.transform(image)
        else:
            texts, pixels = list(items), self.transform(image)
        return ItemSample(sample_id=self.table.filenames[row], image=pixels, items=texts)

    def items(self, index: int) -> list[str]:
        """All items of an index, none joined."""
        return list(self._row_items[self.rows[index]])

    def sample_id(self, index: int) -> str:
        """The file name of an index."""
        return self.table.filenames[self.rows[index]]

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the data, the same on any machine: CSV content, rows used and their items. For checkpoints."""
        used = [[row, self._row_items[row]] for row in self.rows]
        return hashlib.sha256(f"{self.table.csv_sha256} {json.dumps(used)}".encode()).hexdigest()

    def _items_of_rows(self, items: Mapping[int, Sequence[str]] | None) -> list[list[str]]:
        num_rows = len(self.table)
        if items is None:
            return [caption_items(captions) for captions in self.table.captions]
        foreign = [key for key in items if not (isinstance(key, int) and 0 <= key < num_rows)]
        if foreign:
            raise UserError(
                f"{self._items_source}: key {foreign[0]!r} (and {len(foreign) - 1} more) is no row of "
                f"{self.table.csv_path}, which has the rows 0 to {num_rows - 1} (whole numbers). "
                "Give the item file of this split."
            )
        return [[item for text in items.get(row, ()) if (item := normalise_item(text))] for row in range(num_rows)]

    def _unusable_rows(self) -> list[BadRow]:
        """Rows with unreadable cells or without items, in file order."""
        unusable = {bad.row: bad for bad in self.table.bad_rows}
        for row, items in enumerate(self._row_items):
            if not items and row not in unusable:
                if self._has_item_file:
                    reason = f"{self._items_source} has no item under key {str(row)!r}; expected at least one"
                else:
                    reason = "column 'captions' holds no text; expected at least one caption, or an item file"
                unusable[row] = BadRow(row, self.table.lines[row], reason)
        return [unusable[row] for row in sorted(unusable)]

    def _report_skipped(self, on_bad_sample: OnBadSample) -> None:
        if not self.skipped:
            return
        num_rows = len(self.table)
        listed = "\n".join(
            f"  row {bad.row} (counted from 0, line {bad.line}): {bad.reason}"
            for bad in self.skipped[:_MAX_LISTED_ROWS]
        )
        more = len(self.skipped) - _MAX_LISTED_ROWS
        summary = f"{self.table.csv_path}: {len(self.skipped)} of {num_rows} rows cannot be used:\n{listed}" + (
            f"\n  and {more} more" if more > 0 else ""
        )
        if len(self.skipped) == num_rows:
            raise UserError(f"{summary}\nNo row is left. Check that CSV and item file belong together.")
        if on_bad_sample == "stop":
            raise BadSampleError(f"{summary}\nFix the files, or leave these rows out with --on-bad-sample skip.")
        logger.warning("%s\nThese rows are skipped.", summary)


def load_external_captions(paths: str) -> dict[str, Path]:
    """Item files of the splits, from one argument: "train;test" or "train;valid;test".

    Args:
        paths: two or three JSON paths joined by ";", as the published scripts take them, with an optional file for
            valid.csv between the two.

    Returns:
        Split name → path, for the splits given.

    Raises:
        ValueError: another number of paths, or an empty one.
        FileNotFoundError: a file that does not exist.
    """
    forms: dict[int, tuple[str, ...]] = {2: ("train", "test"), 3: ("train", "valid", "test")}
    parts = [part.strip() for part in paths.split(";")]
    if len(parts) not in forms or not all(parts):
        raise UserError(
            f'item files {paths!r}: expected "train.json;test.json" or "train.json;valid.json;test.json", '
            f"found {sum(map(bool, parts))} path(s); quote the argument, because a shell ends a command at ';'"
        )
    files: dict[str, Path] = dict(zip(forms[len(parts)], map(Path, parts)))
    for split, path in files.items():
        if not path.is_file():
            raise MissingFileError(f"{path}: no such file; expected the items of {split}.csv")
    return files


@dataclass(frozen=True)
class ValidationSplit:
    """What a training run validates on.

    Attributes:
        split: "valid" or "test".
        csv_path: its CSV.
        items_path: its item file; None takes the captions.
        message: one sentence for the log.
    """

    split: Literal["valid", "test"]
    csv_path: Path
    items_path: Path | None
    message: str


def resolve_validation_split(rsicd_dir: str | Path, item_files: Mapping[str, Path] | None) -> ValidationSplit:
    """Choose the split a training run validates on.

    valid.csv when it has items: its own item file, or its captions where no split has an item file. With item files
    for train and test only (or without a valid.csv) it is test.csv, as in the published code; to choose a checkpoint
    by such a validation is to choose it on the test set, which the message says.

    Raises:
        FileNotFoundError: the chosen CSV is missing.
    """
    valid_csv, test_csv = Path(rsicd_dir) / "valid.csv", Path(rsicd_dir) / "test.csv"
    if item_files is not None and "valid" in item_files:
        items_path = item_files["valid"]
        message = f"Validation reads {valid_csv} with the items of {items_path}."
        return _existing(ValidationSplit("valid", valid_csv, items_path, message))
    if item_files is None and valid_csv.is_file():
        message = f"Validation reads {valid_csv}; its captions, split at full stops, are the items."
        return ValidationSplit("valid", valid_csv, None, message)
    test_items = None if item_files is None else item_files["test"]
    texts = "its captions" if test_items is None else f"the items of {test_items}"
    reason = "there is no valid.csv" if test_items is None else "no item file for valid.csv was given"
    message = (
        f"Validation reads {test_csv} with {texts}, as the published code does, because {reason}: a checkpoint chosen "
        "by these numbers is chosen on the test set."
    )
    return _existing(ValidationSplit("test", test_csv, test_items, message))


def _existing(chosen: ValidationSplit) -> ValidationSplit:
    if not chosen.csv_path.is_file():
        raise MissingFileError(f"{chosen.csv_path}: no such file; expected RSICD's {chosen.split}.csv, to validate on")
    return chosen


def load_class_labels(path: str | Path, num_rows: int) -> list[int]:
    """Class numbers of the first rows of test.csv; only these rows are evaluated.

    Args:
        path: JSON array of whole numbers, indices into `RSICD_CLASSES`; may be shorter than the CSV.
        num_rows: rows of the CSV (`len(dataset.table)`, bad rows included).

    Returns:
        Class of row 0, 1, … A dataset's index has the label of its row: `labels[dataset.rows[index]]`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an array of class numbers, empty, or longer than the CSV.
    """
    labels = read_json(path, holding="class labels")
    expected = f"a JSON array of class numbers 0 to {len(RSICD_CLASSES) - 1}, one per row of test.csv"
    if not isinstance(labels, list):
        found = "an object" if isinstance(labels, dict) else repr(labels)[:40]
        raise UserError(f"{path}: expected {expected}, found {found}")
    if not 1 <= len(labels) <= num_rows:
        raise UserError(f"{path}: {len(labels)} labels for a CSV of {num_rows} rows; expected {expected}")
    for row, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < len(RSICD_CLASSES):
            raise UserError(f"{path}: label of row {row} is {repr(label)[:40]}; expected {expected}")
    return labels
