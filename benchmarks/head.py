"""The loss with one projection of the image tokens, against one projection per pass, in one run.

    python benchmarks/head.py [--images 4] [--tokens 2744] [--items 10] [--threads 1]

Both sides run ILA and KTA forward and backward over the same features. "Per pass" is the plain way: torch's
nn.MultiheadAttention with its zero token, once for ILA with the weights kept and once for KTA over the chosen tokens,
each projecting keys and values again. Figures: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor, nn

from itemizedclip.models.item_attention import ItemAttention
from itemizedclip.objectives.pairing import sample_pairing
from itemizedclip.objectives.terms import cosine_logits, pair_loss

SCALE, BIAS = torch.tensor(14.0), torch.tensor(-10.0)


class PerPassHead(nn.Module):
    """nn.MultiheadAttention behind three LayerNorms; every call projects the tokens."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_q, self.ln_k, self.ln_v = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads, add_zero_attn=True, batch_first=True)

    def forward(self, items: Tensor, tokens: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        drop = None if keep is None else ~keep.flatten(0, 1)
        return self.attn(
            self.ln_q(items), self.ln_k(tokens), self.ln_v(tokens), attn_mask=drop, average_attn_weights=False
        )


def seconds(step: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    """Best of `repeats` forward and backward passes, and the loss."""
    best, loss = float("inf"), step()
    for _ in range(repeats):
        start = perf_counter()
        loss = step()
        loss.backward()
        best = min(best, perf_counter() - start)
    return best, loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"images": 4, "tokens": 2744, "items": 10, "width": 512, "threads": 1, "repeats": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    B, L, K, D, H = args.images, args.tokens, args.items, args.width, 8
    head, plain = ItemAttention(D, H), PerPassHead(D, H)
    plain.load_state_dict(head.state_dict())
    tokens = torch.randn(B, L, D, requires_grad=True)
    table = torch.randn(B * K, D, requires_grad=True)
    pairing = sample_pairing(torch.ones(B, K, dtype=torch.bool))
    num_key_tokens = max(1, int(0.05 * L))

    def loss_of(pooled: Tensor, items: Tensor) -> Tensor:
        return pair_loss(cosine_logits(pooled, items, SCALE, BIAS), pairing.labels_BT, pairing.weights_BT) / B

    def once() -> Tensor:
        items = table[pairing.index_BT]
        first, second = head.attend_with_key_tokens(items, head.project(tokens), num_key_tokens=num_key_tokens)
        assert second is not None
        return loss_of(first, items) + loss_of(second, items)

    def per_pass() -> Tensor:
        items = table[pairing.index_BT]
        first, weights = plain(items, tokens, None)
        top = weights[..., :-1].detach().mean(1).topk(num_key_tokens).indices
        keep = torch.zeros(B, items.shape[1], L, dtype=torch.bool).scatter_(-1, top, True)
        second, _ = plain(items, tokens, keep[:, None].expand(-1, H, -1, -1))
        return loss_of(first, items) + loss_of(second, items)

    ours, our_loss = seconds(once, args.repeats)
    theirs, their_loss = seconds(per_pass, args.repeats)
    T = pairing.index_BT.shape[1]
    print(f"B {B}  L {L}  T {T}  D {D}, {args.threads} thread(s), forward and backward, float32")
    print(f"one projection        {ours:7.2f} s   loss {our_loss:.4f}")
    print(f"projection per pass   {theirs:7.2f} s   loss {their_loss:.4f}")
    print(f"ratio                 {theirs / ours:7.2f}")


if __name__ == "__main__":
    main()
