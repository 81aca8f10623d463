"""Runs on whole studies, brain MRI and head CT: one named recipe per published run, each with a debug size.

bash train_mri.sh     8 GPUs in the paper, 859 steps of 256 studies per epoch on 220,001 studies; any number works
bash train_ct.sh      the same on head CT
python Radiology_Tasks/src/open_mri_train/main.py --recipe mri_debug --data-root DIR --json-root DIR
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
)
from itemizedclip_radiology.data.study_dataset import NUM_SERIES
from itemizedclip_radiology.data.volumes import Size
from itemizedclip_radiology.models.mae_init import HUB_NAME as MAE_HUB_NAME
from itemizedclip_radiology.training import InitialWeights, RadiologyRun

BIOMEDBERT_HUB_NAME = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext"
"""The text tower's published starting point."""


@dataclass(frozen=True)
class StudyData:
    """Where the studies are, and what is taken of them."""

    data_root: Path | None = None
    """Folder of STUDY/SERIES/img.pt, or of train/ and valid/ (or val/) with these; default: DATA_ROOT."""

    json_root: Path | None = None
    """Folder of train.json and valid.json (or val.json); default: JSON_ROOT, then the study folder."""

    reports: Annotated[Path | None, tyro.conf.arg(aliases=("--report-replacer",))] = None
    """CSV of study and numbered report text, no header line, whose items replace those of the JSON files."""

    is_ct: Annotated[bool, tyro.conf.arg(aliases=("--ct",))] = False
    """Validation studies are those of val.json, also where valid.json lies beside it (as in published head CT runs)."""

    num_series: int = NUM_SERIES
    """Series slots of a training study, filled at random, with repeats when it has fewer; validation takes all."""

    volume_size: Size | None = None
    """Voxels (slices rows columns) of a series, multiples of the model's patch; None: the model's own."""

    use_serienames: bool = True
    """Accepted for published commands; whether the model reads series names is part of its config."""

    def __post_init__(self) -> None:
        if self.num_series < 1:
            raise UserError(f"--num-series is {self.num_series}; expected at least 1")


@dataclass(frozen=True)
class StudyRun(RadiologyRun):
    """A training run on whole studies."""

    data: StudyData = field(default_factory=StudyData)


def mri() -> StudyRun:
    """Published recipe: HLIP on brain MRI, 8 GPUs × 32 studies, 24 epochs; paper: Pub-Brain-5 stroke BAcc 97.3."""
    return StudyRun(
        model=ModelSettings(model="HLIPSN_BiomedBERT_81616_itemizedclip", precision="amp", grad_checkpointing=True),
        objective=ObjectiveSettings(
            ila_weight=1.0,
            ila_keep_rate=0.9,
            kta_weight=1.0,
            key_token_fraction=0.05,
            mps_weight=0.01,
            iis_weight=1.0,
            worst_positive_factor=1.5,
            normal_check=True,
        ),
        optimizer=OptimizerSettings(
            lr=1.75e-4, weight_decay=0.2, beta1=0.9, beta2=0.98, eps=1e-6, warmup=2000, epochs=24
        ),
        # Of hundreds of thousands of studies some cannot be read.
        loading=LoadingSettings(batch_size=8, accum_batch=4, num_sampled_captions=7, workers=4, on_bad_sample="skip"),
        initial=InitialWeights(text_model=BIOMEDBERT_HUB_NAME, image_weights=MAE_HUB_NAME),
    )


def ct() -> StudyRun:
    """Published recipe: HLIP on head CT, 8 GPUs × 32 studies, 24 epochs; paper: RSNA mean AUC of five findings 91.5."""
    return replace(mri(), data=StudyData(is_ct=True))


def _debug_size(recipe: StudyRun) -> StudyRun:
    return replace(
        recipe,
        model=replace(recipe.model, model="HLIPSN_debug", precision="fp32"),
        optimizer=replace(recipe.optimizer, lr=1e-3, warmup=2, epochs=2),
        loading=replace(recipe.loading, batch_size=8, accum_batch=1, num_sampled_captions=3, workers=0),
        data=replace(recipe.data, num_series=6),
        initial=InitialWeights(),
    )


def mri_debug() -> StudyRun:
    """Debug size: the MRI run with the smallest model on 16×64×64 voxels and 2 epochs, seconds on a CPU."""
    return _debug_size(mri())


def ct_debug() -> StudyRun:
    """Debug size: the head CT run with the smallest model on 16×64×64 voxels and 2 epochs, seconds on a CPU."""
    recipe = _debug_size(ct())
    return replace(recipe, data=replace(recipe.data, num_series=3))


RECIPES: dict[str, Callable[[], StudyRun]] = {"mri": mri, "ct": ct, "mri_debug": mri_debug, "ct_debug": ct_debug}
