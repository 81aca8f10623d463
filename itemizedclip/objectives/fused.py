"""The itemized loss differentiated while it is computed: nothing is kept for the backward pass, nothing computed twice.

Axes: B images on this rank, b images of a block, K item slots, T queries per image and rank, Q queries of a step (T of
each of some ranks), L image tokens, H heads, D joint width, d = D / H, N = B·K rows of a rank's item table, P passes
(1: ILA; 2: ILA and KTA).

The total is a weighted sum of pairs, so a block of images against some ranks' queries can be differentiated as soon as
its logits exist. One `torch.autograd.Function` does that in its forward pass, block by block; what lives longer than a
block is the gradient of the inputs. Four identities carry the savings (x̂ is a token after LayerNorm without affine):

- *Affines fold into projections*, W(γ·x̂ + β) + b = (Wγ)·x̂ + (Wβ + b), so keys and values share x̂; their biases are one
  number per query and head, and touch no array of L tokens.
- *Either side can be projected.* q·(W x̂) = (Wᵀq)·x̂ and Σ p W x̂ = W Σ p x̂: with few queries, tokens stay unprojected.
- *The cosine needs no output projection.* With G = WᵀW, |W o + b|² = o·(G o + 2Wᵀb) + b·b and t·(W o + b) =
  (Wᵀt)·o + t·b; Wᵀt is made once per item, and z = G o + Wᵀb is also what the gradient asks for.
- *One exponential serves both passes*: key tokens are a 0/1 factor on it.

Products of tokens run in autocast's dtype where it is on; softmax, logits and sums in float32 (float64 for float64).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from itemizedclip.models.item_attention import ItemAttention
from itemizedclip.objectives.block_size import Blocks, folding_is_cheaper, ranks_at_once, work_bytes
from itemizedclip.objectives.exchange import Exchange, RemoteItems
from itemizedclip.objectives.pairing import RankPairs, own_columns
from itemizedclip.objectives.token_blocks import LN2, Folded, Projected, TokenBlock, Weights, fold, head_parameters

WIDEST = 80.0
"""Attention logits (base 2) above this, against the zero token's 0, leave the shared exponential's range."""


@dataclass(frozen=True)
class TermWeights:
    """Factors of the sums in the total, denominators included; 0 is off."""

    ila: float
    kta: float
    mps: float
    iis: float


class RankItems(NamedTuple):
    """Item features (N, D) of one rank, their gradient to be filled in, and their pairs."""

    features_ND: Tensor
    grad_ND: Tensor
    pairs: RankPairs


# --- items --------------------------------------------------------------------------------------------------------


class ItemTable:
    """Everything computed once per item of some ranks, R rows in all, and what the blocks owe each of it.

    Only what the blocks read is kept; how it came from the items is computed again, rank by rank, to go back.

    Attributes:
        queries_RHe: what meets a token, of width e = d (keys) or e = D (x̂, the key projection folded in).
        shifts_RH: the key bias' share of every attention logit.
        texts_RD: Wᵀt of the normalised item.
        offsets_R: b·t.
        grads: accumulators of these four, in this order.
    """

    def __init__(
        self, ranks: Sequence[RankItems], weights: Weights, num_heads: int, eps: float, *, fold_keys: bool
    ) -> None:
        self.ranks = ranks
        self._arguments = (weights, num_heads, eps, fold_keys)
        tables = [self._derive(rank.features_ND.to(weights.out_D.dtype)) for rank in ranks]
        self.queries_RHe, self.shifts_RH, self.texts_RD, self.offsets_R = (
            torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*tables)
        )
        kept = (self.queries_RHe, self.shifts_RH, self.texts_RD, self.offsets_R)
        self.grads = [torch.zeros_like(part) for part in kept]

    @property
    def rows_per_rank(self) -> int:
        """N."""
        return len(self.texts_RD) // len(self.ranks)

    def _derive(self, items_ND: Tensor) -> tuple[Tensor, ...]:
        weights, H, eps, fold_keys = self._arguments
        D = items_ND.shape[-1]
        normed = F.layer_norm(items_ND, (D,), eps=eps)
        queries = F.linear(normed, weights.query_DD, weights.query_D).view(-1, H, D // H)
        shifts = (queries * weights.key_D.view(H, -1)).sum(-1)
        if fold_keys:
            queries = torch.einsum("rhd,hde->rhe", queries, weights.key_DD.view(H, -1, D))
        unit = F.normalize(items_ND, dim=-1)
        return queries, shifts, unit @ weights.out_DD, unit @ weights.out_D

    def finish(self, weight_grads: Weights) -> None:
        """Carry what was accumulated on to the items and the parameters."""
        weights = self._arguments[0]
        N = self.rows_per_rank
        for number, rank in enumerate(self.ranks):
            leaf = rank.features_ND.detach().to(weights.out_D.dtype).requires_grad_()
            with torch.enable_grad():
                outputs = self._derive(leaf)
            owed = [grad[number * N : (number + 1) * N] for grad in self.grads]
            grads = torch.autograd.grad(outputs, (leaf, *weights), owed, allow_unused=True)
            for total, grad in zip((rank.grad_ND, *weight_grads), grads):
                if grad is not None:
                    total.add_(grad)


# --- the step -----------------------------------------------------------------------------------------------------


class Totals(NamedTuple):
    """Sums of the terms (ILA, KTA, MPS, IIS), and the gradients of τ and β."""

    sums_4: Tensor
    scale: Tensor
    bias: Tensor


class Step:
    """One evaluation of the loss on this rank; see the module's text.

    Args:
        tokens_BLD: image tokens.
        image_global_BD: global image features.
        parameters: `head_parameters`.
        scale: τ.
        bias: β.
        num_heads: H.
        eps: of the LayerNorms.
        num_slots: K.
        own_mask_BK: real items of this rank.
        factors: of the terms in the total.
        worst_positive_factor: UWP.
        keep: keep mask (B, H, T, L) of the own queries, or a keep probability.
        num_key_tokens: of KTA; None without it.
        differentiate: False computes values alone.
        low: dtype of the products of tokens.
    """

    def __init__(
        self,
        tokens_BLD: Tensor,
        image_global_BD: Tensor,
        parameters: Sequence[Tensor],
        scale: Tensor,
        bias: Tensor,
        *,
        num_heads: int,
        eps: float,
        num_slots: int,
        own_mask_BK: Tensor,
        factors: TermWeights,
        worst_positive_factor: float,
        keep: Tensor | float,
        num_key_tokens: int | None,
        differentiate: bool,
        tokens_need_grad: bool,
        low: torch.dtype | None,
    ) -> None:
        self.tokens_BLD = tokens_BLD
        self.exact = torch.float64 if tokens_BLD.dtype == torch.float64 else torch.float32
        self.low = self.exact if low is None else low
        self.scale, self.bias = scale.to(self.exact), bias.to(self.exact)
        self.num_heads, self.eps, self.num_slots = num_heads, eps, num_slots
        self.own_mask_BK = own_mask_BK
        self.factors, self.worst_positive_factor = factors, worst_positive_factor
        self.keep, self.num_key_tokens = keep, num_key_tokens
        self.num_passes = 1 if num_key_tokens is None else 2
        self.differentiate, self.tokens_need_grad = differentiate, tokens_need_grad
        self._parameters = [p.detach().to(self.exact).requires_grad_() for p in parameters]
        with torch.enable_grad():
            self._folded = fold(self._parameters, num_heads)
        self._leaves = Weights(*(w.detach().requires_grad_() for w in self._folded))
        self.weights = Weights(*(w.detach() for w in self._folded))
        self.weight_grads = Weights(*(torch.zeros_like(w) for w in self.weights))
        device = tokens_BLD.device
        zero = torch.zeros((), dtype=self.exact, device=device)
        self.totals = Totals(torch.zeros(4, dtype=self.exact, device=device), zero, zero.clone())
        with torch.enable_grad():
            self._global = image_global_BD.detach().to(self.exact).requires_grad_()
            self._global_unit = F.normalize(self._global, dim=-1)
        self.global_unit_BD = self._global_unit.detach()
        self.global_grad_BD = torch.zeros_like(self.global_unit_BD)
        # Gradients in float16 would be lost before the loss scale reaches them.
        grad_dtype = self.exact if tokens_BLD.dtype == torch.float16 else tokens_BLD.dtype
        self.tokens_grad_BLD: Tensor | None = None
        if differentiate and tokens_need_grad:
            self.tokens_grad_BLD = torch.zeros_like(tokens_BLD, dtype=grad_dtype)

    # --- several ranks ------------------------------------------------------------------------------------------

    def run(self, own: RankItems, others: Iterator[RankItems], num_attended: int) -> None:
        """All ranks; `others` is not asked before this rank's first block is done.

        Args:
            own: this rank.
            others: the others, those with local pairs first.
            num_attended: how many have local pairs.
        """
        if own.pairs.local is None:
            self._everyone(own)
        else:
            at_once = ranks_at_once(work_bytes(self.tokens_BLD.device), own.features_ND.numel(), num_attended)
            for done in range(0, max(1, num_attended), at_once):
                self._images([[own]] if done == 0 else [], others, min(at_once, num_attended - done))
        for rank in others:
            self._everyone(rank)

    def _table(self, ranks: Sequence[RankItems], *, fold_keys: bool) -> ItemTable:
        """The table of some ranks, MPS done."""
        for rank in ranks:
            self._everyone(rank)
        return ItemTable(ranks, self._leaves, self.num_heads, self.eps, fold_keys=fold_keys)

    def _images(self, groups: list[list[RankItems]], others: Iterator[RankItems], count: int) -> None:
        """Every image against the ranks of `groups` and `count` of `others`, with one projection of the tokens."""
        B, L, D = self.tokens_BLD.shape
        T = self.num_slots + B - 1
        fold_keys = folding_is_cheaper(T * (count + len(groups)), L, D, self.num_heads, self.num_passes)
        work = work_bytes(self.tokens_BLD.device)
        blocks = Blocks.choose(work, B, L, D, self.num_heads * T, self.num_passes, max(1, count))
        tables = [self._table(ranks, fold_keys=fold_keys) for ranks in groups]
        for start in range(0, B, blocks.images):
            rows = slice(start, min(B, start + blocks.images))
            tokens = self.tokens_BLD[rows].to(self.exact)
            normed, mean, rstd = torch.native_layer_norm(tokens, (D,), None, None, self.eps)
            block = (Folded if fold_keys else Projected)(normed.to(self.low), self.weights, self.num_heads, self.exact)
            for table in tables:
                self._queries(block, table, rows, blocks.ranks)
            if start == 0 and count:
                # Only now are the other ranks' items needed.
                tables.append(self._table(list(islice(others, count)), fold_keys=fold_keys))
                self._queries(block, tables[-1], rows, blocks.ranks)
            if self.differentiate:
                grad = block.finish(self.weight_grads)
                if self.tokens_grad_BLD is not None:
                    self.tokens_grad_BLD[rows] += torch.ops.aten.native_layer_norm_backward(
                        grad, tokens, (D,), mean, rstd, None, None, [True, False, False]
                    )[0]
        for table in tables:
            self._finish(table)

    def _finish(self, table: ItemTable) -> None:
        if self.differentiate:
            table.finish(self.weight_grads)

    def _queries(self, block: TokenBlock, table: ItemTable, rows: slice, at_once: int) -> None:
        """A block of images against a table, the queries of `at_once` ranks at a time."""
        for start in range(0, len(table.ranks), at_once):
            ranks = table.ranks[start : start + at_once]
            pairs = [rank.pairs.local for rank in ranks if rank.pairs.local is not None]
            index = [p.index_BT[rows] + n * table.rows_per_rank for n, p in enumerate(pairs, start)]
            labels, weights = [p.labels_BT[rows] for p in pairs], [p.weights_BT[rows] for p in pairs]
            self._block(
                block, table, rows, torch.cat(index, 1), torch.cat(labels, 1), torch.cat(weights, 1), ranks[0].pairs
            )

    def _everyone(self, rank: RankItems) -> None:
        """MPS of one rank."""
        pairs = rank.pairs.everyone
        if pairs is None:
            return
        leaf = rank.features_ND.detach().to(self.exact).requires_grad_()
        with torch.enable_grad():
            unit = F.normalize(leaf, dim=-1)
        units_ND = unit.detach()
        grad = self._pairs(self.global_unit_BD @ units_ND.T, pairs.labels, pairs.weights, 2, self.factors.mps)
        if self.differentiate:
            grad = grad * self.scale
            self.global_grad_BD.addmm_(grad, units_ND)
            rank.grad_ND.add_(torch.autograd.grad(unit, leaf, grad.T @ self.global_unit_BD)[0])

    def _pairs(self, cosines: Tensor, labels: Tensor, weights: Tensor, term: int, factor: float) -> Tensor:
        """Add up a term; the gradient of the total by its logits."""
        labels, weights = labels.to(self.exact), weights.to(self.exact)
        signed = labels * (self.scale * cosines + self.bias)
        self.totals.sums_4[term] -= (weights * F.logsigmoid(signed)).sum()
        grad = (-factor) * weights * labels * torch.sigmoid(-signed)
        if self.differentiate:
            self.totals.scale.add_((grad * cosines).sum())
            self.totals.bias.add_(grad.sum())
        return grad

    # --- one block ----------------------------------------------------------------------------------------------

    def _block(
        self,
        block: TokenBlock,
        table: ItemTable,
        rows: slice,
        index_bQ: Tensor,
        labels_bQ: Tensor,
        weights_bQ: Tensor,
        pairs: RankPairs,
    ) -> None:
        """ILA, KTA and IIS of a block of images against some queries of a table."""
        (b, Q), P, H = index_bQ.shape, self.num_passes, self.num_heads
        flat = index_bQ.flatten()
        queries = table.queries_RHe[flat].view(b, Q, H, -1).transpose(1, 2).to(self.low).contiguous()
        shifts_bHQ = table.shifts_RH[flat].view(b, Q, H).transpose(1, 2)
        scores = block.scores(queries).to(self.exact)
        weights, nowhere = self._attention(scores, shifts_bHQ, self._keep_mask(scores, rows, pairs.own))
        weights = weights.flatten(2, 3).to(self.low)  # (b, H, P·Q, L), not normalised
        nowhere = nowhere.flatten(2, 3)
        tokens_share = weights.sum(-1, dtype=self.exact)
        norm = 1.0 / (tokens_share + nowhere)
        tokens_share = tokens_share * norm
        pooled = block.pool(weights).to(self.exact) * norm[..., None]
        value_H1d = self.weights.value_D.view(H, 1, -1)
        attended = block.values_of(pooled) + tokens_share[..., None] * value_H1d
        attended_bPQD = attended.transpose(1, 2).reshape(b, P, Q, -1)
        grad_bPQD = self._cosines(attended_bPQD, table, rows, index_bQ, labels_bQ, weights_bQ, pairs)
        if not self.differentiate:
            return
        grad = grad_bPQD.view(b, P * Q, H, -1).transpose(1, 2)
        delta = (grad * attended).sum(-1)
        self.weight_grads.value_D.view(H, -1).add_((grad * tokens_share[..., None]).sum((0, 2)))
        pool_grad = block.pool_grad(grad, pooled, self.weight_grads) * norm[..., None]
        constant = norm * ((grad * value_H1d).sum(-1) - delta)
        unit = None
        if self.low == torch.float16:
            unit = 8.0 / pool_grad.abs().amax().clamp_min(torch.finfo(self.exact).tiny * 16)
            pool_grad, constant = pool_grad * unit, constant * unit
        pool_grad = pool_grad.to(self.low).contiguous()
        score_grad = block.weight_grad(pool_grad).to(self.exact)
        score_grad.add_(constant[..., None]).mul_(weights)
        if P == 2:
            score_grad = torch.add(score_grad[:, :, :Q], score_grad[:, :, Q:], out=scores)
        query_grad = block.add(pool_grad, weights, queries, score_grad.to(self.low), unit).to(self.exact) * LN2
        if unit is not None:
            query_grad = query_grad / unit
        table.grads[0].index_add_(0, flat, query_grad.transpose(1, 2).reshape(b * Q, H, -1))
        shift_grad = LN2 * (nowhere * norm * delta).view(b, H, P, Q).sum(2)
        table.grads[1].index_add_(0, flat, shift_grad.transpose(1, 2).reshape(b * Q, H))

    def _keep_mask(self, scores: Tensor, rows: slice, own: bool) -> Tensor | None:
        """Which entries of ILA survive, bool of the shape of `scores`."""
        if isinstance(self.keep, Tensor):
            return self.keep[rows] if own else self.keep[rows].repeat(1, 1, scores.shape[2] // self.keep.shape[2], 1)
        return draw_keep(scores.shape, self.keep, scores.device)

    def _attention(self, scores: Tensor, shifts_bHQ: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights (b, H, P, Q, L) before normalisation, and the zero token's (b, H, P, Q); `scores` is overwritten."""
        b, H, Q, L = scores.shape
        P = self.num_passes
        weights = scores.new_empty(b, H, P, Q, L)
        nowhere = scores.new_empty(b, H, P, Q)
        top = (scores.amax(-1) + shifts_bHQ).clamp_min(0)
        # Only a processor is asked: a GPU's queue would run dry meanwhile, which costs more than a second exponential.
        shared = top.device.type == "cpu" and not bool(top.amax() > WIDEST)
        if shared:
            nowhere.copy_(torch.exp2(-top)[:, :, None])
            scores.sub_((top - shifts_bHQ)[..., None])
            if keep is None:
                torch.exp2(scores, out=weights[:, :, 0])
            else:
                torch.mul(scores.exp2_(), keep, out=weights[:, :, 0])
        else:
            self._separate(scores, shifts_bHQ, keep, weights[:, :, 0], nowhere[:, :, 0])
        if self.num_key_tokens is None:
            return weights, nowhere
        norm = 1.0 / (weights[:, :, 0].sum(-1) + nowhere[:, :, 0])
        heads_bQL = weights[:, 0, 0] * norm[:, 0, :, None]
        for head in range(1, H):
            heads_bQL.addcmul_(weights[:, head, 0], norm[:, head, :, None])
        chosen = heads_bQL.topk(self.num_key_tokens, dim=-1, sorted=False).indices
        if shared:
            factor = heads_bQL.zero_().scatter_(-1, chosen, 1.0)[:, None]
            torch.mul(weights[:, :, 0] if keep is None else scores, factor, out=weights[:, :, 1])
        else:
            key_tokens = torch.zeros_like(heads_bQL, dtype=torch.bool).scatter_(-1, chosen, True)[:, None]
            self._separate(scores, shifts_bHQ, key_tokens, weights[:, :, 1], nowhere[:, :, 1])
        return weights, nowhere

    @staticmethod
    def _separate(scores: Tensor, shifts_bHQ: Tensor, keep: Tensor | None, weights: Tensor, nowhere: Tensor) -> None:
        """One pass with an exponential of its own, for logits too far apart to share one."""
        kept = scores if keep is None else scores.masked_fill(~keep, float("-inf"))
        top = (kept.amax(-1) + shifts_bHQ).clamp_min(0)
        weights.copy_(torch.exp2(kept - (top - shifts_bHQ)[..., None]))
        nowhere.copy_(torch.exp2(-top))

    def _cosines(
        self,
        attended_bPQD: Tensor,
        table: ItemTable,
        rows: slice,
        index_bQ: Tensor,
        labels_bQ: Tensor,
        weights_bQ: Tensor,
        pairs: RankPairs,
    ) -> Tensor:
        """Terms of the attended values, and their gradient (b, P, Q, D)."""
        (b, P, Q, D), w = attended_bPQD.shape, self.weights
        flat = index_bQ.flatten()
        texts_b1QD = table.texts_RD[flat].view(b, 1, Q, D)
        half = (attended_bPQD.view(-1, D) @ w.gram_DD).add_(w.gram_D).view_as(attended_bPQD)
        squares = (attended_bPQD * half).sum(-1) + attended_bPQD @ w.gram_D + w.gram
        lengths = squares.clamp_min(0).sqrt_().clamp_min_(1e-12)
        numerators = (attended_bPQD * texts_b1QD).sum(-1) + table.offsets_R[flat].view(b, 1, Q)
        cosines = numerators / lengths
        columns = own_columns(self.tokens_BLD.shape[0], self.num_slots, flat.device)[rows]
        if pairs.own and self.worst_positive_factor != 1.0:
            own = cosines[:, 0].gather(1, columns)
            # τ is positive: the lowest cosine is the lowest logit.
            own = own.masked_fill(~self.own_mask_BK[rows].bool(), float("inf"))
            worst = columns.gather(1, own.argmin(1, keepdim=True))
            weights_bQ = weights_bQ.scatter(1, worst, weights_bQ.gather(1, worst) * self.worst_positive_factor)
        factors = (self.factors.ila, self.factors.kta)[:P]
        grad = torch.stack(
            [self._pairs(cosines[:, p], labels_bQ, weights_bQ, p, factor) for p, factor in enumerate(factors)], 1
        )
        toward = grad * self.scale / lengths
        along = toward * cosines / lengths
        grad_bPQD = toward[..., None] * texts_b1QD if self.differentiate else toward
        if pairs.own and pairs.separation is not None:
            K = self.num_slots
            gather_bKD = columns[..., None].expand(-1, -1, D)
            own_bKD = attended_bPQD[:, 0].gather(1, gather_bKD)
            items = slice(rows.start * K, rows.stop * K)
            own_texts_bKD = table.texts_RD[items].view(b, K, D)
            own_lengths = lengths[:, 0].gather(1, columns)[..., None]
            own_cosines = own_bKD @ own_texts_bKD.transpose(1, 2) + table.offsets_R[items].view(b, 1, K)
            own_cosines = own_cosines / own_lengths
            separation = pairs.separation
            own_grad = self._pairs(own_cosines, separation.labels, separation.weights[rows], 3, self.factors.iis)
            if self.differentiate:
                own_toward = own_grad * self.scale / own_lengths
                grad_bPQD[:, 0].scatter_add_(1, gather_bKD, own_toward @ own_texts_bKD)
                along[:, 0].scatter_add_(1, columns, (own_toward * own_cosines / own_lengths).sum(-1))
                table.grads[2][items].view(b, K, D).baddbmm_(own_toward.transpose(1, 2), own_bKD)
                table.grads[3][items].view(b, K).add_(own_toward.sum(1))
        if not self.differentiate:
            return grad_bPQD
        grad_bPQD.addcmul_(along[..., None], half, value=-1)
        table.grads[2].index_add_(0, flat, (toward[..., None] * attended_bPQD).sum(1).view(-1, D))
        table.grads[3].index_add_(0, flat, toward.sum(1).flatten())
        weighted = (along[..., None] * attended_bPQD).view(-1, D)
        # |W o + b|² = o·G o + 2 g·o + b·b, and the total's gradient by it is −along / 2.
        self.weight_grads.gram_DD.addmm_(weighted.T, attended_bPQD.view(-1, D), alpha=-0.5)
        self.weight_grads.gram_D.sub_(weighted.sum(0))
        self.weight_grads.gram.sub_(along.sum() / 2)
        return grad_bPQD

    # --- results ------------------------------------------------------------------------------------------------

    def parameter_grads(self) -> tuple[Tensor | None, ...]:
        """Gradients of `head_parameters`."""
        return torch.autograd.grad(self._folded, self._parameters, self.weight_grads, allow_unused=True)

    def image_global_grad(self) -> Tensor:
        """Gradient of the global image features."""
        return torch.autograd.grad(self._global_unit, self._global, self.global_grad_BD)[0]


def draw_keep(shape: Sequence[int], rate: float, device: torch.device) -> Tensor | None:
    """Bool of `shape`, each entry True with probability `rate`; None for 1.

    Four entries share one draw of 64 bits: 16 bits each, and the bound they are held against is rounded up or down at
    random, so that the probability is `rate` exactly.
    """
    bound = int(rate * 65536 + float(torch.rand((), dtype=torch.float64)))
    if bound >= 65536:
        return None
    size = math.prod(shape)
    bits = torch.empty((size + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None)
    return (bits.view(torch.int16)[:size] < bound - 32768).view(tuple(shape))


Work = Callable[..., tuple[Tensor, Tensor, list[Tensor | None]]]


class _Fused(torch.autograd.Function):
    """Total and terms; the backward pass hands out what the forward pass differentiated."""

    @staticmethod
    def forward(ctx: Any, work: Work, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        total, sums, ctx.grads = work(*inputs)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("this loss was differentiated in its forward pass, for one backward pass: fused=False")
        grads, ctx.grads = ctx.grads, None
        needed = ctx.needs_input_grad[1:]
        return None, *(g.mul_(grad) if g is not None and n else None for g, n in zip(grads, needed))


def fused_losses(
    head: ItemAttention,
    tokens_BLD: Tensor,
    image_global_BD: Tensor,
    items_ND: Tensor,
    scale: Tensor,
    bias: Tensor,
    exchange: Exchange | None,
    pairs_of: Callable[[RemoteItems | None], RankPairs],
    attended: frozenset[int],
    *,
    own_mask_BK: Tensor,
    factors: TermWeights,
    worst_positive_factor: float,
    keep: Tensor | float,
    num_key_tokens: int | None,
) -> tuple[Tensor, Tensor]:
    """The total, to be differentiated once, and the sums of ILA, KTA, MPS and IIS, without gradient.

    Args:
        head: the item-conditioned attention.
        tokens_BLD: image tokens.
        image_global_BD: global image features.
        items_ND: this rank's item features.
        scale: τ.
        bias: β.
        exchange: the other ranks' items; not waited for before this rank's first block is done.
        pairs_of: pairs with another rank's items, or with this rank's own (None).
        attended: slots of the other ranks that have local pairs.
        own_mask_BK: this rank's real items.
        factors: of the sums in the total.
        worst_positive_factor: UWP.
        keep: keep mask (B, H, T, L) or keep probability of ILA.
        num_key_tokens: of KTA; None without it.
    """
    device = tokens_BLD.device.type
    pairs_of_own = pairs_of(None)
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    ticket = None if exchange is None else exchange.ticket_WND
    parameters = head_parameters(head)
    # What takes no part gets no gradient, rather than zeros that an optimizer would decay by.
    if pairs_of_own.local is None:
        tokens_BLD, parameters = tokens_BLD.detach(), [p.detach() for p in parameters]
    if pairs_of_own.everyone is None:
        image_global_BD = image_global_BD.detach()
    inputs: tuple[Any, ...] = (tokens_BLD, image_global_BD, items_ND, ticket, scale, bias, *parameters)
    differentiate = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)

    def work(
        tokens: Tensor, image_global: Tensor, items: Tensor, everyone: Tensor | None, scale: Tensor, bias: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:  # fmt: skip
        with torch.autocast(device, enabled=False):
            step = Step(
                tokens, image_global, parameters, scale, bias,
                num_heads=head.num_heads, eps=head.ln_k.eps, num_slots=own_mask_BK.shape[1], own_mask_BK=own_mask_BK,
                factors=factors, worst_positive_factor=worst_positive_factor, keep=keep,
                num_key_tokens=num_key_tokens, differentiate=differentiate,
                tokens_need_grad=tokens_BLD.requires_grad, low=low,
            )  # fmt: skip
            items_grad = torch.zeros_like(items, dtype=step.exact)
            everyone_grad = None if everyone is None else everyone.new_zeros(everyone.shape)
            own = RankItems(items, items_grad, pairs_of_own)

            def others() -> Iterator[RankItems]:
                assert exchange is not None
                assert everyone_grad is not None
                # Those with local pairs come first; `sorted` leaves the order among each kind.
                for remote in sorted(exchange.wait(), key=lambda remote: remote.slot not in attended):
                    yield RankItems(remote.features_ND, everyone_grad[remote.slot], pairs_of(remote))

            step.run(own, others() if everyone is not None else iter(()), len(attended) if everyone is not None else 0)
            sums = step.totals.sums_4
            total = (sums * sums.new_tensor([factors.ila, factors.kta, factors.mps, factors.iis])).sum()
            if not differentiate:
                return total, sums, []
            grads = [step.tokens_grad_BLD, step.image_global_grad(), items_grad, everyone_grad]
            return total, sums, [*grads, step.totals.scale, step.totals.bias, *step.parameter_grads()]

    if not differentiate:
        total, sums, _ = work(*inputs)
        return total, sums
    total, sums = _Fused.apply(work, *inputs)
    return total, sums
