"""One image or study, encoded once, to be asked any number of texts.

Encoding a study takes many times as long as asking it: whoever asks more than once keeps the `Explainer`.

Axes: T items, D joint width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from itemizedclip.data.batch import ItemCollator, ItemSample, trim_padding
from itemizedclip.evaluation.attention import ItemMaps, item_maps, maps_of_features
from itemizedclip.evaluation.calibration import Calibration, Judgement, judge_images
from itemizedclip.models.dual_encoder import ImageFeatures
from itemizedclip.models.factory import LoadedModel
from itemizedclip.runtime.errors import UserError
from itemizedclip.viewer.inputs import ModelInput

if TYPE_CHECKING:
    from itemizedclip.viewer.files import ExplanationFiles


@dataclass(frozen=True)
class Explanation:
    """Where each of T items looks in one image or study.

    Attributes:
        source: the image or study.
        items: T texts.
        maps: attention of all items over the whole token grid, and scores.
    """

    source: ModelInput
    items: list[str]
    maps: ItemMaps

    @property
    def scores(self) -> Tensor:
        """(T,), TCSim of each item."""
        return self.maps.scores

    def save(self, folder: str | Path, settings: ExplanationFiles | None = None) -> list[Path]:
        """Write pictures, for a study NIfTI volumes, and explanation.json into a folder; returns the files.

        Raises:
            UserError: an input given as a tensor, which has no picture.
        """
        from itemizedclip.viewer.files import ExplanationFiles, write_explanation

        if not self.source.views:
            raise UserError(f"{self.source.name}: was given as a tensor, which has no picture; give its file")
        return write_explanation(self, Path(folder), settings or ExplanationFiles(), {})

    def times_uniform(self, view: int) -> Tensor:
        """Attention in one view, (T, h, w) or (T, d, h, w), in multiples of an even spread over the whole input."""
        everywhere = self.maps.times_uniform()
        return everywhere if len(self.maps.grid) == 2 else everywhere[:, view]

    def share_of_views(self) -> Tensor:
        """(T, S): how much of its attention each item spends on each view; with the share of nowhere they sum to 1."""
        weights = self.maps.weights
        return weights.flatten(1).sum(1, keepdim=True) if len(self.maps.grid) == 2 else weights.flatten(2).sum(2)


class Explainer:
    """Tells where texts look in one image or study.

    Args:
        loaded: the model, in evaluation mode.
        source: the image or study; encoded here.
        normalise_tokens: see `itemizedclip.evaluation.attention.item_maps`.
        autocast_dtype: of the towers' matrix products; None: as the weights are. The head computes in float32.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        source: ModelInput,
        *,
        normalise_tokens: bool = False,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.source = source
        self._loaded = loaded
        self._normalise_tokens = normalise_tokens
        self._device = loaded.model.logit_scale.device
        self._autocast_dtype = autocast_dtype
        names = source.series_names
        with torch.no_grad(), self._autocast():
            features = loaded.model.encode_image(
                source.image[None].to(self._device),
                series_names=None if names is None else names[None].to(self._device),
            )
        self._features = ImageFeatures(features.global_BD.float(), features.tokens_BLD.float(), features.grid)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=self._autocast_dtype, enabled=self._autocast_dtype is not None)

    @torch.no_grad()
    def explain(self, items: Sequence[str]) -> Explanation:
        """Where each text looks; no text gives an explanation of nothing, whose maps still have their grid."""
        model = self._loaded.model
        if not items:
            num_heads = model.head.num_heads
            nothing = torch.zeros(0, num_heads, *self._features.grid), torch.zeros(0, num_heads), torch.zeros(0)
            return Explanation(self.source, [], ItemMaps(*nothing))
        tokens_TC = trim_padding(self._loaded.tokenizer(list(items))).to(self._device)
        with self._autocast():
            items_BTD = model.encode_text(tokens_TC)[None].float()
        maps = maps_of_features(model.head, self._features, items_BTD, normalise_tokens=self._normalise_tokens)[0]
        return Explanation(self.source, list(items), maps)

    def judged(self, calibration: Calibration, items: Sequence[str]) -> list[Judgement | None]:
        """What each text's score means, as the calibration scores it; None for texts that it does not know."""
        findings = [calibration.finding(item) for item in items]
        known = {finding.name: finding for finding in findings if finding is not None}
        model = self._loaded.model
        found = judge_images(model, self._loaded.tokenizer, calibration, self._features, list(known.values()))[0]
        return [None if finding is None else found[finding.name] for finding in findings]

    def cut_items(self, items: Sequence[str]) -> list[bool]:
        """Which texts fill the text tower's whole context, so that their end may be cut off."""
        is_truncated = getattr(self._loaded.tokenizer, "is_truncated", None)
        if is_truncated is None or not items:
            return [False] * len(items)
        return is_truncated(self._loaded.tokenizer(list(items))).tolist()


def explain_input(
    loaded: LoadedModel, source: ModelInput, items: Sequence[str], *, normalise_tokens: bool = False
) -> Explanation:
    """Where each text looks in an image or study.

    Args:
        loaded: the model, in evaluation mode.
        source: the image or study.
        items: T texts, at least one.
        normalise_tokens: see `itemizedclip.evaluation.attention.item_maps`.

    Raises:
        ValueError: no text.
    """
    if not items:
        raise UserError("no text to look for; give at least one item")
    sample = ItemSample(source.name, source.image, list(items), series_names=source.series_names)
    batch = ItemCollator(loaded.tokenizer)([sample])
    with torch.no_grad():
        maps = item_maps(loaded.model, batch, normalise_tokens=normalise_tokens)[0]
    return Explanation(source, list(items), maps)
