"""Text-to-image and image-to-text retrieval on COCO and Flickr30k.

    python 2D_images_tasks/src/retrieval.py coco --resume epoch_100.pt --coco-data-root-dir DIR
    python 2D_images_tasks/src/retrieval.py flickr --resume epoch_100.pt --flickr-data-root-dir DIR --split test
    torchrun --nproc_per_node 2 -- 2D_images_tasks/src/retrieval.py coco …          the same numbers

`inference_coco.sh` and `inference_flickr.sh` are the same with their paths in environment variables. Every caption is
ranked among all captions and every image among all images, by TCSim or by the cosine of global features (plain CLIP).
"""

from __future__ import annotations

import logging
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from itemizedclip.data.batch import BadSampleError
from itemizedclip.evaluation.encoding import EncodingOptions
from itemizedclip.evaluation.ranks import RETRIEVAL_CUTOFFS, retrieval_table
from itemizedclip.evaluation.results import EvaluationReport, format_measure, write_results
from itemizedclip.evaluation.retrieval import RetrievalEvaluator
from itemizedclip.evaluation.tcsim import Scoring
from itemizedclip.models.factory import create_transform, load_pretrained, transform_spec
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.runtime.files import file_sha256
from itemizedclip.runtime.flags import read_flags
from itemizedclip.runtime.logs import literal, progress_bar
from itemizedclip.runtime.precision import resolve_precision
from itemizedclip.runtime.processes import DistributedSettings, launch, on_main
from itemizedclip_2d.retrieval_sets import RetrievalSet, Transform, coco_karpathy, coco_val2017, flickr30k

logger = logging.getLogger(__name__)

DESCRIPTION = "Retrieval between the images and captions of {}: R@1/5/10/50/100, mean and median rank, both ways."


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions(ABC):
    """What to evaluate, and how."""

    resume: Path
    """Checkpoint (.pt, .safetensors) of a run or a released one."""

    model: str = "ViT-B-16-ItemizedCLIP"
    """Config of a released checkpoint; checkpoints of runs carry their own."""

    inference_with_flair: bool = True
    """Score by TCSim (item-conditioned attention), or by the cosine of global features (plain CLIP)."""

    batch_size: int = 64
    """Images per forward pass and process."""

    workers: int = 2
    """Processes that decode images; 0: none besides this one."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    precision: Literal["fp32", "amp_bf16", "auto"] = "fp32"
    """Of the towers; scores are always float32."""

    output: Path | None = None
    """Where results.json goes; default: <checkpoint>.<data set>.<tcsim or global>.json beside the checkpoint."""

    distributed: Annotated[DistributedSettings, tyro.conf.arg(name="")] = field(default_factory=DistributedSettings)

    def __post_init__(self) -> None:
        for name, value, lowest in (("batch-size", self.batch_size, 1), ("workers", self.workers, 0)):
            if value < lowest:
                raise UserError(f"--{name} is {value}; expected at least {lowest}")

    @property
    def scoring(self) -> Scoring:
        """The scoring that --inference-with-flair chooses."""
        return "tcsim" if self.inference_with_flair else "global"

    @abstractmethod
    def open(self, transform: Transform) -> RetrievalSet:
        """The data set."""


@dataclass(frozen=True, kw_only=True)
class CocoRetrieval(RetrievalOptions):
    """Retrieval on COCO."""

    coco_data_root_dir: Path
    """Folder with annotations/captions_val2017.json and images/val2017/; for karpathy with dataset_coco.json."""

    split: Literal["val2017", "karpathy"] = "val2017"
    """val2017: all 5,000 images, as published; karpathy: the 5,000 test images that most papers report."""

    def open(self, transform: Transform) -> RetrievalSet:
        """COCO val2017 or Karpathy's test split."""
        opener = coco_val2017 if self.split == "val2017" else coco_karpathy
        return opener(self.coco_data_root_dir, transform)


@dataclass(frozen=True, kw_only=True)
class FlickrRetrieval(RetrievalOptions):
    """Retrieval on Flickr30k."""

    flickr_data_root_dir: Path
    """Folder with flickr30k_val.json or flickr30k_test.json and the images."""

    split: Literal["val", "test"] = "val"
    """val: 1,014 images, as published; test: the 1,000 images that most papers report."""

    def open(self, transform: Transform) -> RetrievalSet:
        """Flickr30k's val or test split."""
        return flickr30k(self.flickr_data_root_dir, self.split, transform)


COMMANDS: dict[str, tuple[type[RetrievalOptions], str, str]] = {
    "coco": (CocoRetrieval, "inference_coco.sh", "COCO"),
    "flickr": (FlickrRetrieval, "inference_flickr.sh", "Flickr30k"),
}
"""Command → options, name in messages, data set."""


def evaluate(options: RetrievalOptions) -> dict[str, float]:
    """Load, score, print a table, write results.json; all ranks return the same numbers.

    Raises:
        CheckpointError, FileNotFoundError, ValueError, SetupError: each one sentence with its remedy.
    """
    with launch(options.device, options.distributed) as ranks:
        loaded = load_pretrained(options.resume, config=options.model)
        transform = create_transform(loaded.config, is_train=False)
        # The main rank first, which reports what is wrong with the files.
        on_main(lambda: len(options.open(transform)))
        dataset = options.open(transform)
        output = options.output or options.resume.with_suffix(f".{dataset.name}.{options.scoring}.json")
        on_main(lambda: check_output(output))
        for note in [*loaded.notes, dataset.incomplete] if ranks.is_main else ():
            if note:
                logger.warning(note)
        evaluator = RetrievalEvaluator(
            dataset,
            loaded.tokenizer,
            table=retrieval_table,
            name=dataset.name,
            scoring=options.scoring,
            encoding=EncodingOptions(
                batch_size=options.batch_size,
                num_workers=options.workers,
                autocast_dtype=resolve_precision(options.precision, ranks.device).autocast_dtype,
            ),
        )
        with progress_bar("Reading images", enabled=ranks.is_main) as evaluator.on_progress, readable_worker_errors():
            metrics = evaluator.run(loaded.model.to(ranks.device))
        if ranks.is_main:
            facts = {
                **dataset.facts(),
                **evaluator.facts,
                "checkpoint_sha256": file_sha256(options.resume),
                "transform": transform_spec(loaded.config),
                "precision": options.precision,
            }
            write_results(output, EvaluationReport(dataset.name, "corrected", str(options.resume), metrics, facts))
            console = Console()
            console.print(table(dataset, options.scoring, metrics))
            console.print(literal(f"written to {output}"), soft_wrap=True)
        return metrics


def table(dataset: RetrievalSet, scoring: Scoring, metrics: dict[str, float]) -> Table:
    """The measures as a table: a row per measure, a column per direction."""
    images, captions = dataset.counts
    title = f"{dataset.name}: {images:,} images, {captions:,} captions, {scoring}"
    shown = Table(title=title, title_justify="left")
    shown.add_column("")
    for label in ("text to image", "image to text,\nbest caption", "image to text,\nworst caption"):
        shown.add_column(label, justify="right", no_wrap=True)
    for measure in [*(f"R@{k}" for k in RETRIEVAL_CUTOFFS), "mean_rank", "median_rank"]:
        names = [f"text_to_image_{measure}", f"image_to_text_{measure}", f"image_to_text_{measure}_worst"]
        shown.add_row(measure.replace("_", " "), *(format_measure(name, metrics[name]) for name in names))
    return shown


def check_output(path: Path) -> None:
    """Fail before the evaluation, not after it, when its results cannot be written.

    Raises:
        ValueError: a folder, or a folder that cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK) and not path.is_dir()
    except OSError:
        writable = False
    if not writable:
        raise UserError(f"{path}: results cannot be written there; give a file in a writable folder with --output")


@contextmanager
def readable_worker_errors() -> Iterator[None]:
    """Bring a loader process's report of a bad image, which comes with its trace, back to its one sentence."""
    try:
        yield
    except BadSampleError as error:
        raise BadSampleError(str(error).strip().rpartition("BadSampleError: ")[2]) from None


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Entry point of inference_coco.sh and inference_flickr.sh: the command, then its flags."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        print(f"retrieval.py: error: expected a command first: {' or '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    kind, prog, name = COMMANDS[arguments[0]]
    options = read_flags(kind, arguments[1:], prog=prog, description=DESCRIPTION.format(name))
    with reported_errors(prog):
        return evaluate(options)
