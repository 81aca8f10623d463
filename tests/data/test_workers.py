"""Loader processes outside training: one that dies or hangs ends the command with a sentence."""

from __future__ import annotations

import os
import signal
import time

import pytest
from torch.utils.data import DataLoader, Dataset

from itemizedclip.data.workers import LoaderError, delivered


class Numbers(Dataset[int]):
    """0 … 7; the one at `dies_at` kills its process, the one at `hangs_at` never comes."""

    def __init__(self, dies_at: int = -1, hangs_at: int = -1) -> None:
        self.dies_at, self.hangs_at = dies_at, hangs_at

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        if index == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == self.hangs_at:
            time.sleep(600)
        return index


def test_numbers_arrive_with_and_without_processes():
    for workers in (0, 1):
        loader = DataLoader(Numbers(), batch_size=None, num_workers=workers)
        assert list(delivered(loader)) == list(range(8))


@pytest.mark.parametrize(
    ("dataset", "how"), [(Numbers(dies_at=2), "was killed"), (Numbers(hangs_at=2), "gave nothing")]
)
def test_a_process_that_dies_or_hangs_is_a_sentence(dataset, how):
    loader = DataLoader(dataset, batch_size=None, num_workers=1, timeout=3)
    with pytest.raises(LoaderError, match=f"one of 1 loader processes {how} .*lower --workers or --batch-size"):
        list(delivered(loader))


def test_other_errors_stay_what_they_are():
    class Faulty(Numbers):
        def __getitem__(self, index: int) -> int:
            raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        list(delivered(DataLoader(Faulty(), batch_size=None)))
