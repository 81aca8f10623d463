"""What a data loader's processes need so that nothing freezes: room for their batches, and a word of what they are at.

Batches travel from loader processes to the training process through shared memory (/dev/shm), which containers limit:
Docker to 64 MB. PyTorch's workers say nothing that reaches the trainer when it is full, and the trainer waits for ever.
Here a worker looks at the room first, and takes the pipe that both have in common where the room is too small: one copy
more on each side.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from itemizedclip.runtime.errors import UserError

SHARED_MEMORY = "/dev/shm"  # noqa: S108  only its room is read

logger = logging.getLogger(__name__)


class LoaderError(UserError):
    """Loader processes that ended or hang; the message names them and the samples they were at."""


# --- the way of a batch ----------------------------------------------------------------------------------------------


def free_shared_memory() -> int | None:
    """Bytes of shared memory that can still be used; None where it has no limit of its own."""
    try:
        room = os.statvfs(SHARED_MEMORY)
    except (OSError, AttributeError):
        return None
    return room.f_bavail * room.f_frsize


def shared_memory_need(batch_bytes: int, workers: int) -> int:
    """Bytes of shared memory that batches may take at once: all workers of all local processes fill it together."""
    return 2 * (workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + 1) * batch_bytes


def _rebuild(content: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(content).view(dtype).reshape(shape)


class _PlainPickler(pickle.Pickler):
    """Puts the values of tensors into the stream, where PyTorch's own puts a handle of shared memory."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        content = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _rebuild, (content, value.dtype, tuple(value.shape))


class _Scales(pickle.Pickler):
    """Adds up the bytes of tensors, copying none."""

    total = 0

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        self.total += value.numel() * value.element_size()
        return int, ()


def tensor_bytes(batch: Any) -> int:
    """Bytes of all tensors of a batch, of whatever kind it is."""
    scales = _Scales(io.BytesIO())
    scales.dump(batch)
    return scales.total


@dataclass
class Piped:
    """A batch on its way through a pipe.

    Attributes:
        content: the batch.
        free: bytes of shared memory that were free.
        workers: loader processes of this loader.
    """

    content: bytes
    free: int
    workers: int

    def unpack(self) -> Any:
        """The batch; says once why it came this way."""
        _say_once(self.free, len(self.content), self.workers)
        return pickle.loads(self.content)  # noqa: S301  made by a process of this run

    def pin_memory(self) -> Any:
        """Page-locked copy of the batch; DataLoader calls this by name."""
        return torch.utils.data._utils.pin_memory.pin_memory(self.unpack())


def unpacked(batch: Any) -> Any:
    """A batch as the collator made it, whichever way it came."""
    return batch.unpack() if isinstance(batch, Piped) else batch


LOADER_TIMEOUT_S = 1200.0
"""How long a loader process outside training may give nothing: --loader-timeout's default there."""


def delivered(loader: DataLoader[Any]) -> Iterator[Any]:
    """What a loader gives, as the collator made it; outside training, which knows more (`training.loading`).

    Raises:
        LoaderError: a loader process was killed, or gave nothing for the loader's timeout.
    """
    batches = iter(loader)
    try:
        yield from map(unpacked, batches)
    except BaseException as error:  # also when nobody asks for more
        give_up(batches)
        if not isinstance(error, RuntimeError) or "DataLoader" not in str(error):
            raise
        how = "gave nothing" if "timed out" in str(error) else "was killed"
        raise LoaderError(
            f"one of {loader.num_workers} loader processes {how} ({str(error).splitlines()[0][:200]}). Mostly the "
            "machine's memory was used up (see dmesg), or a disk does not answer: lower --workers or --batch-size"
        ) from None


def give_up(batches: Iterator[Any]) -> None:
    """End the loader processes of an iteration that nobody goes on with; PyTorch waits five seconds for each."""
    workers = getattr(batches, "_workers", [])
    if workers and getattr(batches, "_worker_pids_set", False):
        # Else PyTorch reports each as a failure of its own.
        torch.utils.data._utils.signal_handling._remove_worker_pids(id(batches))
        batches._worker_pids_set = False  # type: ignore[attr-defined]
    for worker in workers:
        worker.kill()


_said = threading.Event()


def _say_once(free: int, size: int, workers: int) -> None:
    if not _said.is_set():
        _said.set()
        logger.warning(
            "%s has %.0f MB free, too little for batches of %.0f MB from %d loader processes: they come through pipes, "
            "which is slower. More room: docker run --shm-size %dg (or --ipc host); none needed: --workers 0",
            SHARED_MEMORY, free / 1e6, size / 1e6, workers, max(1, 3 * workers * size // 10**9 + 1),
        )  # fmt: skip


class RoomyCollator:
    """Collates as `collator` does; in a loader process, picks the way the batch goes.

    Args:
        collator: samples → batch.
        watch: told when a batch is done.
    """

    def __init__(self, collator: Callable[..., Any], watch: WorkerWatch | None = None) -> None:
        self.collator = collator
        self.watch = watch

    def __call__(self, samples: Sequence[Any]) -> Any:
        batch = self.collator(samples)
        worker = get_worker_info()
        if worker is None:
            return batch
        free = free_shared_memory()
        if free is not None and free < shared_memory_need(tensor_bytes(batch), worker.num_workers):
            stream = io.BytesIO()
            _PlainPickler(stream, protocol=5).dump(batch)
            batch = Piped(stream.getvalue(), free, worker.num_workers)
        if self.watch is not None:
            self.watch.idle(worker.id)
        return batch


# --- what the workers are at -----------------------------------------------------------------------------------------


class WorkerWatch:
    """Which sample each loader process is at, for messages when one hangs or dies.

    Args:
        workers: number of loader processes.
        name_of: index of a sample → its name.
    """

    def __init__(self, workers: int, name_of: Callable[[int], str] | None = None) -> None:
        self.workers = workers
        self.name_of = name_of
        # Per worker: process, epoch, index (−1: none), since when in nanoseconds. Read for messages only: no lock.
        self.state = RawArray("q", 4 * max(1, workers))

    def busy(self, worker: int, epoch: int, index: int) -> None:
        """In a worker: it starts with a sample."""
        self.state[4 * worker : 4 * worker + 4] = [os.getpid(), epoch, index, time.monotonic_ns()]

    def idle(self, worker: int) -> None:
        """In a worker: its batch is done."""
        self.state[4 * worker + 2] = -1

    def describe(self, pids: Sequence[int] = ()) -> str:
        """What the workers, or those of them that are processes `pids`, are at."""
        told = []
        for worker in range(self.workers):
            pid, epoch, index, since_ns = self.state[4 * worker : 4 * worker + 4]
            if pid and index >= 0 and (not pids or pid in pids):
                seconds = (time.monotonic_ns() - since_ns) / 1e9
                told.append(
                    f"loader process {worker} (pid {pid}) is at sample {self._named(index)} of epoch {epoch + 1} "
                    f"for {seconds:.0f} s"
                )
        return "; ".join(told) or "no loader process is at a sample"

    def _named(self, index: int) -> str:
        try:
            return f"{index} ({self.name_of(index)})" if self.name_of is not None else str(index)
        except Exception:  # a data set that cannot even be asked for a name
            return str(index)


class WatchedDataset(torch.utils.data.Dataset[Any]):
    """A dataset with keys (epoch, index) that tells a WorkerWatch what it is asked for."""

    def __init__(self, dataset: Any, watch: WorkerWatch) -> None:
        self.dataset = dataset
        self.watch = watch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        worker = get_worker_info()
        if worker is not None:
            self.watch.busy(worker.id, *key)
        return self.dataset[key]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Any]:
        """A batch at once, as PyTorch's loader asks for it: data that lie elsewhere come several at a time."""
        worker = get_worker_info()
        if worker is not None and keys:
            self.watch.busy(worker.id, *keys[0])
        self.dataset.prefetch(keys)
        return [self[key] for key in keys]


def kill_loader_processes() -> None:
    """End this process's loader processes, also those that hear nothing; PyTorch would wait for them."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else PyTorch reports each as a failure of its own
    for child in multiprocessing.active_children():
        child.kill()
