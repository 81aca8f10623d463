"""What a step of a model costs, counted on tensors without data: FLOP, and the memory that lives at each moment.

Axes: B images, K items per image, L image tokens, D joint width, H heads, T = K + B − 1 queries of an image per rank, W
ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from itemizedclip.data.batch import ItemBatch
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.objectives.block_size import Blocks, folding_is_cheaper, ranks_at_once
from itemizedclip.training.task import ItemizedTask


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations inside have made and somebody still holds.

    What an operation needs while it runs is not seen.

    Args:
        module: whose parameters and buffers do not count.

    Attributes:
        now: bytes.
        peak: most since the last `take_peak`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}

    def take_peak(self) -> int:
        """The peak; the next one starts from what is held now."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._hold(storage)
        return made

    def _hold(self, storage: torch.UntypedStorage) -> None:
        size, place = storage.nbytes(), storage._cdata
        self._known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, place, size)

    def _release(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


@dataclass(frozen=True)
class TowerCost:
    """Both towers, forward and backward, for one batch; bytes are above the parameters and include the batch.

    Attributes:
        images: B.
        flop: recomputation included.
        kept: bytes between the forward and the backward pass.
        peaks: bytes at most in the forward pass, then until each parameter's gradient is done, gradients included.
        gradients: bytes of gradients that are done in each of those stretches.
        tokens: L.
    """

    images: int
    flop: int
    kept: int
    peaks: tuple[int, ...]
    gradients: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class TowerLine:
    """Both towers at any batch, from their cost at two: every stretch of a step is linear in the images.

    Attributes:
        small, large: the two.
    """

    small: TowerCost
    large: TowerCost

    def _at(self, B: int, small: int, large: int) -> float:
        slope = (large - small) / (self.large.images - self.small.images)
        return small + slope * (B - self.small.images)

    def flop(self, B: int) -> float:
        """FLOP, recomputation included."""
        return self._at(B, self.small.flop, self.large.flop)

    def kept(self, B: int) -> float:
        """Bytes held between the passes, features and batch included."""
        return self._at(B, self.small.kept, self.large.kept)

    def peak(self, B: int, *, all_gradients: bool) -> float:
        """Bytes held at most, above the parameters.

        Args:
            B: images.
            all_gradients: their memory is there from the start, as several processes have it.
        """
        total = self.small.gradients[-1]
        return max(
            self._at(B, small, large) + (total - done if all_gradients else 0)
            for small, large, done in zip(self.small.peaks, self.large.peaks, self.small.gradients)
        )


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

    def batch() -> ItemBatch:
        return ItemBatch(
            images=torch.zeros(B, *image_shape),
            item_tokens=torch.ones(B, K, text_length, dtype=torch.int64),
            item_mask=torch.ones(B, K, dtype=torch.bool),
            is_normal=torch.zeros(B, dtype=torch.bool),
            sample_ids=[""] * B,
        )

    with mode:
        # One after the other: the FLOP counter's hooks would keep recomputed graphs alive.
        with FlopCounterMode(display=False) as counter:
            there_and_back(task, batch(), dtype)
        _forget_gradients(task)
        tokens, kept, peaks, gradients = live_bytes(task, batch, dtype)
        _forget_gradients(task)
    return TowerCost(B, counter.get_total_flops(), kept, peaks, gradients, tokens)


def live_bytes(
    task: ItemizedTask, make_batch: Callable[[], ItemBatch], dtype: torch.dtype
) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """Take a batch through both towers and back: L, and `kept`, `peaks` and `gradients` of `TowerCost`."""
    live = LiveBytes(task)
    peaks: list[int] = []
    done: list[int] = [0]

    def note(parameter: Tensor) -> None:
        peaks.append(live.take_peak())
        done.append(parameter.nbytes)

    hooks = [p.register_post_accumulate_grad_hook(note) for p in task.parameters() if p.requires_grad]
    kept = 0

    def between() -> None:
        nonlocal kept
        kept = live.now
        peaks.append(live.take_peak())
        done.append(0)

    with live:
        tokens = there_and_back(task, make_batch(), dtype, between)
    peaks.append(live.take_peak())
    for hook in hooks:
        hook.remove()
    return tokens, kept, tuple(peaks), tuple(accumulate(done))


def _forget_gradients(task: ItemizedTask) -> None:
    for parameter in task.parameters():
        parameter.grad = None


def there_and_back(
    task: ItemizedTask, batch: ItemBatch, dtype: torch.dtype, between: Callable[[], None] = lambda: None
) -> int:
    """Both towers forward and backward; the number of image tokens.

    Args:
        between: called when the forward pass is done.
    """
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        inputs = task.encode(batch)
    features = (inputs.image_global_BD, inputs.image_tokens_BLD, inputs.item_features_ND)
    tokens = inputs.image_tokens_BLD.shape[1]
    del inputs
    between()
    trained = [feature for feature in features if feature.requires_grad]
    torch.autograd.backward(trained, [torch.ones_like(feature) for feature in trained])
    return tokens


def loss_flop(B: int, K: int, L: int, D: int, *, passes: int, ranks: int) -> int:
    """FLOP of the loss on one rank, forward and backward: keys, values, and each rank's queries `passes` times."""
    projections = 6 * L * D * D
    queries = ranks * (K + B - 1) * 3 * (L * D * (passes + 1) + passes * D * D)
    global_pairs = 3 * ranks * B * K * D
    return 2 * B * (projections + queries + global_pairs)


def loss_bytes(B: int, K: int, L: int, D: int, H: int, *, passes: int, ranks: int, work: int, token_size: int) -> float:
    """Bytes that the loss holds on one rank above its inputs.

    Args:
        passes: P.
        ranks: W.
        work: bytes that a block may take (`block_size.work_bytes`).
        token_size: bytes of a number of the image tokens' gradient.
    """
    rows = B * K
    pairs = 4 * D * (rows + B)  # items and global features, normalised, and their gradients
    others = 2 * 4 * ranks * rows * D if ranks > 1 else 0  # messages and the gradients that go back
    weights = 16 * 4 * D * D
    if not passes:
        return pairs + others
    T = K + B - 1
    at_once = ranks_at_once(work, rows * D, ranks - 1)
    folded = folding_is_cheaper(T * (1 + min(at_once, ranks - 1)), L, D, H, passes)
    tables = 4 * rows * D * (2 * (H if folded else 1) + 3) * (1 + min(at_once, ranks - 1))
    blocks = Blocks.choose(work, B, L, D, H * T, passes, max(1, min(at_once, ranks - 1)))
    block = blocks.images * (5 * L * D * 4 + blocks.ranks * H * T * L * 4 * (2 * passes + 1))
    return B * L * D * token_size + block + tables + pairs + others + weights
