"""Where the seconds of a step go, and how fast the device multiplies matrices.

    stopwatch = Stopwatch(device)
    with stopwatch.running():
        with timed("loss"): …          # anywhere below; without a running stopwatch it does nothing

On a GPU the marks are CUDA events, read when somebody asks for the seconds: nothing waits for the device on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import torch


class Mark(Protocol):
    """A point in time; `torch.cuda.Event` is one."""

    def elapsed_time(self, later: Mark) -> float:
        """Milliseconds from this mark to a later one."""


@dataclass(frozen=True)
class ProcessorMark:
    """A point in the time of the processor."""

    seconds: float

    def elapsed_time(self, later: Mark) -> float:
        """See `Mark`."""
        assert isinstance(later, ProcessorMark)
        return 1e3 * (later.seconds - self.seconds)


def processor_mark() -> Mark:
    """Now."""
    return ProcessorMark(perf_counter())


def cuda_mark() -> Mark:
    """When the GPU has done what it was given so far."""
    cuda: Any = torch.cuda  # its events are not typed in every version
    event: Mark = cuda.Event(enable_timing=True)
    event.record()  # type: ignore[attr-defined]
    return event


_running: ContextVar[Stopwatch | None] = ContextVar("running", default=None)


class Stopwatch:
    """Seconds by part; a part inside another counts for itself alone.

    Args:
        device: whose time it is.
        mark: makes a mark; by the device when None.
        wait: called before marks are read; waits for the device when None.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        mark: Callable[[], Mark] | None = None,
        wait: Callable[[], None] | None = None,
    ) -> None:
        is_gpu = device.type == "cuda"
        self.mark = mark or (cuda_mark if is_gpu else processor_mark)
        self.wait = wait or (torch.cuda.synchronize if is_gpu else lambda: None)
        self.spans: list[tuple[str, str | None, Mark, Mark]] = []
        self.open: list[str] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """`timed` inside counts here."""
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)

    def take(self) -> dict[str, float]:
        """Seconds by part since the last time; waits for the device."""
        if not self.spans:
            return {}
        self.wait()
        seconds: dict[str, float] = {}
        for name, around, start, end in self.spans:
            spent = start.elapsed_time(end) / 1e3
            seconds[name] = seconds.get(name, 0.0) + spent
            if around is not None:
                seconds[around] = seconds.get(around, 0.0) - spent
        self.spans = []
        return seconds


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Count what is done inside as the part `name` of the running stopwatch, if there is one."""
    stopwatch = _running.get()
    if stopwatch is None:
        yield
        return
    around = stopwatch.open[-1] if stopwatch.open else None
    start = stopwatch.mark()
    stopwatch.open.append(name)
    try:
        yield
    finally:
        stopwatch.open.pop()
        stopwatch.spans.append((name, around, start, stopwatch.mark()))


def matmul_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.1) -> float:
    """FLOP per second of large matrix products, the best of those that fit into about `seconds`."""
    size = 4096 if device.type == "cuda" else 768
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    _ = matrix @ matrix  # sets libraries up
    wait()
    best, started = float("inf"), perf_counter()
    while True:
        before = perf_counter()
        _ = matrix @ matrix
        wait()
        now = perf_counter()
        best = min(best, now - before)
        if now - started > seconds:
            return 2 * size**3 / best
