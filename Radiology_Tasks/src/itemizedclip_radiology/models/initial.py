"""A model of studies with its initial weights: a pretrained BERT, MAE image trunk and series-name encoder.

Axes: D H W voxels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.models.factory import create_model, family_of, load_model_config
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.processes import on_main
from itemizedclip.training.options import ModelSettings, RunOptions
from itemizedclip_radiology.data.volumes import GREY_MEAN, GREY_STD, Size

if TYPE_CHECKING:  # the towers take seconds to import, which flags and --help do not need
    from itemizedclip_radiology.models.hlip import HLIPConfig
    from itemizedclip_radiology.models.radiology_model import RadiologyItemizedCLIP


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
    """A training run on studies; its recipes add the group `data`, which has a `volume_size`."""

    initial: InitialWeights = field(default_factory=InitialWeights)

    def create_model(self) -> RadiologyItemizedCLIP:
        """See `RunOptions`."""
        return build_model(self, getattr(self, "data").volume_size)  # noqa: B009  subclasses have it


def model_config(settings: ModelSettings, initial: InitialWeights, volume_size: Size | None) -> dict[str, Any]:
    """The config of --model with the text model and the volume size of the run.

    Raises:
        FileNotFoundError: a text model that is neither here nor to be had from the hub.
        ValueError: no such model, or one for other images.
    """
    config = load_model_config(settings.model)
    if family_of(config).input_kind != "studies":
        raise UserError(f"--model {settings.model} is no model of 3-D studies; for example HLIPSN_debug is one")
    if volume_size is not None:
        config["vision_cfg"] = {**config["vision_cfg"], "volume_size": list(volume_size)}
    if initial.text_model is not None:
        from itemizedclip_radiology.models.text_tower import with_text_model

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
    from itemizedclip_radiology.models.mae_init import mae_weights_file
    from itemizedclip_radiology.models.radiology_model import RadiologyItemizedCLIP, load_initial_weights

    settings, initial = options.model, options.initial

    def fetch() -> None:
        model_config(settings, initial, volume_size)
        if initial.image_weights is not None and settings.pretrained is None:
            mae_weights_file(initial.image_weights)

    # The main rank first: one download, one message about what is missing.
    on_main(fetch)
    model = create_model(model_config(settings, initial, volume_size), source=settings.model)
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


def trunk_config(model: DualEncoder) -> HLIPConfig:
    """Size and attention table of a radiology model's trunk."""
    from itemizedclip_radiology.models.radiology_model import RadiologyItemizedCLIP

    assert isinstance(model, RadiologyItemizedCLIP)  # `model_config` lets no other through
    return model.visual.trunk.config
