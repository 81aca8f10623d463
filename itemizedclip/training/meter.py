"""How fast a run is and what bounds it: the numbers of speed in metrics.jsonl and the log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter

import torch
from torch.utils.flop_counter import FlopCounterMode

from itemizedclip.runtime.timing import Stopwatch, matmul_rate

PARTS = ("towers", "loss", "exchange", "optimizer")
"""What `timed` counts in a step. The towers' part holds the backward pass, as the loss differentiates itself, and so
the all-reduce of gradients that goes on beside it; the exchange is the wait for other ranks' items and for their
verdict on the step."""


class Meter:
    """Sums since the last logged step, on this rank.

    Args:
        device: of the run.
        dtype: in which its matrices are multiplied.
        counts: whether to count the FLOP of the first step; compiled towers hide theirs.

    Attributes:
        steps: since the last logged one.
        wait_s: seconds waited for data in them.
        step_flop: FLOP of the first step of this process, recomputation included; None before it, or not counted.
        rate: FLOP per second of large matrix products on this device, measured here.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, *, counts: bool = True) -> None:
        self.rate = matmul_rate(device, dtype)
        self.stopwatch = Stopwatch(device)
        self.counts = counts
        self.step_flop: int | None = None
        self.started, self.steps, self.wait_s = perf_counter(), 0, 0.0

    def reset(self) -> None:
        """Start again from nothing."""
        self.stopwatch.take()
        self.started, self.steps, self.wait_s = perf_counter(), 0, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step is taken inside."""
        with ExitStack() as stack:
            stack.enter_context(self.stopwatch.running())
            counter = None
            if self.counts and self.step_flop is None:
                counter = stack.enter_context(FlopCounterMode(display=False))
            yield
            if counter is not None:
                self.step_flop = counter.get_total_flops()

    def speed(self, global_batch: int) -> dict[str, float]:
        """Means per step since the last logged one.

        Args:
            global_batch: images of all ranks per step.
        """
        seconds = self.stopwatch.take()
        step_s = (perf_counter() - self.started) / self.steps
        values = {"images_per_s": global_batch / step_s, "step_s": step_s, "data_wait_s": self.wait_s / self.steps}
        values |= {f"{part}_s": seconds[part] / self.steps for part in PARTS if part in seconds}
        if self.step_flop:
            rate = self.step_flop / step_s
            values |= {"tflop_per_s": rate / 1e12, "mfu": rate / self.rate}
        return values
