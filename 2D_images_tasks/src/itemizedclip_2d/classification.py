"""30-class zero-shot classification of RSICD's test split.

    python 2D_images_tasks/src/classification.py --resume epoch_100.pt --rsicd-data-dir DIR
    torchrun --nproc_per_node 2 -- 2D_images_tasks/src/classification.py …          the same numbers

`inference_rsicd_classification.sh` is the same with its paths in environment variables. Every class has two prompts,
"there is {class}" and "the {class}", averaged; scored by TCSim and by global features (plain CLIP).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from itemizedclip.evaluation.classification import ClassPrompts, SingleLabelEvaluator
from itemizedclip.evaluation.encoding import EncodingOptions
from itemizedclip.evaluation.results import EvaluationReport, metrics_table, write_results
from itemizedclip.evaluation.tcsim import Scoring
from itemizedclip.models.factory import create_transform, load_pretrained
from itemizedclip.runtime.collectives import is_main
from itemizedclip.runtime.errors import reported_errors
from itemizedclip.runtime.flags import read_flags
from itemizedclip.runtime.logs import literal
from itemizedclip.runtime.precision import resolve_precision
from itemizedclip.runtime.processes import DistributedSettings, launch, on_main
from itemizedclip_2d.rsicd import RSICD_CLASSES, RsicdDataset, load_class_labels

logger = logging.getLogger(__name__)

PROG = "inference_rsicd_classification.sh"
DESCRIPTION = "30-class zero-shot classification of RSICD's test split: top-1, top-5 and mean rank of the true class."
TEMPLATES = ("there is {class}", "the {class}")


@dataclass(frozen=True)
class ClassificationOptions:
    """What to evaluate, on what."""

    resume: Path
    """Checkpoint (.pt) of a run or a released one."""

    rsicd_dir: Annotated[Path, tyro.conf.arg(aliases=("--rsicd-data-dir",))]
    """Folder with test.csv and large_label.json."""

    labels: Path | None = None
    """JSON array of class numbers, one per row of test.csv; default: large_label.json in that folder."""

    model: str = "ViT-B-16-ItemizedCLIP"
    """Config of a released checkpoint; checkpoints of runs carry their own."""

    scoring: Literal["both", "tcsim", "global"] = "both"
    """TCSim, the cosine of global features (plain CLIP), or both."""

    batch_size: int = 64
    """Images per forward pass and process."""

    workers: int = 2
    """Processes that decode images; 0: none besides this one."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    precision: Literal["fp32", "amp_bf16", "auto"] = "fp32"
    """Of the towers; scores are always float32. The published evaluation uses fp32."""

    cache_dir: Path | None = None
    """Folder for the image cache; default beside the CSV."""

    on_bad_sample: Literal["skip", "stop"] = "stop"
    """What a row that cannot be read does."""

    output: Path | None = None
    """Where results.json goes; default: <checkpoint>.rsicd_classification.json beside the checkpoint."""

    distributed: Annotated[DistributedSettings, tyro.conf.arg(name="")] = field(default_factory=DistributedSettings)


def evaluate(options: ClassificationOptions) -> dict[str, float]:
    """Load, score, print a table, write results.json; all ranks return the same numbers."""
    with launch(options.device, options.distributed) as ranks:
        loaded = load_pretrained(options.resume, config=options.model)
        for note in loaded.notes if ranks.is_main else ():
            logger.info("%s: %s", options.resume, note)

        def open_dataset() -> RsicdDataset:
            return RsicdDataset(
                csv_path=options.rsicd_dir / "test.csv",
                transform=create_transform(loaded.config, is_train=False),
                items=None,
                num_items=1,
                is_train=False,
                seed=0,
                cache_dir=options.cache_dir,
                on_bad_sample=options.on_bad_sample,
            )

        # The main rank builds the image cache and reports what is wrong with the files; the others then open it.
        on_main(lambda: len(open_dataset()))
        dataset = open_dataset()
        labels = load_class_labels(options.labels or options.rsicd_dir / "large_label.json", len(dataset.table))
        # Labels belong to CSV rows; rows beyond the labels are not evaluated.
        labelled = [labels[row] for row in dataset.rows if row < len(labels)]
        scorings: list[Scoring] = ["tcsim", "global"] if options.scoring == "both" else [options.scoring]
        evaluator = SingleLabelEvaluator(
            dataset,
            loaded.tokenizer,
            ClassPrompts.from_templates(RSICD_CLASSES, TEMPLATES),
            labels=labelled,
            name="rsicd_30",
            scorings=scorings,
            encoding=EncodingOptions(
                batch_size=options.batch_size,
                num_workers=options.workers,
                autocast_dtype=resolve_precision(options.precision, ranks.device).autocast_dtype,
            ),
        )
        metrics = evaluator.run(loaded.model.to(ranks.device))
        if is_main():
            output = options.output or options.resume.with_suffix(".rsicd_classification.json")
            facts = {**evaluator.facts, "csv": str(dataset.table.csv_path), "csv_sha256": dataset.table.csv_sha256}
            report = EvaluationReport("RSICD 30 classes", "corrected", str(options.resume), metrics, facts)
            write_results(output, report)
            console = Console()
            console.print(metrics_table(f"RSICD, 30 classes, {len(labelled)} images", metrics))
            console.print(literal(f"written to {output}"), soft_wrap=True)
        return metrics


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Entry point of inference_rsicd_classification.sh."""
    options = read_flags(ClassificationOptions, argv, prog=PROG, description=DESCRIPTION)
    with reported_errors(PROG):
        return evaluate(options)
