"""Texts to token ids.

Axes: N texts, C context length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

CLIP_VOCABULARY = 49_408
"""Entries of CLIP's vocabulary: ids that the text tower must embed."""


@lru_cache(maxsize=1)
def _clip_bpe() -> SimpleTokenizer:
    # Reading the vocabulary takes half a second: once per process.
    return SimpleTokenizer()


class ClipTokenizer:
    """CLIP's byte-pair encoding (49,408 entries, shipped with open_clip).

    Args:
        context_length: C; longer texts are cut and keep their end-of-text token.
    """

    pad_id = 0

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """int64 (N, C), padded with 0."""
        tokens_NC: Tensor = _clip_bpe()(list(texts), context_length=self.context_length)
        return tokens_NC

    def is_truncated(self, tokens_NC: Tensor) -> Tensor:
        """bool (N,): texts that fill the whole context; they were cut, or fit to the last token."""
        return tokens_NC[:, self.context_length - 1 :].ne(self.pad_id).any(1)
