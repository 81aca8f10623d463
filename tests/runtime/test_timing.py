"""Seconds by part, with a clock that the test moves: also the way of GPU events, which are marks alike."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from itemizedclip.runtime.timing import Stopwatch, matmul_rate, processor_mark, timed


@dataclass
class Event:
    """As torch.cuda.Event: readable only after the device was waited for."""

    device: Device
    at_ms: float

    def elapsed_time(self, later: Event) -> float:
        assert self.device.waited, "read without waiting"
        return later.at_ms - self.at_ms


class Device:
    def __init__(self) -> None:
        self.now_ms, self.waited = 0.0, False

    def mark(self) -> Event:
        self.waited = False
        return Event(self, self.now_ms)

    def wait(self) -> None:
        self.waited = True


def test_a_part_inside_another_counts_for_itself_alone():
    device = Device()
    stopwatch = Stopwatch(torch.device("cpu"), mark=device.mark, wait=device.wait)
    with stopwatch.running():
        for _ in range(2):
            with timed("loss"):
                device.now_ms += 10
                with timed("exchange"):
                    device.now_ms += 3
                device.now_ms += 1
    assert stopwatch.take() == pytest.approx({"loss": 0.022, "exchange": 0.006})
    assert stopwatch.take() == {}, "taken once"


def test_nothing_is_counted_without_a_running_stopwatch():
    stopwatch = Stopwatch(torch.device("cpu"))
    with timed("loss"):
        pass
    with stopwatch.running(), pytest.raises(ValueError, match="inside"), timed("towers"):
        raise ValueError("inside")
    with timed("loss"):
        pass
    assert list(stopwatch.take()) == ["towers"]
    assert stopwatch.open == []


def test_marks_of_the_processor_are_in_order():
    first = processor_mark()
    assert first.elapsed_time(processor_mark()) >= 0


def test_matmul_rate_is_the_count_over_the_time():
    rate = matmul_rate(torch.device("cpu"), torch.float32, seconds=0.01)
    # No processor is slower than 0.1 GFLOP/s or faster than 100 TFLOP/s.
    assert 1e8 < rate < 1e14
