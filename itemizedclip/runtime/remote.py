"""Files that are not on a local disk: s3://, gs://, hf://, http(s):// and memory://, through fsspec.

The one place that reaches a network for data, and only for an address that a user gave as a flag: addresses inside data
files are never followed. `place(text)` is a `Path` or an `Address`; both know what readers ask of a path. Bytes come in
ranges, again after a pause when they fail, and are kept in a bounded cache on this machine (`runtime.cache`).

Credentials stay where the libraries of the stores look for them (environment, configuration files, FSSPEC_S3 and the
like); an address with a password or a query, such as a signed one, is refused, because flags are written into run
folders and logs. Messages name addresses and kinds of errors, never what a library said about them.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import queue
import random
import re
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import quote

from itemizedclip.runtime.cache import FOLDER_VARIABLE, LIMIT_VARIABLE, FileCache, default_cache
from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.runtime.files import replacing
from itemizedclip.runtime.registry import MissingExtraError

logger = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMES = ("s3", "gs", "hf", "http", "https", "memory")

BLOCK_BYTES = 2**22
"""What is fetched and kept at once."""

READ_AHEAD_BLOCKS = 4
"""Blocks that are on their way while a file is read from end to end."""

CONNECTIONS = 8
"""Requests of a process at one time."""

_EXTRA = "pip install -e '.[remote]'"
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/")
_IDENTITY = (
    "ETag", "etag", "generation", "md5Hash", "blob_id", "lfs", "Content-MD5", "Digest", "Last-Modified",
    "LastModified", "last_modified", "updated", "mtime", "created",
)  # fmt: skip


@dataclass
class Patience:
    """How long an address is waited for.

    Attributes:
        attempts: requests for the same bytes.
        first_pause_s: before the second one; each further pause is twice as long, and a random part of it is left out.
        longest_pause_s: of a pause.
        timeout_s: of a request.
    """

    attempts: int = 8
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0
    timeout_s: float = 60.0

    def pause_s(self, attempt: int) -> float:
        """Seconds before request number `attempt`, from 1."""
        pause = min(self.longest_pause_s, self.first_pause_s * 2.0 ** (attempt - 1))
        return float(pause * (1 - 0.5 * random.random()))  # noqa: S311  spreads requests, keeps no secret


patience = Patience()
"""Of this process."""


class RemoteError(UserError):
    """A store that does not give what was asked for, after all attempts."""


class _RetryError(Exception):
    """An answer that is worth asking for again; the message tells users what was wrong with it."""


# --- addresses -------------------------------------------------------------------------------------------------------


def is_address(given: object) -> bool:
    """Whether a flag's value names something elsewhere; also when a `Path` folded the two slashes into one."""
    return isinstance(given, Address) or (isinstance(given, (str, Path)) and bool(_SCHEME.match(str(given))))


def place(given: str | Path | Address) -> Place:
    """A path, `~` expanded, or the address that a user gave.

    Raises:
        UserError: an address of another scheme, or with a password or a query.
    """
    if isinstance(given, Address):
        return given
    return Address.of(str(given)) if is_address(given) else Path(given).expanduser()


@dataclass(frozen=True)
class Address:
    """A file or folder elsewhere; what readers ask of a `Path`, and the same names for it.

    Attributes:
        scheme: one of `SCHEMES`.
        path: what stands behind scheme://, without a slash at its end.
    """

    scheme: str
    path: str

    @classmethod
    def of(cls, text: str) -> Address:
        """Of a user's words; see `place`."""
        scheme, _, rest = text.partition(":")
        scheme, rest = scheme.lower(), rest.lstrip("/").rstrip("/")
        host = rest.partition("/")[0]
        if scheme not in SCHEMES:
            raise UserError(
                f"{scheme}://…: addresses of this kind are not followed; expected a path or "
                f"{', '.join(f'{known}://' for known in SCHEMES)}"
            )
        port = host.partition(":")[2]
        if "@" in host or (port and not port.isdecimal()):
            raise UserError(
                f"{scheme}://…: holds a user name or password, which would be written into run folders and logs; give "
                "it in the environment or the store's configuration file"
            )
        if scheme.startswith("http") and "?" in rest:
            raise UserError(
                f"{scheme}://{rest.partition('?')[0]}?…: holds a query, such as that of a signed address, which would "
                "be written into run folders and logs; give a plain address, and what it needs in FSSPEC_HTTP "
                '(such as {"headers": {"Authorization": "Bearer …"}})'
            )
        return cls(scheme, rest)

    @property
    def url(self) -> str:
        """The whole address."""
        return f"{self.scheme}://{self.path}"

    def __str__(self) -> str:
        return self.url

    __fspath__ = None  # open(address) is an error, not a file named "s3:"

    @property
    def name(self) -> str:
        """The last part."""
        return self.path.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its last ending."""
        return self.name.rpartition(".")[0] or self.name

    @property
    def suffix(self) -> str:
        """The last ending of the name, full stop included."""
        return self.name[len(self.stem) :]

    @property
    def parent(self) -> Address:
        """What it lies in."""
        return Address(self.scheme, self.path.rpartition("/")[0])

    def __truediv__(self, part: str | Path) -> Address:
        """Something below it.

        Raises:
            UserError: a part that leads elsewhere.
        """
        words = [word for word in str(part).replace(os.sep, "/").split("/") if word not in ("", ".")]
        if ".." in words or is_address(part) or str(part).startswith("/"):
            raise UserError(f"{self}: {str(part)[:80]!r} does not lie below it")
        if self.scheme.startswith("http"):
            words = [quote(word) for word in words]
        return Address(self.scheme, "/".join([self.path, *words]))

    def resolve(self) -> Address:
        """Itself."""
        return self

    # --- asking the store

    def file(self) -> RemoteFile:
        """What the store says of a file.

        Raises:
            MissingFileError: no such file. RemoteError: the store does not answer, or not with a size.
        """
        info = self._ask("info", self._inner)
        if info.get("type") == "directory" or info.get("size") is None:
            kind = "is a folder" if info.get("type") == "directory" else "comes without a size (Content-Length)"
            raise RemoteError(f"{self}: {kind}; expected a file that can be read in parts")
        facts = [str(info[name]) for name in _IDENTITY if info.get(name)]
        return RemoteFile(self, int(info["size"]), "|".join(facts))

    def is_file(self) -> bool:
        """Whether there is such a file."""
        try:
            return bool(self.file())
        except MissingFileError:
            return False

    def exists(self) -> bool:
        """Whether there is such a file or folder."""
        return self.is_file() or self.is_dir()

    def is_dir(self) -> bool:
        """Whether something lies below it."""
        return bool(self._ask("isdir", self._inner))

    def names(self) -> set[str]:
        """Names of what lies directly in it; empty when there is nothing."""
        try:
            return {str(found).rstrip("/").rpartition("/")[2] for found in self._ask("ls", self._inner, detail=False)}
        except MissingFileError:
            return set()

    def glob(self, pattern: str) -> list[Address]:
        """What lies below it and fits a pattern, sorted."""
        return Address(self.scheme, f"{self.path}/{pattern}").matches()

    def matches(self) -> list[Address]:
        """The files that this address, which holds * or ?, stands for, sorted."""
        try:
            found = self._ask("glob", self._inner)
        except MissingFileError:
            return []
        return sorted((Address.of(self._with_scheme(str(name))) for name in found), key=str)

    def local(self, check: Callable[[Path], str] = lambda path: "") -> Path:
        """A copy of the whole file in the cache; see `RemoteFile.local`.

        Raises:
            MissingFileError, RemoteError: as `file`.
        """
        return self.file().local(check)

    def named_copy(self) -> Path:
        """A copy of a small file under its own name, such as an index whose name says what it holds.

        Raises:
            MissingFileError, RemoteError: as `file`.
        """
        file = self.file()
        digest = hashlib.sha256(f"{self} {file.size} {file.identity}".encode()).hexdigest()[:40]
        copy = cache().folder / "named" / digest / self.name
        if not copy.is_file():
            with replacing(copy) as part:
                part.write_bytes(file.fetch(0, file.size))
        return copy

    def read_bytes(self) -> bytes:
        """The whole content of a small file; nothing is kept."""
        file = self.file()
        return file.fetch(0, file.size)

    def _with_scheme(self, name: str) -> str:
        return name if "://" in name else f"{self.scheme}://{name.lstrip('/')}"

    @property
    def _inner(self) -> str:
        return self.url if self.scheme in ("http", "https", "memory") else self.path

    def _ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        return _with_patience(self, lambda: _call(self.scheme, method, *arguments, **named))


Place = Path | Address
"""Where data lie: on this machine, or elsewhere."""


def here(given: Place) -> Path:
    """A small file that a user named, on this machine: the path itself, or a copy of what lies at an address."""
    return given.named_copy() if isinstance(given, Address) else given


def relative_path(file: Place, folder: Place) -> Path:
    """The way from a folder to a file below it."""
    return Path(str(file)).relative_to(Path(str(folder)))


def names_in(folder: Place) -> set[str]:
    """Names of what lies directly in a folder; empty when there is none."""
    if isinstance(folder, Address):
        return folder.names()
    return set(os.listdir(folder)) if folder.is_dir() else set()


@dataclass(frozen=True)
class RemoteFile:
    """A file elsewhere whose size is known.

    Attributes:
        address: where.
        size: bytes.
        identity: what the store says that changes with the content; part of the names in the cache.
    """

    address: Address
    size: int
    identity: str

    def fetch(self, start: int, size: int, check: Callable[[bytes], str] | None = None) -> bytes:
        """Bytes of a range, in one request; none kept.

        Args:
            start: first byte.
            size: bytes; the range is cut at the end of the file.
            check: content → what is wrong with it, "" when nothing is; bad content is asked for again.

        Raises:
            RemoteError: after all attempts.
        """
        end = min(self.size, start + size)
        if end <= start:
            return b""

        def once() -> bytes:
            whole = start == 0 and end == self.size
            content = bytes(
                _call(self.address.scheme, "cat_file", self.address._inner)
                if whole
                else _call(self.address.scheme, "cat_file", self.address._inner, start=start, end=end)
            )
            if len(content) == self.size > end - start:
                raise RemoteError(
                    f"{self.address}: the server sends the whole file where a part was asked for; use one that "
                    "answers byte ranges, or copy the files"
                )
            if len(content) != end - start:
                raise _RetryError(f"{len(content):,} bytes came where {end - start:,} were asked for")
            if check is not None and (problem := check(content)):
                raise _RetryError(problem)
            return content

        return _with_patience(self.address, once)

    def read(self, start: int, size: int, *, again: bool = False) -> bytes:
        """Bytes of a range through the cache, whole blocks at a time; cut at the end of the file.

        Args:
            start: first byte.
            size: bytes.
            again: whether what is in the cache is bad, and fetched again.
        """
        end = min(self.size, start + size)
        parts = []
        for block in range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            if again:
                cache().drop(self._block_name(block))
            first = block * BLOCK_BYTES
            content = self._block(block)
            parts.append(content[max(0, start - first) : end - first])
        return b"".join(parts)

    def read_ahead(self, start: int = 0, size: int | None = None) -> None:
        """Bring a range, by default all, into the cache in the background; what fails is left to those who read it."""
        end = self.size if size is None else min(self.size, start + size)
        for block in range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            _process().fetcher.put(self, block)

    def open(self) -> BinaryIO:
        """The file, to be read from end to end."""
        return cast(BinaryIO, io.BufferedReader(_Sequential(self), buffer_size=2**20))

    def local(self, check: Callable[[Path], str] = lambda path: "") -> Path:
        """A copy of the whole file in the cache.

        Args:
            check: file → what is wrong with it, "" when nothing is; a bad one is fetched again, until two copies in
                turn are equal: then that is how it lies there.
        """

        def make(part: Path) -> None:
            before = b""
            for _ in range(patience.attempts):
                digest = hashlib.sha256()
                with part.open("wb") as file:
                    for content in fetch_many((self, start, BLOCK_BYTES) for start in range(0, self.size, BLOCK_BYTES)):
                        digest.update(content)
                        file.write(content)
                if digest.digest() == before or not check(part):
                    return
                before = digest.digest()
                logger.debug("%s: came damaged, fetched again", self.address)

        return cache().get(f"{self.address} {self.size} {self.identity}", make)

    def _block_name(self, block: int) -> str:
        return f"{self.address} {self.size} {self.identity} {BLOCK_BYTES}:{block}"

    def _block(self, block: int) -> bytes:
        def make(part: Path) -> None:
            part.write_bytes(self.fetch(block * BLOCK_BYTES, BLOCK_BYTES))

        expected = min(BLOCK_BYTES, self.size - block * BLOCK_BYTES)
        for _ in range(3):
            path = cache().get(self._block_name(block), make)
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # another process made room at this moment
                continue
            if len(content) == expected:
                return content
            path.unlink(missing_ok=True)
        return self.fetch(block * BLOCK_BYTES, BLOCK_BYTES)


def fetch_many(ranges: Iterable[tuple[RemoteFile, int, int]]) -> Iterator[bytes]:
    """Ranges (file, start, size) in their order; as many requests, and contents that wait, as `CONNECTIONS`."""
    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch") as pool:
        under_way: deque[Future[bytes]] = deque()
        for file, start, size in ranges:
            if len(under_way) == CONNECTIONS:
                yield under_way.popleft().result()
            under_way.append(pool.submit(file.fetch, start, size))
        while under_way:
            yield under_way.popleft().result()


def files_of(addresses: Sequence[Address]) -> list[RemoteFile | None]:
    """What the stores say of files, several at a time; None for those that are not there."""

    def one(address: Address) -> RemoteFile | None:
        try:
            return address.file()
        except MissingFileError:
            return None

    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="stat") as pool:
        return list(pool.map(one, addresses))


def cache() -> FileCache:
    """The cache of this process; see `runtime.cache` for its environment variables."""
    return _process().cache


def cache_remedy() -> str:
    """How to have a larger cache, as part of a sentence."""
    return f"raise {LIMIT_VARIABLE}, on a disk named by {FOLDER_VARIABLE}"


class _Sequential(io.RawIOBase):
    """Reading with blocks on their way."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._place = 0
        self._ahead = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = max(0, offset + (0, self._place, self._file.size)[whence])
        return self._place

    def readinto(self, buffer: Any) -> int:
        block = self._place // BLOCK_BYTES
        last = block + READ_AHEAD_BLOCKS
        if last > self._ahead:
            first = max(self._ahead, block + 1)
            self._file.read_ahead(first * BLOCK_BYTES, (last + 1 - first) * BLOCK_BYTES)
            self._ahead = last
        content = self._file.read(self._place, len(buffer))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


# --- asking stores ---------------------------------------------------------------------------------------------------


class _Fetcher:
    """Threads that bring blocks into the cache; they never keep a process from ending."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[RemoteFile, int]] = queue.Queue()
        self._known: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def put(self, file: RemoteFile, block: int) -> None:
        key = (file._block_name(block), block)
        with self._lock:
            if key in self._known:
                return
            self._known.add(key)
            if len(self._threads) < CONNECTIONS:
                thread = threading.Thread(target=self._work, name="read-ahead", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._waiting.put((file, block))

    def _work(self) -> None:
        while True:
            file, block = self._waiting.get()
            try:
                file._block(block)
            except Exception:
                logger.debug("%s: block %d was not read ahead", file.address, block, exc_info=False)
            with self._lock:
                self._known.discard((file._block_name(block), block))


class _Process:
    """What belongs to one process: connections and threads do not survive a fork."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.systems: dict[str, Any] = {}
        self.cache = default_cache()
        self.fetcher = _Fetcher()


_state: _Process | None = None


def _process() -> _Process:
    global _state
    if _state is None:
        _state = _Process()
    return _state


def start_afresh() -> None:
    """Forget connections, threads and the cache's settings, as a forked process does; changed settings then count."""
    global _state
    _state = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=start_afresh)


def _system(scheme: str) -> Any:
    process = _process()
    with process.lock:
        if scheme not in process.systems:
            import fsspec

            try:
                process.systems[scheme] = fsspec.filesystem(scheme, skip_instance_cache=True)
            except ImportError as error:
                raise MissingExtraError(f"{scheme}:// needs packages that are not installed: {_EXTRA}") from error
            except Exception as error:
                raise RemoteError(
                    f"{scheme}://: the store's library does not start ({type(error).__name__}); check its "
                    "configuration and credentials"
                ) from None
        return process.systems[scheme]


def _call(scheme: str, method: str, *arguments: Any, **named: Any) -> Any:
    system = _system(scheme)
    if getattr(system, "async_impl", False):
        from fsspec.asyn import sync

        inner = getattr(system, f"_{method}")
        return sync(system.loop, inner, *arguments, timeout=patience.timeout_s, **named)
    return getattr(system, method)(*arguments, **named)


def _with_patience(address: Address, call: Callable[[], T]) -> T:
    """The result of a request, asked for again after a pause as long as there is hope."""
    problem = ""
    for attempt in range(patience.attempts):
        if attempt:
            pause_s = patience.pause_s(attempt)
            logger.log(
                logging.WARNING if attempt == 3 else logging.DEBUG,
                "%s: %s; asked again in %.1f s", address, problem, pause_s,
            )  # fmt: skip
            time.sleep(pause_s)
        try:
            return call()
        except UserError:
            raise
        except _RetryError as error:
            problem = str(error)
        except Exception as error:
            problem = _problem(address, error)
    raise RemoteError(
        f"{address}: {problem}, {patience.attempts} times; check the network and the store. Training goes on with "
        "--resume latest"
    ) from None


def _problem(address: Address, error: Exception) -> str:
    """What went wrong, in words of ours: a library's own may hold signed addresses.

    Raises:
        UserError: no use in asking again.
    """
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error
    status = getattr(cause, "status", None) or getattr(cause, "code", None)
    if isinstance(cause, FileNotFoundError) or status in (404, 410, "404", "NoSuchKey"):
        raise MissingFileError(f"{address}: no such file there; check the address") from None
    if isinstance(cause, PermissionError) or status in (401, 403):
        raise RemoteError(
            f"{address}: the store refuses access; give credentials in the environment or its configuration file"
        ) from None
    if type(cause).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
        raise RemoteError(
            f"{address}: no credentials found; give them in the environment or the store's configuration file, or "
            "say FSSPEC_S3='{\"anon\": true}' for a public store"
        ) from None
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
        raise RemoteError(f"{address}: the server answers {status}; check the address") from None
    if isinstance(cause, (ImportError, NotImplementedError, TypeError, AttributeError)):
        raise cause  # a fault of ours or of a library
    return f"the server answers {status}" if isinstance(status, int) else f"no answer ({type(cause).__name__})"


# --- checksums -------------------------------------------------------------------------------------------------------


def crc32_check(expected: int) -> Callable[[bytes], str]:
    """A check for `RemoteFile.fetch`: content → "" or what is wrong."""

    def check(content: bytes) -> str:
        return "" if zlib.crc32(content) == expected else "the bytes that came do not have their checksum"

    return check


SUMS_FILE = "SHA256SUMS"
"""Beside shards: what `sha256sum *.tar > SHA256SUMS` writes."""


def listed_sums(folder: Place) -> dict[str, str]:
    """Name → SHA-256 in lower case of the files beside `SHA256SUMS`; {} without such a file.

    Raises:
        UserError: a line that is none of sha256sum's.
    """
    path = folder / SUMS_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    sums = {}
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line)
        if not match and line.strip():
            raise UserError(f"{path}: line {number} is not as sha256sum writes it: {line[:80]!r}; make it anew")
        if match:
            sums[match[2]] = match[1].lower()
    return sums
