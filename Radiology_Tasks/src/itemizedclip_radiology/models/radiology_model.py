"""The radiology model: HLIP image tower, BERT text tower, item-conditioned attention, in the released layout.

Axes: B studies, S series, N texts, L = S·d·h·w image tokens, C text context length, D joint width.

One class serves brain MRI, head CT and chest CT; they differ by configuration (`configs/*.json`):
    visual.trunk.*, visual.head.proj.weight, text.transformer.*, text.proj.weight, visual_attn.*, logit_scale,
    logit_bias
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from itemizedclip.models.config import head_numbers
from itemizedclip.models.dual_encoder import DualEncoder, ImageFeatures
from itemizedclip.models.item_attention import ItemAttention
from itemizedclip.runtime.errors import UserError
from itemizedclip_radiology.models.hlip import HLIP, HLIPConfig, StudyTokens, resample_position_table
from itemizedclip_radiology.models.mae_init import load_mae_weights
from itemizedclip_radiology.models.series_names import SeriesNameEncoder, load_series_name_weights
from itemizedclip_radiology.models.text_tower import (
    BertTextTokenizer,
    BertTextTower,
    check_text_cfg,
    create_bert_tokenizer,
    load_bert_weights,
    with_text_model,
)
from itemizedclip_radiology.models.weight_files import LoadReport

logger = logging.getLogger(__name__)

_SERIES_NAME_NUMBERS = 1_500_000
"""Parameters and constants of the series-name encoder, rounded up."""

_POSITION_TABLE = "visual.trunk.spatial_posemb"


class VisualTower(nn.Module):
    """HLIP trunk and one bias-free matrix to the joint width, shared by class and patch tokens."""

    def __init__(self, vision_cfg: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        config = HLIPConfig.from_dict({key: value for key, value in vision_cfg.items() if key != "tower"})
        self.trunk = HLIP(config)
        projection = nn.Linear(config.width, embed_dim, bias=False)
        nn.init.normal_(projection.weight, std=config.width**-0.5)
        self.head = nn.Sequential(OrderedDict(proj=projection))

    def forward(self, volumes: Tensor, series_names: Tensor | None = None) -> StudyTokens:
        """Projected tokens (B, 1 + L, D), the class token first, and their grid (S, d, h, w)."""
        tokens, grid = self.trunk(volumes, series_names)
        return StudyTokens(self.head(tokens), grid)


class RadiologyItemizedCLIP(DualEncoder):
    """Studies of one or more 3-D series against text items.

    Args:
        config: `embed_dim`; `vision_cfg` (`tower`: "hlip" and the fields of `HLIPConfig`); `text_cfg` (`tower`: "bert",
            `hf_config`, `context_length`, `text_model`, see `text_tower`); optional `head_heads`,
            `init_logit_scale`, `init_logit_bias`. Unknown keys of the two towers raise ValueError.
    """

    input_kind = "studies"
    head_name = "visual_attn"
    config_folder = Path(__file__).parent / "configs"

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> int:
        """See `DualEncoder`."""
        trunk = HLIPConfig.checked(config["vision_cfg"])
        D = config["embed_dim"]
        names = _SERIES_NAME_NUMBERS + (SeriesNameEncoder.width + 1) * trunk.width if trunk.series_names else 0
        return trunk.num_numbers + names + trunk.width * D + check_text_cfg(config["text_cfg"], D) + head_numbers(D)

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        embed_dim = config["embed_dim"]
        self.visual = VisualTower(config["vision_cfg"], embed_dim)
        self.text = BertTextTower(config["text_cfg"], embed_dim)
        self.visual_attn = ItemAttention(embed_dim, config.get("head_heads", 8))
        self.init_logit_parameters()

    @staticmethod
    def create_tokenizer(config: Mapping[str, Any], *, fetch: bool = False) -> BertTextTokenizer:
        """The WordPiece tokenizer of a configuration: texts → int64 (N, C); see `create_bert_tokenizer`."""
        return create_bert_tokenizer(config["text_cfg"], fetch=fetch)

    @staticmethod
    def with_text_model(config: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
        """A configuration with the shape and tokenizer of the BERT in a folder, or of a hub name."""
        return with_text_model(config, source)

    @staticmethod
    def reads_series_names(config: Mapping[str, Any]) -> bool:
        """See `DualEncoder`."""
        return bool(config["vision_cfg"].get("series_names", False))

    @property
    def context_length(self) -> int:
        """C, the longest text the tower takes, in tokens."""
        return self.text.context_length

    def encode_image(self, images: Tensor, *, series_names: Tensor | None = None) -> ImageFeatures:
        """Features of studies (B, S, 1, D, H, W).

        `series_names` is int64 (B, S, 110) for a trunk conditioned on them, else None. Tokens are ordered by series,
        depth, row, column; `grid` is (S, d, h, w).
        """
        tokens, grid = self.visual(images, series_names)
        return ImageFeatures(tokens[:, 0], tokens[:, 1:], grid)

    def input_shape(self, num_series: int = 1) -> tuple[int, ...]:
        """(S, 1, D, H, W)."""
        return (num_series, 1, *self.visual.trunk.config.volume_size)

    def encode_text(self, tokens_NC: Tensor) -> Tensor:
        """Features (N, D) of the class token; columns that only hold padding may be cut beforehand."""
        return self.text(tokens_NC)

    def image_tower(self) -> list[nn.Module | nn.Parameter]:
        """Trunk and projection."""
        return [self.visual]

    def text_tower(self) -> list[nn.Module | nn.Parameter]:
        """BERT and its projection."""
        return [self.text]

    def lock(self, *, image: bool = False, text: bool = False, freeze_layer_norm: bool = True) -> None:
        """Freeze towers; call before wrapping in DDP.

        Of the text tower BERT is frozen, and runs without gradient and dropout; its projection still trains, as no
        pretrained file holds one. Without `freeze_layer_norm` BERT's LayerNorms train and its dropout stays active, as
        in the published chest CT runs.
        """
        super().lock(image=image)
        if text:
            self.text.lock(freeze_layer_norm=freeze_layer_norm)

    def blocks(self) -> list[nn.Module]:
        """HLIP's blocks and BERT's layers."""
        return [*self.visual.trunk.blocks, *self.text.transformer.encoder.layer]

    def set_patch_dropout(self, share: float) -> None:
        """See `DualEncoder`; the share is dropped of each of the smallest groups that a block attends to."""
        self.visual.trunk.patch_dropout.share = share

    def resize_position_tables(self, tensors: dict[str, Tensor]) -> list[str]:
        """Resample the position table in `tensors` (parameter names as here) to this model's grid, in place.

        Returns:
            a note for the table that was changed.
        """
        table = tensors.get(_POSITION_TABLE)
        grid = self.visual.trunk.config.grid_size
        if table is None or table.dim() != 5 or tuple(table.shape[1:4]) == grid:
            return []
        tensors[_POSITION_TABLE] = resample_position_table(table, grid)
        return [f"{_POSITION_TABLE} (resampled from grid {tuple(table.shape[1:4])} to {grid})"]


def load_initial_weights(
    model: RadiologyItemizedCLIP,
    *,
    image_weights: str | Path | None = None,
    series_name_weights: str | Path | None = None,
    text_model: str | Path | None = None,
) -> list[LoadReport]:
    """Start training from pretrained parts; what is not given starts from random weights, with a warning.

    Args:
        model: gets the weights.
        image_weights: MAE ViT-B/16 file, folder or hub name (`itemizedclip_radiology.recipes.MAE_HUB_NAME`).
        series_name_weights: file with the series-name encoder, or a released checkpoint that contains it.
        text_model: BERT folder, weights file or hub name.

    Returns:
        one report per part loaded, also logged.

    Raises:
        ValueError: a part does not fit, or series-name weights for a model without series names.
    """
    reports = []
    trunk = model.visual.trunk
    if image_weights is not None:
        reports.append(load_mae_weights(trunk, image_weights))
    if series_name_weights is not None:
        if trunk.serienameencoder is None:
            raise UserError("series-name weights given, but this model takes no series names: leave them out")
        reports.append(load_series_name_weights(trunk.serienameencoder, series_name_weights))
    if text_model is not None:
        reports.append(load_bert_weights(model.text, text_model))
    from_scratch = [
        part
        for part, given in (
            ("image trunk", image_weights),
            ("series-name encoder", series_name_weights if trunk.serienameencoder is not None else "not needed"),
            ("BERT text tower", text_model),
        )
        if given is None
    ]
    for report in reports:
        logger.info("initial weights: %s", report)
    for part in from_scratch:
        logger.warning("initial weights: the %s starts from random weights", part)
    return reports
