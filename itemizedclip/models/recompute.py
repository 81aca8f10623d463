"""Blocks of a tower that compute their activations again in the backward pass instead of keeping them.

What a block keeps is its input. It can keep the results of its attention as well, one more array of the input's size:
what is computed again is then projections, MLP and norms alone, and attention over n tokens, whose cost grows with n²,
is computed once.

Axes: n tokens of an attention group.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import MethodType

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

ATTENTION = [
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
]
"""Fused attention of every device; where dropout keeps it from being fused, it is computed again."""


def set_recomputing(blocks: Iterable[nn.Module], enable: bool = True, *, keep_attention: bool = False) -> None:
    """Let blocks recompute, in place; parameter names stay.

    Args:
        blocks: modules; each is recomputed as a whole.
        enable: False undoes it.
        keep_attention: keep the results of fused attention.
    """
    settings = {"context_fn": partial(create_selective_checkpoint_contexts, ATTENTION)} if keep_attention else {}
    for block in blocks:
        block.__dict__.pop("forward", None)
        if enable:
            # Around `forward`, so that a compiled block compiles its recomputation too.
            plain = MethodType(type(block).forward, block)
            block.__dict__["forward"] = partial(checkpoint, plain, use_reentrant=False, **settings)
