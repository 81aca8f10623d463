"""Serve an index on this machine: a page to search by text, and the HTTP API behind it.

    GET TOKEN/                                   the page
    GET TOKEN/search?q=TEXT&k=20&skip=0&where=   JSON: hits with score, box of the attended region, thumbnail
    GET TOKEN/picture/ID                         JPEG of a hit, its longer side at most 320 pixels

It listens on 127.0.0.1 alone, behind a random token, and refuses other hosts, as the report's server does
(`viewer.page.serve`). Pictures are those of hits that a search gave out; no path comes from a request.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import threading
from collections import OrderedDict
from http import HTTPStatus
from importlib import resources
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.images import decode_photograph
from itemizedclip.runtime.errors import UserError
from itemizedclip.search.searcher import Hit, Searcher
from itemizedclip.viewer.page.serve import MAX_CHARACTERS, OwnPageHandler, ReportServer

logger = logging.getLogger(__name__)

PICTURE_PIXELS = 320
MOST_HITS = 100
"""Of one page."""
MOST_SKIPPED = 5000

_GIVEN_OUT = 20_000
_KEPT_PICTURES = 2000
_KEPT_ANSWERS = 500


class SearchServer(ReportServer):
    """The page and the API of one index; `serve_forever` runs it, `url` is where to open it.

    As many searches are answered at a time as there are cores, the others wait; the same search is answered from
    memory. Pictures are made by the thread that asks.
    """

    def __init__(self, index: Searcher, port: int = 0) -> None:
        """Listen.

        Args:
            index: what is searched.
            port: 0 takes any free one.

        Raises:
            UserError: the port is taken or not allowed.
        """
        page = resources.files("itemizedclip.search").joinpath("page.html").read_text(encoding="utf-8")
        super().__init__(page.replace("{{NUMBER}}", f"{len(index):,}"), lambda items: {}, port)
        self.index = index
        self._memory = threading.Lock()
        self._searching = threading.BoundedSemaphore(os.cpu_count() or 1)
        self._hits: OrderedDict[str, Hit] = OrderedDict()
        self._pictures: OrderedDict[str, bytes] = OrderedDict()
        self._answers: OrderedDict[tuple[str, int, int, str], dict[str, Any]] = OrderedDict()

    def search(self, text: str, k: int, skip: int, where: str) -> dict[str, Any]:
        """The answer of a search, as JSON has it."""
        key = (text, k, skip, where)
        with self._memory:
            if key in self._answers:
                self._answers.move_to_end(key)
                return self._answers[key]
        with self._searching:
            found = self.index.page(text, k, skip=skip, where=where or None)
        hits = []
        with self._memory:
            for hit in found.hits:
                name = hashlib.sha256(f"{hit.image.path} {hit.image.mtime_ns}".encode()).hexdigest()[:24]
                _keep(self._hits, name, hit, _GIVEN_OUT)
                hits.append(
                    {
                        "rank": hit.rank, "path": hit.image.path, "score": round(hit.score, 5),
                        "picture": f"picture/{name}",
                        "width": hit.image.width, "height": hit.image.height, "box": list(hit.region.box),
                        "box_share": round(hit.region.share, 4), "nowhere": round(hit.region.nowhere, 4),
                    }
                )  # fmt: skip
            answer = {"text": text, "num_images": len(self.index), "skip": skip, "hits": hits}
            _keep(self._answers, key, answer, _KEPT_ANSWERS)
        return answer

    def picture(self, name: str) -> bytes:
        """JPEG of a hit that was given out.

        Raises:
            UserError: none of that name, or an image that cannot be read any more.
        """
        with self._memory:
            if name in self._pictures:
                self._pictures.move_to_end(name)
                return self._pictures[name]
            hit = self._hits.get(name)
        if hit is None:
            raise UserError("no such picture; search again")
        picture = decode_photograph(hit.file, source=hit.image.path)
        if (picture.height, picture.width) != (hit.image.height, hit.image.width):
            raise BadSampleError(f"{hit.image.path}: changed since it was encoded; run `itemizedclip index` again")
        picture.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=85)
        with self._memory:
            _keep(self._pictures, name, content.getvalue(), _KEPT_PICTURES)
        return content.getvalue()


def _keep(memory: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    memory[key] = value
    memory.move_to_end(key)
    while len(memory) > most:
        memory.popitem(last=False)


def read_search(query: str) -> tuple[str, int, int, str]:
    """Text, k, skip and filter of an address's query.

    Raises:
        UserError: what is wrong with them.
    """
    values = {name: found[-1] for name, found in parse_qs(query, max_num_fields=10).items()}
    text, where = values.get("q", "").strip(), values.get("where", "").strip()
    if not text:
        raise UserError("the search holds no text; type what to look for")
    if max(len(text), len(where)) > MAX_CHARACTERS:
        raise UserError(f"more than {MAX_CHARACTERS} characters; search for less")
    numbers = []
    for name, default, lowest, highest in (("k", 20, 1, MOST_HITS), ("skip", 0, 0, MOST_SKIPPED)):
        words = values.get(name, str(default))
        number = int(words) if words.isascii() and words.isdecimal() and len(words) < 8 else -1
        if not lowest <= number <= highest:
            raise UserError(f"{name} is {words[:20]!r}; expected {lowest} to {highest}")
        numbers.append(number)
    return text, numbers[0], numbers[1], where


class _SearchHandler(OwnPageHandler):
    def get(self, path: str) -> None:
        server = cast(SearchServer, self.server)
        address = urlsplit(path)
        try:
            if address.path == "search":
                answer = server.search(*read_search(address.query))
                self._send(HTTPStatus.OK, "application/json", json.dumps(answer).encode())
            elif address.path.startswith("picture/"):
                self._send(HTTPStatus.OK, "image/jpeg", server.picture(address.path.removeprefix("picture/")))
            else:
                super().get(path)
        except ValueError as error:
            self._send(HTTPStatus.BAD_REQUEST, "application/json", json.dumps({"error": str(error)}).encode())
        except Exception:
            logger.exception("a search could not be answered")
            answer = {"error": "the search could not be answered; the terminal says why"}
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "application/json", json.dumps(answer).encode())


SearchServer.handler = _SearchHandler
