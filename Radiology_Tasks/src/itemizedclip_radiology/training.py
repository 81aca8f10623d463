"""What the trainers of studies (brain MRI, head CT, chest CT) share: initial weights, model, usable validation studies.

Axes: D H W voxels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from itemizedclip.data.batch import BadSampleError, ItemSample
from itemizedclip.data.preflight import PreflightError
from itemizedclip.models.factory import create_model, load_model_config
from itemizedclip.runtime.collectives import gather_objects
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.processes import on_main
from itemizedclip.training.options import LoadingSettings, ModelSettings, RunOptions
from itemizedclip_radiology.data.reports import StudyIndex
from itemizedclip_radiology.data.studies import SkippedSeries
from itemizedclip_radiology.data.volumes import GREY_MEAN, GREY_STD, Size
from itemizedclip_radiology.models.mae_init import mae_weights_file
from itemizedclip_radiology.models.radiology_model import RadiologyItemizedCLIP, load_initial_weights
from itemizedclip_radiology.models.text_tower import with_text_model

logger = logging.getLogger(__name__)

_MOST_LISTED = 5


# --- options ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InitialWeights:
    """Pretrained parts to start from; not used with --pretrained."""

    text_model: str | None = None
    """BERT folder or hub name: its shape, tokenizer and weights. None: the model's own, random weights."""

    image_weights: str | None = None
    """MAE ViT-B/16 for the image trunk: file, folder or hub name. None: random weights."""

    series_name_weights: Path | None = None
    """Series-name encoder: file with its weights, or a released checkpoint that holds it. None: random weights."""


@dataclass(frozen=True)
class RadiologyRun(RunOptions):
    """A training run on studies; wings' runs add the group `data`."""

    initial: InitialWeights = field(default_factory=InitialWeights)


# --- model -----------------------------------------------------------------------------------------------------------


def model_config(settings: ModelSettings, initial: InitialWeights, volume_size: Size | None) -> dict[str, Any]:
    """The config of --model with the text model and the volume size of the run.

    Raises:
        FileNotFoundError: a text model that is neither here nor to be had from the hub.
        ValueError: no such model, or one for other images.
    """
    config = load_model_config(settings.model)
    if config["vision_cfg"].get("tower") != "hlip":
        raise UserError(f"--model {settings.model} is no model of 3-D studies; for example HLIPSN_debug is one")
    if volume_size is not None:
        config["vision_cfg"] = {**config["vision_cfg"], "volume_size": list(volume_size)}
    if initial.text_model is not None:
        config = with_text_model(config, initial.text_model)
    return config


def build_model(options: RadiologyRun, volume_size: Size | None) -> RadiologyItemizedCLIP:
    """The model with its initial weights; call it on every rank, under `launch`.

    Args:
        options: the run.
        volume_size: voxels of a series; None: the model's own.

    Raises:
        FileNotFoundError, ValueError: weights that are not there or do not fit.
    """
    settings, initial = options.model, options.initial

    def fetch() -> None:
        model_config(settings, initial, volume_size)
        if initial.image_weights is not None and settings.pretrained is None:
            mae_weights_file(initial.image_weights)

    # The main rank first: one download, one message about what is missing.
    on_main(fetch)
    model = create_model(model_config(settings, initial, volume_size))
    assert isinstance(model, RadiologyItemizedCLIP)
    if settings.pretrained is None:
        load_initial_weights(
            model,
            image_weights=initial.image_weights,
            series_name_weights=initial.series_name_weights,
            text_model=initial.text_model,
        )
    return model


def volume_transform(volume_size: Size, **more: Any) -> dict[str, Any]:
    """What is done to volumes, for checkpoints."""
    return {"volume_size": list(volume_size), "mean": GREY_MEAN, "std": GREY_STD, **more}


# --- training data ---------------------------------------------------------------------------------------------------


def check_folders(absent: Sequence[str], count: int, *, index: Path, folder: Path, loading: LoadingSettings) -> None:
    """Stop before the first step when too many training studies have no folder: half a copy, or the wrong JSON file.

    Args:
        absent: studies without one.
        count: studies.
        index: file that lists them.
        folder: where their folders should be.
        loading: policy for bad samples.

    Raises:
        PreflightError: more than --max-bad-fraction of the studies, or any with --on-bad-sample stop.
    """
    if not absent:
        return
    shown = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
    message = f"{len(absent):,} of {count:,} studies of {index} have no folder in {folder}: {shown}"
    if loading.on_bad_sample == "stop":
        raise PreflightError(f"{message}. Add them (--on-bad-sample skip goes on without them)")
    if len(absent) > loading.max_bad_fraction * count:
        raise PreflightError(
            f"{message}, more than --max-bad-fraction {loading.max_bad_fraction:g} allows. Add them, take them out of "
            "the JSON file, or raise the limit"
        )
    logger.warning("%s; others take their place", message)


# --- validation data -------------------------------------------------------------------------------------------------


class ItemizedStudies(Protocol):
    """A data set of studies in evaluation mode."""

    index: StudyIndex

    def __len__(self) -> int: ...

    def __getitem__(self, key: int, /) -> ItemSample: ...

    def items_of(self, index: int) -> list[str]:
        """All items of a study, without reading its volumes."""


@dataclass
class UsableStudies:
    """The studies of a split that can be opened, as the evaluators read them.

    Attributes:
        dataset: the split, in evaluation mode.
        rows: which of its studies.
    """

    dataset: ItemizedStudies
    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ItemSample:
        return self.dataset[self.rows[index]]

    def items(self, index: int) -> list[str]:
        """All items of a study; its volumes are not read."""
        return self.dataset.items_of(self.rows[index])


def usable_rows(
    count: int,
    why_unusable: Callable[[int], str | None],
    *,
    source: Path,
    on_bad_sample: str,
    what: str = "study",
) -> list[int]:
    """Studies of a validation split that can be opened.

    An evaluation cannot replace a study as training does, and should not end after hours of training.

    Args:
        count: studies of the split.
        why_unusable: study number → why it cannot be opened, None when it can.
        source: file that lists them.
        on_bad_sample: "skip" leaves such studies out.
        what: a study, for messages.

    Raises:
        BadSampleError: a study that cannot be opened, unless `on_bad_sample` is "skip".
        PreflightError: no study is left.
    """
    rows, bad = [], []
    for row in range(count):
        message = why_unusable(row)
        if message is None:
            rows.append(row)
        elif on_bad_sample == "stop":
            raise BadSampleError(f"{message}. Fix it (--on-bad-sample skip goes on without it)")
        else:
            bad.append(message)
    if not rows:
        raise PreflightError(f"{source}: no {what} can be used; the first: {bad[0]}")
    for message in bad[:_MOST_LISTED]:
        logger.warning("validation %s left out: %s", what, message)
    if bad:
        logger.warning("%d of %d of the validation split are left out", len(bad), count)
    return rows


def report_skipped(skipped: SkippedSeries, what: str) -> None:
    """Log how many series (or reconstructions) could not be used, over all ranks; every rank must call it."""
    positions = {position for share in gather_objects(list(skipped)) for position in share}
    if positions:
        logger.warning("%d %s were skipped; log.txt names each", len(positions), what)
