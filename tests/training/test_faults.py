"""What befalls runs of days, done to real processes of the toy run: nothing beyond the last checkpoint is lost.

`python benchmarks/faults.py` runs all of them, with more kills, and prints the table of docs/reliability.md: the first
line of a test's docstring names the fault, the others what is wanted. ITEMIZEDCLIP_FAULTS=long is the long version.
"""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_checkpoint import exact_curve
from test_engine import TOY, curve, run_toy

from itemizedclip.training.checkpoint import load_checkpoint, newest_checkpoint

LONG = os.environ.get("ITEMIZEDCLIP_FAULTS") == "long"
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
STOPPED, NO_SPACE = 75, 74

pytestmark = [pytest.mark.timeout(1800 if LONG else 400)]


class Process:
    """A toy run that goes on while the test looks."""

    def __init__(self, folder: Path, *flags: object, ranks: int = 1, before: Callable[[], None] | None = None) -> None:
        self.output = folder / f"output-{time.monotonic_ns()}.txt"
        launcher = ["-m", "itemizedclip.runtime.torchrun", "--standalone", "--nproc_per_node", str(ranks), "--"]
        command = [sys.executable, *(launcher if ranks > 1 else []), TOY, *map(str, flags)]
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(command, stderr=file, preexec_fn=before)

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.said():
            assert self.process.poll() is None, self.said()[-3000:]
            assert time.monotonic() < deadline, f"{text!r} not said: {self.said()[-3000:]}"
            time.sleep(0.02)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, seconds: float = 120) -> int:
        """Its exit status; no trace may have been shown."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"does not end: {self.said()[-3000:]}") from None
        assert "Traceback" not in self.said(), self.said()[-5000:]
        return code


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return sorted(map(int, found.split()))


@contextmanager
def small_disk(path: Path, size: str, *options: str) -> Iterator[Path]:
    """A file system of its own, where this process may make one."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(path)]
    if not IS_ROOT or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


RUN = ("--epochs", 3, "--save-every-steps", 4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[dict]:
    """The curve of a run that nothing befell."""
    logs = tmp_path_factory.mktemp("whole")
    run_toy("--logs", logs, "--name", "a", *RUN)
    return exact_curve(logs / "a")


def assert_whole(folder: Path, whole: list[dict]) -> None:
    """The curve of a run that never was interrupted, each evaluation once, and nothing left behind."""
    assert exact_curve(folder) == whole
    assert [line["epoch"] for line in curve(folder, "eval")] == [1, 2, 3]
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoints", "log.txt", "metrics.jsonl", "params.json"]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["epoch_1.pt", "epoch_2.pt", "epoch_3.pt"]


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_named_moments(tmp_path, whole):
    """SIGKILL within an epoch, during a write, in an evaluation, after one, in a resume
    `--resume latest` goes on at once; the curve is the uninterrupted one to the last digit; no file is left behind
    """
    flags = ["--logs", tmp_path, "--name", "a", *RUN, "--resume", "latest"]
    for kill in (("--kill-at", 7), ("--kill-in", "write"), ("--kill-in", "resume"), ("--kill-in", "evaluation"),
                 ("--kill-in", "after-evaluation")):  # fmt: skip
        done = run_toy(*flags, *kill, check=False)
        assert done.returncode == -signal.SIGKILL, (kill, done.stderr[-2000:])
        if kill[1] == "write":
            assert list((tmp_path / "a/checkpoints").glob(".*.part"))
    run_toy(*flags)
    assert_whole(tmp_path / "a", whole)


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="long version only")
def test_killed_at_random_moments(tmp_path, whole):
    """25 times SIGKILL at a random moment, among them during start, resume and write
    as above
    """
    flags = ["--logs", tmp_path, "--name", "a", *RUN, "--resume", "latest", "--wait-s", 0.02]
    moments = random.Random(0)
    for _ in range(25):
        process = Process(tmp_path, *flags)
        if moments.random() < 0.7:
            process.wait_for("step ")
        time.sleep(moments.uniform(0, 0.5))
        process.process.kill()
        process.process.wait()
    run_toy(*flags)
    assert_whole(tmp_path / "a", whole)


# --- stopped ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stopped_by_each_signal(tmp_path, whole):
    """SIGTERM, SIGINT, SIGHUP, SIGUSR1 on one process
    saved at the end of the step, exit status 75, no trace; the resumed curve is the uninterrupted one
    """
    flags = ["--logs", tmp_path, "--name", "a", *RUN, "--resume", "latest"]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        process = Process(tmp_path, *flags, "--wait-s", 0.1)
        process.wait_for("images/s")
        process.send(number)
        assert process.end() == STOPPED
        assert f"{number.name}: saved and stopped; --resume latest goes on" in process.said()
    run_toy(*flags)
    assert_whole(tmp_path / "a", whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.Signals(n) for n in (15, 2, 1, 10)] if LONG else [signal.SIGTERM])
def test_stopped_on_two_ranks(tmp_path, number):
    """the same signals to the launcher of two processes
    both save together, exit status 75 of the launcher, no trace; also with loader processes
    """
    flags = ["--logs", tmp_path, "--name", "a", "--epochs", 50, "--workers", 1]
    process = Process(tmp_path, *flags, "--wait-s", 0.1, ranks=2)
    process.wait_for("images/s")
    process.send(number)
    assert process.end() == STOPPED
    assert "ended with" not in process.said()
    saved = load_checkpoint(tmp_path / "a/checkpoints/latest.pt")
    assert saved.step == len(curve(tmp_path / "a"))


@pytest.mark.slow
def test_signals_to_the_whole_group_and_in_an_evaluation(tmp_path):
    """Ctrl-C or Slurm's signal reaches the loader processes, too
    they do not leave before the run has saved
    """

    def own_group() -> None:
        os.setpgrp()

    flags = ["--logs", tmp_path, "--name", "a", "--epochs", 50, "--workers", 2, "--wait-s", 0.05]
    process = Process(tmp_path, *flags, before=own_group)
    process.wait_for("images/s")
    os.killpg(process.process.pid, signal.SIGTERM)
    assert process.end() == STOPPED
    assert load_checkpoint(tmp_path / "a/checkpoints/latest.pt").step == len(curve(tmp_path / "a"))


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(tmp_path):
    """a second signal, to a run that hangs
    leaves at once with 75; the first one alone waits for the step
    """
    process = Process(tmp_path, "--logs", tmp_path, "--name", "a", "--hang-at", 3, "--save-every-steps", 1)
    process.wait_for("hanging")
    process.send(signal.SIGTERM)
    time.sleep(1.5)
    assert process.process.poll() is None
    process.send(signal.SIGTERM)
    assert process.end(5) == STOPPED
    assert load_checkpoint(tmp_path / "a/checkpoints/latest.pt").step == 2


# --- others of the run -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_of_two_ranks_killed(tmp_path):
    """one of two ranks killed
    the other ends within 40 s; the launcher names the rank and the signal
    """
    process = Process(tmp_path, "--logs", tmp_path, "--name", "a", "--epochs", 500, "--wait-s", 0.05, ranks=2)
    process.wait_for("step 3/")
    (agent,) = children(process.process.pid)
    started = time.monotonic()
    os.kill(children(agent)[1], signal.SIGKILL)
    assert process.end(60) in (1, 128 + signal.SIGKILL)
    assert "the process of rank 1 ended with signal 9 (SIGKILL)" in process.said().splitlines()[-1]
    assert time.monotonic() - started < 45


@pytest.mark.slow
def test_one_of_two_ranks_frozen(tmp_path):
    """one of two ranks frozen (SIGSTOP, a machine that hangs)
    the other names it after --rank-timeout; all end at most 40 s later
    """
    flags = ["--logs", tmp_path, "--name", "a", "--epochs", 500, "--wait-s", 0.05, "--rank-timeout", 0.15]
    process = Process(tmp_path, *flags, ranks=2)
    process.wait_for("step 3/")
    (agent,) = children(process.process.pid)
    frozen = children(agent)[1]
    os.kill(frozen, signal.SIGSTOP)
    assert process.end(90) == 1
    assert f"rank 1 (process {frozen} on " in process.said()
    assert "has given no sign of life for 9 s (--rank-timeout)" in process.said()


@pytest.mark.slow
def test_a_loader_process_killed(tmp_path):
    """a loader process killed (mostly: memory used up)
    one sentence with process and sample, exit status 1
    """
    flags = ["--logs", tmp_path, "--name", "a", "--epochs", 500, "--workers", 2, "--wait-s", 0.3]
    process = Process(tmp_path, *flags)
    process.wait_for("images/s")
    killed = children(process.process.pid)[0]
    os.kill(killed, signal.SIGKILL)
    assert process.end() == 1
    # PyTorch tells by whichever way it hears of it first.
    how = r"(was ended by a signal \(Killed\)|ended unexpectedly)"
    assert re.search(rf"one of 2 loader processes {how}: loader process \d \(pid {killed}\) is at", process.said())


@pytest.mark.slow
def test_a_loader_process_that_hangs(tmp_path):
    """a loader process that hangs
    after --loader-timeout one sentence with process and sample, exit status 1; nothing keeps running
    """
    flags = ["--logs", tmp_path, "--name", "a", "--workers", 2, "--hang-sample", 17, "--loader-timeout", 0.05]
    process = Process(tmp_path, *flags)
    assert process.end(90) == 1
    assert "no batch for 0.05 minutes (--loader-timeout): loader process " in process.said()
    assert "is at sample 17 of epoch 1 for" in process.said()


@pytest.mark.slow
def test_shared_memory_too_small(tmp_path):
    """/dev/shm smaller than the loader processes need
    batches go through pipes, which is said with the remedy; the curve stays the same
    """
    flags = ["--logs", tmp_path, "--epochs", 2, "--samples", 160, "--batch-size", 16, "--name"]
    runs = " ".join(map(str, [*flags, "alone", "--workers", 0, "+", *flags, "helped", "--workers", 2]))
    script = f"mount -t tmpfs -o size=100k tmpfs /dev/shm && exec {sys.executable} {TOY} {runs}"
    if not IS_ROOT or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("needs the right to mount")
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "they come through pipes, which is slower. More room: docker run --shm-size" in done.stderr
    assert exact_curve(tmp_path / "helped") == exact_curve(tmp_path / "alone")
    script = script.replace("100k", "8k").replace("alone", "again").replace("helped", "never")
    none = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=120)
    assert none.returncode == 1
    assert "/dev/shm is full, loader processes cannot start" in none.stderr


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_disk_full(tmp_path):
    """the disk is full
    one sentence with path, need, free space and the last good checkpoint; exit status 74; that one is readable
    """
    with small_disk(tmp_path / "disk", "800k") as disk:
        process = Process(tmp_path, "--logs", disk, "--name", "a", "--epochs", 100)
        assert process.end() == NO_SPACE
        last = newest_checkpoint(disk / "a")
        assert last is not None
        assert "the disk is full" in process.said()
        assert f"the last good checkpoint is {last}; --resume latest goes on from it" in process.said()
        assert not list((disk / "a").rglob(".*"))


@pytest.mark.slow
def test_disk_too_small_from_the_start(tmp_path):
    """two checkpoints do not fit; a limit on file sizes (ulimit -f)
    refused before the first step with need and free space, exit status 74
    """
    limited = Process(
        tmp_path, "--logs", tmp_path, "--name", "b",
        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    assert limited.end() == NO_SPACE
    assert "files of at most 20 kB (ulimit -f)" in limited.said()
    with small_disk(tmp_path / "disk", "100k") as disk:
        process = Process(tmp_path, "--logs", disk, "--name", "a")
        assert process.end() == NO_SPACE
        assert "two checkpoints take" in process.said()
        assert "step 1/" not in process.said()


@pytest.mark.slow
def test_read_only_folder(tmp_path):
    """a folder that cannot be written
    one line, exit status 1
    """
    with small_disk(tmp_path / "disk", "1m", "ro") as disk:
        process = Process(tmp_path, "--logs", disk, "--name", "a")
        assert process.end() == 1
        assert process.said().splitlines()[-1].endswith("Read-only file system")


@pytest.mark.slow
def test_run_folder_removed(tmp_path):
    """the run folder removed while the run is at work
    said, made again, saved at once; the run ends with metrics and checkpoints
    """
    process = Process(tmp_path, "--logs", tmp_path, "--name", "a", "--wait-s", 0.05, "--epochs", 4)
    process.wait_for("step 3/")
    shutil.rmtree(tmp_path / "a")
    assert process.end() == 0
    assert "was removed while the run is at work" in process.said()
    assert (tmp_path / "a/checkpoints/epoch_4.pt").is_file()
    assert curve(tmp_path / "a")[-1]["step"] == 40
    assert "finished after 40 of 40 steps" in (tmp_path / "a/log.txt").read_text()
    assert (tmp_path / "a/params.json").is_file()


# --- two at once -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_starts_at_once(tmp_path, whole):
    """two starts with one --name, and a resume beside a run at work
    one runs, the others are refused with the holder's name; its curve is whole
    """
    flags = ["--logs", tmp_path, "--name", "a", *RUN, "--wait-s", 0.1]
    started = [Process(tmp_path, *flags, *more) for more in ((), (), ("--resume", "latest"))]
    codes = [process.end() for process in started]
    assert sorted(codes) == [0, 1, 1]
    running = started[codes.index(0)]
    for process, code in zip(started, codes):
        assert code == 0 or f"another run is at work here (process {running.process.pid} on " in process.said()
    assert_whole(tmp_path / "a", whole)
