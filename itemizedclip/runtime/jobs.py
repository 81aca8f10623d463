"""Many independent jobs on one machine, each in a process of its own: a bad one takes nothing else down.

A job that crashes, runs out of memory or takes too long is one result among the others. Processes are forked from a
clean server that has loaded the heavy packages once.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

POLL_S = 0.02
_STOP_S = 5.0


@dataclass(frozen=True)
class JobEnd:
    """How a job ended.

    Attributes:
        job: its number.
        failure: why it gave no result, "" when it did: its work is then what its function wrote.
        seconds: wall time.
    """

    job: int
    failure: str
    seconds: float


def run_jobs(
    function: Callable[..., None],
    jobs: Sequence[tuple[Any, ...]],
    *,
    workers: int,
    time_limit_s: float = 0.0,
    preload: Sequence[str] = (),
) -> Iterator[JobEnd]:
    """Call `function(*job)` for every job, at most `workers` at once; yields their ends in the order they come.

    Args:
        function: of a module, so that another process can import it; what it finds it writes to a file.
        jobs: arguments, picklable.
        workers: processes at once.
        time_limit_s: a job that takes longer is ended; 0: no limit.
        preload: modules that the server of the processes loads once.
    """
    context: Any = multiprocessing.get_context("forkserver" if hasattr(signal, "SIGCHLD") else "spawn")
    if preload and hasattr(context, "set_forkserver_preload"):
        context.set_forkserver_preload(list(preload))
    running: dict[int, tuple[BaseProcess, float]] = {}
    waiting = iter(range(len(jobs)))
    try:
        while True:
            while len(running) < max(1, workers) and (number := next(waiting, None)) is not None:
                process = context.Process(target=function, args=jobs[number], daemon=True)
                process.start()
                running[number] = process, time.monotonic()
            if not running:
                return
            ended = []
            for number, (process, started) in running.items():
                seconds = time.monotonic() - started
                if not process.is_alive():
                    ended.append(JobEnd(number, _failure(process.exitcode), seconds))
                elif time_limit_s and seconds > time_limit_s:
                    _end(process)
                    ended.append(JobEnd(number, f"took longer than {time_limit_s / 60:g} minutes", seconds))
            for end in ended:
                running.pop(end.job)[0].join()
                yield end
            if not ended:
                time.sleep(POLL_S)
    finally:
        for process, _ in running.values():
            _end(process)


def _failure(exit_code: int | None) -> str:
    if exit_code == 0:
        return ""
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        memory = " (mostly: memory used up)" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{memory}"
    return f"its process ended with status {exit_code}"


def _end(process: BaseProcess) -> None:
    process.terminate()
    process.join(_STOP_S)
    if process.is_alive():
        process.kill()
        process.join()
