"""Image tokens of a block as the fused loss meets them: scores, sums, and both of them backwards.

Axes: b images of a block, L image tokens, Q queries, H heads, D joint width, d = D / H, e = d or D.

Two ways to the same numbers. `Projected` projects tokens to keys and values, 6·L·D² multiply-adds an image with its
gradients, and then 3·L·D a query and pass besides 3·L·D a query. `Folded` leaves tokens as they are, q·(W x̂) = (Wᵀq)·x̂
and Σ p W x̂ = W Σ p x̂, and pays H times as much a query: cheaper while an image meets few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from itemizedclip.models.item_attention import ItemAttention

LN2 = math.log(2.0)


class Weights(NamedTuple):
    """What the blocks need of the head's parameters: affines folded in, queries scaled for base-2 exponentials."""

    query_DD: Tensor
    query_D: Tensor
    key_DD: Tensor
    key_D: Tensor
    value_DD: Tensor
    value_D: Tensor
    out_DD: Tensor
    out_D: Tensor
    gram_DD: Tensor
    gram_D: Tensor
    gram: Tensor


def head_parameters(head: ItemAttention) -> list[Tensor]:
    """The head's parameters in the order that `fold` expects."""
    norms = [p for norm in (head.ln_q, head.ln_k, head.ln_v) for p in (norm.weight, norm.bias)]
    attn = head.attn
    return [*norms, attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, attn.out_proj.bias]


def fold(parameters: Sequence[Tensor], num_heads: int) -> Weights:
    """`Weights` of `head_parameters`, differentiable."""
    *norms, packed, packed_bias, out, out_bias = parameters
    D = out.shape[0]
    folded: list[Tensor] = []
    for part in range(3):
        rows = slice(part * D, (part + 1) * D)
        scale = (D // num_heads) ** -0.5 / LN2 if part == 0 else 1.0
        gain, shift = norms[2 * part], norms[2 * part + 1]
        folded += [scale * packed[rows] * gain, scale * (packed[rows] @ shift + packed_bias[rows])]
    return Weights._make([*folded, out, out_bias, out.T @ out, out.T @ out_bias, out_bias @ out_bias])


class TokenBlock(Protocol):
    """What `Projected` and `Folded` both do; every array is (b, H, Q, …)."""

    def scores(self, queries_bHQe: Tensor) -> Tensor:
        """Attention logits (b, H, Q, L), without the key bias."""

    def pool(self, weights_bHQL: Tensor) -> Tensor:
        """Weighted sums (b, H, Q, e)."""

    def values_of(self, pooled_bHQe: Tensor) -> Tensor:
        """What was summed as values (b, H, Q, d), without the value bias."""

    def pool_grad(self, grad_bHQd: Tensor, pooled_bHQe: Tensor, weight_grads: Weights) -> Tensor:
        """Gradient of what `pool` returned, from that of `values_of`."""

    def weight_grad(self, grad_bHQe: Tensor) -> Tensor:
        """Gradient of the attention weights (b, H, Q, L), from that of `pool`."""

    def add(
        self, pool_grad: Tensor, weights: Tensor, queries: Tensor, score_grad: Tensor, unit: Tensor | None
    ) -> Tensor:
        """Note the gradients of the tokens; returns that of the queries (b, H, Q, e).

        `unit` is what the gradients were multiplied by to suit half precision.
        """

    def finish(self, weight_grads: Weights) -> Tensor:
        """Gradient of the tokens x̂ (b, L, D); the projections' goes into `weight_grads`."""


def _accumulate(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a·b, batched; `first` overwrites."""
    if a.dtype == total.dtype:
        torch.baddbmm(total, a, b, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(torch.bmm(a, b))
    else:
        total.add_(torch.bmm(a, b))


class Projected:
    """Keys and values of a block of images, (b, D, L): each head's part is contiguous, so nothing is copied."""

    def __init__(self, normed_bLD: Tensor, weights: Weights, num_heads: int, exact: torch.dtype) -> None:
        self.x = normed_bLD
        b, self.L, self.D = normed_bLD.shape
        self.shape = (b * num_heads, self.D // num_heads, self.L)
        self.key_DD = weights.key_DD.to(self.x.dtype)
        self.value_DD = weights.value_DD.to(self.x.dtype)
        tokens_bDL = self.x.transpose(1, 2)
        self.keys = torch.bmm(self.key_DD.expand(b, -1, -1), tokens_bDL).view(self.shape)
        self.values = torch.bmm(self.value_DD.expand(b, -1, -1), tokens_bDL).view(self.shape)
        self.exact = exact
        self.grads: tuple[Tensor, Tensor] | None = None

    def scores(self, queries_bHQe: Tensor) -> Tensor:
        return torch.bmm(queries_bHQe.flatten(0, 1), self.keys).view(*queries_bHQe.shape[:3], self.L)

    def pool(self, weights_bHQL: Tensor) -> Tensor:
        pooled = torch.bmm(weights_bHQL.flatten(0, 1), self.values.transpose(1, 2))
        return pooled.view(*weights_bHQL.shape[:3], -1)

    def values_of(self, pooled_bHQe: Tensor) -> Tensor:
        return pooled_bHQe

    def pool_grad(self, grad_bHQd: Tensor, pooled_bHQe: Tensor, weight_grads: Weights) -> Tensor:
        return grad_bHQd

    def weight_grad(self, grad_bHQe: Tensor) -> Tensor:
        return torch.bmm(grad_bHQe.flatten(0, 1), self.values).view(*grad_bHQe.shape[:3], self.L)

    def add(
        self, pool_grad: Tensor, weights: Tensor, queries: Tensor, score_grad: Tensor, unit: Tensor | None
    ) -> Tensor:
        first = self.grads is None
        if self.grads is None:
            self.grads = (
                self.x.new_empty(self.shape, dtype=self.exact),
                self.x.new_empty(self.shape, dtype=self.exact),
            )
        keys, values = self.grads
        pool_grad, weights, queries, score_grad = (
            part.flatten(0, 1) for part in (pool_grad, weights, queries, score_grad)
        )
        queries_T = (LN2 * queries).transpose(1, 2)
        if unit is None:
            _accumulate(values, pool_grad.transpose(1, 2), weights, first=first)
            _accumulate(keys, queries_T, score_grad, first=first)
        else:
            if first:
                keys.zero_()
                values.zero_()
            values.addcdiv_(torch.bmm(pool_grad.transpose(1, 2), weights).to(self.exact), unit)
            keys.addcdiv_(torch.bmm(queries_T, score_grad).to(self.exact), unit)
        return torch.bmm(score_grad, self.keys.transpose(1, 2)).view(
            len(self.x), -1, *score_grad.shape[1:2], self.shape[1]
        )

    def finish(self, weight_grads: Weights) -> Tensor:
        assert self.grads is not None
        b = len(self.x)
        tokens = self.x.to(self.exact).flatten(0, 1)
        keys, values = (grad.view(b, self.D, self.L) for grad in self.grads)
        for grad, total in ((keys, weight_grads.key_DD), (values, weight_grads.value_DD)):
            total.addmm_(grad.transpose(0, 1).reshape(self.D, -1), tokens)
        key_DD, value_DD = self.key_DD.to(self.exact), self.value_DD.to(self.exact)
        grad_bLD = torch.bmm(keys.transpose(1, 2), key_DD.expand(b, -1, -1))
        return grad_bLD.baddbmm_(values.transpose(1, 2), value_DD.expand(b, -1, -1))


class Folded:
    """Tokens of a block as they are: queries bring the key projection along, the value projection waits for the sum."""

    def __init__(self, normed_bLD: Tensor, weights: Weights, num_heads: int, exact: torch.dtype) -> None:
        self.x = normed_bLD
        self.value_HdD = weights.value_DD.view(num_heads, -1, normed_bLD.shape[-1])
        self.exact = exact
        self.grad: Tensor | None = None

    def scores(self, queries_bHQe: Tensor) -> Tensor:
        b, H, Q, _ = queries_bHQe.shape
        return torch.bmm(queries_bHQe.flatten(1, 2), self.x.transpose(1, 2)).view(b, H, Q, -1)

    def pool(self, weights_bHQL: Tensor) -> Tensor:
        b, H, Q, _ = weights_bHQL.shape
        return torch.bmm(weights_bHQL.flatten(1, 2), self.x).view(b, H, Q, -1)

    def values_of(self, pooled_bHQe: Tensor) -> Tensor:
        return torch.matmul(pooled_bHQe, self.value_HdD.transpose(1, 2))

    def pool_grad(self, grad_bHQd: Tensor, pooled_bHQe: Tensor, weight_grads: Weights) -> Tensor:
        total = weight_grads.value_DD.view_as(self.value_HdD)
        for grad_HQd, pooled_HQe in zip(grad_bHQd, pooled_bHQe):
            total.baddbmm_(grad_HQd.transpose(1, 2), pooled_HQe)
        return torch.matmul(grad_bHQd, self.value_HdD)

    def weight_grad(self, grad_bHQe: Tensor) -> Tensor:
        return self.scores(grad_bHQe)

    def add(
        self, pool_grad: Tensor, weights: Tensor, queries: Tensor, score_grad: Tensor, unit: Tensor | None
    ) -> Tensor:
        first = self.grad is None
        if self.grad is None:
            self.grad = torch.empty_like(self.x, dtype=self.exact)
        pool_grad, weights, queries, score_grad = (
            part.flatten(1, 2) for part in (pool_grad, weights, queries, score_grad)
        )
        if unit is None:
            _accumulate(self.grad, weights.transpose(1, 2), pool_grad, first=first)
            _accumulate(self.grad, score_grad.transpose(1, 2), LN2 * queries, first=False)
        else:
            if first:
                self.grad.zero_()
            for a, c in ((weights, pool_grad), (score_grad, LN2 * queries)):
                self.grad.addcdiv_(torch.bmm(a.transpose(1, 2), c).to(self.exact), unit)
        H, _, D = self.value_HdD.shape
        return torch.bmm(score_grad, self.x).view(len(self.x), H, -1, D)

    def finish(self, weight_grads: Weights) -> Tensor:
        assert self.grad is not None
        return self.grad
