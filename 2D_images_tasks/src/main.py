#!/usr/bin/env python3
"""Train ItemizedCLIP on photographs and remote-sensing images.

    python 2D_images_tasks/src/main.py --recipe rsicd --rsicd-data-dir DIR --external-captions 'train.json;test.json'
    torchrun --nproc_per_node 8 2D_images_tasks/src/main.py --recipe rsicd …

`train_rsicd.sh` is the same with its paths in environment variables.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from images_2d.recipes import RECIPES, RsicdRun
from images_2d.rsicd import RsicdDataset, load_external_captions, resolve_validation_split

from itemizedclip.data.batch import ItemCollator
from itemizedclip.data.items import load_item_lists
from itemizedclip.evaluation.encoding import EncodingOptions
from itemizedclip.evaluation.retrieval import RetrievalEvaluator
from itemizedclip.models.factory import create_model, create_tokenizer, create_transform
from itemizedclip.training.distributed import Ranks, launch, on_main
from itemizedclip.training.engine import Evaluator, TrainResult, reported_errors, train
from itemizedclip.training.options import parse_run

logger = logging.getLogger(__name__)

DESCRIPTION = "Train ItemizedCLIP on photographs and remote-sensing images."


@dataclass(frozen=True)
class TrainingData:
    """What a domain gives the engine.

    Attributes:
        dataset: keys (epoch, index) → training sample.
        evaluators: run every --val-frequency epochs.
        fingerprint: identity of the training data.
    """

    dataset: RsicdDataset
    evaluators: list[Evaluator]
    fingerprint: str


def rsicd_data(options: RsicdRun, config: dict[str, Any], ranks: Ranks) -> TrainingData:
    """RSICD's training split and the retrieval evaluator over its validation split.

    Raises:
        FileNotFoundError: a CSV or item file is missing.
        ValueError: no --rsicd-data-dir, or files that do not belong together.
    """
    folder = options.data.rsicd_dir
    if folder is None:
        raise FileNotFoundError("--rsicd-data-dir is not set; give the folder with train.csv, valid.csv and test.csv")
    files = None
    if options.data.external_captions != "captions":
        files = load_external_captions(options.data.external_captions)
    validation = resolve_validation_split(folder, files)
    if ranks.is_main:
        logger.info(validation.message)

    def split(csv_path: Path, items_path: Path | None, *, is_train: bool) -> RsicdDataset:
        return RsicdDataset(
            csv_path=csv_path,
            transform=create_transform(config, is_train=is_train),
            items=None if items_path is None else load_item_lists(items_path, integer_keys=True),
            items_path=items_path,
            num_items=options.loading.num_sampled_captions,
            is_train=is_train,
            seed=options.run.seed,
            cache_dir=options.data.cache_dir,
            on_bad_sample=options.loading.on_bad_sample,
        )

    def training_split() -> RsicdDataset:
        return split(folder / "train.csv", None if files is None else files["train"], is_train=True)

    def validation_split() -> RsicdDataset:
        return split(validation.csv_path, validation.items_path, is_train=False)

    # The main rank opens both first: one process builds the caches and reports what is wrong with the files.
    on_main(lambda: len(training_split()) + len(validation_split()))
    dataset = training_split()
    evaluator = RetrievalEvaluator(
        validation_split(),
        create_tokenizer(config),
        name=f"rsicd_{validation.split}",
        encoding=EncodingOptions(batch_size=min(64, options.loading.batch_size), num_workers=options.loading.workers),
    )
    return TrainingData(dataset, [evaluator], dataset.fingerprint)


def main(argv: Sequence[str] | None = None) -> TrainResult:
    """Parse flags, build model and data, train."""
    options = parse_run(RECIPES, "rsicd", argv, prog="main.py", description=DESCRIPTION)
    with reported_errors(), launch(options) as ranks:
        model = create_model(options.model.model)
        data = rsicd_data(options, model.config, ranks)
        collator = ItemCollator(create_tokenizer(model.config), options.loading.num_sampled_captions)
        return train(
            options,
            model=model,
            dataset=data.dataset,
            collator=collator,
            evaluators=data.evaluators,
            data_fingerprint=data.fingerprint,
            ranks=ranks,
        )


if __name__ == "__main__":
    main()
