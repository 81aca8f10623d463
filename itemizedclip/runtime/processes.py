"""Processes of a run: who am I, on which device, and an end that is always clean.

With torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE) there is a process group, otherwise there is none and nothing
else changes. `itemizedclip.runtime.collectives` holds what the processes tell each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from itemizedclip.runtime.collectives import broadcast_object, is_distributed, is_main
from itemizedclip.runtime.errors import EXIT_STOPPED, UserError
from itemizedclip.runtime.flags import at_least, at_most, check, max_processes, usable_cores
from itemizedclip.runtime.liveness import watched_ranks
from itemizedclip.runtime.logs import logging_to_console

T = TypeVar("T")

MAX_TIMEOUT_MIN = 60 * 24 * 7
"""A week."""

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

    rank_timeout: float = 3.0
    """Minutes without a sign of life of another process after which the run ends, naming it; 0: not watched."""

    def __post_init__(self) -> None:
        at_least(self, threads=0, rank_timeout=0)
        at_most(self, threads=max_processes(), dist_timeout=MAX_TIMEOUT_MIN, rank_timeout=MAX_TIMEOUT_MIN)
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


CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Variable of cuBLAS; the values under which its sums have one order, the first one faster."""
REPEATABLE_WORKSPACES = (":4096:8", ":16:8")


@contextmanager
def repeatable(enabled: bool = True) -> Iterator[None]:
    """Inside the block PyTorch takes algorithms that give the same bits every time, and refuses operations without one.

    Enter it before the first product of matrices on a GPU.

    Raises:
        SetupError: the environment asks cuBLAS for something else.
    """
    if not enabled:
        yield
        return
    asked = os.environ.setdefault(CUBLAS_WORKSPACE, REPEATABLE_WORKSPACES[0])
    if asked not in REPEATABLE_WORKSPACES:
        raise SetupError(
            f"{CUBLAS_WORKSPACE} is {asked!r}; --deterministic needs {' or '.join(REPEATABLE_WORKSPACES)}: unset it"
        )
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


@contextmanager
def launch(
    device_name: str = "auto",
    settings: DistributedSettings | None = None,
    *,
    seed: int = 0,
    deterministic: bool = False,
) -> Iterator[Ranks]:
    """Join the process group if there is one, pick the device, seed, show the log; leave cleanly, also after an error.

    Build the model inside this context: its random weights then follow the seed.

    Args:
        device_name: see `check_device_name`.
        settings: backend, time-out and threads.
        seed: of Python, NumPy and PyTorch, the same on every rank.
        deterministic: see `repeatable`.

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
        watch = watched_ranks(rank, world_size, settings.rank_timeout) if owns_group else contextlib.nullcontext()
        with watch, logging_to_console(rank), repeatable(deterministic):
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
    if not threads and device.type == "cpu":
        threads = max(1, usable_cores() // local_world_size)
        # Someone who set OMP_NUM_THREADS for one process means it; PyTorch knows nothing of a container's share.
        threads = min(threads, torch.get_num_threads()) if local_world_size == 1 else threads
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


STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
)
"""Pre-emption, Ctrl-C, Slurm's warning, a terminal that is gone: all ask a run to save and leave."""

SAME_SIGNAL_S = 1.0
"""Seconds in which a second signal is the first once more: `timeout`, Slurm and shells signal a process twice."""

_NO_SIGNAL = 0


class Stopped(SystemExit):
    """The end of a run that a signal stopped: exit status 75, `--resume latest` goes on.

    Attributes:
        result: what the run had reached (a TrainResult), None before its first step.
    """

    def __init__(self, result: Any = None) -> None:
        super().__init__(EXIT_STOPPED)
        self.result = result


class StopRequest:
    """Whether a signal asked this process to save and leave; a second one leaves at once, saved or not.

    Attributes:
        signal: name of the signal, None as long as there was none.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._may_leave = 0
        self._owner = os.getpid()

    @classmethod
    @contextmanager
    def listening(cls) -> Iterator[StopRequest]:
        """Catch the signals inside the block; outside the main thread, where Python allows no handlers, never set."""
        request = cls()
        if threading.current_thread() is not threading.main_thread():
            yield request
            return
        previous = {number: signal.signal(number, request._note) for number in STOP_SIGNALS if _is_heard(number)}
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        previous_end = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        watcher = threading.Thread(target=request._watch, args=(read_end,), name="signals", daemon=True)
        watcher.start()
        try:
            yield request
        finally:
            signal.set_wakeup_fd(previous_end)
            for number, handler in previous.items():
                signal.signal(number, handler)
            # A byte, not the end of the pipe: forked loader workers hold its other end, too.
            os.write(write_end, bytes([_NO_SIGNAL]))
            watcher.join()
            os.close(write_end)
            os.close(read_end)

    def _note(self, number: int, frame: object) -> None:
        if os.getpid() != self._owner:
            return  # a forked process, which its parent will end
        if self.signal is None:
            self.signal = signal.Signals(number).name
        if self._may_leave:
            raise Stopped

    def _watch(self, read_end: int) -> None:
        """Leave at the second signal, also when the main thread waits for another process and hears nothing."""
        first: float | None = None
        while (block := os.read(read_end, 64)) and _NO_SIGNAL not in block:
            if not any(number in STOP_SIGNALS for number in block):
                continue
            if first is None:
                first = time.monotonic()
            elif time.monotonic() - first > SAME_SIGNAL_S:
                print("a second signal: left at once; --resume latest goes on", file=sys.stderr, flush=True)
                os._exit(EXIT_STOPPED)

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """Inside the block, where all is saved or nothing has begun, the first signal already leaves.

        Raises:
            Stopped: a signal came, here or before. An error that follows it, because the other processes of the run
                leave too, is taken for the same.
        """
        if self.signal is not None:
            raise Stopped
        self._may_leave += 1
        try:
            yield
        except Exception:
            if self.signal is not None:
                raise Stopped from None
            raise
        finally:
            self._may_leave -= 1


def _is_heard(number: int) -> bool:
    """False for Ctrl-C and a lost terminal where nohup, or a shell's background, has them ignored."""
    return (
        number == signal.SIGTERM
        or number == getattr(signal, "SIGUSR1", None)
        or (signal.getsignal(number) != signal.SIG_IGN)
    )


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Signals inside the block end the process with exit status 75 and without a trace: there is nothing to save."""
    with StopRequest.listening() as request, request.leaving_at_once():
        yield


def shield_loader_worker(worker_id: int = 0) -> None:
    """What a data loader's process does first: signals for the whole group are its parent's business.

    Slurm and Ctrl-C signal every process of a run. A worker that left would take the step along that is to be saved.
    The parent ends its workers itself: with a word, else with SIGTERM, whose second one is obeyed.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def end_at_the_second(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, end_at_the_second)


def _forget_wakeup() -> None:
    # A forked process would tell its parent's watcher of its own signals.
    if threading.current_thread() is threading.main_thread():
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_wakeup)
