"""Scoring at scale: TCSim of N images with M texts, exact, in bounded memory, on the device of the texts.

Axes: N images, M texts, B images of a block, m texts of a block, L image tokens, H heads, D joint width, d = D / H.

TCSim(t, v) = cos(t, head(t, v)). What it costs, in multiply-adds:

                             published     here
    per image and text
      query projection       D²            —              once per text
      logits and pooling     2·L·D         2·L·D
      output projection      D²            5/8·D²         on the CPU; D² elsewhere
      cosine                 3·D           3·D
    per image
      keys and values        2·L·D²        2·L·D²         one product, however many blocks of texts

For L = 196, D = 512 that is 726k against 366k per pair. The output projection shrinks because only the length of the
projected vector and its product with the text are needed, so both may be rotated: with W = Q·R (Q orthogonal, R upper
triangular), b the bias, p the pooled values and t̂ the normalised text,

    t̂·(W p + b) = (Qᵀt̂)·(R p + Qᵀb)   and   ‖W p + b‖ = ‖R p + Qᵀb‖,

and the zeros of R are skipped in strips of D / 4 rows (finer strips cost more in calls than they save). A rotation
loses nothing in float32. Weighed and left out: the quadratic form pᵀ(WᵀW)p for the length (as cheap, but it cancels
where heads oppose each other); multiplying every token's value by W beforehand (H·L·D per pair, three times the
cost); folding the key projection into the query (H·L·D per pair; pays below D / (H − 1) = 73 texts, where the image
tower costs a hundred times more than scoring); convolutions for the attention products (no faster than the fused
kernel).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from itemizedclip.models.dual_encoder import ImageFeatures
from itemizedclip.models.item_attention import ItemAttention
from itemizedclip.runtime.errors import UserError

Scoring = Literal["tcsim", "global"]
"""TCSim, or the cosine of global features (plain CLIP)."""

CPU_BLOCK_BYTES = 8 * 2**20
"""Intermediate results of one block of pairs on the CPU: about what its caches hold."""

DEVICE_BLOCK_BYTES = 512 * 2**20
"""The same on an accelerator, where large blocks keep it busy."""

NUM_STRIPS = 4
"""Strips of the rotated output projection on the CPU."""

ROW_MULTIPLE = 16
"""Texts of a block and tokens of an image are filled up to a multiple of this (see `_linear`)."""

MIN_NORM = 1e-8
"""Lengths below this count as this in a cosine, as in torch.cosine_similarity."""


@dataclass(frozen=True)
class ScoreBlock:
    """Scores of some images of a batch with some texts: `scores[images, texts] = values`, float32."""

    images: slice
    texts: slice
    values: Tensor


class TextScorer(ABC):
    """A fixed set of M texts that image after image is scored against."""

    num_texts: int

    @abstractmethod
    def score_blocks(self, features: ImageFeatures) -> Iterator[ScoreBlock]:
        """Scores of B images with all texts, block by block; together the blocks cover (B, M) once."""

    @torch.no_grad()
    def score(self, features: ImageFeatures) -> Tensor:
        """Scores (B, M), float32, on the device of the features."""
        scores_BM = features.global_BD.new_empty((len(features.global_BD), self.num_texts), dtype=torch.float32)
        for block in self.score_blocks(features):
            scores_BM[block.images, block.texts] = block.values
        return scores_BM


class GlobalScorer(TextScorer):
    """Cosine of the global image feature and the text feature.

    Args:
        texts_MD: text features, normalised here.
        block_bytes: largest block of scores.
    """

    def __init__(self, texts_MD: Tensor, *, block_bytes: int | None = None) -> None:
        self.texts_MD = F.normalize(texts_MD.detach().float(), dim=-1)
        self.num_texts = len(texts_MD)
        self.block_bytes = block_bytes or default_block_bytes(texts_MD.device)

    @torch.no_grad()
    def score_blocks(self, features: ImageFeatures) -> Iterator[ScoreBlock]:
        with full_precision(features.global_BD.device):
            images_BD = F.normalize(features.global_BD.float(), dim=-1)
            for texts in blocks_of(self.num_texts, self.block_bytes // (4 * max(1, len(images_BD)))):
                yield ScoreBlock(slice(0, len(images_BD)), texts, images_BD @ self.texts_MD[texts].T)


@dataclass(frozen=True)
class _Strip:
    """Some rows of the output projection: z[rows] = weight · p[inputs] + bias."""

    rows: slice
    inputs: slice
    weight: Tensor
    bias: Tensor


class TcsimScorer(TextScorer):
    """TCSim with a fixed set of texts: everything that depends on a text alone is computed once.

    Args:
        head: the model's head; its weights are copied, so later training does not change the scores.
        texts_MD: text features, on the head's device, normalised or not as the protocol wants them.
        normalise_tokens: L2-normalise each image token before the head, as the published zero-shot evaluations do;
            the published retrieval passes tokens as they are.
        dtype: precision of the products; lengths and cosines stay float32. bfloat16 is good to about 1e-2.
        block_bytes: bound of the intermediate results; default by device.

    Raises:
        ValueError: texts that are not (M, D) with M ≥ 1.
    """

    def __init__(
        self,
        head: ItemAttention,
        texts_MD: Tensor,
        *,
        normalise_tokens: bool,
        dtype: torch.dtype = torch.float32,
        block_bytes: int | None = None,
    ) -> None:
        if texts_MD.dim() != 2 or texts_MD.shape[1] != head.width or not len(texts_MD):
            raise UserError(f"texts must be (M, {head.width}) with M ≥ 1, got {tuple(texts_MD.shape)}")
        self.normalise_tokens = normalise_tokens
        self.dtype = dtype
        self.num_texts = len(texts_MD)
        self.num_heads = head.num_heads
        self.block_bytes = block_bytes or default_block_bytes(texts_MD.device)
        with torch.no_grad(), full_precision(texts_MD.device):
            # Rows that fill up to the multiple are scored like texts and cut off at the end.
            texts_MD = F.pad(texts_MD.detach().float(), (0, 0, 0, -self.num_texts % ROW_MULTIPLE))
            head = float_head(head)
            self._queries_HMd = self._split_heads(head.project_queries(texts_MD).to(dtype)[None])[0].contiguous()
            self._kv_weight, self._kv_bias = (part.to(dtype) for part in fold_layer_norms(head))
            self._layer_norm_eps = head.ln_k.eps
            self._targets_MD, self._strips = _rotate_output(head, F.normalize(texts_MD, dim=-1), dtype)

    @torch.no_grad()
    def score_blocks(self, features: ImageFeatures) -> Iterator[ScoreBlock]:
        tokens_BLD = features.tokens_BLD
        B, L, D = tokens_BLD.shape
        itemsize = torch.finfo(self.dtype).bits // 8
        bytes_per_image = 6 * L * D * itemsize  # normalised tokens, keys and values with and without the zero token
        bytes_per_pair = 4 * D * itemsize  # pooled values, their projection, and products of it
        texts_per_block = min(len(self._targets_MD), self.block_bytes // bytes_per_pair)
        texts_per_block = max(ROW_MULTIPLE, texts_per_block // ROW_MULTIPLE * ROW_MULTIPLE)
        images_per_block = self.block_bytes // max(bytes_per_image, texts_per_block * bytes_per_pair)
        for images in blocks_of(B, images_per_block):
            with full_precision(tokens_BLD.device):
                keys, values = self._project(tokens_BLD[images])
            for rows in blocks_of(len(self._targets_MD), texts_per_block):
                with full_precision(tokens_BLD.device):
                    scores = self._score_block(keys, values, rows)
                texts = slice(rows.start, min(rows.stop, self.num_texts))
                yield ScoreBlock(images, texts, scores[:, : texts.stop - texts.start])

    def _split_heads(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) → (B, H, N, d)."""
        B, N, D = x_BND.shape
        return x_BND.reshape(B, N, self.num_heads, D // self.num_heads).transpose(1, 2)

    def _project(self, tokens_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, L + 1, d), the zero token last."""
        tokens_BLD = tokens_BLD.float()
        if self.normalise_tokens:
            tokens_BLD = F.normalize(tokens_BLD, dim=-1)
        _, L, D = tokens_BLD.shape
        standardised_BLD = F.layer_norm(tokens_BLD, (D,), eps=self._layer_norm_eps).to(self.dtype)
        # At least one row more than tokens: the zero token.
        filled = F.pad(standardised_BLD, (0, 0, 0, ROW_MULTIPLE - L % ROW_MULTIPLE))
        projected = _linear(filled, self._kv_weight, self._kv_bias)
        projected[:, L] = 0
        keys, values = projected[:, : L + 1].split(D, dim=-1)
        return self._split_heads(keys), self._split_heads(values)

    def _score_block(self, keys: Tensor, values: Tensor, texts: slice) -> Tensor:
        """Scores (B, m) of the projected images with some texts."""
        B = len(keys)
        queries_BHmd = self._queries_HMd[:, texts].expand(B, -1, -1, -1)
        pooled_BmD = F.scaled_dot_product_attention(queries_BHmd, keys, values).transpose(1, 2).flatten(2)
        dots_Bm = pooled_BmD.new_zeros(pooled_BmD.shape[:2], dtype=torch.float32)
        squares_Bm = torch.zeros_like(dots_Bm)
        for strip in self._strips:
            z_Bmr = _linear(pooled_BmD[..., strip.inputs], strip.weight, strip.bias).float()
            dots_Bm += torch.linalg.vecdot(z_Bmr, self._targets_MD[texts, strip.rows])
            squares_Bm += torch.linalg.vecdot(z_Bmr, z_Bmr)
        return dots_Bm / squares_Bm.sqrt().clamp_min(MIN_NORM)


def create_scorer(
    head: ItemAttention,
    texts_MD: Tensor,
    scoring: Scoring,
    *,
    normalise_tokens: bool,
    dtype: torch.dtype = torch.float32,
    block_bytes: int | None = None,
) -> TextScorer:
    """The scorer of that name; `normalise_tokens` and `dtype` apply to TCSim (see `TcsimScorer`)."""
    if scoring == "tcsim":
        return TcsimScorer(head, texts_MD, normalise_tokens=normalise_tokens, dtype=dtype, block_bytes=block_bytes)
    if scoring == "global":
        return GlobalScorer(texts_MD, block_bytes=block_bytes)
    raise UserError(f"unknown scoring {scoring!r}; expected tcsim or global")


@torch.no_grad()
def score_images(
    head: ItemAttention,
    tokens_NLD: Tensor,
    texts_MD: Tensor,
    *,
    normalise_tokens: bool,
    dtype: torch.dtype = torch.float32,
    block_bytes: int | None = None,
) -> Tensor:
    """TCSim (N, M) of images whose tokens are at hand; arguments as for `TcsimScorer`."""
    scorer = TcsimScorer(head, texts_MD, normalise_tokens=normalise_tokens, dtype=dtype, block_bytes=block_bytes)
    return scorer.score(ImageFeatures(tokens_NLD[:, 0], tokens_NLD, (tokens_NLD.shape[1],)))


@torch.no_grad()
def score_images_plainly(
    head: ItemAttention, tokens_NLD: Tensor, texts_MD: Tensor, *, normalise_tokens: bool
) -> Tensor:
    """TCSim (N, M) as published: for each image the whole head with all texts. The reference for `score_images`."""
    rows = []
    for tokens_LD in tokens_NLD:
        tokens_1LD = F.normalize(tokens_LD[None], dim=-1) if normalise_tokens else tokens_LD[None]
        rows.append(F.cosine_similarity(texts_MD[None], head(texts_MD[None], tokens_1LD), dim=-1))
    return torch.cat(rows)


# --- the head's weights, rearranged ---------------------------------------------------------------------------------


def float_head(head: ItemAttention) -> ItemAttention:
    """The head in float32: itself, or a copy when the model keeps its weights in another precision."""
    return head if head.attn.in_proj_weight.dtype == torch.float32 else copy.deepcopy(head).float()


def fold_layer_norms(head: ItemAttention) -> tuple[Tensor, Tensor]:
    """Weight (2·D, D) and bias (2·D,) of keys and values from standardised tokens: both norms share mean and scale."""
    D = head.width
    weights, biases = [], []
    for part, norm in ((1, head.ln_k), (2, head.ln_v)):
        rows = slice(part * D, (part + 1) * D)
        weight = head.attn.in_proj_weight[rows]
        weights.append(weight * norm.weight)
        biases.append(head.attn.in_proj_bias[rows] + weight @ norm.bias)
    return torch.cat(weights), torch.cat(biases)


def _rotate_output(head: ItemAttention, targets_MD: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[_Strip]]:
    """Targets and output projection, rotated and cut into strips on the CPU (see the top of the file).

    An accelerator does one large product in less time than several small ones.
    """
    weight, bias, D = head.attn.out_proj.weight, head.attn.out_proj.bias, head.width
    if targets_MD.device.type != "cpu":
        everything = slice(0, D)
        return targets_MD, [_Strip(everything, everything, weight.to(dtype), bias.to(dtype))]
    Q, R = torch.linalg.qr(weight.double())
    rotated_bias = Q.T @ bias.double()
    strips = []
    for rows in blocks_of(D, -(-D // NUM_STRIPS)):
        inputs = slice(rows.start, D)
        strips.append(_Strip(rows, inputs, R[rows, inputs].to(dtype).contiguous(), rotated_bias[rows].to(dtype)))
    return targets_MD @ Q.float(), strips


def _linear(x_BND: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear; on the CPU as a 1 × 1 convolution, whose library (oneDNN) runs AMD processors at twice MKL's speed.

    N must be a multiple of ROW_MULTIPLE: PyTorch hands 1 × 1 kernels to oneDNN only with several threads or a batch of
    at least 16, so on one thread the rows are given as 16 images.
    """
    if x_BND.device.type != "cpu" or x_BND.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return F.linear(x_BND, weight, bias)
    B, N, _ = x_BND.shape
    batch = 1 if torch.get_num_threads() > 1 else ROW_MULTIPLE
    channels_last = x_BND.flatten(0, 1).unflatten(0, (batch, -1)).unsqueeze(2).permute(0, 3, 1, 2)
    result = F.conv2d(channels_last, weight[:, :, None, None], bias)
    return result.permute(0, 2, 3, 1).reshape(B, N, -1)


# --- the best of many, without the matrix ---------------------------------------------------------------------------


class TopK:
    """The k largest scores of each row, fed with blocks of columns in any order.

    Equal scores go to the lower column number, so the result does not depend on the blocks. Memory: 8·R·k bytes.

    Args:
        k: how many to keep.
        num_rows: R, rows kept apart (texts when searching images, images when searching texts).
        device: where blocks will lie.
    """

    _EMPTY = -(2**63)
    _MAX_COLUMN = 2**32 - 1

    def __init__(self, k: int, num_rows: int, *, device: torch.device | str = "cpu") -> None:
        if k < 1 or num_rows < 0:
            raise UserError(f"k must be at least 1 and num_rows not negative, got k = {k}, num_rows = {num_rows}")
        self.k = k
        self._keys_Rk = torch.full((num_rows, k), self._EMPTY, dtype=torch.int64, device=device)

    def update(self, scores_RC: Tensor, columns_C: Tensor, *, rows: slice = slice(None)) -> None:
        """Take the scores of `rows` with the columns of these numbers (int64, 0 … 2³² − 1, each once per row).

        Raises:
            ValueError: a NaN, or a column number out of range.
        """
        if torch.isnan(scores_RC).any():
            raise UserError("scores hold NaN, which cannot be ordered: check the weights and the precision")
        if len(columns_C) and not 0 <= int(columns_C.min()) <= int(columns_C.max()) <= self._MAX_COLUMN:
            raise UserError(f"column numbers must be 0 … {self._MAX_COLUMN}")
        keys_RC = (_order_preserving_int(scores_RC) << 32) | (self._MAX_COLUMN - columns_C)
        best_of_block = keys_RC.topk(min(self.k, keys_RC.shape[1]), dim=1).values
        joined = torch.cat([self._keys_Rk[rows], best_of_block], dim=1)
        self._keys_Rk[rows] = joined.topk(self.k, dim=1).values

    def result(self) -> tuple[Tensor, Tensor]:
        """Scores (R, k), float32 and falling, and column numbers (R, k); −inf and −1 where fewer than k came."""
        empty = self._keys_Rk == self._EMPTY
        scores = _float_of_int(self._keys_Rk >> 32).masked_fill(empty, float("-inf"))
        columns = (self._MAX_COLUMN - (self._keys_Rk & self._MAX_COLUMN)).masked_fill(empty, -1)
        return scores, columns


def _order_preserving_int(scores: Tensor) -> Tensor:
    """int64 in the range of int32 that compare as the float32 scores do."""
    bits = (scores.float() + 0.0).contiguous().view(torch.int32)  # + 0.0 turns −0 into 0
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).long()


def _float_of_int(ordered: Tensor) -> Tensor:
    """Inverse of `_order_preserving_int`."""
    bits = ordered.to(torch.int32)
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).view(torch.float32)


def top_images(
    scorer: TextScorer, batches: Iterable[tuple[Tensor, ImageFeatures]], k: int, *, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The k best images of every text, over a stream of (image numbers (B,), features).

    Returns:
        Scores (M, k) and image numbers (M, k), best first; −inf and −1 where there are fewer than k images.
    """
    best = TopK(k, scorer.num_texts, device=device)
    for numbers_B, features in batches:
        for block in scorer.score_blocks(features):
            best.update(block.values.T, numbers_B[block.images].to(block.values.device), rows=block.texts)
    return best.result()


def top_texts(
    scorer: TextScorer, batches: Iterable[tuple[Tensor, ImageFeatures]], k: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The k best texts of every image of a stream: (image numbers (B,), scores (B, k), text numbers (B, k))."""
    for numbers_B, features in batches:
        device = features.global_BD.device
        best = TopK(k, len(features.global_BD), device=device)
        for block in scorer.score_blocks(features):
            columns = torch.arange(block.texts.start, block.texts.stop, device=device)
            best.update(block.values, columns, rows=block.images)
        yield numbers_B, *best.result()


# --- small helpers --------------------------------------------------------------------------------------------------


def blocks_of(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` (at least 1) that cover 0 … count."""
    size = max(1, size)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def default_block_bytes(device: torch.device) -> int:
    return CPU_BLOCK_BYTES if device.type == "cpu" else DEVICE_BLOCK_BYTES


def full_precision(device: torch.device) -> torch.autocast:
    """No autocast inside: the scorer's dtype decides."""
    return torch.autocast(device.type, enabled=False)
