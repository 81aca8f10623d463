"""Two "nodes" on one machine: torchrun agents of two ranks each that meet at a c10d store on loopback.

What a cluster does to a run is done to real processes: a worker dies, a node dies and comes back, Slurm ends the job.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import free_port

pytestmark = pytest.mark.slow

TOY = str(Path(__file__).parents[1] / "helpers" / "toy.py")
ROOT = Path(__file__).parents[2]
SECONDS = 300
"""Of each wait; a machine with two idle cores needs some five."""


def _end_with_parent() -> None:
    """A test that is killed leaves no run behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


class Node:
    """An agent with its ranks."""

    def __init__(self, logs: Path, port: int, nodes: str, *, ranks: int, name: str, flags: list[str]) -> None:
        self.told = logs.parent / f"{name}.txt"
        launcher = [
            "--nnodes", nodes, "--nproc_per_node", str(ranks), "--max_restarts", "3", "--rdzv_backend", "c10d",
            "--rdzv_id", "rehearsal", "--rdzv_endpoint", f"127.0.0.1:{port}",
            # Less time than a cluster is given; a busy machine must not take a living agent for a dead one.
            "--rdzv_conf", "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=10",
        ]  # fmt: skip
        toy = [TOY, "--logs", str(logs), "--name", "run", "--resume", "latest", *flags]
        with self.told.open("a") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "itemizedclip.runtime.torchrun", *launcher, "--", *toy],
                stdout=file,
                stderr=file,
                preexec_fn=_end_with_parent,
            )

    def everyone(self) -> list[int]:
        """All processes of the node, the agent's parent first."""
        found = [self.process.pid]
        for pid in found:
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                found += [int(child) for child in task.read_text().split() if int(child) not in found]
        return found

    def workers(self) -> list[int]:
        def command(pid: int) -> str:
            return Path(f"/proc/{pid}/cmdline").read_text()

        return [pid for pid in self.everyone() if TOY in command(pid) and "torchrun" not in command(pid)]

    def die(self) -> None:
        """As when its power fails."""
        for pid in self.everyone():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


def wait_until(condition: Callable[[], object], *nodes: Node) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        told = "".join(node.told.read_text()[-1500:] for node in nodes)
        assert time.monotonic() < deadline, told
        time.sleep(0.05)


def steps(logs: Path) -> list[dict]:
    path = logs / "run/metrics.jsonl"
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [line for line in lines if line["kind"] == "train"]


def log(logs: Path) -> str:
    path = logs / "run/log.txt"
    return path.read_text() if path.is_file() else ""


def after(text: str, mark: str) -> str:
    return text.partition(mark)[2]


LONG = ["--samples", "4000", "--epochs", "50", "--wait-s", "0.005", "--save-every-steps", "2", "--val-frequency", "0"]


def test_a_node_dies_the_run_shrinks_the_node_comes_back_the_run_grows(tmp_path):
    logs, port = tmp_path / "logs", free_port()
    node = {"ranks": 2, "flags": [*LONG, "--batch-size", "2"]}
    first = Node(logs, port, "1:2", name="first", **node)
    time.sleep(0.5)  # the first has the store
    second = Node(logs, port, "1:2", name="second", **node)
    try:
        # A second that comes late joins a run that has begun alone.
        wait_until(lambda: "on 4 × cpu" in log(logs), first, second)
        started = steps(logs)[-1]["samples"] if steps(logs) else 0
        wait_until(lambda: steps(logs) and steps(logs)[-1]["samples"] > started + 16, first, second)
        second.die()
        wait_until(lambda: "2 processes instead of 4" in log(logs), first)
        shrunk = steps(logs)[-1]["samples"]
        wait_until(lambda: steps(logs)[-1]["samples"] > shrunk + 8, first)
        second = Node(logs, port, "1:2", name="again", **node)
        wait_until(lambda: "4 processes instead of 2" in after(log(logs), "2 processes instead of 4"), first, second)
        grown = steps(logs)[-1]["samples"]
        wait_until(lambda: steps(logs)[-1]["samples"] > grown + 16, first, second)
        for one in (first, second):
            one.process.send_signal(signal.SIGTERM)
        # An agent waits five minutes for the others at its end; the run itself is over when it has said so.
        wait_until(lambda: "saved and stopped" in log(logs), first, second)
    finally:
        for one in (first, second):
            if one.process.poll() is None:
                one.die()
    samples = [line["samples"] for line in steps(logs)]
    assert samples == sorted(samples), "one curve, without a step taken twice"
    assert {later - before for before, later in itertools.pairwise(samples)} == {4, 8}
    assert "Traceback" not in first.told.read_text()


def test_a_worker_dies_and_all_start_again_from_the_last_checkpoint(tmp_path):
    logs, port = tmp_path / "logs", free_port()
    flags = ["--samples", "96", "--epochs", "2", "--batch-size", "4", "--wait-s", "0.02", "--save-every-steps", "2",
             "--val-frequency", "0", "--dropout", "0"]  # fmt: skip
    nodes = [Node(logs, port, "2", name=f"node{n}", ranks=1, flags=flags) for n in range(2)]
    try:
        wait_until(lambda: len(steps(logs)) >= 5, *nodes)
        os.kill(nodes[1].workers()[0], signal.SIGKILL)
        assert [node.process.wait(SECONDS) for node in nodes] == [0, 0], nodes[0].told.read_text()[-2000:]
    finally:
        for node in nodes:
            if node.process.poll() is None:
                node.die()
    found = steps(logs)
    assert [line["step"] for line in found] == list(range(1, 25))
    resumed = re.findall(r"resumed from \S+ at step (\d+)", log(logs))
    assert len(resumed) == 1
    assert int(resumed[0]) >= 4
    assert "finished after 24 of 24 steps" in log(logs)


def test_a_job_array_takes_shares_and_a_requeued_task_takes_the_same(tmp_path):
    """slurm/prepare.sbatch: what each task of the array runs, however its numbers begin."""
    stand_in = tmp_path / "venv/bin/itemizedclip"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$*"\n')
    stand_in.chmod(0o755)
    told = []
    for number in (3, 4, 5, 4):  # 4 was pre-empted and is put back
        job = {"SLURM_ARRAY_TASK_ID": number, "SLURM_ARRAY_TASK_MIN": 3, "SLURM_ARRAY_TASK_COUNT": 3,
               "SLURM_CPUS_PER_TASK": 2, "SLURM_SUBMIT_DIR": tmp_path, "VENV": tmp_path / "venv"}  # fmt: skip
        done = subprocess.run(
            ["bash", str(ROOT / "slurm/prepare.sbatch"), "/data/pacs", "--to", "/data/mri"],
            env={**os.environ, **{name: str(value) for name, value in job.items()}},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        told.append(done.stdout.strip())
    assert told == [f"prepare studies /data/pacs --to /data/mri --workers 2 --shard {n}/3" for n in (1, 2, 3, 2)]
