"""Benchmarks of photographs and remote-sensing images: retrieval on COCO and Flickr30k, RSICD's 30 classes.

    python 2D_images_tasks/src/retrieval.py coco --resume epoch_100.pt --coco-data-root-dir DIR
    python 2D_images_tasks/src/retrieval.py flickr --resume epoch_100.pt --flickr-data-root-dir DIR --split test
    python 2D_images_tasks/src/classification.py --resume epoch_100.pt --rsicd-data-dir DIR
    torchrun --nproc_per_node 2 -- 2D_images_tasks/src/retrieval.py coco …          the same numbers

`inference_coco.sh`, `inference_flickr.sh` and `inference_rsicd_classification.sh` are the same with their paths in
environment variables; so is `itemizedclip evaluate coco`, `flickr30k` and `rsicd`.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from itemizedclip.evaluation.benchmark import Benchmark, BenchmarkOptions, Subject, evaluate_from_flags
from itemizedclip.evaluation.classification import ClassPrompts, SingleLabelEvaluator
from itemizedclip.evaluation.ranks import RETRIEVAL_CUTOFFS, retrieval_table
from itemizedclip.evaluation.results import format_measure, metrics_table
from itemizedclip.evaluation.retrieval import RetrievalEvaluator
from itemizedclip.evaluation.tcsim import Scoring
from itemizedclip.models.factory import create_transform, expect_photographs, transform_spec
from itemizedclip.runtime.errors import EXIT_WRONG_FLAG
from itemizedclip.runtime.processes import main_first
from itemizedclip_2d.retrieval_sets import RetrievalSet, Transform, coco_karpathy, coco_val2017, flickr30k
from itemizedclip_2d.rsicd import RSICD_CLASSES, RsicdDataset, load_class_labels

RSICD_TEMPLATES = ("there is {class}", "the {class}")
"""Every class has two prompts, whose features are averaged."""


@dataclass(frozen=True, kw_only=True)
class PhotographOptions(BenchmarkOptions):
    """What the evaluations of models of photographs are asked for."""

    model: str | None = "ViT-B-16-ItemizedCLIP"
    """Config of a released checkpoint; checkpoints of runs carry their own."""

    def transform_for(self, subject: Subject) -> Transform:
        """The model's evaluation transform.

        Raises:
            CheckpointError: a model of studies.
        """
        expect_photographs(subject.loaded, self.checkpoint)
        return create_transform(subject.loaded.config, is_train=False)


# --- retrieval -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions(PhotographOptions):
    """Every caption ranked among all captions and every image among all images."""

    inference_with_flair: bool = True
    """Score by TCSim (item-conditioned attention), or by the cosine of global features (plain CLIP)."""

    output: Path | None = None
    """Where results.json goes; default: <checkpoint>.<data set>.<tcsim or global>.json beside the checkpoint."""

    @abstractmethod
    def read(self, transform: Transform) -> RetrievalSet:
        """The data set."""

    def open(self, subject: Subject) -> Benchmark:
        """Retrieval among all of its images and captions."""
        transform = self.transform_for(subject)
        dataset = main_first(lambda: self.read(transform))
        scoring: Scoring = "tcsim" if self.inference_with_flair else "global"
        evaluator = RetrievalEvaluator(
            dataset,
            subject.loaded.tokenizer,
            table=retrieval_table,
            name=dataset.name,
            scoring=scoring,
            encoding=subject.encoding,
        )

        def facts() -> dict[str, Any]:
            whole = dataset.incomplete is None and not evaluator.unusable
            return dataset.facts() | {"is_whole_set": whole, "transform": transform_spec(subject.loaded.config)}

        return Benchmark(
            name=dataset.name,
            evaluator=evaluator,
            results=self.output or self.checkpoint.with_suffix(f".{dataset.name}.{scoring}.json"),
            table=partial(_retrieval_table, evaluator),
            facts=facts,
            notes=[dataset.incomplete or ""],
        )


@dataclass(frozen=True, kw_only=True)
class CocoOptions(RetrievalOptions):
    """Retrieval between images and captions of COCO: R@1/5/10/50/100, mean and median rank, both ways."""

    coco_data_root_dir: Path
    """Folder with annotations/captions_val2017.json and images/val2017/; for karpathy with dataset_coco.json."""

    split: Literal["val2017", "karpathy"] = "val2017"
    """val2017: all 5,000 images, as published; karpathy: the 5,000 test images that most papers report."""

    def read(self, transform: Transform) -> RetrievalSet:
        """COCO val2017 or Karpathy's test split."""
        opener = coco_val2017 if self.split == "val2017" else coco_karpathy
        return opener(self.coco_data_root_dir, transform)


@dataclass(frozen=True, kw_only=True)
class Flickr30kOptions(RetrievalOptions):
    """Retrieval between images and captions of Flickr30k: R@1/5/10/50/100, mean and median rank, both ways."""

    flickr_data_root_dir: Path
    """Folder with flickr30k_val.json or flickr30k_test.json and the images."""

    split: Literal["val", "test"] = "val"
    """val: 1,014 images, as published; test: the 1,000 images that most papers report."""

    def read(self, transform: Transform) -> RetrievalSet:
        """Flickr30k's val or test split."""
        return flickr30k(self.flickr_data_root_dir, self.split, transform)


def _retrieval_table(evaluator: RetrievalEvaluator, metrics: dict[str, float]) -> Table:
    """A row per measure, a column per direction."""
    images, captions = evaluator.facts["num_images"], evaluator.facts["num_texts"]
    title = f"{evaluator.name}: {images:,} images, {captions:,} captions, {evaluator.scoring}"
    shown = Table(title=title, title_justify="left")
    shown.add_column("")
    for label in ("text to image", "image to text,\nbest caption", "image to text,\nworst caption"):
        shown.add_column(label, justify="right", no_wrap=True)
    for measure in [*(f"R@{k}" for k in RETRIEVAL_CUTOFFS), "mean_rank", "median_rank"]:
        names = [f"text_to_image_{measure}", f"image_to_text_{measure}", f"image_to_text_{measure}_worst"]
        shown.add_row(measure.replace("_", " "), *(format_measure(name, metrics[name]) for name in names))
    return shown


RETRIEVAL_COMMANDS: dict[str, tuple[type[RetrievalOptions], str]] = {
    "coco": (CocoOptions, "inference_coco.sh"),
    "flickr": (Flickr30kOptions, "inference_flickr.sh"),
}
"""Command of retrieval.py → options, name in messages."""


def retrieval_main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Entry point of inference_coco.sh and inference_flickr.sh: the command, then its flags."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in RETRIEVAL_COMMANDS:
        expected = " or ".join(RETRIEVAL_COMMANDS)
        print(f"retrieval.py: error: expected a command first: {expected}", file=sys.stderr)
        raise SystemExit(EXIT_WRONG_FLAG)
    kind, prog = RETRIEVAL_COMMANDS[arguments[0]]
    return evaluate_from_flags(kind, arguments[1:], prog=prog)


# --- classification --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RsicdOptions(PhotographOptions):
    """30-class zero-shot classification of RSICD's test split: top-1, top-5 and mean rank of the true class."""

    rsicd_dir: Annotated[Path, tyro.conf.arg(aliases=("--rsicd-data-dir",))]
    """Folder with test.csv and large_label.json."""

    labels: Path | None = None
    """JSON array of class numbers, one per row of test.csv; default: large_label.json in that folder."""

    scoring: Literal["both", "tcsim", "global"] = "both"
    """TCSim, the cosine of global features (plain CLIP), or both."""

    cache_dir: Path | None = None
    """Folder for the image cache; default beside the CSV."""

    output: Path | None = None
    """Where results.json goes; default: <checkpoint>.rsicd_classification.json beside the checkpoint."""

    def open(self, subject: Subject) -> Benchmark:
        """RSICD's labelled test images."""
        transform = self.transform_for(subject)
        # The main rank builds the image cache; the others then open it.
        dataset, labelled = main_first(lambda: self._read(transform))
        scorings: list[Scoring] = ["tcsim", "global"] if self.scoring == "both" else [self.scoring]
        evaluator = SingleLabelEvaluator(
            dataset,
            subject.loaded.tokenizer,
            ClassPrompts.from_templates(RSICD_CLASSES, RSICD_TEMPLATES),
            labels=labelled,
            name="rsicd_30",
            scorings=scorings,
            encoding=subject.encoding,
        )
        return Benchmark(
            name="RSICD 30 classes",
            evaluator=evaluator,
            results=self.output or self.checkpoint.with_suffix(".rsicd_classification.json"),
            table=lambda metrics: metrics_table(f"RSICD, 30 classes, {len(evaluator.rows)} images", metrics),
            facts=lambda: {"csv": str(dataset.table.csv_path), "csv_sha256": dataset.table.csv_sha256},
        )

    def _read(self, transform: Transform) -> tuple[RsicdDataset, list[int]]:
        """The test split and the class of each of its first images; rows beyond the labels are not evaluated."""
        dataset = RsicdDataset(
            csv_path=self.rsicd_dir / "test.csv",
            transform=transform,
            items=None,
            num_items=1,
            is_train=False,
            seed=0,
            cache_dir=self.cache_dir,
            on_bad_sample=self.on_bad_sample,
        )
        labels = load_class_labels(self.labels or self.rsicd_dir / "large_label.json", len(dataset.table))
        # Labels belong to CSV rows.
        return dataset, [labels[row] for row in dataset.rows if row < len(labels)]


def classification_main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Entry point of inference_rsicd_classification.sh."""
    return evaluate_from_flags(RsicdOptions, argv, prog="inference_rsicd_classification.sh")
