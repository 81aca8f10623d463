"""Runs of the 2D wing and their data options: one named recipe per published run, each with a debug size.

bash train_rsicd.sh                          8 GPUs in the paper, about 10 s per epoch there; any number works
bash train_itemized_cc0.3M.sh                8 GPUs in the paper, 294 steps of 1,024 images per epoch there
python 2D_images_tasks/src/main.py --recipe rsicd_debug --rsicd-data-dir DIR --external-captions captions
python 2D_images_tasks/src/main.py --recipe itemized_cc0.3M_debug --train-data 'DIR/{00000..00003}.tar'
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from itemizedclip.data.items import load_item_lists
from itemizedclip.data.preflight import PreflightError, check_dataset
from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.runtime.files import file_sha256
from itemizedclip.runtime.flags import check
from itemizedclip.runtime.processes import on_main
from itemizedclip.training.engine import TrainResult
from itemizedclip.training.loading import MapSource
from itemizedclip.training.options import (
    LoadingSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    RunOptions,
    RunSettings,
)
from itemizedclip.training.own import OwnRun, own_like
from itemizedclip.training.recipes import Opening, TrainingData, train_door
from itemizedclip.training.run import Evaluator
from itemizedclip_2d.rsicd import RsicdDataset, load_external_captions, resolve_validation_split
from itemizedclip_2d.shard_index import expand_shards, open_shards
from itemizedclip_2d.shard_stream import ShardStream, StreamSource, check_stream, stream_fingerprint, stream_sources
from itemizedclip_2d.shards import ShardDataset, ShardSampler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RsicdData:
    """Remote sensing: where RSICD lies."""

    rsicd_dir: Annotated[Path | None, tyro.conf.arg(aliases=("--rsicd-data-dir",))] = None
    """Folder with train.csv, valid.csv and test.csv from Kaggle."""

    external_captions: str = "captions"
    """Item files "train.json;test.json" or "train.json;valid.json;test.json"; captions: the CSV's own sentences."""

    cache_dir: Path | None = None
    """Folder for the image cache; default beside the CSV."""

    def open(self, opening: Opening) -> TrainingData:
        """RSICD's training split and the retrieval evaluator over its validation split.

        Raises:
            FileNotFoundError: a CSV or item file is missing.
            ValueError: no --rsicd-data-dir, or files that do not belong together.
        """
        options, ranks = opening.options, opening.ranks
        folder = self.rsicd_dir
        if folder is None:
            raise MissingFileError(
                "--rsicd-data-dir is not set; give the folder with train.csv, valid.csv and test.csv"
            )
        files = None
        if self.external_captions != "captions":
            files = load_external_captions(self.external_captions)
        validation = resolve_validation_split(folder, files)
        if ranks.is_main:
            logger.info(validation.message)

        def split(csv_path: Path, items_path: Path | None, *, is_train: bool) -> RsicdDataset:
            return RsicdDataset(
                csv_path=csv_path,
                transform=opening.transform(is_train=is_train),
                items=None if items_path is None else load_item_lists(items_path, integer_keys=True),
                items_path=items_path,
                num_items=options.loading.num_sampled_captions,
                is_train=is_train,
                seed=options.run.seed,
                cache_dir=self.cache_dir,
                on_bad_sample=options.loading.on_bad_sample,
            )

        def training_split() -> RsicdDataset:
            return split(folder / "train.csv", None if files is None else files["train"], is_train=True)

        def validation_split() -> RsicdDataset:
            return split(validation.csv_path, validation.items_path, is_train=False)

        # The main rank opens both first: one process builds the caches and reports what is wrong with the files.
        on_main(lambda: len(training_split()) + len(validation_split()))
        dataset = training_split()
        evaluator = opening.retrieval(validation_split(), f"rsicd_{validation.split}")
        return TrainingData(dataset, [evaluator], dataset.fingerprint)


@dataclass(frozen=True)
class RsicdRun(RunOptions):
    """A training run on RSICD."""

    data: RsicdData = field(default_factory=RsicdData)


def rsicd() -> RsicdRun:
    """Published recipe: ViT-B/16 on RSICD, 8 GPUs × 128 images, 100 epochs; paper: 30-class mean rank 3.76."""
    return RsicdRun(
        run=RunSettings(save_frequency=5),
        model=ModelSettings(model="ViT-B-16-ItemizedCLIP", precision="amp"),
        objective=ObjectiveSettings(
            ila_weight=1.0,
            ila_keep_rate=0.6,
            kta_weight=1.5,
            key_token_fraction=0.2,
            mps_weight=2.0,
            iis_weight=1.0,
            worst_positive_factor=1.5,
        ),
        optimizer=OptimizerSettings(lr=3e-4, weight_decay=1.5, beta1=0.9, beta2=0.98, eps=1e-8, warmup=100, epochs=100),
        loading=LoadingSettings(batch_size=128, num_sampled_captions=6),
    )


def rsicd_debug() -> RsicdRun:
    """Debug size: the RSICD run with the smallest model and 2 epochs, seconds on a CPU."""
    recipe = rsicd()
    return replace(
        recipe,
        model=replace(recipe.model, model="ViT-scenes-ItemizedCLIP", precision="fp32"),
        optimizer=replace(recipe.optimizer, warmup=2, epochs=2),
        loading=replace(recipe.loading, batch_size=4, workers=0),
    )


@dataclass(frozen=True)
class ShardData:
    """Natural images: webdataset shards and their items."""

    train_data: str = ""
    """Training shards: brace ranges such as 'DIR/{00000..00057}.tar', folders or patterns, joined by '::'; DIR may be
    an address, s3://, gs://, hf:// or http(s)://."""

    val_data: str = ""
    """Validation shards, in the same form; empty: no validation."""

    external_captions: str = "captions"
    """Item file {"0": ["item", …], …} by sample index; captions: the samples' own captions for all."""

    caption_field: str = "shortIB_captions"
    """JSON field of a sample's own captions, which stand in where the item file has none."""

    train_num_samples: int | None = None
    """Samples of an epoch; None: all, once. Epochs go on where the last one ended."""

    val_num_samples: int | None = None
    """Validate on the first so many images; None: all."""

    dataset_resampled: bool = False
    """Draw the samples of an epoch with replacement."""

    stream: bool = False
    """Read shards from end to end by webdataset, also `pipe:COMMAND`: shards drawn with replacement, epochs of
    --train-num-samples, other samples after --resume. For stores where reading at a place is slow."""

    shard_window: int = 0
    """For slow disks: shuffle within so many shards at a time, read ahead as a whole; 0: among all samples."""

    cache_dir: Path | None = None
    """Folder for the indices of the shards; default beside them."""

    def __post_init__(self) -> None:
        for name, lowest in (("train_num_samples", 1), ("val_num_samples", 1), ("shard_window", 0)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UserError(f"--{name.replace('_', '-')} is {value}; expected at least {lowest}")
        check(
            not self.stream or self.train_num_samples is not None,
            "--stream has no epochs of its own; give the samples of one with --train-num-samples",
        )
        check(not self.stream or not self.shard_window, "--shard-window belongs to reading at places; drop --stream")

    def open(self, opening: Opening) -> TrainingData:
        """Natural images from shards, in their own order, and the retrieval evaluator over the validation shards.

        Raises:
            PreflightError: no --train-data, shards that are missing or hold too little, or too many bad samples.
            FileNotFoundError, ValueError: an item file that is missing or no item file.
        """
        options, ranks = opening.options, opening.ranks
        loading = options.loading
        if not self.train_data:
            raise PreflightError("--train-data is not set; give the training shards, such as 'DIR/{00000..00057}.tar'")
        items_path = None if self.external_captions == "captions" else Path(self.external_captions)

        def split(sources: str, *, is_train: bool) -> ShardDataset:
            shards = open_shards(
                expand_shards(sources),
                caption_field=self.caption_field,
                # In training a bad image is replaced when it comes up; in validation none may be.
                decode_images=not is_train,
                cache_dir=self.cache_dir,
            )
            return ShardDataset(
                shards,
                transform=opening.transform(is_train=is_train),
                items=None if items_path is None else load_item_lists(items_path, integer_keys=True),
                items_path=items_path,
                num_items=loading.num_sampled_captions,
                is_train=is_train,
                seed=options.run.seed,
                on_bad_sample=loading.on_bad_sample,
                max_bad_fraction=loading.max_bad_fraction,
                max_samples=None if is_train else self.val_num_samples,
                read_ahead=is_train and self.shard_window > 0,
            )

        def order(dataset: ShardDataset) -> ShardSampler:
            return ShardSampler(
                dataset.shard_of,
                batch_size=loading.step_batch,
                rank=ranks.rank,
                world_size=ranks.world_size,
                seed=options.run.seed,
                samples_per_epoch=self.train_num_samples,
                window=self.shard_window,
                resampled=self.dataset_resampled,
            )

        def check_data() -> None:
            dataset = split(self.train_data, is_train=True)
            order(dataset)
            check_dataset(dataset, opening.collator, step_batch=1, world_size=1)
            logger.info("Training shards: %s", dataset.summary)
            if self.val_data:
                logger.info("Validation shards: %s", split(self.val_data, is_train=False).summary)

        evaluators: list[Evaluator] = []
        if self.stream:
            on_main(lambda: split(self.val_data, is_train=False) if self.val_data else None)
            if self.val_data:
                evaluators.append(opening.retrieval(split(self.val_data, is_train=False), "val"))
            return self._streamed(opening, items_path, evaluators)
        # The main rank first: one process reads new shards and reports what is wrong with the files.
        on_main(check_data)
        dataset = split(self.train_data, is_train=True)
        sampler = order(dataset)
        if ranks.is_main and sampler.num_samples >= 2 * len(dataset):
            logger.warning(
                "an epoch of %d samples passes over the %d images %.1f times; one pass: --train-num-samples None",
                sampler.num_samples, len(dataset), sampler.num_samples / len(dataset),
            )  # fmt: skip
        if self.val_data:
            evaluators.append(opening.retrieval(split(self.val_data, is_train=False), "val"))
        source = MapSource(dataset, opening.collator, loading, ranks, seed=options.run.seed, sampler=sampler)
        return TrainingData(dataset, evaluators, dataset.fingerprint, source)

    def _streamed(self, opening: Opening, items_path: Path | None, evaluators: list[Evaluator]) -> TrainingData:
        loading, ranks = opening.options.loading, opening.ranks
        stream = ShardStream(
            sources=stream_sources(self.train_data),
            transform=opening.transform(is_train=True),
            items=None if items_path is None else load_item_lists(items_path, integer_keys=True),
            num_items=loading.num_sampled_captions,
            seed=opening.options.run.seed,
            rank=ranks.rank,
            caption_field=self.caption_field,
            on_bad_sample=loading.on_bad_sample,
        )
        assert self.train_num_samples is not None
        source = StreamSource(stream, opening.collator, loading, ranks, samples_per_epoch=self.train_num_samples)
        on_main(lambda: check_stream(stream))
        fingerprint = stream_fingerprint(stream.sources, "" if items_path is None else file_sha256(items_path))
        return TrainingData(None, evaluators, fingerprint, source)


@dataclass(frozen=True)
class ShardRun(RunOptions):
    """A training run on webdataset shards."""

    data: ShardData = field(default_factory=ShardData)


def itemized_cc03m() -> ShardRun:
    """Published recipe: ViT-B/16 on Itemized-cc0.3M, 8 GPUs × 128 images, 100 epochs; paper: Flickr30k T2I R@1 14.4."""
    return ShardRun(
        model=ModelSettings(model="ViT-B-16-ItemizedCLIP", precision="amp"),
        objective=ObjectiveSettings(
            ila_weight=1.0,
            ila_keep_rate=0.8,
            kta_weight=1.0,
            key_token_fraction=0.2,
            mps_weight=0.1,
            iis_weight=0.1,
            worst_positive_factor=1.5,
        ),
        optimizer=OptimizerSettings(
            lr=5e-4, weight_decay=0.8, beta1=0.9, beta2=0.98, eps=1e-8, warmup=2000, epochs=100
        ),
        # Images of the web: some cannot be decoded.
        loading=LoadingSettings(batch_size=128, num_sampled_captions=7, on_bad_sample="skip"),
        # As published, although the training shards hold at most 290,000.
        data=ShardData(train_num_samples=300_000),
    )


def itemized_cc03m_debug() -> ShardRun:
    """Debug size: the Itemized-cc0.3M run with the smallest model and 2 epochs, seconds on a CPU."""
    recipe = itemized_cc03m()
    return replace(
        recipe,
        model=replace(recipe.model, model="ViT-scenes-ItemizedCLIP", precision="fp32"),
        optimizer=replace(recipe.optimizer, warmup=2, epochs=2),
        loading=replace(recipe.loading, batch_size=4, workers=0),
        data=replace(recipe.data, train_num_samples=None),
    )


def own_rsicd() -> OwnRun:
    """Remote-sensing and other images, a few thousand: as the recipe rsicd."""
    return own_like(rsicd())


def own_natural() -> OwnRun:
    """Photographs, hundreds of thousands: as the recipe itemized_cc0.3M."""
    return own_like(itemized_cc03m())


def main(argv: Sequence[str] | None = None) -> TrainResult | None:
    """Entry point of the published script 2D_images_tasks/src/main.py."""
    names = ("rsicd", "rsicd_debug", "itemized_cc0.3M", "itemized_cc0.3M_debug")
    return train_door(names, argv, description="Train ItemizedCLIP on photographs and remote-sensing images.")
