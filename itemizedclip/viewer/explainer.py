"""One image or study, encoded once, to be asked any number of texts.

Encoding a study takes many times as long as asking it: whoever asks more than once keeps the `Explainer`.

Axes: T items, D joint width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from itemizedclip.data.batch import trim_padding
from itemizedclip.models.dual_encoder import ImageFeatures
from itemizedclip.models.factory import LoadedModel
from itemizedclip.viewer.inputs import Explanation, ModelInput
from itemizedclip.viewer.maps import ItemMaps, maps_of_features


class Explainer:
    """Tells where texts look in one image or study.

    Args:
        loaded: the model, in evaluation mode.
        source: the image or study; encoded here.
        normalise_tokens: see `itemizedclip.viewer.maps.item_maps`.
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
        return torch.autocast(
            self._device.type, dtype=self._autocast_dtype, enabled=self._autocast_dtype is not None
        )

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

    def cut_items(self, items: Sequence[str]) -> list[bool]:
        """Which texts fill the text tower's whole context, so that their end may be cut off."""
        is_truncated = getattr(self._loaded.tokenizer, "is_truncated", None)
        if is_truncated is None or not items:
            return [False] * len(items)
        return is_truncated(self._loaded.tokenizer(list(items))).tolist()
