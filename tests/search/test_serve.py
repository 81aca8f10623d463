"""`itemizedclip search --serve`: the API, who gets an answer, many at once, and the page in a browser."""

from __future__ import annotations

import http.client
import io
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from PIL import Image
from test_index import World, index, save_model, write_pictures

from itemizedclip.search.index import open_searcher
from itemizedclip.search.serve import SearchServer


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("served")
    made = World(write_pictures(root / "photos", 31), save_model(root / "tiny.pt"), root / "photos.index")
    index(made.images, "--checkpoint", made.checkpoint, "--recall-queries", "none")
    return made


@pytest.fixture(scope="module")
def server(world) -> Iterator[SearchServer]:
    with SearchServer(open_searcher(world.index, device="cpu")) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        served.shutdown()
    thread.join()


def get(server: SearchServer, path: str, **headers: str) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers["Content-Type"], content


def search(server: SearchServer, **query: object) -> tuple[int, dict]:
    status, kind, content = get(server, f"/{server.token}/search?{urlencode(query)}")
    assert kind == "application/json"
    return status, json.loads(content)


def test_pages_of_hits_are_those_of_the_index(server, world):
    exact = open_searcher(world.index, device="cpu").page("a lake", 31).hits
    found = []
    for skip in range(0, 40, 10):
        status, answer = search(server, q="a lake", k=10, skip=skip)
        assert status == 200
        assert (answer["num_images"], answer["skip"]) == (31, skip)
        found += answer["hits"]
    assert [hit["path"] for hit in found] == [hit.image.path for hit in exact]
    assert [hit["rank"] for hit in found] == list(range(1, 32))
    assert [hit["box"] for hit in found] == [list(hit.region.box) for hit in exact]
    for hit in found[:3]:
        status, kind, content = get(server, f"/{server.token}/{hit['picture']}")
        assert (status, kind) == (200, "image/jpeg")
        assert Image.open(io.BytesIO(content)).size == (hit["width"], hit["height"])  # smaller than 320 pixels


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "the search holds no text"),
        ({"q": " "}, "the search holds no text"),
        ({"q": "x" * 2001}, "more than 2000 characters"),
        ({"q": "x", "k": 0}, "k is '0'; expected 1 to 100"),
        ({"q": "x", "k": "٣"}, "expected 1 to 100"),
        ({"q": "x", "skip": -1}, "skip is '-1'; expected 0 to 5000"),
        ({"q": "x", "where": "a = 1"}, "--where filters a large index"),
    ],
)
def test_searches_that_cannot_be(server, query, message):
    status, answer = search(server, **query)
    assert status == 400
    assert message in answer["error"]


def test_nobody_else_gets_an_answer(server, world):
    token = server.token
    assert get(server, f"/{token}/search?q=x", Host="evil.example")[0] == 403
    assert get(server, "/search?q=x")[0] == 404
    assert get(server, f"/{token[:-1]}x/search?q=x")[0] == 404
    for path in ("picture/", "picture/nothing", f"picture/{quote(str(world.checkpoint), safe='')}", "picture/../../x"):
        assert get(server, f"/{token}/{path}")[0] == 400
    assert get(server, f"/{token}/other")[0] == 404
    assert server.server_address[0] == "127.0.0.1"


def test_an_image_that_is_gone_has_no_picture(server, world):
    hit = search(server, q="something gone", k=31)[1]["hits"][-1]
    path = world.images / hit["path"]
    content, times = path.read_bytes(), path.stat()
    path.unlink()
    try:
        status, _, answer = get(server, f"/{server.token}/{hit['picture']}")
        assert status == 400
        assert "no such file" in json.loads(answer)["error"]
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_fifty_people_at_once(server):
    def one(number: int) -> tuple[int, str]:
        status, answer = search(server, q=f"text number {number % 25}", k=5)
        return status, answer["text"]

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(one, range(100)))
    assert answers == [(200, f"text number {number % 25}") for number in range(100)]


def test_the_page_in_a_browser(server, tmp_path):
    pytest.importorskip("selenium", reason="selenium is not installed (extra dev)")
    from browser import BROWSER, DRIVER, MISSING, browser

    if not (BROWSER and DRIVER):
        pytest.skip(MISSING)
    with browser(tmp_path) as chromium:
        chromium.open(server.url, width=1100, height=800)
        chromium.find("#q").send_keys("a lake")
        chromium.run("document.getElementById('k').value = '12'")
        chromium.find("button[type=submit]").click()
        chromium.wait("document.querySelectorAll('#hits li').length === 12")
        assert "images 1 to 12 of 31" in chromium.text("#said")
        chromium.wait("[...document.images].every(image => image.complete && image.naturalWidth)")
        boxes = chromium.run(
            "return [...document.querySelectorAll('.frame')].map(frame => {"
            " const i = frame.querySelector('img').getBoundingClientRect();"
            " const b = frame.querySelector('.box').getBoundingClientRect();"
            " return b.left >= i.left - 1 && b.right <= i.right + 1"
            " && b.top >= i.top - 1 && b.bottom <= i.bottom + 1 })"
        )
        assert boxes == [True] * 12
        if "SHOTS" in os.environ:
            chromium.shoot(Path(os.environ["SHOTS"]) / "search.png")
        for page in (2, 3):
            chromium.find("#next").click()
            chromium.wait(f"document.getElementById('place').textContent === 'page {page}'")
        assert len(chromium.find_all("#hits li")) == 7
        assert not chromium.find("#next").is_enabled()
        chromium.find("#where").send_keys("a = 1\n")
        chromium.wait("document.getElementById('said').className === 'error'")
        assert "--where filters a large index" in chromium.text("#said")
        # A refused filter is the one complaint: the browser notes the answer's status.
        assert all("400" in said for said in chromium.complaints())
        assert all(url.startswith((server.url, "data:")) for url in chromium.requests())
