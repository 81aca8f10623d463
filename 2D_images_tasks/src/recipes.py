"""Runs of the 2D wing: RSICD and its data options, one named recipe per published run, each with a debug size.

    bash train_rsicd.sh                          8 GPUs in the paper, about 10 s per epoch there; any number works
    python 2D_images_tasks/src/main.py --recipe rsicd_debug --rsicd-data-dir DIR --external-captions captions
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

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


RECIPES = {"rsicd": rsicd, "rsicd_debug": rsicd_debug}
