"""torchrun that ends with one line instead of a trace, and lets its processes save before they leave.

    python -m itemizedclip.runtime.torchrun --standalone --nproc_per_node 2 -- script.py …

The options are torchrun's own. torchrun itself ends at a signal, and kills its processes thirty seconds later, saved or
not. Here it runs one process further down, out of reach of the terminal's signals; this process passes every signal on
to the processes of the run, once, and waits for as long as they take.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
EXIT_STOPPED = 75  # as in itemizedclip.runtime.errors, without waiting for its imports
EXIT_NO_SPACE = 74


def run_agent(argv: Sequence[str] | None, stop_asked: Callable[[], bool] = lambda: False) -> int:
    """torchrun to its end.

    Args:
        argv: torchrun's arguments.
        stop_asked: whether a signal was passed on to the processes.

    Returns:
        The exit status that tells most, 128 + n for a process that signal n ended.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # It says below, or its processes have said, what these would.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    given = sys.argv[1:] if argv is None else argv
    if any(flag.replace("_", "-").startswith("--max-restarts") for flag in given):
        # Processes that start again would else meet at the store of those before them, at addresses that are gone.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        torchrun(None if argv is None else list(argv))
    except SignalException as error:  # the parent has gone, or there was no process yet to pass a signal on to
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        # When one process fails torchrun stops the others, which then leave as if asked to.
        own = {rank: code for rank, code in codes.items() if code not in (EXIT_STOPPED, -signal.SIGTERM)}
        if EXIT_NO_SPACE in codes.values():
            return EXIT_NO_SPACE
        if EXIT_STOPPED in codes.values() and (stop_asked() or not own):
            return EXIT_STOPPED
        # Which one failed first torchrun does not tell; one that hears nothing it kills with SIGKILL.
        ranks: dict[str, int] = {}
        for rank, code in sorted((own or codes).items()):
            how = f"exit status {code}" if code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"
            ranks.setdefault(how, rank)
        whose = "its message stands" if len(ranks) == 1 else "their messages stand"
        told = "; ".join(f"the process of rank {rank} ended with {how}" for how, rank in ranks.items())
        print(f"{told}; {whose} above", file=sys.stderr)
        code = max((own or codes).values())
        return code if code >= 0 else 128 - code
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes and wait for them."""
    # Signals that come before all is set up wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    own = os.getpid()
    asked = mmap.mmap(-1, 1)  # shared by both processes
    agent = os.fork()
    if agent == 0:
        _become_agent(own)
        os._exit(_exit_code(argv, lambda: asked[0] > 0))

    def pass_on(number: int, frame: object) -> None:
        asked[0] = 1
        # Before there is a process that could save, the agent itself may go.
        for process in _children_of(agent) or [agent]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number if process != agent else signal.SIGTERM)

    for number in SIGNALS:
        # nohup, and shells that start a process in the background, have these ignored.
        if number in (signal.SIGHUP, signal.SIGINT) and signal.getsignal(number) == signal.SIG_IGN:
            continue
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    code = os.waitstatus_to_exitcode(os.waitpid(agent, 0)[1])
    code = code if code >= 0 else 128 - code
    # Ended by a signal before it listened, or before it had saved: stopped all the same.
    return EXIT_STOPPED if asked[0] and code > 128 else code


def _become_agent(parent: int) -> None:
    """In the child: a session of its own, which ends with its parent."""
    os.setsid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(EXIT_STOPPED)
    # scripts/slurm_task.sh ignores it until this program listens.
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _exit_code(argv: Sequence[str] | None, stop_asked: Callable[[], bool]) -> int:
    try:
        return run_agent(argv, stop_asked)
    except SystemExit as error:  # torchrun's own flags
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _children_of(parent: int) -> list[int]:
    """Processes that `parent` has started."""
    try:
        listed = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    except OSError:
        # Where there is no /proc; the argument is a number.
        command = ["pgrep", "-P", str(parent)]
        listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout  # noqa: S603
    return [int(pid) for pid in listed.split()]


if __name__ == "__main__":
    raise SystemExit(main())
