"""Jobs for processes of their own; imports nothing heavy, which every process would load."""

import os
import signal
import time
from pathlib import Path


def end_somehow(number: int, folder: str) -> None:
    """Write a file, or end in a way of its own."""
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 2:
        time.sleep(600)
    if number == 3:
        raise SystemExit(7)
    (Path(folder) / str(number)).write_text("done")


def write_slowly(number: int, folder: str) -> None:
    """Write a file after a second, so that a node can die meanwhile."""
    time.sleep(1)
    (Path(folder) / str(number)).write_text("done")
