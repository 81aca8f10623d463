"""The base of every model: an image tower, a text tower, the head, a logit scale and a logit bias.

Axes: B images, N texts, L image tokens, D joint width, C text context length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from itemizedclip.models.item_attention import ItemAttention
from itemizedclip.models.recompute import set_recomputing
from itemizedclip.runtime.errors import UserError

MAX_LOGIT_SCALE = math.log(100)
"""The logit-scale parameter is clamped to [0, ln 100] after every optimizer step."""


@dataclass(frozen=True)
class ImageFeatures:
    """What an image tower returns, in the joint space, not normalised.

    Attributes:
        global_BD: (B, D) class-token feature.
        tokens_BLD: (B, L, D) image tokens.
        grid: how the L tokens lie in the image: (h, w) for photographs, (S, d, h, w) for studies.
    """

    global_BD: Tensor
    tokens_BLD: Tensor
    grid: tuple[int, ...]


class DualEncoder(nn.Module):
    """Interface of every model the trainer, the evaluators and the viewer work with.

    Subclasses build their towers under the published parameter names, set `head_name` to the attribute that holds
    the head, and call `init_logit_parameters`.

    Attributes:
        input_kind: "photographs", which the core reads, or "studies", which the family's own readers do.
        config: JSON-able description; `itemizedclip.models.factory.create_model(config)` rebuilds the model.
        logit_scale: scalar parameter, τ = exp(logit_scale).
        logit_bias: scalar parameter β.
    """

    input_kind: ClassVar[Literal["photographs", "studies"]] = "photographs"
    head_name: str
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> int:
        """Refuse `vision_cfg` and `text_cfg` that this family cannot build; called before anything is built.

        Args:
            config: whose other fields are as they should be (`itemizedclip.models.config.check_common`).

        Returns:
            How many parameters and constants the model would have; 0 from families that do not say.

        Raises:
            UserError: names the field, what it holds and what was expected.
        """
        return 0

    @staticmethod
    def reads_series_names(config: Mapping[str, Any]) -> bool:
        """Whether a model of this config is conditioned on the names of a study's series."""
        return False

    def init_logit_parameters(self) -> None:
        """Scale 1/0.07 and bias −10 unless the config says otherwise (`init_logit_scale` is the logarithm)."""
        scale = self.config.get("init_logit_scale", math.log(1 / 0.07))
        self.logit_scale = nn.Parameter(torch.tensor(float(scale)))
        self.logit_bias = nn.Parameter(torch.tensor(float(self.config.get("init_logit_bias", -10.0))))

    @property
    def head(self) -> ItemAttention:
        """The item-conditioned attention, under whatever name the published layout gives it."""
        head: ItemAttention = getattr(self, self.head_name)
        return head

    def encode_image(self, images: Tensor, *, series_names: Tensor | None = None) -> ImageFeatures:
        """Image features in the joint space.

        Args:
            images: (B, 3, H, W) photographs or (B, S, 1, D, H, W) studies, normalised.
            series_names: int64 (B, S, 110) for models conditioned on series names.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define encode_image")

    def input_shape(self, num_series: int = 1) -> tuple[int, ...]:
        """Shape of one image, or of one study of so many series, at the size the config names."""
        raise NotImplementedError(f"{type(self).__name__} does not define input_shape")

    def encode_text(self, tokens_NC: Tensor) -> Tensor:
        """Text features (N, D) of int64 tokens (N, C), not normalised."""
        raise NotImplementedError(f"{type(self).__name__} does not define encode_text")

    def image_tower(self) -> list[nn.Module | nn.Parameter]:
        """The parts that `--lock-image` freezes."""
        raise NotImplementedError(f"{type(self).__name__} does not define image_tower")

    def text_tower(self) -> list[nn.Module | nn.Parameter]:
        """The parts that `--lock-text` freezes."""
        raise NotImplementedError(f"{type(self).__name__} does not define text_tower")

    def blocks(self) -> list[nn.Module]:
        """The layers of both towers that are alike; recomputation and compilation take them one by one."""
        return []

    def set_grad_checkpointing(self, enable: bool = True, *, keep_attention: bool = False) -> None:
        """Recompute the towers' activations in the backward pass instead of keeping them, block by block.

        Args:
            enable: False keeps them again.
            keep_attention: keep the results of attention, and recompute the rest.
        """
        if enable and not self.blocks():
            raise NotImplementedError(f"{type(self).__name__} defines neither blocks nor set_grad_checkpointing")
        set_recomputing(self.blocks(), enable, keep_attention=keep_attention)

    def set_patch_dropout(self, share: float) -> None:
        """Drop this share of an image's patches in training; features then hold fewer tokens than their grid says.

        Raises:
            UserError: a model that cannot.
        """
        raise UserError(f"{type(self).__name__} cannot leave out patches; drop --patch-dropout")

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep τ within [1, 100]; called after every optimizer step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def lock(self, *, image: bool = False, text: bool = False, freeze_layer_norm: bool = True) -> None:
        """Freeze towers; call before wrapping in DDP.

        Args:
            image: freeze the image tower.
            text: freeze the text tower.
            freeze_layer_norm: its LayerNorms too; otherwise they train, and the tower keeps its training mode.
        """
        parts = (self.image_tower() if image else []) + (self.text_tower() if text else [])
        for part in parts:
            part.requires_grad_(False)
        if text and not freeze_layer_norm:
            unfreeze_layer_norms(self.text_tower())


def unfreeze_layer_norms(parts: Iterable[nn.Module | nn.Parameter]) -> None:
    """Let the LayerNorms of a frozen tower train."""
    for part in parts:
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)
