"""Train ItemizedCLIP on photographs and remote-sensing images.

    python 2D_images_tasks/src/main.py --recipe rsicd --rsicd-data-dir DIR --external-captions 'train.json;test.json'
    python 2D_images_tasks/src/main.py --recipe itemized_cc0.3M --train-data 'DIR/{00000..00057}.tar' \\
        --val-data 'DIR/{00058..00059}.tar' --external-captions first_300000_rewrites.json
    torchrun --nproc_per_node 8 -- 2D_images_tasks/src/main.py --recipe rsicd …

`train_rsicd.sh` and `train_itemized_cc0.3M.sh` are the same with their paths in environment variables.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itemizedclip.data.batch import ItemCollator
from itemizedclip.data.items import load_item_lists
from itemizedclip.data.preflight import PreflightError, check_dataset
from itemizedclip.evaluation.encoding import EncodingOptions
from itemizedclip.evaluation.retrieval import RetrievalEvaluator
from itemizedclip.models.factory import create_model, create_tokenizer, create_transform
from itemizedclip.runtime.errors import MissingFileError, reported_errors
from itemizedclip.runtime.processes import Ranks, on_main
from itemizedclip.training.engine import Evaluator, TrainResult, train
from itemizedclip.training.loading import BatchSource, MapSource
from itemizedclip.training.options import parse_run
from itemizedclip.training.run import launch_run
from itemizedclip_2d.recipes import RECIPES, RsicdRun, ShardRun
from itemizedclip_2d.rsicd import RsicdDataset, load_external_captions, resolve_validation_split
from itemizedclip_2d.shard_index import expand_shards, open_shards
from itemizedclip_2d.shards import ShardDataset, ShardSampler

logger = logging.getLogger(__name__)

DESCRIPTION = "Train ItemizedCLIP on photographs and remote-sensing images."


@dataclass(frozen=True)
class TrainingData:
    """What a domain gives the engine.

    Attributes:
        dataset: keys (epoch, index) → training sample.
        evaluators: run every --val-frequency epochs.
        fingerprint: identity of the training data.
        source: batches of the dataset in an order of its own; None leaves the order to the engine.
    """

    dataset: RsicdDataset | ShardDataset
    evaluators: list[Evaluator]
    fingerprint: str
    source: BatchSource | None = None


def rsicd_data(options: RsicdRun, config: dict[str, Any], ranks: Ranks) -> TrainingData:
    """RSICD's training split and the retrieval evaluator over its validation split.

    Raises:
        FileNotFoundError: a CSV or item file is missing.
        ValueError: no --rsicd-data-dir, or files that do not belong together.
    """
    folder = options.data.rsicd_dir
    if folder is None:
        raise MissingFileError("--rsicd-data-dir is not set; give the folder with train.csv, valid.csv and test.csv")
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
        scoring=options.objective.scoring,
        encoding=EncodingOptions(batch_size=min(64, options.loading.batch_size), num_workers=options.loading.workers),
    )
    return TrainingData(dataset, [evaluator], dataset.fingerprint)


def shard_data(options: ShardRun, config: dict[str, Any], ranks: Ranks, collator: ItemCollator) -> TrainingData:
    """Natural images from shards, in their own order, and the retrieval evaluator over the validation shards.

    Raises:
        PreflightError: no --train-data, shards that are missing or hold too little, or too many bad samples.
        FileNotFoundError, ValueError: an item file that is missing or no item file.
    """
    paths, loading = options.data, options.loading
    if not paths.train_data:
        raise PreflightError("--train-data is not set; give the training shards, such as 'DIR/{00000..00057}.tar'")
    items_path = None if paths.external_captions == "captions" else Path(paths.external_captions)

    def split(sources: str, *, is_train: bool) -> ShardDataset:
        shards = open_shards(
            expand_shards(sources),
            caption_field=paths.caption_field,
            # In training a bad image is replaced when it comes up; in validation none may be.
            decode_images=not is_train,
            cache_dir=paths.cache_dir,
        )
        return ShardDataset(
            shards,
            transform=create_transform(config, is_train=is_train),
            items=None if items_path is None else load_item_lists(items_path, integer_keys=True),
            items_path=items_path,
            num_items=loading.num_sampled_captions,
            is_train=is_train,
            seed=options.run.seed,
            on_bad_sample=loading.on_bad_sample,
            max_bad_fraction=loading.max_bad_fraction,
            max_samples=None if is_train else paths.val_num_samples,
            read_ahead=is_train and paths.shard_window > 0,
        )

    def order(dataset: ShardDataset) -> ShardSampler:
        return ShardSampler(
            dataset.shard_of,
            batch_size=loading.step_batch,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=options.run.seed,
            samples_per_epoch=paths.train_num_samples,
            window=paths.shard_window,
            resampled=paths.dataset_resampled,
        )

    def check() -> None:
        dataset = split(paths.train_data, is_train=True)
        order(dataset)
        check_dataset(dataset, collator, step_batch=1, world_size=1)
        logger.info("Training shards: %s", dataset.summary)
        if paths.val_data:
            logger.info("Validation shards: %s", split(paths.val_data, is_train=False).summary)

    # The main rank first: one process reads new shards and reports what is wrong with the files.
    on_main(check)
    dataset = split(paths.train_data, is_train=True)
    sampler = order(dataset)
    if ranks.is_main and sampler.num_samples >= 2 * len(dataset):
        logger.warning(
            "an epoch of %d samples passes over the %d images %.1f times; --train-num-samples None makes it one pass",
            sampler.num_samples, len(dataset), sampler.num_samples / len(dataset),
        )  # fmt: skip
    evaluators: list[Evaluator] = []
    if paths.val_data:
        evaluators.append(
            RetrievalEvaluator(
                split(paths.val_data, is_train=False),
                create_tokenizer(config),
                name="val",
                scoring=options.objective.scoring,
                encoding=EncodingOptions(batch_size=min(64, loading.batch_size), num_workers=loading.workers),
            )
        )
    source = MapSource(dataset, collator, loading, ranks, seed=options.run.seed, sampler=sampler)
    return TrainingData(dataset, evaluators, dataset.fingerprint, source)


def main(argv: Sequence[str] | None = None) -> TrainResult:
    """Parse flags, build model and data, train."""
    options = parse_run(RECIPES, "rsicd", argv, prog="main.py", description=DESCRIPTION)
    with reported_errors(), launch_run(options) as ranks:
        model = create_model(options.model.model)
        collator = ItemCollator(create_tokenizer(model.config), options.loading.num_sampled_captions)
        if isinstance(options, ShardRun):
            data = shard_data(options, model.config, ranks, collator)
        else:
            data = rsicd_data(options, model.config, ranks)
        return train(
            options,
            model=model,
            dataset=data.dataset,
            collator=collator,
            source=data.source,
            evaluators=data.evaluators,
            data_fingerprint=data.fingerprint,
            ranks=ranks,
        )
