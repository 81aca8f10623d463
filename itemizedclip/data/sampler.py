"""Which sample a rank reads when: a pure function of (seed, epoch, step, rank), so that any point can be resumed.

Datasets take keys (epoch, index) and make all their random choices from (seed, epoch, index).

Axes: N samples, W ranks, B samples per rank and step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import Dataset, Sampler

from itemizedclip.data.batch import BadSampleError, ItemBatch, ItemSample
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.processes import stable_seed

Key = tuple[int, int]
"""(epoch, index) of a sample."""

MAX_REPLACEMENTS = 20
"""Bad samples in a row after which a dataset is given up."""


class EpochSampler(Sampler[Key]):
    """Training order: each epoch a permutation of the N samples, cut into steps of W·B, a step cut into ranks.

    The samples of a step do not depend on W when W·B stays the same. Samples that fill no whole step are left out of
    that epoch, so every rank takes the same number of steps.

    Args:
        num_samples: N.
        batch_size: B, what a rank consumes per optimizer step, over all loaded batches that are joined.
        rank: this rank, 0 … W − 1.
        world_size: W.
        seed: of the permutations.
        shuffle: False keeps the order of the dataset.

    Raises:
        ValueError: N is smaller than one step.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} is not in 0 … {world_size - 1}")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.steps_per_epoch = num_samples // (batch_size * world_size)
        if self.steps_per_epoch < 1:
            raise UserError(
                f"{num_samples} samples do not fill one step of {batch_size * world_size} "
                f"({world_size} processes of {batch_size}): lower --batch-size, --accum-batch or --accum-freq, "
                "use fewer processes, or give more data"
            )
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch of the next iteration and the step it begins with (for resuming)."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise UserError(f"step {start_step} is not in this epoch of {self.steps_per_epoch} steps")
        self.epoch = epoch
        self.start_step = start_step

    def order(self, epoch: int) -> torch.Tensor:
        """int64 (N,): the permutation of an epoch."""
        if not self.shuffle:
            return torch.arange(self.num_samples)
        return torch.randperm(self.num_samples, generator=_generator("order", self.seed, epoch))

    def __iter__(self) -> Iterator[Key]:
        order = self.order(self.epoch)
        for step in range(self.start_step, self.steps_per_epoch):
            start = (step * self.world_size + self.rank) * self.batch_size
            for index in order[start : start + self.batch_size].tolist():
                yield self.epoch, index

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.start_step) * self.batch_size


class EvalShard(Sampler[int]):
    """Evaluation order: rank r reads samples r, r + W, r + 2W, …; every sample once, shards differ by at most one."""

    def __init__(self, num_samples: int, *, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} is not in 0 … {world_size - 1}")
        self.indices = range(rank, num_samples, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def _generator(purpose: str, *numbers: int) -> torch.Generator:
    """Generator whose stream depends on the purpose and every number."""
    return torch.Generator().manual_seed(stable_seed(purpose, *numbers))


# --- samples that cannot be used -------------------------------------------------------------------------------------


@dataclass
class LoadedBatch:
    """What a loader hands to the trainer: the batch, and why samples were replaced, if any were."""

    batch: ItemBatch
    skipped: list[str]

    def pin_memory(self) -> LoadedBatch:
        """Page-locked copy; DataLoader calls this by name."""
        return LoadedBatch(self.batch.pin_memory(), self.skipped)


class CheckedDataset(Dataset[tuple[ItemSample, list[str]]]):
    """A dataset under a policy for samples that raise BadSampleError.

    "stop" lets the error end the run. "skip" replaces the sample by others drawn from (seed, epoch, index), the first
    that loads, so batches keep their size on every rank and a resumed run makes the same choice; each message goes
    with the sample to the trainer, which logs and counts it. Nothing is replaced silently.

    Returns (sample, messages of the bad samples it stands for).
    """

    def __init__(self, dataset: Any, *, seed: int, on_bad_sample: Literal["skip", "stop"]) -> None:
        self.dataset = dataset
        self.seed = seed
        self.on_bad_sample = on_bad_sample

    def __len__(self) -> int:
        return len(self.dataset)

    def prefetch(self, keys: Sequence[Key]) -> None:
        """Tell the dataset which samples come next, if it cares (data that lie elsewhere)."""
        if hasattr(self.dataset, "prefetch"):
            self.dataset.prefetch(keys)

    def __getitem__(self, key: Key) -> tuple[ItemSample, list[str]]:
        epoch, index = key
        messages: list[str] = []
        replacements = self._replacements(epoch, index)
        while True:
            try:
                sample = self.dataset[(epoch, index)]
                if not sample.items:
                    raise BadSampleError(f"{sample.sample_id}: no text item; expected at least one. Fix or remove it")
                return sample, messages
            except BadSampleError as error:
                if self.on_bad_sample == "stop":
                    raise BadSampleError(f"{error} (--on-bad-sample skip goes on without such samples)") from error
                messages.append(str(error))
            if len(messages) > MAX_REPLACEMENTS:
                raise BadSampleError(
                    f"{len(messages)} samples in a row cannot be used, the last: {messages[-1]}. Check the data's paths"
                )
            index = next(replacements)

    def _replacements(self, epoch: int, index: int) -> Iterator[int]:
        generator = _generator("replacement", self.seed, epoch, index)
        while True:
            yield int(torch.randint(len(self), (), generator=generator))


@dataclass
class CheckedCollator:
    """Collates what `CheckedDataset` returns into a LoadedBatch."""

    collator: Callable[[Sequence[ItemSample]], ItemBatch]

    def __call__(self, entries: Sequence[tuple[ItemSample, list[str]]]) -> LoadedBatch:
        batch = self.collator([sample for sample, _ in entries])
        return LoadedBatch(batch, [message for _, messages in entries for message in messages])


class BadSampleCounter:
    """Counts replaced samples of a rank and ends the run when there are too many in one epoch.

    Args:
        samples_per_epoch: what this rank reads in an epoch.
        max_fraction: of them, in [0, 1].
    """

    def __init__(self, samples_per_epoch: int, max_fraction: float) -> None:
        self.allowed = max_fraction * samples_per_epoch
        self.samples_per_epoch = samples_per_epoch
        self.epoch = -1
        self.in_epoch = 0
        self.total = 0

    def add(self, epoch: int, messages: Sequence[str]) -> None:
        """Count the bad samples of one step.

        Raises:
            BadSampleError: more than the allowed share of the epoch is bad.
        """
        if epoch != self.epoch:
            self.epoch, self.in_epoch = epoch, 0
        self.in_epoch += len(messages)
        self.total += len(messages)
        if messages and self.in_epoch > self.allowed:
            raise BadSampleError(
                f"{self.in_epoch} bad samples in epoch {epoch + 1}, more than --max-bad-fraction allows "
                f"({self.allowed:g} of {self.samples_per_epoch}); the last: {messages[-1]}. "
                "Fix the data, or raise the limit"
            )
