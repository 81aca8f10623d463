"""What a step of a model costs, counted on tensors without data.

Axes: B images, K items per image, L image tokens, D joint width, H heads, T = K + B − 1 queries of an image per rank, W
ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from itemizedclip.data.batch import ItemBatch
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.training.task import ItemizedTask


@dataclass(frozen=True)
class TowerCost:
    """Both towers, forward and backward, for one batch.

    Attributes:
        flop: recomputation included.
        tokens: L.
    """

    flop: int
    tokens: int


def without_data(model: DualEncoder, mode: FakeTensorMode) -> None:
    """Replace parameters and buffers by such without data, in place."""
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None:
                    fake = mode.from_tensor(tensor)
                    is_trained = isinstance(tensor, nn.Parameter)
                    table[name] = nn.Parameter(fake, tensor.requires_grad) if is_trained else fake


def count_towers(
    task: ItemizedTask,
    mode: FakeTensorMode,
    *,
    images: int,
    image_shape: Sequence[int],
    items: int,
    text_length: int,
    dtype: torch.dtype,
) -> TowerCost:
    """Take both towers through a batch without data and back.

    Args:
        task: its model `without_data`.
        mode: in which it was made so.
        images: B.
        image_shape: of one image or study.
        items: K.
        text_length: tokens of a text.
        dtype: of matrix products.
    """
    B, K = images, items
    with mode:
        batch = ItemBatch(
            images=torch.zeros(B, *image_shape),
            item_tokens=torch.ones(B, K, text_length, dtype=torch.int64),
            item_mask=torch.ones(B, K, dtype=torch.bool),
            is_normal=torch.zeros(B, dtype=torch.bool),
            sample_ids=[""] * B,
        )
        with FlopCounterMode(display=False) as counter:
            tokens = _there_and_back(task, batch, dtype)
        for parameter in task.parameters():
            parameter.grad = None
    return TowerCost(counter.get_total_flops(), tokens)


def _there_and_back(task: ItemizedTask, batch: ItemBatch, dtype: torch.dtype) -> int:
    """Forward and backward; the number of image tokens."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        inputs = task.encode(batch)
    features = (inputs.image_global_BD, inputs.image_tokens_BLD, inputs.item_features_ND)
    trained = [feature for feature in features if feature.requires_grad]
    torch.autograd.backward(trained, [torch.ones_like(feature) for feature in trained])
    return inputs.image_tokens_BLD.shape[1]


def loss_flop(B: int, K: int, L: int, D: int, *, passes: int, ranks: int) -> int:
    """FLOP of the loss on one rank, forward and backward: keys, values, and each rank's queries `passes` times."""
    projections = 6 * L * D * D
    queries = ranks * (K + B - 1) * 3 * (L * D * (passes + 1) + passes * D * D)
    global_pairs = 3 * ranks * B * K * D
    return 2 * B * (projections + queries + global_pairs)
