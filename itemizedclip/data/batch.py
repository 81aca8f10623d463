"""The one sample type and the one batch type that every domain hands to the engine.

Axes: B studies (images), K item slots, C text context length, S series.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from itemizedclip.data.items import ITEM_SEPARATOR
from itemizedclip.data.opposites import contradiction
from itemizedclip.runtime.errors import UserError

Tokenizer = Callable[[Sequence[str]], Tensor]
"""Maps N texts to an int64 tensor (N, C)."""

PLACEHOLDER = "Placeholder"
"""Text of an empty item slot (paper: padding item); masked everywhere, so its wording changes nothing."""


_MAX_KNOWN_TEXTS = 16384
"""Token rows a collator keeps: 17 MB of context 128 in each loader process."""


class BadSampleError(UserError):
    """A sample that cannot be used: the message names the file, the field, what was expected and what to do."""


@dataclass
class ItemSample:
    """One image or study with its text items, as a dataset returns it.

    Attributes:
        sample_id: stable name used in messages and result files.
        image: float tensor, (3, H, W) for photographs or (S, 1, D, H, W) for studies, already normalised.
        items: the text items to use, already drawn and shuffled for training; at least one.
        is_normal: radiology only, the study has no finding (paper: normal check).
        series_names: int64 (S, 110) encoded series names, or None.
        skipped: parts that could not be used and are not in the image, such as series: a message each.
    """

    sample_id: str
    image: Tensor
    items: list[str]
    is_normal: bool = False
    series_names: Tensor | None = None
    skipped: list[str] = field(default_factory=list)


@dataclass
class ItemBatch:
    """A batch of images, each with K item slots.

    Attributes:
        images: (B, 3, H, W) or (B, S, 1, D, H, W).
        item_tokens: int64 (B, K, C), padded with 0 and as long as the longest text needs.
        item_mask: bool (B, K), True where the slot holds a real item; real items come first.
        is_normal: bool (B,).
        sample_ids: B names.
        series_names: int64 (B, S, 110) or None.
        contradiction_tokens: int64 (B, K, C'), a text that contradicts each item, or None where nobody asks for them.
        contradiction_mask: bool (B, K), True where there is one.
    """

    images: Tensor
    item_tokens: Tensor
    item_mask: Tensor
    is_normal: Tensor
    sample_ids: list[str]
    series_names: Tensor | None = None
    contradiction_tokens: Tensor | None = None
    contradiction_mask: Tensor | None = None

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ItemBatch:
        """Copy with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ItemBatch:
        """Page-locked copy; DataLoader calls this by name."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> ItemBatch:
        """Copy with `change` applied to every tensor."""
        changed: dict[str, Any] = {
            f.name: change(value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **changed)

    def chunk(self, num_chunks: int) -> list[ItemBatch]:
        """Split along the batch into `num_chunks` near-equal parts (fewer when the batch is smaller)."""
        parts, start = [], 0
        size, larger = divmod(len(self), min(num_chunks, len(self)))
        for number in range(min(num_chunks, len(self))):
            cut = slice(start, start := start + size + (number < larger))
            values: dict[str, Any] = {
                f.name: None if (value := getattr(self, f.name)) is None else value[cut] for f in fields(self)
            }
            parts.append(ItemBatch(**values))
        return parts

    @staticmethod
    def join(batches: Sequence[ItemBatch]) -> ItemBatch:
        """Concatenate loaded batches into one contrastive batch; all must share K and image shape.

        Texts trimmed to different lengths are padded with 0 (every tokenizer's padding here) to the longest.
        """
        if len(batches) == 1:
            return batches[0]
        joined: dict[str, Any] = {}
        for f in fields(ItemBatch):
            values = [getattr(batch, f.name) for batch in batches]
            if f.name.endswith("_tokens") and isinstance(values[0], Tensor):
                C = max(value.shape[-1] for value in values)
                joined[f.name] = torch.cat([F.pad(value, (0, C - value.shape[-1])) for value in values])
            elif isinstance(values[0], Tensor):
                joined[f.name] = torch.cat(values)
            elif isinstance(values[0], list):
                joined[f.name] = [name for value in values for name in value]
            else:
                joined[f.name] = None
        return ItemBatch(**joined)


def trim_padding(tokens_NC: Tensor, *, multiple: int = 8) -> Tensor:
    """Cut the columns on the right that are padding (0) in every row, keeping a multiple of `multiple` columns.

    Exact for every text tower here: the causal transformer never looks right, BERT masks its padding. At context 100
    and items of a dozen tokens this saves five sixths of the text tower's work.
    """
    used = (tokens_NC != 0).any(0).nonzero()
    longest = int(used[-1]) + 1 if len(used) else 1
    return tokens_NC[:, : min(tokens_NC.shape[1], -(-longest // multiple) * multiple)]


@dataclass
class ItemCollator:
    """Turns samples into an ItemBatch: pads items to K slots, tokenises, masks.

    Attributes:
        tokenizer: texts → int64 (N, C), padded on the right with 0; padding no text needs is cut off again.
        max_items: K. None means the longest sample of the batch (evaluation: no item is lost).
        join_items: the items of an image, the first K, are one text: the batch has one slot.
        contradictions: give each item a text that contradicts it, where there is one (`itemizedclip.data.opposites`).
    """

    tokenizer: Tokenizer
    max_items: int | None = None
    join_items: bool = False
    contradictions: bool = False
    _known: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, samples: Sequence[ItemSample]) -> ItemBatch:
        for sample in samples:
            if not sample.items:
                raise BadSampleError(f"{sample.sample_id}: no text item; expected at least one. Remove or fix it.")
        if self.join_items:
            joined = [ITEM_SEPARATOR.join(sample.items[: self.max_items]) for sample in samples]
            samples = [replace(sample, items=[text]) for sample, text in zip(samples, joined)]
        K = 1 if self.join_items else self.max_items or max(len(sample.items) for sample in samples)
        texts: list[str] = []
        item_mask = torch.zeros(len(samples), K, dtype=torch.bool)
        for row, sample in enumerate(samples):
            kept = sample.items[:K]
            texts += kept + [PLACEHOLDER] * (K - len(kept))
            item_mask[row, : len(kept)] = True
        tokens = trim_padding(self._tokens(texts))
        names = [s.series_names for s in samples if s.series_names is not None]
        against = [contradiction(text) for text in texts] if self.contradictions else []
        return ItemBatch(
            contradiction_tokens=trim_padding(self._tokens([text or PLACEHOLDER for text in against])).reshape(
                len(samples), K, -1
            )
            if against
            else None,
            contradiction_mask=item_mask & torch.tensor([bool(text) for text in against]).view(len(samples), K)
            if against
            else None,
            images=torch.stack([sample.image for sample in samples]),
            item_tokens=tokens.reshape(len(samples), K, -1),
            item_mask=item_mask,
            is_normal=torch.tensor([sample.is_normal for sample in samples]),
            sample_ids=[sample.sample_id for sample in samples],
            series_names=torch.stack(names) if names else None,
        )

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        """int64 (N, C). Items come back every epoch, placeholders in every batch: what was tokenised is kept."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if len(self._known) + len(new) > _MAX_KNOWN_TEXTS:
            self._known.clear()
            new = list(dict.fromkeys(texts))
        if new:
            # Rows of their own: a view would keep the whole batch it came from.
            self._known.update(zip(new, (row.clone() for row in self.tokenizer(new))))
        return torch.stack([self._known[text] for text in texts])
