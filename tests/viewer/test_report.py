"""The report page: what stands in it, that it lets nothing in or out, its size, and the server that answers texts."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from report_cases import AXIAL, PROVENANCE, photograph, planted_maps, scan, study

from itemizedclip.commands.cli import main as cli
from itemizedclip.commands.questions import read_items_file, split_texts
from itemizedclip.models.factory import load_pretrained
from itemizedclip.viewer.explanation import Explainer, Explanation, explain_input
from itemizedclip.viewer.geometry import Geometry
from itemizedclip.viewer.inputs import InputView, ModelInput, photograph_input
from itemizedclip.viewer.page import serve
from itemizedclip.viewer.page.html import described_items, pack_array, report_html, rounded_hu
from itemizedclip.viewer.page.serve import (
    ASK_PATH,
    MAX_CHARACTERS,
    MAX_ITEMS,
    QuestionError,
    ReportServer,
    read_question,
)

EVIL = "</script><script>alert(1)</script> & \"quoted\" 'too' <b>bold</b> \u2028 ☃"
TINY = {
    "name": "tiny",
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    "head_heads": 4,
}


# --- reading a page back, without any of the code that made it --------------------------------------------------------


class Page(HTMLParser):
    """Tags, scripts by id, title and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.visible = self.title = self.style = self.program = ""
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.report = json.loads(self.scripts["report"])

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "input", "br"):
            self._open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if self._open and self._open[-1][0] == tag:
            self._open.pop()

    def handle_data(self, data):
        tag, attributes = self._open[-1] if self._open else ("", {})
        if tag == "script" and attributes.get("type") == "module":
            self.program += data
        elif tag == "script":
            self.scripts[attributes["id"]] = self.scripts.get(attributes["id"], "") + data
        elif tag == "style":
            self.style += data
        elif tag == "title":
            self.title += data
        else:
            self.visible += data

    def policy(self) -> dict[str, str]:
        (content,) = [a["content"] for t, a in self.tags if a.get("http-equiv") == "Content-Security-Policy"]
        return dict(part.split(" ", 1) for part in content.split("; "))


def unpack(packed, data=None):
    """What data.js does, in numpy."""
    dtype = np.dtype(packed["type"])
    raw = np.frombuffer(zlib.decompress(base64.b64decode(packed.get("data", data))), np.uint8)
    values = raw.reshape(dtype.itemsize, -1).T.copy().view(dtype).reshape(packed["shape"])
    return values.cumsum(-1, dtype=dtype) if packed["delta"] else values


def values_of(page: Page, number=0):
    packed = page.report["views"][number]["values"]
    return unpack(packed, page.scripts[packed["block"]])


def page_of(explanation, **options) -> Page:
    return Page(report_html(explanation, PROVENANCE, **options))


# --- contents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [photograph, study, scan])
def test_attention_and_scores_come_back_as_they_were(make):
    explanation = make()
    page, maps = page_of(explanation), explanation.maps
    report = page.report
    assert [item["text"] for item in report["items"]] == explanation.items
    assert [item["score"] for item in report["items"]] == pytest.approx(maps.scores.tolist(), abs=1e-6)
    np.testing.assert_allclose([i["headNowhere"] for i in report["items"]], maps.head_nowhere.numpy(), atol=1e-6)
    back = unpack(report["maps"], page.scripts["maps"])
    np.testing.assert_allclose(back, maps.times_uniform(per_head=True).numpy(), rtol=1 / 8000)
    assert (len(explanation.items), report["numHeads"], *report["grid"][-len(maps.grid) :]) == back.shape
    assert len(report["grid"]) == 4


def test_grey_values_and_hounsfield_units_are_exact():
    explanation = study()
    page = page_of(explanation)
    for number, view in enumerate(explanation.source.views):
        assert page.report["views"][number]["unit"] == "grey"
        np.testing.assert_array_equal(values_of(page, number), view.values)
    explanation = scan()
    page = page_of(explanation)
    assert values_of(page).dtype == np.int16
    np.testing.assert_array_equal(values_of(page), explanation.source.views[0].values)
    assert page.report["views"][0]["window"] == [-1150, 350]


def test_every_value_of_a_type_survives_packing():
    extremes = np.array([[-32768, 32767, 0, -1, 32767, -32768]], dtype=np.int16)
    slope = np.arange(3000, dtype=np.int16)[None]
    speckled = (np.random.default_rng(0).random((40, 60)) < 0.1).astype(np.uint8)
    for values in (extremes, extremes.astype(np.uint8), slope, speckled, extremes.astype(np.float32)):
        np.testing.assert_array_equal(unpack(pack_array(values)), values)
    assert pack_array(slope)["delta"]
    assert not pack_array(speckled)["delta"]


def test_pictures_are_exact_unless_they_are_huge():
    explanation = photograph()
    noise = np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    view = explanation.source.views[0]
    source = ModelInput("p", torch.zeros(3, 8, 8), [InputView("p", noise, "rgb", view.geometry)])
    page = page_of(Explanation(source, explanation.items, explanation.maps))
    packed = page.report["views"][0]["values"]
    picture = Image.open(io.BytesIO(base64.b64decode(page.scripts[packed["block"]])))
    assert packed["type"] == "image/png"
    np.testing.assert_array_equal(np.asarray(picture), noise)
    huge = np.zeros((2100, 2000, 3), dtype=np.uint8)
    huge[:, 700:] = 200
    source = ModelInput("h", torch.zeros(3, 8, 8), [InputView("h", huge, "rgb", Geometry.of_input((2100, 2000)))])
    page = page_of(Explanation(source, explanation.items, explanation.maps))
    packed = page.report["views"][0]["values"]
    assert packed["type"] == "image/jpeg"
    picture = Image.open(io.BytesIO(base64.b64decode(page.scripts[packed["block"]])))
    assert np.abs(np.asarray(picture)[:, ::100].astype(int) - huge[:, ::100]).max() < 12
    assert page.report["notes"][-2:] == ["a note of the model", "h: stored as JPEG, its colours are not exact"]


def test_pictures_no_browser_would_draw_are_shown_smaller():
    long = np.zeros((40, 20_000, 3), dtype=np.uint8)
    geometry = Geometry.of_input((40, 20_000)).crop((0, 12_000), (40, 40))
    source = ModelInput("strip", torch.zeros(3, 40, 40), [InputView("strip", long, "rgb", geometry)])
    page = page_of(Explanation(source, ["x"], planted_maps((4, 4), [(0, 1)])))
    view = page.report["views"][0]
    assert view["size"] == [1, 16, 8192]
    # What the model saw begins at 60 % of the width, still.
    assert view["offset"][2] / view["scale"][2] / 8192 == pytest.approx(0.6)
    assert "20000×40 pixels, shown at 8192×16" in page.report["notes"][-1]


def test_geometry_spacing_and_directions_are_told():
    view = page_of(photograph()).report["views"][0]
    # 60 × 80 → 64 × 85, of which the middle 64 columns: 10 are cut off at the left.
    assert (view["size"], view["viewSize"]) == ([1, 60, 80], [1, 64, 64])
    assert view["scale"] == pytest.approx([1, 64 / 60, 85 / 80])
    assert view["offset"] == [0, 0, 10]
    assert (view["spacing"], view["toward"]) == (None, None)
    padded = page_of(scan(affine=AXIAL)).report["views"][0]
    assert padded["offset"] == [-2, 1, 6]
    assert padded["spacing"] == [5.0, 0.7, 0.7]
    assert padded["toward"] == ["S", "P", "L"]


def test_colours_are_matplotlibs():
    table = np.frombuffer(base64.b64decode(page_of(photograph()).report["colours"]), np.uint8).reshape(256, 3)
    expected = colormaps["inferno"](np.linspace(0, 1, 256))[:, :3] * 255
    assert np.abs(table - expected).max() <= 1


def test_the_page_says_what_it_was_made_from():
    page = page_of(photograph(name="scene_7.png"), cut_items=[True, False])
    assert page.title == "scene_7.png: where each item looked"
    for expected in ("scene_7.png", "a-model", "epoch_3.pt", "abababababab", "not a medical device"):
        assert expected in page.visible
    facts = dict(page.report["facts"])
    assert facts["SHA-256"] == "ab" * 32
    assert facts["epoch"] == "3"
    assert page.report["notes"] == ["a note", "a note of the model"]
    assert [item["isCut"] for item in page.report["items"]] == [True, False]


def test_a_report_of_nothing_is_refused_unless_texts_can_be_typed():
    nothing = Explanation(photograph().source, [], planted_maps((8, 8), ()))
    with pytest.raises(ValueError, match="at least one item"):
        report_html(nothing, PROVENANCE)
    page = page_of(nothing, ask="ask")
    assert page.report["items"] == []
    assert page.report["ask"] == "ask"


# --- what gets in and out --------------------------------------------------------------------------------------------


def test_texts_cannot_leave_their_place():
    explanation = photograph(items=[EVIL, "plain"], name=f"{EVIL}.png")
    harmless = page_of(photograph(items=["x", "plain"], name="x.png"))
    page = page_of(explanation)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    assert page.report["items"][0]["text"] == EVIL
    assert page.report["views"][0]["name"] == f"{EVIL}.png"
    assert page.title == f"{EVIL}.png: where each item looked"
    assert f"{EVIL}.png" in page.visible
    assert "<" not in page.scripts["report"]


@pytest.mark.parametrize("ask", [None, "ask"])
def test_policy_allows_the_pages_own_script_and_nothing_else(ask):
    page = page_of(photograph(), ask=ask)
    policy = page.policy()

    def digest(text):
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == digest(page.program)
    assert policy["style-src"] == digest(page.style)
    assert policy["connect-src"] == ("'self'" if ask else "'none'")
    assert "unsafe" not in str(policy)


def test_the_page_names_no_other_place():
    page = page_of(photograph())
    for tag, attributes in page.tags:
        for name in ("src", "href", "action"):
            assert attributes.get(name, "data:,") == "data:,", (tag, attributes)
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    for text in (page.program, page.style):
        assert "//cdn" not in text
        assert "url(" not in text
        assert "import" not in text.replace("!important", "")
    assert page.program.count("http") == page.program.count("http://www.w3.org/2000/svg")


def test_equal_inputs_give_equal_pages():
    assert report_html(study(), PROVENANCE) == report_html(study(), PROVENANCE)


def test_headings_labels_and_language():
    page = page_of(study())
    assert ("html", {"lang": "en"}) in page.tags
    labels = {attributes["for"] for tag, attributes in page.tags if tag == "label" and "for" in attributes}
    fields = {a["id"] for tag, a in page.tags if tag in ("input", "select") and a.get("id") not in ("order", None)}
    assert fields == labels


def test_size_stays_near_what_the_voxels_need():
    """Smooth anatomy with noise of ±1 grey level: 16 series fit into half of their voxels' bytes, base64 included."""
    generator = np.random.default_rng(0)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in (16, 96, 96)), indexing="ij")
    body = np.where(x**2 + y**2 < 0.8, 120 + 60 * np.sin(3 * x + 2 * y + z), 0)
    values = np.where(body > 0, body + generator.integers(-1, 2, body.shape), 0).astype(np.uint8)
    views = [InputView(f"S{s}", np.roll(values, s, 2), "grey", Geometry.of_input(values.shape)) for s in range(16)]
    source = ModelInput("big", torch.zeros(1), views)
    maps = planted_maps((16, 2, 6, 6), [(0, 0, 0, 0)] * 5, num_heads=8)
    page = report_html(Explanation(source, [f"item {k}" for k in range(5)], maps), PROVENANCE)
    voxels = 16 * values.size
    assert voxels == 2_359_296
    assert len(page) < voxels / 2


# --- asking ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from itemizedclip.models.factory import create_model

    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("model") / "epoch_2.pt"
    model = create_model(TINY)
    for name, parameter in model.named_parameters():
        if "visual_proj" in name and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    torch.save({"state_dict": model.state_dict(), "model_config": model.config, "step": 12}, path)
    return path


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_pretrained(checkpoint)


@pytest.fixture
def picture(tmp_path):
    generator = np.random.default_rng(2)
    path = tmp_path / "noise.png"
    Image.fromarray(generator.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(path)
    return path


def test_encoded_once_and_asked_often_equals_asked_at_once(loaded, picture):
    with Image.open(picture) as opened:
        source = photograph_input("noise.png", opened.convert("RGB"), loaded)
    texts = ["a small red seven", "a large cyan two", "nothing of the kind, at all"]
    for normalise in (False, True):
        explainer = Explainer(loaded, source, normalise_tokens=normalise)
        expected = explain_input(loaded, source, texts, normalise_tokens=normalise).maps
        for k, text in enumerate(texts):
            asked = explainer.explain([text]).maps
            torch.testing.assert_close(asked.head_weights[0], expected.head_weights[k], rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(asked.scores[0], expected.scores[k], rtol=1e-4, atol=1e-6)
    nothing = explainer.explain([])
    assert nothing.maps.head_weights.shape == (0, 4, 4, 4)
    assert explainer.cut_items(["red", "word " * 30]) == [False, True]
    assert explainer.cut_items([]) == []


@contextlib.contextmanager
def serving(answer=None):
    """A server with the page "<p>page</p>" that answers with one planted item per text."""

    def planted(items):
        maps = planted_maps((8, 8), [(0, 1)] * len(items))
        return described_items(Explanation(photograph().source, list(items), maps))

    with ReportServer("<p>page</p>", answer or planted) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def send(server, method="GET", path=None, body=None, **headers):
    """Status and contents of one request; None leaves a header out."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    path = f"/{server.token}/" if path is None else path
    connection.putrequest(method, path, skip_host=True)
    data = b"" if body is None else (body if isinstance(body, bytes) else json.dumps(body).encode())
    sent = {"Host": f"127.0.0.1:{server.server_port}", "Content-Length": str(len(data))}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        sent.setdefault("Content-Type", "application/json")
    for name, value in sent.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(data)
    answer = connection.getresponse()
    contents = answer.read()
    connection.close()
    return answer.status, contents, dict(answer.getheaders())


def test_the_server_gives_its_page_and_answers_texts():
    with serving() as server:
        assert server.server_address[0] == "127.0.0.1"
        status, contents, headers = send(server)
        assert (status, contents) == (200, b"<p>page</p>")
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        status, contents, _ = send(server, "POST", f"/{server.token}/{ASK_PATH}", {"items": [" a text ", EVIL, " "]})
        answer = json.loads(contents)
        assert status == 200
        assert [item["text"] for item in answer["items"]] == ["a text", EVIL.strip()]
        assert unpack(answer["maps"]).shape == (2, 2, 8, 8)
        # localhost is this machine too, and a browser tells where its page came from.
        own = f"localhost:{server.server_port}"
        assert send(server, Host=own)[0] == 200
        path = f"/{server.token}/{ASK_PATH}"
        assert send(server, "POST", path, {"items": ["x"]}, Host=own, Origin=f"http://{own}")[0] == 200


def test_the_server_refuses_strangers():
    with serving() as server:
        path = f"/{server.token}/{ASK_PATH}"
        wrong_token = server.token[:-1] + ("A" if server.token[-1] != "A" else "B")
        question = {"items": ["x"]}
        port = server.server_port
        refusals = {
            "another name for this machine": (403, send(server, Host=f"evil.example:{port}")),
            "no host": (403, send(server, Host=None)),
            "another port": (403, send(server, Host="127.0.0.1:1")),
            "no token": (404, send(server, path="/")),
            "a wrong token": (404, send(server, path=f"/{wrong_token}/")),
            "a file": (404, send(server, path=f"/{server.token}/../../etc/passwd")),
            "the question by GET": (404, send(server, path=path)),
            "another page": (403, send(server, "POST", path, question, Origin="https://evil.example")),
            "a page without an origin": (403, send(server, "POST", path, question, Origin="null")),
            "a plain form": (403, send(server, "POST", path, b"items=x", Content_Type="text/plain")),
            "another host asking": (403, send(server, "POST", path, question, Host=f"evil.example:{port}")),
            "the question elsewhere": (404, send(server, "POST", "/ask", question)),
            "another method": (501, send(server, "PUT", path, question)),
            "too much": (413, send(server, "POST", path, question, Content_Length=str(10**9))),
            "a length of 5,000 digits": (413, send(server, "POST", path, question, Content_Length="9" * 5000)),
            "no length": (411, send(server, "POST", path, question, Content_Length=None)),
            "a negative length": (400, send(server, "POST", path, question, Content_Length="-1")),
            "a length in other digits": (400, send(server, "POST", path, question, Content_Length="٣".encode())),
            "pieces": (411, send(server, "POST", path, question, Transfer_Encoding="chunked")),
        }
        for what, (expected, (status, contents, _)) in refusals.items():
            assert status == expected, what
            assert b"page</p>" not in contents, what


def test_an_address_may_hold_any_bytes():
    with serving() as server, socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        connection.sendall(b"GET /\xe9\xff HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % server.server_port)
        assert connection.recv(100).startswith(b"HTTP/1.1 404")


def test_clients_that_hang_up_or_wait_are_no_errors(capfd, caplog, monkeypatch):
    monkeypatch.setattr(serve, "SILENCE_S", 0.2)
    monkeypatch.setattr(serve, "REQUEST_S", 0.2)
    with serving(lambda items: {"filler": "x" * 10_000_000}) as server:
        host = f"Host: 127.0.0.1:{server.server_port}\r\n"
        ask = f"POST /{server.token}/{ASK_PATH} HTTP/1.1\r\n{host}Content-Type: application/json\r\n"
        beginnings = [
            "GET /",
            f"GET /{server.token}/ HTTP/1.1\r\n{host}",
            f"{ask}Content-Length: 500\r\n\r\n",
            f'{ask}Content-Length: 500\r\n\r\n{{"items"',
            f'{ask}Content-Length: 16\r\n\r\n{{"items": ["a"]}}',  # the answer finds nobody
            "\x16\x03\x01\x02\x00\x01\x00\x01\xfc",  # a browser that tries TLS
        ]
        waiting = []
        for begin in beginnings * 2:
            connection = socket.create_connection(("127.0.0.1", server.server_port), timeout=10)
            connection.sendall(begin.encode("latin-1"))
            if len(waiting) < len(beginnings):
                waiting.append(connection)
                continue
            # Closed with a reset, as a browser that is killed does.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        assert send(server)[0] == 200
        for connection in waiting:
            while connection.recv(2**20):
                pass
            connection.close()
    assert "Traceback" not in capfd.readouterr().err
    assert not caplog.records


def closed_after(connection: socket.socket, seconds: float) -> bool:
    """Whether the server closes a connection within so many seconds."""
    connection.settimeout(seconds)
    try:
        while connection.recv(2**20):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def test_a_byte_now_and_then_keeps_no_connection_open(monkeypatch, caplog):
    monkeypatch.setattr(serve, "REQUEST_S", 0.4)
    with serving() as server:
        ask = f"POST /{server.token}/{ASK_PATH} HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n"
        for begin in ("G", ask, f"{ask}Content-Type: application/json\r\nContent-Length: 500\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
                connection.sendall(begin.encode())
                for _ in range(100):
                    try:
                        connection.sendall(b"a")
                    except ConnectionError:
                        break
                    if closed_after(connection, 0.05):
                        break
                else:
                    pytest.fail(f"still open after {begin[:20]!r}")
        assert send(server)[0] == 200
    assert not caplog.records


def test_an_answer_that_nobody_takes_is_given_up(monkeypatch):
    monkeypatch.setattr(serve, "REQUEST_S", 0.3)
    with serving() as server:
        server.page = b"x" * 50_000_000
        with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
            host = f"Host: 127.0.0.1:{server.server_port}"
            connection.sendall(f"GET /{server.token}/ HTTP/1.1\r\n{host}\r\n\r\n".encode())
            deadline = time.monotonic() + 10
            while server._connections and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not server._connections


@pytest.mark.parametrize(
    "header", [b"x" * 200_000, b"A: " + b"x" * 100_000 + b"\r\n", b"A: x\r\n" * 150, b"A: x\r\n" * 50_000]
)
def test_headers_of_any_size_are_refused(header, caplog):
    with serving() as server, socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        with contextlib.suppress(ConnectionError):  # closed before all of it was sent
            connection.sendall(b"GET / HTTP/1.1\r\n" + header + b"\r\n")
            assert connection.recv(12) in (b"HTTP/1.1 431", b"HTTP/1.1 400")
        assert send(server)[0] == 200
    assert not caplog.records


def test_many_connections_that_ask_nothing_keep_nobody_out(monkeypatch):
    monkeypatch.setattr(serve, "MAX_CONNECTIONS", 8)
    with serving() as server:
        silent = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(40)]
        assert send(server)[0] == 200
        assert len(server._connections) <= 8
        assert closed_after(silent[0], 10)
        for connection in silent:
            connection.close()


def test_questions_are_checked():
    wrong = {
        b"[" * 100_000: "nested too deeply",
        b'{"items": ' + b"[" * 100_000: "nested too deeply",
        b"not json": "not valid JSON",
        b"\xff\xfe": "no UTF-8 text",
        b"[1]": "no list of texts",
        b'{"items": "x"}': "no list of texts",
        b'{"items": [1]}': "no list of texts",
        b'{"items": ["  "]}': "holds no text",
        json.dumps({"items": ["x"] * (MAX_ITEMS + 1)}).encode(): f"at most {MAX_ITEMS}",
        json.dumps({"items": ["x" * (MAX_CHARACTERS + 1)]}).encode(): f"at most {MAX_CHARACTERS}",
    }
    for body, message in wrong.items():
        with pytest.raises(QuestionError, match=message):
            read_question(body)
    with serving() as server:
        status, contents, _ = send(server, "POST", f"/{server.token}/{ASK_PATH}", b"not json")
        assert status == 400
        assert "not valid JSON" in json.loads(contents)["error"]


def test_a_failing_model_is_told_to_the_page_and_the_server_lives_on(caplog):
    def failing(items):
        if items == ["bad"]:
            raise ValueError("this text cannot be read")
        raise RuntimeError("out of memory at 0x7f")

    with serving(failing) as server:
        path = f"/{server.token}/{ASK_PATH}"
        status, contents, _ = send(server, "POST", path, {"items": ["bad"]})
        assert (status, json.loads(contents)["error"]) == (400, "this text cannot be read")
        status, contents, _ = send(server, "POST", path, {"items": ["worse"]})
        assert status == 500
        assert "0x7f" not in json.loads(contents)["error"]
        assert "out of memory at 0x7f" in caplog.text
        assert send(server)[0] == 200


def test_a_taken_port_is_said_to_be():
    with serving() as server, pytest.raises(ValueError, match="leave --port out"):
        ReportServer("", lambda items: {}, server.server_port)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_a_page(checkpoint, loaded, picture, tmp_path, capsys):
    output = tmp_path / "new" / "page.html"
    texts = ["a small red seven", "a large cyan two"]
    cli(["report", str(picture), "--checkpoint", str(checkpoint), "--items", "; ".join(texts), "--output", str(output)])
    out = capsys.readouterr().out
    assert str(output) in out
    assert "a small red seven" in out
    page = Page(output.read_text(encoding="utf-8"))
    assert [item["text"] for item in page.report["items"]] == texts
    with Image.open(picture) as opened:
        expected = explain_input(loaded, photograph_input("noise.png", opened.convert("RGB"), loaded), texts).maps
    back = unpack(page.report["maps"], page.scripts["maps"])
    np.testing.assert_allclose(back, expected.times_uniform(per_head=True), rtol=1e-3)
    facts = dict(page.report["facts"])
    assert facts["SHA-256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert facts["model"] == "tiny"
    assert facts["training steps"] == "12"
    assert str(tmp_path) not in output.read_text(encoding="utf-8")
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]


def test_a_study_from_its_folder(tmp_path, capsys):
    """A whole study of several series: what the page holds is what lies in the files."""
    from itemizedclip_radiology.synthetic.cohort import write_studies

    from itemizedclip.models.factory import create_model

    model = create_model("HLIPSN_debug")
    weights, root, output = tmp_path / "epoch_1.pt", tmp_path / "cohort", tmp_path / "study.html"
    torch.save({"state_dict": model.state_dict(), "model_config": model.config}, weights)
    folder = write_studies(root, kind="mri", num_train=0, num_valid=1, seed=1)
    study = root / "valid" / next(iter(folder.studies))
    cli(["report", str(study), "--checkpoint", str(weights), "--items", "acute stroke;glioma", "--output", str(output)])
    assert "most in" in capsys.readouterr().out
    page = Page(output.read_text(encoding="utf-8"))
    series = sorted(path.parent.name for path in study.glob("*/img.pt"))
    assert len(series) > 2
    assert sorted(view["name"] for view in page.report["views"]) == series
    for number, view in enumerate(page.report["views"]):
        saved = torch.load(study / view["name"] / "img.pt", weights_only=True).numpy()
        np.testing.assert_array_equal(values_of(page, number), saved)
    weights_sum = unpack(page.report["maps"], page.scripts["maps"]).mean((2, 3, 4, 5))
    nowhere = [item["headNowhere"] for item in page.report["items"]]
    np.testing.assert_allclose(weights_sum + nowhere, 1, atol=1e-3)


def test_items_files(tmp_path):
    lines, listed = tmp_path / "items.txt", tmp_path / "items.json"
    lines.write_text("one thing; with a semicolon\n\n  another \n", encoding="utf-8")
    listed.write_text('["one thing", "another"]', encoding="utf-8")
    assert read_items_file(lines) == ["one thing; with a semicolon", "another"]
    assert read_items_file(listed) == ["one thing", "another"]
    assert split_texts(" a; ;b ") == ["a", "b"]


def test_bad_input_gives_one_message(checkpoint, picture, tmp_path, capsys):
    empty, wrong_json, binary = tmp_path / "empty.txt", tmp_path / "wrong.json", tmp_path / "binary.txt"
    empty.write_text(" \n")
    wrong_json.write_text('{"a": 1}')
    binary.write_bytes(b"\xff\xfe\x00")
    common = [str(picture), "--checkpoint", str(checkpoint)]
    missing = str(tmp_path / "none.png")
    cases = {
        "no such file; expected a JPEG": [missing, *common[1:], "--items", "x"],
        "checkpoint does not exist": [str(picture), "--checkpoint", str(tmp_path / "none.pt"), "--items", "x"],
        "no readable image": [str(empty), *common[1:], "--items", "x"],
        "has no items of its own": common,
        "holds no text": [*common, "--items", " ; "],
        "give one of them": [*common, "--items", "x", "--items-file", str(empty)],
        "empty.txt: holds no text": [*common, "--items-file", str(empty)],
        "expected a list of texts": [*common, "--items-file", str(wrong_json)],
        "is no UTF-8 text": [*common, "--items-file", str(binary)],
        "one text per line": [*common, "--items-file", str(tmp_path / "none.txt")],
        "is a folder": [*common, "--items", "x", "--output", str(tmp_path)],
        "cannot write there": [*common, "--items", "x", "--output", str(empty / "page.html")],
        "--port needs --serve": [*common, "--items", "x", "--port", "8000"],
        "expected 0": [*common, "--serve", "--port", "99999"],
        "expected auto, cpu": [*common, "--items", "x", "--device", "tpu"],
    }
    for message, arguments in cases.items():
        with pytest.raises(SystemExit) as stopped:
            cli(["report", *arguments])
        assert stopped.value.code in (1, 2), message
        err = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert message in err
        assert "Traceback" not in err


def test_served_from_the_command_line(checkpoint, picture, tmp_path):
    """Start, ask as the page does, end by Ctrl-C; nothing is written."""
    process = subprocess.Popen(
        [sys.executable, "-m", "itemizedclip.commands.report", str(picture), "--checkpoint", str(checkpoint),
         "--serve"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        connection = http.client.HTTPConnection(*url.split("/")[2].split(":"), timeout=30)
        path = "/" + url.split("/", 3)[3]
        connection.request("GET", path)
        page = Page(connection.getresponse().read().decode())
        assert page.report["items"] == []
        body = json.dumps({"items": ["a small red seven"]})
        connection.request("POST", path + page.report["ask"], body, {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        assert unpack(answer["maps"]).shape == (1, 4, 4, 4)
    finally:
        process.send_signal(2)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "ended" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["noise.png"]


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli(["report", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for flag in ("--checkpoint", "--items", "--items-file", "--output", "--serve", "--port", "--model", "--device"):
        assert flag in out


def test_rounded_hu_stay_within_half_a_step():
    values = np.arange(-1024, 3072, dtype=np.int16)
    steps, middles = rounded_hu(values)
    off = np.abs(middles[steps].astype(int) - values)
    soft = (values >= -200) & (values < 300)
    air, lung = values < -950, (values >= -950) & (values < -200)
    assert [off[part].max() for part in (soft, lung, air, values >= 300)] == [2, 7, 18, 18]
    assert steps.dtype == np.uint8
    outside, _ = rounded_hu(np.array([-32768, -2000, 5000, 32767], dtype=np.int16))
    assert outside.tolist() == [0, 0, 253, 253]
