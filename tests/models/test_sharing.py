"""Models to share: every layout and back, nothing private in them, and a hub on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from commands import fails, run
from safetensors import safe_open

import itemizedclip as ic
from itemizedclip.commands import convert
from itemizedclip.commands.share import main_pull, main_push
from itemizedclip.models.factory import create_model, load_model_config, load_pretrained
from itemizedclip.models.weights import CheckpointError, given_checkpoint

RUNS = Path(__file__).parents[1] / "fixtures" / "runs"
CHECKPOINTS = {
    "2d": RUNS / "tiny_2d" / "checkpoints" / "epoch_6.pt",
    "hlip": RUNS / "tiny_hlip" / "checkpoints" / "epoch_3.pt",
}


def weights_of(path, **more):
    return load_pretrained(path, **more).model.state_dict()


def assert_same_weights(one, other):
    assert set(one) == set(other)
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_there_and_back_through_every_layout(kind, tmp_path):
    if kind == "hlip":
        pytest.importorskip("timm")
    checkpoint = CHECKPOINTS[kind]
    before = load_pretrained(checkpoint)
    convert.main([str(checkpoint), "--to", str(tmp_path / "shared")])
    convert.main([str(tmp_path / "shared"), "--to", str(tmp_path / "alone.safetensors")])
    (tmp_path / "config.json").write_text(json.dumps(before.config))
    convert.main([str(tmp_path / "alone.safetensors"), "--layout", "released", "--to", str(tmp_path / "r.pt")])
    for path, more in (
        (tmp_path / "shared", {}),
        (tmp_path / "shared" / "model.safetensors", {}),
        (tmp_path / "alone.safetensors", {}),
        (tmp_path / "r.pt", {"config": str(tmp_path / "config.json")}),
    ):
        after = load_pretrained(path, **more)
        assert_same_weights(before.model.state_dict(), after.model.state_dict())
        assert after.tokenizer(["a small red seven"]).tolist() == before.tokenizer(["a small red seven"]).tolist()
    shared = load_pretrained(tmp_path / "shared")
    assert shared.meta["transform"] == before.meta["transform"]
    assert shared.meta["metrics"] == before.meta["metrics"]


def test_names_of_the_released_layout(tmp_path):
    """The published scripts save under the prefix of DDP, and read `state_dict`."""
    convert.main([str(CHECKPOINTS["2d"]), "--layout", "released", "--to", str(tmp_path / "r.pt")])
    contents = torch.load(tmp_path / "r.pt", weights_only=True)
    assert set(contents) == {"epoch", "name", "state_dict"}
    assert {"module.visual_proj.attn.in_proj_weight", "module.logit_scale", "module.image_post.proj"} <= set(
        contents["state_dict"]
    )


@pytest.mark.slow
def test_a_model_of_published_size(tmp_path):
    """The layout of the released MRI file, random weights: released → shared → released."""
    pytest.importorskip("timm")
    config = load_model_config("HLIPSN_BiomedBERT_81616_itemizedclip")
    config["text_cfg"]["tokenizer"] = "builtin"
    state_dict = {f"module.{key}": value for key, value in create_model(config).state_dict().items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"state_dict": state_dict}, tmp_path / "a.pt")
    released = ["--model", str(tmp_path / "config.json")]
    convert.main([str(tmp_path / "a.pt"), *released, "--to", str(tmp_path / "b.safetensors")])
    convert.main([str(tmp_path / "b.safetensors"), "--layout", "released", "--to", str(tmp_path / "c.pt")])
    assert_same_weights(state_dict, torch.load(tmp_path / "c.pt", weights_only=True)["state_dict"])


def test_nothing_of_the_machine_is_shared(tmp_path):
    main_push([str(CHECKPOINTS["2d"]), "--to", "me/seven", "--dry-run", "--folder", str(tmp_path / "f"), "--licence",
               "cc-by-nc-4.0", "--training-data", "Invented scenes."])  # fmt: skip
    with safe_open(str(tmp_path / "f/model.safetensors"), framework="pt") as file:
        header = file.metadata()
    texts = [*header.values(), (tmp_path / "f/config.json").read_text(), (tmp_path / "f/README.md").read_text()]
    options = torch.load(CHECKPOINTS["2d"], weights_only=True)["options"]
    for text in texts:
        assert "options" not in json.loads(text) if text.startswith("{") else True
        assert not re.search(r"/(home|root|tmp|work|data)/", text)
    assert "lr" in json.dumps(options)  # what is left behind


def test_the_card(tmp_path):
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"evaluation": "own", "metrics": {"top1": 0.75}}))
    flags = ["--licence", "cc-by-nc-4.0", "--training-data", "Invented scenes.", "--results", str(results)]
    main_push([str(CHECKPOINTS["2d"]), "--to", "me/seven", "--dry-run", "--folder", str(tmp_path / "f"), *flags])
    card = (tmp_path / "f/README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-nc-4.0\n")
    assert "| Training data | Invented scenes. |" in card
    assert 'ic.load("hf-hub:me/seven")' in card
    assert "| own: top1 | 0.7500 |" in card
    pytest.importorskip("timm")
    main_push([str(CHECKPOINTS["hlip"]), "--to", "me/brain", "--dry-run", "--folder", str(tmp_path / "g")])
    assert "Not a medical device" in (tmp_path / "g/README.md").read_text()


def test_what_cannot_be_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = str(CHECKPOINTS["2d"])
    assert "expected a .pt file for --layout released" in fails(
        capsys, convert.main, [checkpoint, "--layout", "released", "--to", "x"]
    )
    assert "no name of the hub; expected owner/name" in fails(capsys, main_push, [checkpoint, "--to", "x", "--dry-run"])
    torch.save({"state_dict": weights_of(checkpoint)}, "r.pt")
    assert "carries no model config" in fails(capsys, convert.main, ["r.pt", "--to", "x"])
    convert.main([checkpoint, "--to", "m.safetensors"])
    assert "is the checkpoint itself" in fails(capsys, convert.main, ["m.safetensors", "--to", "m.safetensors"])
    data = bytearray(Path("m.safetensors").read_bytes())
    Path("cut.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: not a readable checkpoint"):
        load_pretrained("cut.safetensors")
    assert given_checkpoint(Path("m.safetensors")) == Path("m.safetensors")


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    """A hub on this machine: repositories are folders of files by name, what is uploaded lands in them."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def file(self) -> None:
            found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/([\w.-]+)", self.path)
            content = server.repositories.get(found[1], {}).get(found[3]) if found else None
            if content is None:
                known = found is not None and found[1] in server.repositories
                code = "EntryNotFound" if known else "RepoNotFound"
                return self.answer(b"", 404, X_Error_Code=code, X_Repo_Commit="c" * 40)
            etag = hashlib.sha256(content).hexdigest()
            return self.answer(content, X_Repo_Commit="c" * 40, ETag=f'"{etag}"')

        do_GET = do_HEAD = file

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.asked.append((self.path, self.headers.get("Authorization")))
            address = f"http://127.0.0.1:{server.server_port}"
            if self.path == "/api/repos/create":
                wanted = json.loads(body)
                name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
                server.repositories.setdefault(name, {})
                return self.answer(json.dumps({"url": f"{address}/{name}"}).encode())
            if self.path.endswith("/preupload/main"):
                files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                         for f in json.loads(body)["files"]]  # fmt: skip
                return self.answer(json.dumps({"files": files}).encode())
            if "/commit/main" in self.path:
                name = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main.*", self.path)[1]
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        value = line["value"]
                        server.repositories[name][value["path"]] = base64.b64decode(value["content"])
                made = {"commitUrl": f"{address}/{name}/commit/{'c' * 40}", "commitOid": "c" * 40}
                return self.answer(json.dumps(made).encode())
            return self.answer(b"{}")

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories, server.asked = {}, []
    server.variables = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def command(hub, *arguments, cwd):
    result = run(sys.executable, "-m", "itemizedclip", *arguments, cwd=cwd, **hub.variables)
    assert "Traceback" not in result.stderr, result.stderr
    return result


@pytest.mark.slow
def test_pushed_pulled_and_used_by_its_name(hub, tmp_path):
    pushed = command(hub, "push", str(CHECKPOINTS["2d"]), "--to", "me/seven", "--licence", "mit", cwd=tmp_path)
    assert pushed.returncode == 0, pushed.stderr
    assert set(hub.repositories["me/seven"]) == {"model.safetensors", "config.json", "README.md"}
    assert {token for _, token in hub.asked} == {"Bearer hf_test"}
    pulled = command(hub, "pull", "me/seven", "--to", "here", cwd=tmp_path)
    assert pulled.returncode == 0, pulled.stderr
    assert_same_weights(weights_of(CHECKPOINTS["2d"]), weights_of(tmp_path / "here"))
    picture = Path(__file__).parents[1] / "fixtures" / "pictures" / "0.png"
    explained = command(hub, "explain", str(picture), "--checkpoint", "hf-hub:me/seven", "--items", "a seven",
                        "--output", "seen", cwd=tmp_path)  # fmt: skip
    assert explained.returncode == 0, explained.stderr
    assert (tmp_path / "seen/attention.png").is_file()
    hub.variables["HF_HUB_OFFLINE"] = "1"  # what was fetched once is used
    assert command(hub, "pull", "me/seven", "--to", "again", cwd=tmp_path).returncode == 0
    missing = command(hub, "pull", "me/eight", "--to", "again", cwd=tmp_path)
    assert missing.returncode == 1
    assert re.search(r"hf-hub:me/eight: model\.safetensors cannot be fetched .*bring that file", missing.stderr)


def test_a_dry_run_asks_nobody(hub, tmp_path):
    result = command(hub, "push", str(CHECKPOINTS["2d"]), "--to", "me/seven", "--dry-run", cwd=tmp_path)
    assert "nothing was sent" in result.stdout
    assert (tmp_path / "seven/model.safetensors").is_file()
    assert hub.asked == []
    assert hub.repositories == {}


def test_python_loads_a_shared_folder(tmp_path):
    convert.main([str(CHECKPOINTS["2d"]), "--to", str(tmp_path / "s")])
    picture = Path(__file__).parents[1] / "fixtures" / "pictures" / "0.png"
    one, other = (
        ic.score(ic.load(path, device="cpu"), picture, ["a seven"]) for path in (CHECKPOINTS["2d"], tmp_path / "s")
    )
    assert torch.equal(one, other)
    assert os.access(tmp_path / "s/model.safetensors", os.R_OK)


def test_pull_without_a_network_says_what_to_bring(tmp_path, capsys, monkeypatch):
    import huggingface_hub

    def refuse(*arguments, **more):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    said = fails(capsys, main_pull, ["me/seven", "--to", str(tmp_path)])
    assert "model.safetensors cannot be fetched (We couldn't connect); without a network, bring that file" in said
