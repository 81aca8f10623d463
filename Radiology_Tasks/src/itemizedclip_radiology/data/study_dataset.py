"""Studies with the items of their reports, for training and validation; a subclass knows their files.

Axes: S series, K item slots.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from itemizedclip.data.batch import BadSampleError, ItemSample
from itemizedclip.data.items import is_normal_study, sample_items, sample_rng
from itemizedclip.data.preflight import PreflightError
from itemizedclip.runtime.collectives import gather_objects
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import file_sha256
from itemizedclip.runtime.remote import Place
from itemizedclip.training.options import LoadingSettings
from itemizedclip_radiology.data.reports import StudyIndex
from itemizedclip_radiology.data.studies import LoadedStudy, SkippedSeries

logger = logging.getLogger(__name__)

_MOST_LISTED = 5


class StudyDataset(Dataset[ItemSample], ABC):
    """N studies and their items.

    Training: K random items, and whatever the subclass draws of the files. Evaluation: all items in the report's order
    and nothing random. All random choices follow from (seed, epoch, index); items are drawn first and before a file is
    read, so that neither a broken file nor the number of draws of a crop changes them.

    A file that is missing or cannot be used is skipped, logged once and counted (`skipped`); a study without any
    raises BadSampleError.

    Attributes:
        index: the studies and what is kept of their JSON entries, the items under "report".
        is_train: see above.
        skipped: (study, file) numbers of the files that could not be used, over all loader workers.
        what_files: what the files of a study are called, for messages.
        chest_ct: how normal studies are recognised (see `is_normal_study`).
    """

    what_files = "series"
    chest_ct = False

    def __init__(
        self, index: StudyIndex, *, files_per_study: Sequence[int], is_train: bool, num_items: int, seed: int
    ) -> None:
        if num_items < 1:
            raise UserError(f"num_items must be at least 1, got {num_items}")
        self.index = index
        self.is_train = is_train
        self.num_items = num_items
        self.seed = seed
        self.skipped = SkippedSeries(files_per_study)

    @abstractmethod
    def load(self, row: int, generator: np.random.Generator | None) -> LoadedStudy:
        """The images of one study; `generator` draws what is random in training, None is evaluation.

        Raises:
            BadSampleError: none of its files can be used.
        """

    @abstractmethod
    def why_unusable(self, row: int) -> str | None:
        """Why no file of a study can be used, None when one can; of each file only the beginning is read."""

    @abstractmethod
    def without_folder(self) -> list[str]:
        """Studies that are not on disk, in order, from few listings of folders, however many studies there are."""

    @property
    @abstractmethod
    def folder(self) -> Place:
        """Where the studies are, for messages."""

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int | tuple[int, int]) -> ItemSample:
        """Study of an index, or of (epoch, index); an index alone means epoch 0.

        Raises:
            IndexError: index outside the dataset.
            BadSampleError: no file of the study can be used.
        """
        epoch, row = key if isinstance(key, tuple) else (0, key)
        items = self.items(row)
        generator = sample_rng(self.seed, epoch, row) if self.is_train else None
        drawn = list(items) if generator is None else sample_items(items, self.num_items, generator)
        study = self.load(row, generator)
        return ItemSample(
            sample_id=self.index[row]["study"],
            image=study.image,
            items=drawn,
            is_normal=self.is_normal(row),
            series_names=study.series_names,
        )

    def items(self, row: int) -> list[str]:
        """All items of a study, in the report's order; no image is read."""
        return self.index[row]["report"]

    def is_normal(self, row: int) -> bool:
        """Whether a study reports no finding, as its items say it, unless its entry says so itself ("normal")."""
        said = self.index[row].get("normal")
        return is_normal_study(self.items(row), chest_ct=self.chest_ct) if said is None else bool(said)

    @property
    def studies(self) -> list[str]:
        """All study ids, in order, parsed anew."""
        return [self.index[row]["study"] for row in range(len(self))]

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the split, for checkpoints."""
        facts: dict[str, Any] = {
            "json_sha256": file_sha256(self.index.path),
            "num_studies": len(self),
            "num_skipped": len(self.index.skipped),
        }
        return json.dumps(facts)

    def check_on_disk(self, loading: LoadingSettings) -> None:
        """Stop before the first step when too many studies are not on disk: half a copy, or the wrong JSON file.

        Raises:
            PreflightError: more than --max-bad-fraction of the studies, or any with --on-bad-sample stop.
        """
        absent = self.without_folder()
        if not absent:
            return
        shown = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
        message = (
            f"{len(absent):,} of {len(self):,} studies of {self.index.path} have no folder in {self.folder}: {shown}"
        )
        if loading.on_bad_sample == "stop":
            raise PreflightError(f"{message}. Add them (--on-bad-sample skip goes on without them)")
        if len(absent) > loading.max_bad_fraction * len(self):
            raise PreflightError(
                f"{message}, more than --max-bad-fraction {loading.max_bad_fraction:g} allows. Add them, take them out "
                "of the JSON file, or raise the limit"
            )
        logger.warning("%s; others take their place", message)

    def usable_rows(self, on_bad_sample: str) -> list[int]:
        """`usable_rows` of this split."""
        return usable_rows(len(self), self.why_unusable, source=self.index.path, on_bad_sample=on_bad_sample)

    def report_skipped(self, what: str) -> None:
        """Log how many files could not be used, over all ranks; every rank must call it."""
        positions = {position for share in gather_objects(list(self.skipped)) for position in share}
        if positions:
            logger.warning("%d %s were skipped; log.txt names each", len(positions), what)


@dataclass
class UsableStudies:
    """The studies of a split that can be opened, as the evaluators read them.

    Attributes:
        dataset: the split, in evaluation mode.
        rows: which of its studies.
    """

    dataset: StudyDataset
    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ItemSample:
        return self.dataset[self.rows[index]]

    def items(self, index: int) -> list[str]:
        """All items of a study; its volumes are not read."""
        return self.dataset.items(self.rows[index])


def usable_rows(
    count: int,
    why_unusable: Callable[[int], str | None],
    *,
    source: Path,
    on_bad_sample: str,
    what: str = "study",
) -> list[int]:
    """Studies of a validation split that can be opened.

    An evaluation cannot replace a study as training does, and should not end after hours of training.

    Args:
        count: studies of the split.
        why_unusable: study number → why it cannot be opened, None when it can.
        source: file that lists them.
        on_bad_sample: "skip" leaves such studies out.
        what: a study, for messages.

    Raises:
        BadSampleError: a study that cannot be opened, unless `on_bad_sample` is "skip".
        PreflightError: no study is left.
    """
    rows, bad = [], []
    for row in range(count):
        message = why_unusable(row)
        if message is None:
            rows.append(row)
        elif on_bad_sample == "stop":
            raise BadSampleError(f"{message}. Fix it (--on-bad-sample skip goes on without it)")
        else:
            bad.append(message)
    if not rows:
        raise PreflightError(f"{source}: no {what} can be used; the first: {bad[0]}")
    for message in bad[:_MOST_LISTED]:
        logger.warning("validation %s left out: %s", what, message)
    if bad:
        logger.warning("%d of %d of the validation split are left out", len(bad), count)
    return rows
