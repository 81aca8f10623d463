"""The 2D model: ViT image tower, causal text transformer, one shared projection each (paper: natural images, RSICD).

Axes: B images, N texts, L = h·w image tokens, C text context length, D joint width.

Towers are open_clip's; parameter names are those of the released ViT-B-16-ItemizedCLIP checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, _build_text_tower, _build_vision_tower
from torch import Tensor, nn

from itemizedclip.models.config import MAX_LAYERS, MAX_SIDE, MAX_WIDTH, block_numbers, head_numbers
from itemizedclip.models.dual_encoder import DualEncoder, ImageFeatures
from itemizedclip.models.item_attention import ItemAttention
from itemizedclip.models.patch_dropout import PatchDropout
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.fields import (
    Rule,
    check_fields,
    either,
    nothing,
    number,
    one_of,
    several,
    true_or_false,
    whole,
)

_SIDE = either(whole(1, MAX_SIDE), several(whole(1, MAX_SIDE), 2))

_BLOCK_RULES: dict[str, Rule] = {
    "width": whole(1, MAX_WIDTH),
    "layers": whole(1, MAX_LAYERS),
    "mlp_ratio": number(0.01, 64),
    "ls_init_value": either(nothing(), number(0, 100)),
}


def _only_defaults(of: type, rules: dict[str, Rule]) -> dict[str, Rule]:
    """Rules that let open_clip's other fields hold their defaults only.

    They choose towers that are none of this family; some name models that open_clip would fetch.
    """
    defaults = {f.name: one_of([f.default]) for f in fields(of) if f.default is not MISSING}
    return defaults | rules


_VISION_RULES = _only_defaults(
    CLIPVisionCfg,
    _BLOCK_RULES
    | {
        "tower": one_of(["vit"]),
        "image_size": _SIDE,
        "patch_size": _SIDE,
        "head_width": whole(1, MAX_WIDTH),
        "patch_dropout": number(0, 0.99),
        "no_ln_pre": true_or_false(),
        "pos_embed_type": one_of(["learnable", "sin_cos_2d"]),
        "pool_type": one_of(["tok", "avg"]),
        "final_ln_after_pool": true_or_false(),
        "output_tokens": true_or_false(),
    },
)

_TEXT_RULES = _only_defaults(
    CLIPTextCfg,
    _BLOCK_RULES
    | {
        "context_length": whole(2, 16_384),
        "vocab_size": whole(1, 10_000_000),
        "heads": whole(1, 1024),
    },
)


def _pair(side: Any) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def _tower_numbers(cfg: Any) -> int:
    scales = 0 if cfg.ls_init_value is None else 2 * cfg.width
    numbers: int = cfg.layers * (block_numbers(cfg.width, int(cfg.width * cfg.mlp_ratio)) + scales)
    return numbers


class SharedProjection(nn.Module):
    """One bias-free matrix (width, D), applied to every token alike."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.proj


class ItemizedCLIP2D(DualEncoder):
    """ViT and CLIP text transformer joined by item-conditioned attention.

    Args:
        config: `embed_dim`, open_clip's `vision_cfg` (image_size, patch_size, width, layers, head_width) and `text_cfg`
            (context_length, vocab_size, width, heads, layers), optional `head_heads`, `init_logit_scale`,
            `init_logit_bias`.
    """

    head_name = "visual_proj"

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> int:
        """See `DualEncoder`."""
        vision = check_fields(config["vision_cfg"], _VISION_RULES, place="vision_cfg", required=["image_size"])
        text = check_fields(config["text_cfg"], _TEXT_RULES, place="text_cfg", required=["context_length"])
        v = CLIPVisionCfg(**{key: value for key, value in vision.items() if key != "tower"})
        t = CLIPTextCfg(**text)
        (height, width), (patch_h, patch_w) = _pair(v.image_size), _pair(v.patch_size)
        if patch_h > height or patch_w > width:
            raise UserError(f"vision_cfg.patch_size {v.patch_size} is larger than image_size {v.image_size}")
        heads = v.width // v.head_width
        if heads == 0 or v.width % heads:
            raise UserError(
                f"vision_cfg.width {v.width} makes {heads} heads of head_width {v.head_width}, which do not divide it"
            )
        if t.width % t.heads:
            raise UserError(f"text_cfg.width {t.width} is not divisible by text_cfg.heads {t.heads}")
        grid = (height // patch_h, width // patch_w)
        if v.pos_embed_type == "sin_cos_2d" and (grid[0] != grid[1] or v.width % 4):
            raise UserError("vision_cfg.pos_embed_type sin_cos_2d needs a square grid and a width divisible by 4")
        D = config["embed_dim"]
        image = 3 * patch_h * patch_w * v.width + (grid[0] * grid[1] + 2) * v.width
        image += (2 if v.no_ln_pre else 4) * v.width + _tower_numbers(v) + v.width * D
        texts = (t.vocab_size + t.context_length + 2) * t.width + _tower_numbers(t) + t.width * D
        mask = t.context_length**2
        numbers: int = image + texts + mask + head_numbers(D)
        return numbers

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        embed_dim = config["embed_dim"]
        vision = CLIPVisionCfg(**{k: v for k, v in config["vision_cfg"].items() if k not in ("tower", "output_tokens")})
        text = CLIPTextCfg(**config["text_cfg"])
        vision.output_tokens = True
        self.visual = _build_vision_tower(embed_dim, vision)
        # Class and patch tokens share one matrix outside the tower.
        self.visual.proj = None
        tower = _build_text_tower(embed_dim, text)
        self.transformer = tower.transformer
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.ln_final = tower.ln_final
        self.register_buffer("attn_mask", tower.attn_mask, persistent=False)
        self.image_post = SharedProjection(vision.width, embed_dim)
        self.text_post = SharedProjection(text.width, embed_dim)
        self.visual_proj = ItemAttention(embed_dim, config.get("head_heads", 8))
        self.init_logit_parameters()

    @property
    def context_length(self) -> int:
        """C, the longest text the tower takes, in tokens."""
        return len(self.positional_embedding)

    def encode_image(self, images: Tensor, *, series_names: Tensor | None = None) -> ImageFeatures:
        """Features of (B, 3, H, W) images; series names do not apply and must be None."""
        expected = (3, *self.visual.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise UserError(f"images must be (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}")
        if series_names is not None:
            raise UserError("this model takes no series names: it reads photographs, not studies")
        pooled, tokens = self.visual(images)
        return ImageFeatures(self.image_post(pooled), self.image_post(tokens), tuple(self.visual.grid_size))

    def input_shape(self, num_series: int = 1) -> tuple[int, ...]:
        """(3, H, W)."""
        return (3, *self.visual.image_size)

    def encode_text(self, tokens_NC: Tensor) -> Tensor:
        """Features (N, D) at the end-of-text token; C may be shorter than the context length.

        The transformer is causal, so columns after the longest text change nothing and may be cut beforehand.
        """
        C = tokens_NC.shape[1]
        if self.context_length < C:
            raise UserError(f"texts have {C} tokens, the text tower takes {self.context_length}")
        x = self.token_embedding(tokens_NC) + self.positional_embedding[:C]
        x = self.transformer(x, attn_mask=self.causal_mask(C, x.dtype))
        x = self.ln_final(x)
        # End-of-text is the highest id of the vocabulary.
        at_end = x[torch.arange(x.shape[0], device=x.device), tokens_NC.argmax(dim=-1)]
        features_ND: Tensor = self.text_post(at_end)
        return features_ND

    def causal_mask(self, length: int, dtype: torch.dtype) -> Tensor:
        """Additive mask (length, length): 0 on and below the diagonal, −inf above."""
        mask = self.get_buffer("attn_mask")
        return mask[:length, :length].to(dtype)

    def image_tower(self) -> list[nn.Module | nn.Parameter]:
        """ViT and its projection."""
        return [self.visual, self.image_post]

    def text_tower(self) -> list[nn.Module | nn.Parameter]:
        """Text transformer, embeddings and projection."""
        return [self.transformer, self.token_embedding, self.positional_embedding, self.ln_final, self.text_post]

    def blocks(self) -> list[nn.Module]:
        """Transformer blocks of both towers."""
        return [*self.visual.transformer.resblocks, *self.transformer.resblocks]

    def set_patch_dropout(self, share: float) -> None:
        """See `DualEncoder`."""
        self.visual.patch_dropout = PatchDropout(share, has_class_token=True).train(self.visual.training)
