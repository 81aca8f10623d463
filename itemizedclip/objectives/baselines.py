"""Objectives to compare with: CLIP and SigLIP on global features, FLAIR as a choice of this project's own terms.

CLIP and SigLIP know one text per image; here it is the image's first item of the step, and since items are shuffled in
training, each of an image's items is as likely. "concat" is CLIP on all of an image's items as one text, which the
collator joins.

Axes: B images on this rank, K item slots, N = B·K rows of the item table, W ranks, D joint width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from itemizedclip.objectives.exchange import gather_features
from itemizedclip.objectives.loss import LossInputs, ObjectiveOptions
from itemizedclip.objectives.terms import pair_loss
from itemizedclip.runtime.collectives import rank


def flair_options(options: ObjectiveOptions) -> ObjectiveOptions:
    """FLAIR (Xiao et al., CVPR 2025) in this project's terms: text-conditioned sigmoid loss and multi-positive sigmoid
    loss, which are ILA over all tokens and MPS; the denominators are this project's (docs/method.md)."""
    return replace(
        options,
        baseline="none",
        ila_weight=1.0,
        ila_keep_rate=1.0,
        kta_weight=0.0,
        mps_weight=1.0,
        iis_weight=0.0,
        coverage_weight=0.0,
        contradiction_weight=0.0,
        worst_positive_factor=1.0,
        normal_check=False,
        mask_duplicates=False,
    )


def flair_own_options(options: ObjectiveOptions, B: int, K: int) -> ObjectiveOptions:
    """FLAIR with the denominators of its released code: ½ (TCS / (K + B − 1) + MPS / (B·K)), where this project's are
    B and B·K.

    Args:
        options: of the run.
        B: images of this rank's batch.
        K: item slots.
    """
    return replace(flair_options(options), ila_weight=B / (2 * (K + B - 1)), mps_weight=0.5)


def clip_loss(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over all ranks' pairs (Radford et al., 2021), this rank's rows and columns of it.

    The mean over ranks, which DDP takes, is the loss of the joined batch, and so are the gradients.

    Args:
        image_BD: global image features of this rank.
        text_BD: the text of each image.
        logit_scale: τ.
    """
    images, texts = F.normalize(image_BD.float(), dim=-1), F.normalize(text_BD.float(), dim=-1)
    all_images_WBD, all_texts_WBD = gather_features(images), gather_features(texts)
    B = len(images)
    truth_B = torch.arange(B, device=images.device) + rank() * B
    with torch.autocast(images.device.type, enabled=False):
        to_text = logit_scale * (images @ all_texts_WBD.flatten(0, 1).T)
        to_image = logit_scale * (texts @ all_images_WBD.flatten(0, 1).T)
    return (F.cross_entropy(to_text, truth_B) + F.cross_entropy(to_image, truth_B)) / 2


def siglip_loss(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Pairwise sigmoid loss over all ranks' texts, divided by B (Zhai et al., 2023).

    Args:
        image_BD: global image features of this rank.
        text_BD: the text of each image.
        logit_scale: τ.
        logit_bias: β.
    """
    images, texts = F.normalize(image_BD.float(), dim=-1), F.normalize(text_BD.float(), dim=-1)
    all_texts_WBD = gather_features(texts)
    B = len(images)
    with torch.autocast(images.device.type, enabled=False):
        logits = logit_scale * (images @ all_texts_WBD.flatten(0, 1).T) + logit_bias
    labels = torch.full_like(logits, -1.0)
    labels[:, rank() * B : (rank() + 1) * B].fill_diagonal_(1.0)
    return pair_loss(logits, labels, torch.ones_like(logits)) / B


def baseline_losses(
    inputs: LossInputs, logit_scale: Tensor, logit_bias: Tensor, options: ObjectiveOptions
) -> dict[str, Tensor]:
    """CLIP's (on items or on joined items) or SigLIP's loss on this rank, as "loss" and under its own name.

    Args:
        inputs: features of this rank's batch; image tokens are not used. Every rank must hold the same B.
        logit_scale: τ, already exponentiated.
        logit_bias: β; CLIP has none.
        options: `baseline` is "clip", "concat" or "siglip".
    """
    B, K = inputs.item_mask_BK.shape
    text_BD = inputs.item_features_ND.view(B, K, -1)[:, 0]
    if options.baseline in ("clip", "concat"):
        value = clip_loss(inputs.image_global_BD, text_BD, logit_scale)
    else:
        value = siglip_loss(inputs.image_global_BD, text_BD, logit_scale, logit_bias)
    return {"loss": value, options.baseline: value}
