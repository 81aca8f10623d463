"""Runs of the 2D wing and their data options: one named recipe per published run, each with a debug size.

bash train_rsicd.sh                          8 GPUs in the paper, about 10 s per epoch there; any number works
bash train_itemized_cc0.3M.sh                8 GPUs in the paper, 294 steps of 1,024 images per epoch there
python 2D_images_tasks/src/main.py --recipe rsicd_debug --rsicd-data-dir DIR --external-captions captions
python 2D_images_tasks/src/main.py --recipe itemized_cc0.3M_debug --train-data 'DIR/{00000..00003}.tar'
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from itemizedclip.runtime.errors import UserError
from itemizedclip.training.options import (
    LoadingSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    RunOptions,
    RunSettings,
)


@dataclass(frozen=True)
class RsicdData:
    """Remote sensing: where RSICD lies."""

    rsicd_dir: Annotated[Path | None, tyro.conf.arg(aliases=("--rsicd-data-dir",))] = None
    """Folder with train.csv, valid.csv and test.csv from Kaggle."""

    external_captions: str = "captions"
    """Item files "train.json;test.json" or "train.json;valid.json;test.json"; captions: the CSV's own sentences."""

    cache_dir: Path | None = None
    """Folder for the image cache; default beside the CSV."""


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
        loading=LoadingSettings(batch_size=128, num_sampled_captions=6, workers=7),
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
    """Training shards: brace ranges such as 'DIR/{00000..00057}.tar', folders or patterns, joined by '::'."""

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

    shard_window: int = 0
    """For slow disks: shuffle within so many shards at a time, read ahead as a whole; 0: among all samples."""

    cache_dir: Path | None = None
    """Folder for the indices of the shards; default beside them."""

    def __post_init__(self) -> None:
        for name, lowest in (("train_num_samples", 1), ("val_num_samples", 1), ("shard_window", 0)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UserError(f"--{name.replace('_', '-')} is {value}; expected at least {lowest}")


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
        loading=LoadingSettings(batch_size=128, num_sampled_captions=7, workers=7, on_bad_sample="skip"),
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


RECIPES: dict[str, Callable[[], RsicdRun | ShardRun]] = {
    "rsicd": rsicd,
    "rsicd_debug": rsicd_debug,
    "itemized_cc0.3M": itemized_cc03m,
    "itemized_cc0.3M_debug": itemized_cc03m_debug,
}
