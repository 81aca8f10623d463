"""Runs on chest CT: the published recipe and its debug size.

bash train_ctrate.sh     8 GPUs in the paper, 47 steps of 512 scans per epoch on 24,128 scans; any number works
python Radiology_Tasks/src/open_ct_rate/main.py --recipe ctrate_debug --data-root DIR --items-json FILE
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from itemizedclip.runtime.errors import UserError
from itemizedclip.training.options import LoadingSettings, ModelSettings, ObjectiveSettings, OptimizerSettings
from itemizedclip_radiology.data.chest import PUBLISHED_INPUT_INFO, ChestSettings
from itemizedclip_radiology.data.volumes import Size
from itemizedclip_radiology.models.mae_init import HUB_NAME as MAE_HUB_NAME
from itemizedclip_radiology.training import InitialWeights, RadiologyRun

CXR_BERT_HUB_NAME = "microsoft/BiomedVLP-CXR-BERT-specialized"
"""The text tower's published weights; loaded into a plain BERT, no remote code."""


@dataclass(frozen=True)
class ChestData(ChestSettings):
    """Where the scans are, and how they are read."""

    data_root: Path | None = None
    """CT-RATE's folder of volumes, with train/ and valid/ in it; default: DATA_ROOT."""

    items_json: Path | None = None
    """Reconstructions and report items of each training scan (itemized.json); default: ITEMS_JSON."""

    labels: Annotated[Path | None, tyro.conf.arg(aliases=("--zeroshot-ct-rate",))] = None
    """Validation labels for the zero-shot evaluation; default: those of --data-root or the folder above, if any."""

    valid_items: Path | None = None
    """JSON file like --items-json, of other scans: retrieval among them after each epoch. None: no retrieval."""

    volume_size: Size | None = None
    """Voxels (slices rows columns) of the input, multiples of the model's patch; None: the model's own."""


@dataclass(frozen=True)
class ChestRun(RadiologyRun):
    """A training run on chest CT."""

    data: ChestData = field(default_factory=ChestData)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.lock_text and self.initial.text_model is None and self.model.pretrained is None:
            raise UserError(
                "--lock-text would freeze a BERT of random weights: give its weights with --text-model, or drop "
                "--lock-text (--no-lock-text)"
            )


def ctrate() -> ChestRun:
    """Published recipe: HLIP on chest CT, 8 GPUs × 64 scans, 80 epochs; paper: CT-RATE mean AUC of 16 findings 83.2."""
    return ChestRun(
        model=ModelSettings(
            model="CTRATE_HLIP_BiomedBERT_itemizedclip", precision="amp", grad_checkpointing=True, lock_text=True
        ),
        objective=ObjectiveSettings(
            ila_weight=1.0,
            ila_keep_rate=0.95,
            kta_weight=1.0,
            key_token_fraction=0.05,
            mps_weight=0.1,
            iis_weight=1.0,
            worst_positive_factor=1.0,
            normal_check=True,
        ),
        optimizer=OptimizerSettings(lr=1e-4, weight_decay=0.5, beta1=0.9, beta2=0.98, eps=1e-6, warmup=100, epochs=80),
        # Of 47,149 volumes some cannot be converted.
        loading=LoadingSettings(batch_size=16, accum_batch=4, num_sampled_captions=10, workers=4, on_bad_sample="skip"),
        initial=InitialWeights(text_model=CXR_BERT_HUB_NAME, image_weights=MAE_HUB_NAME),
        data=ChestData(input_info=PUBLISHED_INPUT_INFO),
    )


def ctrate_debug() -> ChestRun:
    """Debug size: the chest CT run with the smallest model on 32×96×96 voxels and 2 epochs, seconds on a CPU."""
    recipe = ctrate()
    return replace(
        recipe,
        # Its BERT starts from random weights, which are not worth freezing.
        model=replace(recipe.model, model="CTRATE_HLIP_debug", precision="fp32", lock_text=False),
        optimizer=replace(recipe.optimizer, lr=1e-3, weight_decay=0.2, warmup=2, epochs=2),
        loading=replace(recipe.loading, batch_size=8, accum_batch=1, num_sampled_captions=3, workers=0),
        initial=InitialWeights(),
    )


RECIPES: dict[str, Callable[[], ChestRun]] = {"ctrate": ctrate, "ctrate_debug": ctrate_debug}
