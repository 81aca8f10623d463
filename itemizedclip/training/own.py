"""The recipe `own`: train on your own images or studies, described by one file (`itemizedclip.data.jsonl`).

    itemizedclip train own --data my.jsonl --name mine
    itemizedclip train own --data my.jsonl --like mri --name mine
    itemizedclip train own --data my.jsonl --finetune lora --pretrained epoch_30.pt --name mine

A domain offers its way of training on such files under the entry-point group `itemizedclip.like`: name → function
without arguments that returns options whose group `data` inherits `OwnData`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from itemizedclip.data.jsonl import ImageItems, OwnFile, check_files, read_own
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.models.factory import create_model
from itemizedclip.models.lora import fold
from itemizedclip.models.weights import given_checkpoint, read_checkpoint
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.processes import on_main
from itemizedclip.runtime.registry import Registry, unknown_name
from itemizedclip.training.options import (
    LoadingSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    RunOptions,
)
from itemizedclip.training.recipes import Opening, TrainingData

logger = logging.getLogger(__name__)

OptionsT = TypeVar("OptionsT", bound=RunOptions)

LIKES: Registry[Callable[[], RunOptions]] = Registry("itemizedclip.like", "way to train on own data")
"""Value of --like → options of a run on one file of own data, in the manner of a published recipe."""

FINETUNES: dict[str, tuple[dict[str, Any], float]] = {
    "full": ({}, 2e-5),
    "frozen": ({"lock_image": True, "lock_text": True}, 1e-4),
    "frozen-image": ({"lock_image": True}, 2e-5),
    "frozen-text": ({"lock_text": True}, 2e-5),
    "lora": ({"lora_image": 8, "lora_text": 8}, 2e-4),
    "lora-image": ({"lora_image": 8, "lock_text": True}, 2e-4),
    "lora-text": ({"lora_text": 8, "lock_image": True}, 2e-4),
}
"""Value of --finetune → what of the model trains, and the peak learning rate; flags override both."""


@dataclass(frozen=True)
class OwnData:
    """Your data: one file of images or studies with their items."""

    data: Path | None = None
    """Images or studies with items: .jsonl, .json, .csv, or a folder with one; `split` says train or val."""

    train_file: Path | None = None
    """Instead of --data: file of the training images alone."""

    val_file: Path | None = None
    """File of other images, retrieved among after each epoch; None: those of --data with split val, if any."""

    image_root: Path | None = None
    """Folder that the paths are relative to; default: that of the file."""

    like: str = ""
    """Train in the manner of a published recipe: rsicd, natural, scenes, mri, head-ct or chest-ct, or a debug size."""

    finetune: str = ""
    """Start from --pretrained: full, frozen (the head alone trains), frozen-image, frozen-text, lora, lora-image,
    lora-text (adapters in the towers' linear layers)."""

    def files(self, options: RunOptions) -> tuple[OwnFile, OwnFile | None]:
        """Training and validation entries; call it on the main rank first, which checks that the files are there.

        Raises:
            UserError: no file given, two given, files that cannot be used, or none of their images on disk.
        """
        if (self.data is None) == (self.train_file is None):
            raise UserError(
                "give --data FILE, your images or studies with their items, or --train-file (docs/own-data.md)"
            )
        loading = options.loading

        def read(path: Path) -> OwnFile:
            return read_own(path, root=self.image_root, on_bad_sample=loading.on_bad_sample)

        if self.train_file is not None:
            train, val = read(self.train_file), None if self.val_file is None else read(self.val_file)
        else:
            assert self.data is not None
            whole = read(self.data)
            train, val = whole.part("train"), whole.part("val")
            if not train.entries:
                raise UserError(f"{whole.path}: no entry has split train; expected at least one to train on")
            val = read(self.val_file) if self.val_file is not None else val if val.entries else None
        return train, val

    def check(self, options: RunOptions) -> None:
        """Stop before the first step when images are not on disk; called on the main rank."""
        skip = options.loading.on_bad_sample == "skip"
        train, val = self.files(options)
        for file in (train, val):
            if file is not None:
                missing = check_files(file, max_missing=options.loading.max_bad_fraction if skip else 0.0)
                if missing:
                    logger.warning("%d entries of %s have no file, such as %s", len(missing), file.path, missing[0])
        logger.info(
            "%d entries to train on, %s to validate on", len(train.entries), len(val.entries) if val else "none"
        )


@dataclass(frozen=True)
class OwnImages(OwnData):
    """Your images and their items."""

    join_items: bool = False
    """Training texts are 1 … 3 items joined, as in the published recipes of photographs; otherwise single items."""

    def open(self, opening: Opening) -> TrainingData:
        """See `itemizedclip.training.recipes.DataGroup`.

        Raises:
            UserError: no --data, files that cannot be used, or a model of studies.
        """
        options = opening.options
        if opening.model.input_kind != "photographs":
            raise UserError("the model reads studies: add --like mri, head-ct or chest-ct")

        def images(file: OwnFile, *, is_train: bool) -> ImageItems:
            return ImageItems(
                file,
                opening.transform(is_train=is_train),
                num_items=options.loading.num_sampled_captions,
                is_train=is_train,
                seed=options.run.seed,
                join_items=self.join_items,
                on_bad_sample=options.loading.on_bad_sample,
            )

        # The main rank first, which reports what is wrong with the files.
        on_main(lambda: self.check(options))
        train, val = self.files(options)
        dataset = images(train, is_train=True)
        validation = [] if val is None else [opening.retrieval(images(val, is_train=False), "val")]
        return TrainingData(dataset, validation, dataset.fingerprint)


@dataclass(frozen=True)
class OwnRun(RunOptions):
    """A run on your own images."""

    data: OwnImages = field(default_factory=OwnImages)

    def create_model(self) -> DualEncoder:
        """See `RunOptions`; with an empty --model the one of --pretrained."""
        config = checkpoint_config(self.model)
        return super().create_model() if config is None else create_model(config)


def checkpoint_config(settings: ModelSettings) -> dict[str, Any] | None:
    """The config of --pretrained where --model is left empty, as fine-tuning leaves it; None where a model is named.

    Raises:
        UserError: no checkpoint to take it from, or one without a config.
    """
    if settings.model:
        return None
    if settings.pretrained is None:
        raise UserError("--finetune needs --pretrained, the checkpoint to start from")
    path = given_checkpoint(settings.pretrained)
    config = fold(read_checkpoint(path, verify=False, mapped=True)).get("model_config")
    if config is None:
        raise UserError(
            f"{settings.pretrained}: carries no model config (a released file?); name its model with --model"
        )
    return dict(config)


def own(like: str = "", finetune: str = "") -> RunOptions:
    """Your own images or studies, from one file; --like mri trains as the recipe mri does, --finetune a checkpoint."""
    options: Any = LIKES.load(like)() if like else own_images()
    if finetune:
        options = finetuning(options, finetune)
    return replace(options, data=replace(options.data, like=like, finetune=finetune))


def own_images() -> OwnRun:
    """Images, from random weights: what the recipe does without --like."""
    return OwnRun(
        objective=ObjectiveSettings(ila_keep_rate=0.8, mask_duplicates=True),
        optimizer=OptimizerSettings(lr=3e-4, weight_decay=0.5, warmup=100, epochs=30),
        loading=LoadingSettings(batch_size=64),
    )


def own_like(recipe: RunOptions, *, join_items: bool = True) -> OwnRun:
    """A published recipe of photographs, on own images; texts that several images of a batch share are masked."""
    return OwnRun(
        model=recipe.model,
        objective=replace(recipe.objective, mask_duplicates=True),
        optimizer=recipe.optimizer,
        loading=recipe.loading,
        data=OwnImages(join_items=join_items),
    )


def finetuning(options: OptionsT, preset: str) -> OptionsT:
    """The options of a run that starts from a checkpoint.

    Raises:
        UserError: no such preset.
    """
    if preset not in FINETUNES:
        raise UserError(unknown_name("value of --finetune", preset, FINETUNES))
    changes, lr = FINETUNES[preset]
    return replace(
        options,
        model=replace(options.model, model="", **changes),
        optimizer=replace(options.optimizer, lr=lr, warmup=50, epochs=10),
    )
