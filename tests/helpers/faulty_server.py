"""A file server on loopback that answers byte ranges, and cuts, delays, corrupts or refuses answers when told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = Callable[[str, int], str]
"""(path of the request, its number among all GET requests) → "", "cut", "delay", "corrupt", "503", "403" or "whole"."""


class FaultyServer(ThreadingHTTPServer):
    """Serves a folder; `with FaultyServer(folder) as server: server.url`.

    Attributes:
        fault: what is wrong with a request.
        requests: (method, path, range) of all requests.
    """

    daemon_threads = True

    def __init__(self, folder: Path, fault: Fault = lambda path, number: "", delay_s: float = 1.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.fault = fault
        self.delay_s = delay_s
        self.requests: list[tuple[str, str, str]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self) -> int:
        return sum(method == "GET" for method, *_ in self.requests)

    def __enter__(self) -> FaultyServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        asked = self.headers.get("Range", "")
        with self.server.lock:
            number = self.server.gets()
            self.server.requests.append((self.command, self.path, asked))
        fault = self.server.fault(self.path, number) if with_body else ""
        path = self.server.folder / self.path.lstrip("/")
        if fault in ("503", "403") or not path.is_file():
            self._headers(int(fault) if fault else 404, 0)
            return
        content = path.read_bytes()
        if asked and fault != "whole":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1 if last else None]
            self._headers(206, len(part), f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        else:
            part = content
            self._headers(200, len(part))
        if not with_body:
            return
        if fault == "delay":
            time.sleep(self.server.delay_s)
        if fault == "corrupt":
            middle = len(part) // 2
            part = part[:middle] + bytes([part[middle] ^ 0xFF]) + part[middle + 1 :]
        if fault == "cut":
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(part)

    def _headers(self, status: int, size: int, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        self.send_header("ETag", '"1"')
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass
