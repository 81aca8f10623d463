"""Texts to token ids.

Axes: N texts, C context length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import Tensor

from itemizedclip.runtime.registry import MissingExtraError

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

CLIP_VOCABULARY = 49_408
"""Entries of CLIP's vocabulary: ids that the text tower must embed."""


@lru_cache(maxsize=1)
def _clip_bpe() -> SimpleTokenizer:
    from open_clip.tokenizer import SimpleTokenizer  # takes seconds, reading the vocabulary half of one: only here

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

    def to_json(self) -> str:
        """The same tokenizer in the format of the package `tokenizers`, which needs no PyTorch.

        Texts are not mended (`ftfy`) and HTML entities not resolved there; of plain texts the ids are equal.

        Raises:
            MissingExtraError: tokenizers is not installed.
        """
        try:
            from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
        except ModuleNotFoundError as error:
            raise MissingExtraError("exporting needs the package tokenizers: pip install -e '.[onnx]'") from error
        bpe = _clip_bpe()
        start, end = "<start_of_text>", "<end_of_text>"
        merges = sorted(bpe.bpe_ranks, key=bpe.bpe_ranks.__getitem__)
        backend = Tokenizer(models.BPE(vocab=dict(bpe.encoder), merges=merges, end_of_word_suffix="</w>"))
        clean = [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Lowercase(),
        ]
        backend.normalizer = normalizers.Sequence(clean)
        words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        backend.decoder = decoders.BPEDecoder("</w>")
        ids = [(token, int(bpe.encoder[token])) for token in (start, end)]
        backend.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ids)
        backend.enable_truncation(self.context_length)
        backend.enable_padding(pad_id=self.pad_id, pad_token="!", length=self.context_length)  # noqa: S106  no secret
        text: str = backend.to_str()
        return text
