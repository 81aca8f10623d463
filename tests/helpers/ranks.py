"""Several ranks without torchrun: processes forked from a server that has loaded the heavy packages once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

SECONDS = 400


def _rank(rank: int, world_size: int, port: int, log: str, argv: Sequence[str]) -> None:
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    import toy

    toy.main(list(argv))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(world_size: int, argv: Sequence[object], log: Path, *, fails: bool = False) -> str:
    """The toy run on several ranks; what they printed.

    Args:
        world_size: W.
        argv: flags of `toy.main`.
        log: file for what they print.
        fails: every rank is to end with exit status 1.
    """
    helpers = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([helpers, *filter(None, [os.environ.get("PYTHONPATH")])])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy", "torch.distributed.fsdp", "torch.distributed.checkpoint"])
    if helpers not in sys.path:
        sys.path.insert(0, helpers)
    port, flags = free_port(), [str(value) for value in argv]
    ranks = [context.Process(target=_rank, args=(r, world_size, port, str(log), flags)) for r in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    told = log.read_text()
    assert codes == [int(fails)] * world_size, f"{codes}\n{told[-3000:]}"
    return told
