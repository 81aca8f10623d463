"""Processes of a run that notice when one of them is gone, and say which.

A collective waits for every rank, for as long as --dist-timeout allows, and its error names none. Here each rank
counts up a number of its own in the store that the ranks met at; a rank whose number stands still for --rank-timeout
minutes is dead, frozen or cut off, and the others end with its name. The counting is a thread's work and goes on while
a rank loads, evaluates or waits.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from itemizedclip.runtime.errors import EXIT_WRONG_FILE

BEAT_S = 5.0

logger = logging.getLogger(__name__)


@contextmanager
def watched_ranks(rank: int, world_size: int, timeout_min: float) -> Iterator[None]:
    """Watch the other ranks, and be watched, inside the block; the process ends with exit status 1 when one is gone.

    Args:
        rank: this rank.
        world_size: W.
        timeout_min: minutes; 0: no watch.
    """
    if not timeout_min or world_size == 1:
        yield
        return
    try:
        # A connection of its own: the group's may be waiting for something.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
            timeout=timedelta(minutes=timeout_min),
        )  # fmt: skip
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        logger.warning("the ranks do not watch each other (%s); a dead one shows after --dist-timeout", reason)
        yield
        return
    ended = threading.Event()
    watch = _Watch(store, rank, world_size, 60 * timeout_min)
    thread = threading.Thread(target=watch.run, args=(ended,), name="liveness", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        watch.say("done")
        thread.join(timeout=BEAT_S)


class _Watch:
    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_s: float) -> None:
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.beats = 0
        self.seen: dict[int, tuple[bytes, float]] = {}
        self.lock = threading.Lock()

    def say(self, what: str) -> None:
        """Tell the others; without a store there is nobody left to tell."""
        try:
            with self.lock:
                self.store.set(_key(self.rank), f"{what}|process {os.getpid()} on {socket.gethostname()}")
        except (RuntimeError, OSError):
            pass

    def run(self, ended: threading.Event, leave: Callable[[str], None] | None = None) -> None:
        """Count and look until the block has ended."""
        while not ended.is_set():
            self.beats += 1
            self.say(str(self.beats))
            message = self.look(time.monotonic())
            if message and not ended.is_set():
                (leave or _leave)(message)
                return
            ended.wait(min(BEAT_S, self.timeout_s / 4))

    def look(self, now: float) -> str | None:
        """What to say when a rank is gone."""
        for rank in range(self.world_size):
            if rank == self.rank:
                continue
            said = self._said_by(rank)
            before = self.seen.get(rank)
            if before is None or (said is not None and said != before[0]):
                self.seen[rank] = (said or b"", now)
            elif not before[0].startswith(b"done") and now - before[1] >= self.timeout_s:
                who = before[0].decode(errors="replace").partition("|")[2]
                return (
                    f"rank {rank}{f' ({who})' if who else ''} has given no sign of life for {self.timeout_s:.0f} s "
                    "(--rank-timeout): it or its machine hangs or is gone. This run ends; --resume latest goes on from "
                    "its last checkpoint"
                )
        return None

    def _said_by(self, rank: int) -> bytes | None:
        try:
            with self.lock:
                return self.store.get(_key(rank)) if self.store.check([_key(rank)]) else None
        except (RuntimeError, OSError):
            return None


def _key(rank: int) -> str:
    return f"itemizedclip/alive/{rank}"


def _leave(message: str) -> None:
    # The main thread may wait inside a collective, from which nothing calls it back.
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(EXIT_WRONG_FILE)
