"""The 2D model: ViT image tower, causal text transformer, one shared projection each (paper: natural images, RSICD).

Axes: B images, N texts, L = h·w image tokens, C text context length, D joint width.

Towers are open_clip's; parameter names are those of the released ViT-B-16-ItemizedCLIP checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, _build_text_tower, _build_vision_tower
from torch import Tensor, nn

from itemizedclip.models.dual_encoder import DualEncoder, ImageFeatures
from itemizedclip.models.item_attention import ItemAttention
from itemizedclip.runtime.errors import UserError


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
            `init_logit_bias`. Unknown keys raise TypeError.
    """

    head_name = "visual_proj"

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
        at_end = x[torch.arange(len(x), device=x.device), tokens_NC.argmax(dim=-1)]
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

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Checkpoint both towers block by block."""
        self.visual.set_grad_checkpointing(enable)
        self.transformer.grad_checkpointing = enable
