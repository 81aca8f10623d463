"""Serve a report on this machine, so that people can ask it texts of their own.

Nothing leaves the machine, and nobody else gets in: the server listens on 127.0.0.1 alone, the page's address holds a
random token, requests must name this machine as their host (a name that another site points at 127.0.0.1 does not) and
come from the page itself. It answers two addresses, the page and the question, and reads no file.
"""

from __future__ import annotations

import contextlib
import hmac
import io
import json
import logging
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import parse_json

logger = logging.getLogger(__name__)

ASK_PATH = "ask"
"""Address of the question, beside the page."""

MAX_ITEMS = 32
"""Texts of one question."""

MAX_CHARACTERS = 2000
"""Of one text."""

MAX_REQUEST_BYTES = 4 * MAX_ITEMS * MAX_CHARACTERS

MAX_HEADER_BYTES = 2**16
"""Of a request's first line and headers together; browsers send a few kB."""

MAX_CONNECTIONS = 64
"""At once; a browser opens six. Beyond that the one that has waited longest without asking is hung up on."""

SILENCE_S = 60.0
"""Seconds that a connection may wait before it begins a request."""

REQUEST_S = 20.0
"""Seconds from a request's first byte to its last, and for taking the answer."""

_HOSTS = ("127.0.0.1", "localhost")

Answer = Callable[[Sequence[str]], dict[str, Any]]
"""Items → what the page reads (`itemizedclip.viewer.page.html.described_items`)."""


class QuestionError(UserError):
    """A question that cannot be answered: the message says what to ask instead."""


def read_question(body: bytes) -> list[str]:
    """Texts of a request's body, {"items": ["a text", …]}.

    Raises:
        QuestionError: anything else.
    """
    try:
        contents = parse_json(body, source="the question", holding='{"items": ["a text", …]}')
    except UserError as error:
        raise QuestionError(str(error)) from None
    items = contents.get("items") if isinstance(contents, dict) else None
    if not isinstance(items, list) or not all(isinstance(text, str) for text in items):
        raise QuestionError('the question holds no list of texts; expected {"items": ["a text", …]}')
    texts = [text.strip() for text in items if text.strip()]
    if not texts:
        raise QuestionError("the question holds no text; type what to look for")
    if len(texts) > MAX_ITEMS:
        raise QuestionError(f"{len(texts)} texts at once; ask at most {MAX_ITEMS}")
    longest = max(len(text) for text in texts)
    if longest > MAX_CHARACTERS:
        raise QuestionError(f"a text of {longest} characters; expected at most {MAX_CHARACTERS}")
    return texts


class ReportServer(ThreadingHTTPServer):
    """One page and its question; `serve_forever` runs it, `url` is where to open it.

    Args:
        page: the page, made with `ask=ASK_PATH`.
        answer: answers one question; called by one thread at a time.
        port: 0 takes any free one.

    Raises:
        ValueError: the port is taken or not allowed.
    """

    # A thread that is killed inside PyTorch takes the process down with it: closing waits for them all.
    daemon_threads = False
    request_queue_size = 128  # people who ask at the same moment

    handler: type[BaseHTTPRequestHandler]
    """Answers its requests."""

    def __init__(self, page: str, answer: Answer, port: int = 0) -> None:
        self.page = page.encode("utf-8")
        self.token = secrets.token_urlsafe(18)
        self._answer = answer
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        # In the order in which they began to wait for a request.
        self._waiting: dict[socket.socket, None] = {}
        try:
            super().__init__(("127.0.0.1", port), self.handler)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--port {port}: cannot listen there ({error}); leave --port out to take a free one"
            ) from error

    def process_request(self, request: Any, client_address: Any) -> None:
        """Note the connection, so that closing can end it; with too many, one that asks nothing makes room."""
        if len(self._connections) >= MAX_CONNECTIONS and not self._hang_up_on_the_idlest():
            super().shutdown_request(request)
            return
        self._connections.add(request)
        super().process_request(request, client_address)

    def _hang_up_on_the_idlest(self) -> bool:
        """Whether there was a connection without a whole request; its thread ends of itself."""
        for connection in tuple(self._waiting):
            self._waiting.pop(connection, None)
            if connection in self._connections:
                self._connections.discard(connection)
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                return True
        return False

    def waits(self, request: socket.socket, *, is_waiting: bool) -> None:
        """A connection begins to wait for a request, or has got one whole."""
        self._waiting.pop(request, None)
        if is_waiting:
            self._waiting[request] = None

    def shutdown_request(self, request: Any) -> None:
        """The connection is over."""
        self._connections.discard(request)
        self._waiting.pop(request, None)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Hang up on idle browsers, and wait for what is being answered."""
        for connection in tuple(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up or go silent are no errors of ours."""
        if isinstance(sys.exc_info()[1], OSError):
            logger.debug("a client went away", exc_info=True)
        else:
            logger.exception("a request could not be answered")

    @property
    def url(self) -> str:
        """Address of the page, token included."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def answer(self, items: Sequence[str]) -> dict[str, Any]:
        """Answer one question at a time: the model is one."""
        with self._lock:
            return self._answer(items)


class _Requests(io.RawIOBase):
    """What a client sends, in time and in bounds: a byte now and then keeps no connection open.

    Args:
        connection: the client's.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.begin()

    def begin(self) -> None:
        """The next byte is the first of a request."""
        self._deadline: float | None = None
        self.header_bytes: int | None = 0

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`; raises TimeoutError, HTTPException for headers that are too long."""
        left = SILENCE_S if self._deadline is None else self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        count = self._connection.recv_into(buffer)
        if self._deadline is None:
            self._deadline = time.monotonic() + REQUEST_S
        if self.header_bytes is not None:
            self.header_bytes += count
            if self.header_bytes > MAX_HEADER_BYTES + io.DEFAULT_BUFFER_SIZE:
                raise HTTPException(f"headers of more than {MAX_HEADER_BYTES} bytes")
        return count


class OwnPageHandler(BaseHTTPRequestHandler):
    """Answers the page's own machine and nobody else; subclasses answer more addresses (`get`)."""

    server: ReportServer
    protocol_version = "HTTP/1.1"
    server_version = "itemizedclip"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self._requests = _Requests(self.connection)
        self.rfile = io.BufferedReader(self._requests)

    def handle_one_request(self) -> None:
        self._requests.begin()
        self.server.waits(self.connection, is_waiting=True)
        super().handle_one_request()

    def parse_request(self) -> bool:
        is_sound = super().parse_request()
        self._requests.header_bytes = None
        return is_sound

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Of requests that are none; what is left of them is not read."""
        self.close_connection = True
        self._refuse(HTTPStatus(code), message or HTTPStatus(code).phrase)

    def do_GET(self) -> None:
        path = self._path()
        if path is not None:
            self.server.waits(self.connection, is_waiting=False)
            self.get(path)

    def get(self, path: str) -> None:
        """Answer an address behind the token, query included."""
        if path:
            self._refuse(HTTPStatus.NOT_FOUND, "no such page; open the address that the command printed")
        else:
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)

    def do_POST(self) -> None:
        # What is left of a refused request must not be read as the next one.
        self.close_connection = True
        if not self._is_allowed(ASK_PATH) or not self._is_from_the_page():
            return
        length = self._length()
        if length is None:
            return
        body = self.rfile.read(length)
        if len(body) < length:
            return  # hung up in the middle: nobody reads an answer
        self.server.waits(self.connection, is_waiting=False)
        try:
            items = read_question(body)
            contents, status = self.server.answer(items), HTTPStatus.OK
        except ValueError as error:
            contents, status = {"error": str(error)}, HTTPStatus.BAD_REQUEST
        except Exception:
            logger.exception("a question could not be answered")
            contents = {"error": "the model could not answer this; the terminal says why"}
            status = HTTPStatus.INTERNAL_SERVER_ERROR
        self._send(status, "application/json", json.dumps(contents).encode("utf-8"))

    def _length(self) -> int | None:
        """Bytes of the question, said beforehand; answers requests that do not say, or say too much."""
        said = self.headers.get("Content-Length")
        if said is None or "Transfer-Encoding" in self.headers:
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "a question says its length, and comes in one piece")
        elif not (said.isascii() and said.isdecimal()):
            self._refuse(HTTPStatus.BAD_REQUEST, "Content-Length is no number of bytes")
        # Python reads no numbers of thousands of digits.
        elif len(said) > len(str(MAX_REQUEST_BYTES)) or int(said) > MAX_REQUEST_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected at most {MAX_REQUEST_BYTES} bytes")
        else:
            return int(said)
        return None

    def _is_allowed(self, path: str) -> bool:
        """Whether a request names this machine and the right address; answers it otherwise."""
        found = self._path()
        if found is not None and found != path:
            self._refuse(HTTPStatus.NOT_FOUND, "no such page; open the address that the command printed")
        return found == path

    def _path(self) -> str | None:
        """What stands behind the token of a request that names this machine; answers others."""
        if self.headers.get("Host") not in self._own(""):
            self._refuse(HTTPStatus.FORBIDDEN, "this server answers its own machine only")
            return None
        start = f"/{self.server.token}/"
        # Compared in constant time, as bytes: an address may hold anything.
        given = self.path[: len(start)].encode("utf-8", "replace")
        if not hmac.compare_digest(given, start.encode()):
            self._refuse(HTTPStatus.NOT_FOUND, "no such page; open the address that the command printed")
            return None
        return self.path[len(start) :]

    def _is_from_the_page(self) -> bool:
        is_json = self.headers.get_content_type() == "application/json"
        if not is_json or self.headers.get("Origin") not in (None, *self._own("http://")):
            self._refuse(HTTPStatus.FORBIDDEN, "questions come as JSON from the page itself")
            return False
        return True

    def _own(self, scheme: str) -> list[str]:
        port = self.server.server_port
        # Browsers leave out the port that is usual.
        return [f"{scheme}{host}" if port == 80 else f"{scheme}{host}:{port}" for host in _HOSTS]

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self._send(status, "application/json", json.dumps({"error": reason}).encode("utf-8"))

    def _send(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        # For the whole answer: a client that takes none of it is left.
        self.connection.settimeout(REQUEST_S)
        self.send_response(status)
        headers = {
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
        }
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


ReportServer.handler = OwnPageHandler
