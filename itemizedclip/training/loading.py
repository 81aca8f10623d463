"""From a dataset to the batch of each step: worker processes, joining, copying to the device.

Axes: B images of one step on this rank.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from itemizedclip.data.batch import BadSampleError, ItemBatch, ItemSample
from itemizedclip.data.sampler import CheckedCollator, CheckedDataset, EpochSampler, LoadedBatch
from itemizedclip.data.workers import (
    SHARED_MEMORY,
    LoaderError,
    RoomyCollator,
    WatchedDataset,
    WorkerWatch,
    give_up,
    kill_loader_processes,
    unpacked,
)
from itemizedclip.runtime.flags import loader_processes
from itemizedclip.runtime.processes import Ranks, shield_loader_worker
from itemizedclip.training.options import LoadingSettings


@dataclass
class StepBatch:
    """The contrastive batch of one step on this rank.

    Attributes:
        batch: on the device.
        wait_s: seconds the trainer waited for it.
        skipped: messages of the samples that were replaced.
    """

    batch: ItemBatch
    wait_s: float
    skipped: list[str]


class BatchSource(Protocol):
    """Where the engine gets its batches: `MapSource` below for datasets with keys, or one's own.

    Attributes:
        steps_per_epoch: optimizer steps of an epoch, the same on every rank.
    """

    steps_per_epoch: int

    def epoch(self, epoch: int, start_step: int) -> Iterator[StepBatch]:
        """The batches of steps `start_step` … `steps_per_epoch` − 1, the same whenever they are asked for."""
        ...


class MapSource:
    """Batches of a dataset with keys (epoch, index).

    Args:
        dataset: keys (epoch, index) → ItemSample.
        collator: samples → ItemBatch.
        settings: batch sizes, workers, policy for bad samples.
        ranks: this process; its device receives the batches.
        seed: of the order.
        sampler: an order of its own, with batches of `settings.step_batch`; by default each epoch a permutation.
    """

    def __init__(
        self,
        dataset: Any,
        collator: Callable[[Sequence[ItemSample]], ItemBatch],
        settings: LoadingSettings,
        ranks: Ranks,
        *,
        seed: int,
        sampler: EpochSampler | None = None,
    ) -> None:
        self.device = ranks.device
        self.loads_per_step = settings.accum_batch * settings.accum_freq
        self.sampler = sampler or EpochSampler(
            len(dataset), batch_size=settings.step_batch, rank=ranks.rank, world_size=ranks.world_size, seed=seed
        )
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.settings = settings
        self.workers = loader_processes(settings.workers)
        self.watch = WorkerWatch(self.workers, getattr(dataset, "name", None))
        self.loader = DataLoader(
            WatchedDataset(CheckedDataset(dataset, seed=seed, on_bad_sample=settings.on_bad_sample), self.watch),
            batch_size=settings.batch_size,
            sampler=self.sampler,
            num_workers=self.workers,
            collate_fn=RoomyCollator(CheckedCollator(collator), self.watch),
            worker_init_fn=shield_loader_worker,
            timeout=60 * settings.loader_timeout if self.workers else 0,
            persistent_workers=self.workers > 0,
            # A step takes several loads at once: together the workers have at least so many ready.
            prefetch_factor=max(2, -(-self.loads_per_step // self.workers)) if self.workers else None,
            pin_memory=self.device.type == "cuda",
            # Otherwise the loader draws its workers' seed from the generator of the training process.
            generator=torch.Generator().manual_seed(seed),
        )

    def epoch(self, epoch: int, start_step: int) -> Iterator[StepBatch]:
        """See BatchSource."""
        self.sampler.set_epoch(epoch, start_step)
        try:
            loads = iter(self.loader)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise LoaderError(
                f"{SHARED_MEMORY} is full, loader processes cannot start: give them more room (docker run --shm-size "
                "1g), remove what lies there, or use --workers 0"
            ) from error
        for _ in range(start_step, self.steps_per_epoch):
            started = perf_counter()
            try:
                loaded = [_next(loads) for _ in range(self.loads_per_step)]
            except BadSampleError:
                give_up(loads)
                raise
            wait_s = perf_counter() - started
            # Copied one by one from page-locked memory, joined on the device.
            batch = ItemBatch.join([load.batch.to(self.device, non_blocking=True) for load in loaded])
            yield StepBatch(batch, wait_s, [message for load in loaded for message in load.skipped])


def _next(loads: Iterator[Any]) -> LoadedBatch:
    """The next loaded batch; a worker's report of a bad sample is brought back to its one sentence."""
    try:
        return unpacked(next(loads))
    except BadSampleError as error:
        raise BadSampleError(str(error).strip().rpartition("BadSampleError: ")[2]) from None


def worker_failure(error: RuntimeError, source: BatchSource) -> LoaderError | None:
    """One sentence where PyTorch reports that a loader process ended or gave nothing; None for other errors.

    PyTorch may report a process that ended in the middle of anything else.
    """
    message = str(error)
    if not isinstance(source, MapSource) or "DataLoader" not in message:
        return None
    workers, minutes = source.workers, source.settings.loader_timeout
    if "timed out" in message:
        told = source.watch.describe()
        kill_loader_processes()
        return LoaderError(
            f"no batch for {minutes:g} minutes (--loader-timeout): {told}. Look at that sample and its disk; where "
            "loading takes so long, raise --loader-timeout"
        )
    if "DataLoader worker" not in message:
        return None
    pids = re.search(r"\(pid(?:\(s\))? ([\d, ]+)\)", message)
    told = source.watch.describe([int(pid) for pid in re.findall(r"\d+", pids[1])] if pids else [])
    killed = re.search(r"killed by signal: ([^.]+)\.", message)
    how = f"was ended by a signal ({killed[1].strip()})" if killed else "ended unexpectedly"
    kill_loader_processes()
    return LoaderError(
        f"one of {workers} loader processes {how}: {told}. Mostly the machine's memory was used up (see dmesg): lower "
        "--workers or --batch-size; else look at that sample. --resume latest goes on"
    )
