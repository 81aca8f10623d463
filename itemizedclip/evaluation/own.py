"""Your own images or studies as a benchmark: zero-shot classes with their labels, or retrieval of their items.

    itemizedclip evaluate own --data my.jsonl --checkpoint epoch_30.pt
    itemizedclip evaluate own --data my.jsonl --classes classes.txt --checkpoint epoch_30.pt

Axes: N images, C classes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from itemizedclip.data.jsonl import OWN_READERS, ImageItems, OwnFile, check_files, read_own
from itemizedclip.evaluation.benchmark import Benchmark, BenchmarkOptions, Subject
from itemizedclip.evaluation.classification import (
    CLASS_SLOT,
    ClassPrompts,
    MultiLabelEvaluator,
    SingleLabelEvaluator,
)
from itemizedclip.evaluation.results import metrics_table
from itemizedclip.evaluation.retrieval import RetrievalEvaluator
from itemizedclip.evaluation.tcsim import Scoring
from itemizedclip.models.factory import LoadedModel, create_transform
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import read_lines
from itemizedclip.runtime.processes import on_main

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OwnBenchmark(BenchmarkOptions):
    """Your own images or studies, from one file: zero-shot classes with --classes, else retrieval of their items."""

    data: Path
    """File of images or studies: .jsonl, .json, .csv, or a folder with one (docs/own-data.md)."""

    split: Literal["test", "val", "train", "all"] | None = None
    """Which entries; None: those of split test, else val, else, where no entry has a split, all."""

    classes: Path | None = None
    """Class names, one a line, as in `labels`; "name: prompt; another prompt" gives the texts to look for."""

    template: str = CLASS_SLOT
    """Text to look for, with {class} for the name, for classes without prompts of their own."""

    scoring: Scoring = "tcsim"
    """tcsim (item-conditioned attention), or global: the cosine of global features."""

    image_root: Path | None = None
    """Folder that the paths are relative to; default: that of the file."""

    def for_calibration(self) -> BenchmarkOptions:
        """On split val unless --split says otherwise; never on test entries, nor on patients of these.

        Raises:
            UserError: entries of split test, or patients that have some.
        """
        whole = on_main(lambda: read_own(self.data, root=self.image_root, on_bad_sample=self.on_bad_sample))
        named = {entry.split for entry in whole.entries} - {None}
        split = self.split or ("val" if named else "all")
        if split == "test" or (split == "all" and "test" in named):
            raise UserError(f"{whole.path}: a calibration is not fitted on entries of split test; take val (--split)")
        tested = {entry.patient or entry.name for entry in whole.entries if entry.split == "test"}
        part = whole.entries if split == "all" else whole.part(split).entries
        shared = sorted(tested & {entry.patient or entry.name for entry in part})
        if shared:
            raise UserError(
                f"{whole.path}: {len(shared):,} patients of split {split} have test entries too, the first {shared[0]};"
                " give each patient one split"
            )
        return replace(self, split=split)

    def open(self, subject: Subject) -> Benchmark:
        """The entries as the model reads them."""
        file = on_main(self._read)
        dataset = open_for_model(file, subject.loaded)
        more = {"file": str(file.path), "split": self._part_of(file), "data_fingerprint": file.fingerprint}
        output = self.output or self.checkpoint.with_suffix(f".own.{file.path.stem}.json")
        # Studies differ in their number of series.
        is_study = bool(file.entries[0].series)
        encoding = replace(subject.encoding, batch_size=1) if is_study else subject.encoding
        patients = [entry.patient or entry.name for entry in file.entries]
        evaluator: Any
        if self.classes is None:
            if not all(entry.items for entry in file.entries):
                raise UserError(f"{file.path}: some entries have no items to retrieve; give --classes for their labels")
            evaluator = RetrievalEvaluator(
                dataset,
                subject.loaded.tokenizer,
                name="own",
                scoring=self.scoring,
                encoding=encoding,
                patients=patients,
            )
            what = "retrieval"
        else:
            prompts = read_classes(self.classes, self.template)
            labels_NC = labels_of(file, prompts.names)
            arguments: dict[str, Any] = {
                "name": "own",
                "scorings": [self.scoring],
                "encoding": encoding,
                "patients": patients,
            }
            one_each = bool((np.nan_to_num(labels_NC).sum(1) == 1).all())
            if one_each and len(prompts.names) > 1:
                evaluator = SingleLabelEvaluator(
                    dataset, subject.loaded.tokenizer, prompts, labels=np.nanargmax(labels_NC, 1).tolist(), **arguments
                )
                what = f"{len(prompts.names)} classes, one each"
            else:
                evaluator = MultiLabelEvaluator(
                    dataset, subject.loaded.tokenizer, prompts, labels=labels_NC, **arguments
                )
                what = f"{len(prompts.names)} classes, any number each"
        title = f"{file.path.name}: {len(file.entries):,} entries, {what}"
        return Benchmark(
            name="own",
            evaluator=evaluator,
            results=output,
            table=lambda metrics: metrics_table(title, metrics),
            facts=lambda: more,
        )

    def _read(self) -> OwnFile:
        whole = read_own(self.data, root=self.image_root, on_bad_sample=self.on_bad_sample)
        part = self._part_of(whole)
        file = whole if part == "all" else replace(whole, entries=whole.part(part).entries)
        if not file.entries:
            raise UserError(f"{whole.path}: no entry has split {part}; give another --split, or all")
        check_files(file, max_missing=1.0 if self.on_bad_sample == "skip" else 0.0)
        return file

    def _part_of(self, file: OwnFile) -> Literal["test", "val", "train", "all"]:
        if self.split is not None:
            return self.split
        parts = {entry.split for entry in file.entries}
        if "test" in parts:
            return "test"
        if "val" in parts:
            return "val"
        if "train" in parts:
            raise UserError(f"{file.path}: all entries have split train; --split train evaluates on those all the same")
        return "all"


def open_for_model(file: OwnFile, loaded: LoadedModel) -> Any:
    """Entries as evaluators read them for a model.

    Raises:
        UserError: images for a model of studies, or the reverse.
    """
    tower = loaded.config["vision_cfg"].get("tower", "vit")
    if tower == "vit":
        return ImageItems(file, create_transform(loaded.config, is_train=False), num_items=1, is_train=False)
    return OWN_READERS.load(tower)(file, loaded.config, loaded.meta.get("transform") or {})


def read_classes(path: Path, template: str) -> ClassPrompts:
    """Classes of a text file: "name" or "name: prompt; another prompt" per line.

    Raises:
        UserError: no class, a name that stands twice, or a template without {class}.
    """
    names: list[str] = []
    prompts: list[list[str]] = []
    for line in read_lines(path, holding="class names, one a line"):
        name, _, texts = line.partition(":")
        own = [text.strip() for text in texts.split(";") if text.strip()]
        names.append(name.strip())
        prompts.append(own or list(ClassPrompts.from_templates([name.strip()], [template]).prompts[0]))
    if not names:
        raise UserError(f"{path}: holds no class; expected one name per line")
    return ClassPrompts(tuple(names), prompts)


def labels_of(file: OwnFile, classes: Any) -> np.ndarray:
    """float64 (N, C): 1, 0, or NaN where an entry does not say.

    An entry whose labels are names alone, such as {"labels": "airport"}, says that the other classes are not there.

    Raises:
        UserError: no entry has a label of these classes.
    """
    labels_NC = np.full((len(file.entries), len(classes)), np.nan)
    for row, entry in enumerate(file.entries):
        if entry.whole_labels:
            labels_NC[row] = 0
        for column, name in enumerate(classes):
            if name in entry.labels:
                labels_NC[row, column] = entry.labels[name]
    known = {name for entry in file.entries for name in entry.labels}
    if not known & set(classes):
        listed = ", ".join(sorted(known)[:5]) or "no labels at all"
        raise UserError(f"{file.path}: no entry has a label of these classes; its labels are {listed}")
    return labels_NC
