"""Terms beyond the paper, each off by default: coverage, and contradictions as hard negatives.

Both ask the head about an image's own texts once more, after the paper's terms: one further projection of the image
tokens, and B · K queries each.

Axes: B images, K item slots, L image tokens, D joint width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from itemizedclip.models.item_attention import ItemAttention, at_least_float32
from itemizedclip.objectives.loss import LossInputs, ObjectiveOptions
from itemizedclip.objectives.terms import cosine_logits, pair_loss


def coverage_loss(pooled_BKD: Tensor, item_mask_BK: Tensor, image_global_BD: Tensor) -> Tensor:
    """1 − cos(mean of an image's own item-conditioned embeddings, its global feature), mean over images with items.

    The items of an image together should explain the whole of it. The global feature is not moved by this term: MPS
    moves it.

    Args:
        pooled_BKD: what each own item sees; unit vectors are averaged.
        item_mask_BK: bool, True = real item.
        image_global_BD: global features.
    """
    unit_BKD = F.normalize(at_least_float32(pooled_BKD), dim=-1) * item_mask_BK[:, :, None]
    together_BD = unit_BKD.sum(1)
    cosine_B = F.cosine_similarity(together_BD, at_least_float32(image_global_BD).detach(), dim=-1)
    has_items_B = item_mask_BK.any(1)
    return ((1 - cosine_B) * has_items_B).sum() / has_items_B.sum().clamp_min(1)


def contradiction_loss(
    pooled_BKD: Tensor, texts_BKD: Tensor, mask_BK: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """−Σ log σ(−(τ·cos(text, its image embedding) + β)) / B over texts that contradict their image.

    Args:
        pooled_BKD: what each contradiction sees in its image.
        texts_BKD: features of the contradictions.
        mask_BK: bool, True = there is one.
        logit_scale: τ.
        logit_bias: β.
    """
    logits_BK = cosine_logits(pooled_BKD, texts_BKD, logit_scale, logit_bias)
    return pair_loss(logits_BK, -1.0, mask_BK.to(logits_BK.dtype)) / len(logits_BK)


def extra_losses(
    head: ItemAttention, inputs: LossInputs, logit_scale: Tensor, logit_bias: Tensor, options: ObjectiveOptions
) -> dict[str, Tensor]:
    """The unweighted terms that are on, on this rank; nothing where none is.

    Args:
        head: the item-conditioned attention; must be called inside the module that DDP wraps.
        inputs: features of this rank's batch, with contradictions where their weight is not 0.
        logit_scale: τ, already exponentiated.
        logit_bias: β.
        options: weights of the terms.
    """
    if not (options.coverage_weight or options.contradiction_weight):
        return {}
    B, K = inputs.item_mask_BK.shape
    projected = head.project(inputs.image_tokens_BLD)
    scale, bias = at_least_float32(logit_scale), at_least_float32(logit_bias)
    losses = {}
    if options.coverage_weight:
        items_BKD = inputs.item_features_ND.view(B, K, -1)
        pooled_BKD = head.attend(items_BKD, projected)
        losses["coverage"] = coverage_loss(pooled_BKD, inputs.item_mask_BK, inputs.image_global_BD)
    if options.contradiction_weight:
        if inputs.contradiction_features_ND is None or inputs.contradiction_mask_BK is None:
            raise ValueError("contradiction_weight is not 0, but the batch has no contradictions; see ItemCollator")
        texts_BKD = inputs.contradiction_features_ND.view(B, K, -1)
        pooled_BKD = head.attend(texts_BKD, projected)
        losses["contradiction"] = contradiction_loss(pooled_BKD, texts_BKD, inputs.contradiction_mask_BK, scale, bias)
    return losses


def with_extra(losses: dict[str, Tensor], extra: dict[str, Tensor], options: ObjectiveOptions) -> dict[str, Tensor]:
    """The paper's losses and the further ones, the total with both."""
    if not extra:
        return losses
    weighted = torch.stack([getattr(options, f"{name}_weight") * value for name, value in extra.items()]).sum()
    return {**losses, "loss": losses["loss"] + weighted, **extra}
