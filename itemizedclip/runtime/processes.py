"""Processes of a run: who am I, on which device, and an end that is always clean.

With torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE) there is a process group, otherwise there is none and nothing
else changes. `itemizedclip.runtime.collectives` holds what the processes tell each other.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from itemizedclip.runtime.collectives import broadcast_object, is_distributed, is_main
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.flags import at_least, check
from itemizedclip.runtime.logs import logging_to_console

T = TypeVar("T")

GLOO_SETTLE_S = 0.2
"""Seconds between the last collective and the end of a gloo process group; see `leave_process_group`."""


class SetupError(UserError):
    """The machine cannot do what the options ask for: the message says what to change."""


def check_device_name(name: str) -> None:
    """Whether --device names a device; whether the machine has it, `choose_device` finds out.

    Raises:
        ValueError: any other name.
    """
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is not None
    check(known, f"--device is {name!r}; expected auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class DistributedSettings:
    """Several processes, started by torchrun."""

    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """auto: nccl on GPUs, gloo on CPUs."""

    dist_timeout: float = 30.0
    """Minutes a process waits for the others before the run is given up."""

    threads: int = 0
    """CPU threads per process; 0: under torchrun on CPUs the cores shared out, else PyTorch's choice."""

    def __post_init__(self) -> None:
        at_least(self, threads=0)
        check(self.dist_timeout > 0, f"--dist-timeout is {self.dist_timeout}; expected minutes, more than 0")


@dataclass(frozen=True)
class Ranks:
    """This process among the W of a run.

    Attributes:
        rank: 0 … W − 1.
        local_rank: its number on this machine.
        world_size: W.
        device: where the model lives.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def choose_device(name: str, local_rank: int, local_world_size: int) -> torch.device:
    """The device of one process.

    Raises:
        SetupError: a GPU is asked for and there is none, or too few for the processes of this machine.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if num_gpus == 0:
        raise SetupError(f"--device {name}: PyTorch sees no GPU; use --device cpu or install a CUDA build of PyTorch")
    if name.startswith("cuda:"):
        index = int(name[5:])
        if local_world_size > 1:
            raise SetupError(f"--device {name} with {local_world_size} processes: use --device cuda, one GPU each")
    else:
        index = local_rank
    if index >= num_gpus:
        raise SetupError(
            f"process {local_rank} of this machine wants GPU {index}, there are {num_gpus}: start at most {num_gpus} "
            "processes per machine (GPUS, --nproc_per_node)"
        )
    return torch.device("cuda", index)


@contextmanager
def launch(device_name: str = "auto", settings: DistributedSettings | None = None, *, seed: int = 0) -> Iterator[Ranks]:
    """Join the process group if there is one, pick the device, seed, show the log; leave cleanly, also after an error.

    Build the model inside this context: its random weights then follow the seed.

    Args:
        device_name: see `check_device_name`.
        settings: backend, time-out and threads.
        seed: of Python, NumPy and PyTorch, the same on every rank.

    Raises:
        SetupError: device, backend or variables of torchrun do not fit.
    """
    settings = settings or DistributedSettings()
    rank, local_rank, world_size, local_world_size = _environment()
    device = choose_device(device_name, local_rank, local_world_size)
    _set_threads(settings.threads, device, local_world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # TF32 in convolutions only: float32 matrix products are those of the logits, which need their digits.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    owns_group = world_size > 1 and not is_distributed()
    if owns_group:
        _join(settings, device)
    seed_everything(seed)
    try:
        with logging_to_console(rank):
            yield Ranks(rank, local_rank, world_size, device)
    finally:
        if owns_group:
            leave_process_group()


def leave_process_group() -> None:
    """End this process's part in the process group, if there is one."""
    if not is_distributed():
        return
    if dist.get_backend() == "gloo":
        # Gloo's threads need the interpreter's lock to drop their last tensors. In PyTorch 2.6 destroying the group
        # holds the lock while it waits for them, for ever when they come too late.
        time.sleep(GLOO_SETTLE_S)
    dist.destroy_process_group()


def _environment() -> tuple[int, int, int, int]:
    """rank, local rank, world size, local world size from torchrun's variables."""
    values = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    given = [name for name, value in values.items() if value is not None]
    if not given or values["WORLD_SIZE"] in (None, "1"):
        return 0, 0, 1, 1
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise SetupError(f"WORLD_SIZE is set but {' and '.join(missing)} is not: start the processes with torchrun")
    rank, local_rank, world_size = (int(str(value)) for value in values.values())
    return rank, local_rank, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def _join(settings: DistributedSettings, device: torch.device) -> None:
    backend = settings.backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        raise SetupError("--backend nccl needs GPUs; use --backend gloo (or auto) on CPUs")
    if backend == "gloo" and device.type == "cuda":
        raise SetupError("--backend gloo moves no GPU tensors between ranks; use --backend nccl (or auto) on GPUs")
    dist.init_process_group(
        backend,
        timeout=timedelta(minutes=settings.dist_timeout),
        device_id=device if device.type == "cuda" else None,
    )


def _set_threads(threads: int, device: torch.device, local_world_size: int) -> None:
    """CPU threads of this process; torchrun's own default is 1, which leaves cores idle when training on CPUs."""
    if not threads and device.type == "cpu" and local_world_size > 1:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, usable // local_world_size)
    if threads:
        torch.set_num_threads(threads)


def stable_seed(purpose: str, *numbers: int) -> int:
    """A seed in [0, 2^63) from a purpose and numbers: unrelated for different arguments, the same on every machine."""
    digest = hashlib.sha256(repr((purpose, *map(int, numbers))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch alike on every rank, so that every rank builds the same weights."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_step(seed: int, rank: int, step: int) -> None:
    """Seed PyTorch for one step: dropout, drop path, keep masks and sampled negatives follow (seed, rank, step) alone.

    A resumed run therefore needs no generator state.
    """
    torch.manual_seed(stable_seed("step", seed, rank, step))


def on_main(function: Callable[[], T]) -> T:
    """Run `function` on the main rank and give its result, plain data, to every rank.

    When it fails, the main rank raises its error and the others leave quietly with it.
    """
    if not is_distributed():
        return function()
    failure: Exception | None = None
    result: T | None = None
    if is_main():
        try:
            result = function()
        except Exception as error:
            failure = error
    ok, shared = broadcast_object((failure is None, result))
    if failure is not None:
        raise failure
    if not ok:
        raise SystemExit(1)
    return cast(T, shared)


def main_first(function: Callable[[], T]) -> T:
    """Run `function` on every rank, the main one before the others: one download, one cache, one message.

    When it fails on the main rank, that raises its error and the others leave quietly with it.
    """
    made: list[T] = []

    def make() -> None:
        made.append(function())

    on_main(make)
    return made[0] if made else function()


class StopRequest:
    """Whether a signal asked this process to save and leave: SIGTERM (pre-emption) or SIGUSR1 (Slurm's warning)."""

    def __init__(self) -> None:
        self.signal: str | None = None

    @classmethod
    @contextmanager
    def listening(cls) -> Iterator[StopRequest]:
        """Catch both signals inside the block; outside the main thread, where Python allows no handlers, never set."""
        request = cls()

        def note(number: int, frame: object) -> None:
            request.signal = signal.Signals(number).name

        in_main_thread = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGTERM, signal.SIGUSR1) if in_main_thread else ()
        previous = {number: signal.signal(number, note) for number in numbers}
        try:
            yield request
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
