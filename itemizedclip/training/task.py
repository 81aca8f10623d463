"""The module that DDP wraps: one contrastive batch in, loss terms out.

Axes: B images of this rank's contrastive batch, K item slots, C text context length, L image tokens, D joint width.

Gradient caching (`num_chunks` > 1): the towers see the batch in chunks whose activations are not kept; the loss is
taken once, over the features of the whole batch; the backward pass runs each chunk through the towers again and
through its backward at once. The towers' activations then take the memory of one chunk, and the gradients are those
of the whole batch, parameters of the head and the logit scale included, because there is one loss and one graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from itemizedclip.data.batch import ItemBatch
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.objectives.baselines import baseline_losses, flair_options, flair_own_options
from itemizedclip.objectives.extra import extra_losses, with_extra
from itemizedclip.objectives.loss import LossInputs, ObjectiveOptions, itemized_losses
from itemizedclip.objectives.terms import text_ids
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.timing import timed

Parts = Sequence[nn.Module | nn.Parameter]


def is_frozen(parts: Parts) -> bool:
    """Whether no parameter of a tower is trained."""
    return not any(p.requires_grad for p in parameters_of(parts))


def parameters_of(parts: Parts) -> list[nn.Parameter]:
    """All parameters of a tower's parts."""
    return [p for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())]


class ItemizedTask(nn.Module):
    """Towers, head, exchange between ranks and objectives of one step.

    Freeze towers (`model.lock`) before building the task: a tower without a trainable parameter runs in evaluation
    mode and without a graph.

    Args:
        model: the dual encoder, on its device.
        objective: weights of the terms.
        num_chunks: chunks the towers see the batch in; 1 keeps all activations (no recomputing).
    """

    def __init__(self, model: DualEncoder, objective: ObjectiveOptions, *, num_chunks: int = 1) -> None:
        super().__init__()
        if num_chunks < 1:
            raise UserError(f"num_chunks is {num_chunks}; expected at least 1")
        self.model = model
        self.objective = flair_options(objective) if objective.baseline == "flair" else objective
        self.num_chunks = num_chunks
        self.image_is_frozen = is_frozen(model.image_tower())
        self.text_is_frozen = is_frozen(model.text_tower())
        self.train(self.training)

    def train(self, mode: bool = True) -> ItemizedTask:
        """Set the mode; frozen towers stay in evaluation mode."""
        super().train(mode)
        frozen = [*self._frozen_parts(self.image_is_frozen, self.model.image_tower())]
        frozen += self._frozen_parts(self.text_is_frozen, self.model.text_tower())
        for part in frozen:
            part.eval()
        return self

    @staticmethod
    def _frozen_parts(frozen: bool, parts: Parts) -> list[nn.Module]:
        return [part for part in parts if frozen and isinstance(part, nn.Module)]

    def forward(self, batch: ItemBatch) -> dict[str, Tensor]:
        """Scalars: "loss", its unweighted terms, "logit_scale" (τ) and "logit_bias"; the last two detached.

        Args:
            batch: this rank's contrastive batch, on the model's device; the same B and K on every rank.
        """
        with timed("towers"):
            inputs = self.encode(batch)
        with timed("loss"):
            return self.losses(inputs)

    def encode(self, batch: ItemBatch) -> LossInputs:
        """What both towers make of a batch, in chunks where gradient caching asks for them."""
        images, texts, against = [], [], []
        for chunk in batch.chunk(self.num_chunks):
            images.append(self._recomputed(self._encode_image, self.image_is_frozen, chunk.images, chunk.series_names))
            texts.append(self._recomputed(self._encode_text, self.text_is_frozen, chunk.item_tokens))
            if self.objective.uses_contradictions and chunk.contradiction_tokens is not None:
                tokens = chunk.contradiction_tokens
                against.append(self._recomputed(self._encode_text, self.text_is_frozen, tokens))
        return LossInputs(
            image_global_BD=torch.cat([global_BD for global_BD, _ in images]).float(),
            image_tokens_BLD=torch.cat([tokens_BLD for _, tokens_BLD in images]),
            item_features_ND=torch.cat(texts).float(),
            item_mask_BK=batch.item_mask,
            is_normal_B=batch.is_normal,
            item_ids_N=text_ids(batch.item_tokens.flatten(0, 1)) if self.objective.mask_duplicates else None,
            contradiction_features_ND=torch.cat(against).float() if against else None,
            contradiction_mask_BK=batch.contradiction_mask if against else None,
        )

    def losses(self, inputs: LossInputs) -> dict[str, Tensor]:
        """The scalars that `forward` returns."""
        scale = self.model.logit_scale.float().exp()
        bias = self.model.logit_bias.float()
        objective = self.objective
        if objective.baseline == "flair_own":
            objective = flair_own_options(objective, *inputs.item_mask_BK.shape)
        if objective.baseline == "none":
            losses = itemized_losses(self.model.head, inputs, scale, bias, objective)
            extra = extra_losses(self.model.head, inputs, scale, bias, objective)
            losses = with_extra(losses, extra, objective)
        else:
            losses = baseline_losses(inputs, scale, bias, objective)
        return {**losses, "logit_scale": scale.detach(), "logit_bias": bias.detach()}

    def _encode_image(self, images: Tensor, series_names: Tensor | None) -> tuple[Tensor, Tensor]:
        features = self.model.encode_image(images.to(self._dtype(self.model.image_tower())), series_names=series_names)
        return features.global_BD, features.tokens_BLD

    def _encode_text(self, item_tokens_BKC: Tensor) -> Tensor:
        return self.model.encode_text(item_tokens_BKC.flatten(0, 1))

    @staticmethod
    def _dtype(parts: Parts) -> torch.dtype:
        return parameters_of(parts)[0].dtype

    def _recomputed(self, encode, frozen: bool, *arguments):
        """`encode(*arguments)`, keeping activations only where the backward pass needs them and memory allows."""
        if frozen:
            with torch.no_grad():
                return encode(*arguments)
        if self.num_chunks == 1 or not torch.is_grad_enabled():
            return encode(*arguments)
        # Restores the random state, so dropout and drop path repeat; nests with the towers' own checkpointing.
        return checkpoint(encode, *arguments, use_reentrant=False)
