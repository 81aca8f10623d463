"""A folder that belongs to one process at a time, on any file system and over several machines, without locks.

The claim is a small file in the folder that names its holder; it comes into being whole and only where there is none.
The holder touches it every `BEAT_S` seconds. A claim is stale, and may be taken over, when

- its holder ran here and is gone: at once (same machine since the same boot, same process namespace, and no process of
  that number that started at that time);
- its holder was an earlier start of the same Slurm job, which is put back into the queue only after it ended: at once;
- its holder ran elsewhere and has given no sign of life for `STALE_S` seconds, by the clock of the file system. A
  newcomer waits so long; a holder that gives a sign meanwhile lives, and the newcomer is refused.

A holder that was thought dead (a machine that stood still for minutes) finds out at its next beat and must end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from itemizedclip.runtime.errors import UserError

NAME = ".claim"
BEAT_S = 15.0
STALE_S = 120.0

logger = logging.getLogger(__name__)


class ClaimedError(UserError):
    """The folder belongs to another process, which the message names."""


@dataclass(frozen=True)
class Holder:
    """Who holds a folder.

    Attributes:
        host: name of the machine.
        boot: identity of the machine's present start and of its process namespace, "" where the system has none.
        pid: number of the process.
        started: when it started, in the system's own unit, "" where the system does not tell.
        job: Slurm's job and how often it was put back into the queue, such as "123/0", "" outside Slurm.
        since: local date and time of the claim.
        nonce: different for every claim.
    """

    host: str
    boot: str
    pid: int
    started: str
    job: str
    since: str
    nonce: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def this_process() -> Holder:
    """The present process as a holder."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return Holder(
        host=socket.gethostname(),
        boot=_boot_identity(),
        pid=os.getpid(),
        started=start_time(os.getpid()) or "",
        job=f"{job}/{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else "",
        since=datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
        nonce=uuid.uuid4().hex,
    )


def _boot_identity() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def start_time(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks since boot; "" where only its being there can be told.

    None: there is no such process, or it has ended and waits for its parent.
    """
    try:
        # The name in parentheses may hold blanks and parentheses itself.
        rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if rest[0] in "ZX" else rest[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


def is_gone(holder: Holder, here: Holder) -> bool:
    """Whether a holder is known to have ended; False also when that cannot be told from here."""
    if holder.job and here.job:
        (job, restart), (own_job, own_restart) = holder.job.split("/"), here.job.split("/")
        if job == own_job and restart != own_restart:
            return True
    if not holder.boot or (holder.host, holder.boot) != (here.host, here.boot):
        return False
    return start_time(holder.pid) != holder.started


# --- the file --------------------------------------------------------------------------------------------------------


def _read_bytes(path: Path) -> tuple[bytes, float] | None:
    """A claim's content and the time of its last sign of life; None: no such file."""
    try:
        # Opening, unlike stat, asks a network file system's server.
        with path.open("rb") as file:
            return file.read(2**16), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _parsed(content: bytes) -> Holder | None:
    """The holder a claim names; None: not legible."""
    try:
        values = json.loads(content)
        kinds = {f.name: int if f.name == "pid" else str for f in fields(Holder)}
        if not all(type(values[name]) is kind for name, kind in kinds.items()):
            return None
        if values["job"] and values["job"].count("/") != 1:
            return None
        return Holder(**{name: values[name] for name in kinds})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _read(path: Path) -> tuple[Holder | None, float] | None:
    """The present holder (None: not legible) and the time of its last sign of life; None: no claim."""
    chain = _chain(path)
    return (chain[-1].holder, chain[-1].beat) if chain else None


def _create(path: Path, holder: Holder) -> bool:
    """Make the claim unless there is one; whether it was made."""
    content = json.dumps(asdict(holder)).encode()
    own = path.with_name(f"{path.name}.{holder.nonce}")
    own.write_bytes(content)
    try:
        os.link(own, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: a reader may see the file before its content
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        return True
    finally:
        own.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Found:
    """What a claim says: its holder (None: not legible), its last sign of life, and the name of its heir's file."""

    holder: Holder | None
    beat: float
    heir: Path


def _chain(path: Path) -> list[_Found]:
    """The claim and its heirs, the present holder last; empty: no claim."""
    found: list[_Found] = []
    link = path
    while (read := _read_bytes(link)) is not None:
        content, beat = read
        # Named after the content: an heir belongs to one claim and never to a later one in the same place.
        heir = path.with_name(f"{path.name}.{hashlib.sha256(content).hexdigest()[:24]}.heir")
        if any(heir == before.heir for before in found):
            break
        found.append(_Found(_parsed(content), beat, heir))
        link = heir
    return found


def _take_over(path: Path, stale: _Found, here: Holder) -> bool:
    """Become the heir of a stale claim; whether it succeeded.

    The claim's place is never empty on the way, and one file, named after the stale claim, decides who is the heir: of
    many newcomers exactly one makes it. A newcomer who comes so late that the heir has moved into the claim's place
    and tidied up does not find itself at the end of the chain, and steps back.
    """
    if not _create(stale.heir, here):
        return False
    chain = _chain(path)
    if not chain or chain[-1].holder != here:
        stale.heir.unlink(missing_ok=True)
        return False
    own = path.with_name(f"{path.name}.{here.nonce}")
    own.write_bytes(json.dumps(asdict(here)).encode())
    os.replace(own, path)
    for link in chain:
        link.heir.unlink(missing_ok=True)
    return True


def _now(folder: Path, here: Holder) -> float:
    """The file system's present time, which the claim's own time can be compared with."""
    probe = folder / f"{NAME}.{here.nonce}.now"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _acquire(folder: Path, here: Holder) -> None:
    path = folder / NAME
    first: tuple[Holder | None, float] | None = None
    started = time.monotonic()
    while not _create(path, here):
        chain = _chain(path)
        if not chain:
            continue  # released just now
        holder, beat = found = chain[-1].holder, chain[-1].beat
        # The second, for a clock that was set back.
        age = max(_now(folder, here) - beat, time.monotonic() - started)
        if (holder is not None and is_gone(holder, here)) or age >= STALE_S:
            if _take_over(path, chain[-1], here):
                logger.info("%s: taken over from %s, which has ended", folder, holder or "a process of unknown name")
                return
            continue
        lives_here = holder is not None and (holder.host, holder.boot) == (here.host, here.boot) and holder.boot
        if lives_here or (first is not None and first != found):
            raise ClaimedError(_at_work(folder, holder))
        if first is None:
            first = found
            logger.warning(
                "%s: claimed by %s, which gave its last sign of life %.0f s ago; waiting for another, at most %.0f s",
                folder, holder or "a process of unknown name", age, STALE_S - age,
            )  # fmt: skip
        time.sleep(min(1.0, BEAT_S / 4))


def _at_work(folder: Path, holder: Holder | None) -> str:
    return (
        f"{folder}: another run is at work here ({holder or 'its name cannot be read'}); wait for its end or stop it, "
        "or choose another --name"
    )


def check_unclaimed(folder: Path) -> None:
    """Whether a folder, which need not exist, could be claimed now; nothing is changed.

    Raises:
        ClaimedError: another process holds it, by all that can be told at once.
    """
    found = _read(folder / NAME)
    if found is None:
        return
    holder, beat = found
    if (holder is None or not is_gone(holder, this_process())) and time.time() - beat < STALE_S:
        raise ClaimedError(_at_work(folder, holder))


# --- holding ---------------------------------------------------------------------------------------------------------


class Claim:
    """A folder held by this process.

    Attributes:
        folder: the folder.
        holder: this process.
    """

    def __init__(self, folder: Path, holder: Holder) -> None:
        self.folder = folder
        self.holder = holder
        self.path = folder / NAME
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):
                if self.is_ours():
                    os.utime(self.path)

    def is_ours(self) -> bool:
        """Whether the claim still names this process."""
        found = _read(self.path)
        return found is not None and found[0] == self.holder

    def check(self) -> bool:
        """Whether the folder and the claim are still there; False: somebody removed them.

        Raises:
            ClaimedError: another process has taken the folder over.
        """
        found = _read(self.path)
        if found is not None and found[0] != self.holder:
            raise ClaimedError(
                f"{self.folder}: taken over by another run ({found[0] or 'its name cannot be read'}), because this one "
                f"gave no sign of life for {STALE_S:.0f} s; ended without writing anything more"
            )
        return found is not None

    def renew(self) -> None:
        """Claim again after somebody removed the claim or the folder.

        Raises:
            ClaimedError: another process was faster.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not _create(self.path, self.holder):
            self.check()

    def release(self) -> None:
        """Give the folder free."""
        self._ended.set()
        self._thread.join(timeout=BEAT_S)
        with contextlib.suppress(OSError):
            if self.is_ours():
                self.path.unlink()


@contextmanager
def claimed(folder: Path) -> Iterator[Claim]:
    """Hold a folder, which must exist, for the block.

    Raises:
        ClaimedError: another process holds it.
    """
    here = this_process()
    _acquire(folder, here)
    claim = Claim(folder, here)
    try:
        yield claim
    finally:
        claim.release()
