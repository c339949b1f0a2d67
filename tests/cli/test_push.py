"""`emomerge push` to a server of the test's own that answers as the Hub does."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from emomerge.cli import main

hub = pytest.importorskip("huggingface_hub")
from huggingface_hub import utils  # noqa: E402


class Hub(ThreadingHTTPServer):
    """Remembers requests and the files of commits; `status` is what it answers to the making of a repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.requests, self.files = 200, [], {}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        answer = {"url": "https://huggingface.co/me/model"}
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            answer = {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"success": True, "commitOid": "a" * 40, "commitUrl": "https://huggingface.co/me/model/commit/a"}
        status = self.server.status if self.path == "/api/repos/create" else 200
        text = json.dumps(answer if status < 400 else {"error": "no"}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def server(monkeypatch):
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    utils.close_session()  # a session remembers whether it is offline
    yield server
    server.shutdown()
    server.server_close()
    utils.close_session()


@pytest.fixture
def model(tmp_path):
    """A merge in a folder, with everything beside it that must stay at home."""
    folder = tmp_path / "merged"
    (folder / "masks").mkdir(parents=True)
    save_file({"w": torch.randn(3, 5)}, folder / "model.safetensors")
    save_file({"w": torch.ones(3, 5)}, folder / "masks/sens.safetensors")
    for name in (
        "config.json",
        "merge.json",
        "tokenizer.json",
        "optimizer.pt",
        "evaluations.jsonl",
        "metrics.jsonl",
        "run.bin",
    ):
        (folder / name).write_text("{}")
    save_file({"m": torch.ones(2)}, folder / "optimizer.safetensors")
    save_file({"m": torch.ones(2)}, folder / "state.safetensors")
    (folder / ".secret.json").write_text("{}")
    (folder / "README.md").write_text("---\nlibrary_name: x\n---\n# The card\n")
    return folder


WANTED = ["README.md", "config.json", "masks/sens.safetensors", "merge.json", "model.safetensors", "tokenizer.json"]


def push(*args):
    return CliRunner().invoke(main, ["push", *map(str, args)])


def refused(result, *words):
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    for word in words:
        assert word in result.stderr


def test_a_model_is_uploaded_with_its_card_and_nothing_else(server, model):
    done = push(model, "me/model", "--json")
    assert done.exit_code == 0, done.output
    assert sorted(server.files) == WANTED
    for name in WANTED:
        assert server.files[name] == (model / name).read_bytes()
    found = json.loads(done.stdout)
    assert (found["commit"], found["dry_run"]) == ("a" * 40, False)
    assert [file["name"] for file in found["files"]] == WANTED
    paths = [path for path, *_ in server.requests]
    assert paths[0] == "/api/repos/create" and sum("/commit/main" in path for path in paths) == 1
    assert {token for _, token, _ in server.requests} == {"Bearer hf_secret"}
    assert "private" not in json.loads(server.requests[0][2])


def test_private_and_a_branch(server, model):
    assert push(model, "me/model", "--private", "--revision", "v2").exit_code == 0
    made = json.loads(server.requests[0][2])
    assert made.get("private") is True or made.get("visibility") == "private"
    paths = [path for path, *_ in server.requests]
    assert any(path.endswith("/branch/v2") for path in paths) and any("/commit/v2" in path for path in paths)


def test_a_dry_run_needs_neither_token_nor_network(model, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    done = push(model, "me/model", "--dry-run")
    assert done.exit_code == 0, done.output
    assert all(name in done.stdout for name in WANTED)
    assert "# The card" in done.stdout and "Nothing was uploaded" in done.stdout
    assert "optimizer" not in done.stdout and "state" not in done.stdout


def test_a_single_file_gets_a_card(model):
    done = push(model / "model.safetensors", "me/model", "--dry-run", "--json")
    found = json.loads(done.stdout)
    assert [file["name"] for file in found["files"]] == ["README.md", "model.safetensors"]
    assert found["card"].startswith("---")


def test_refusals_are_one_line(server, model, monkeypatch, tmp_path):
    refused(push(tmp_path / "absent", "me/model", "--dry-run"), "no model here")
    (tmp_path / "empty").mkdir()
    refused(push(tmp_path / "empty", "me/model", "--dry-run"), "no weights here")
    refused(push(model, "not a name"), "not the name of a repository", "USER/NAME")
    for server.status in (401, 403):
        refused(push(model, "me/model"), "does not let this token write", str(server.status), "hf auth login")
    server.status = 422
    refused(push(model, "me/model"), "the Hub refuses the upload")
    assert not server.files
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(push(model, "me/model"), "cannot be reached", "check the connection")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    refused(push(model, "me/model"), "no token", "hf auth login")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(push(model, "me/model"), "HF_HUB_OFFLINE", "--dry-run")


def test_the_recommended_model_of_an_output_folder(tmp_path, model):
    def write(**selected):
        about = {"name": "tall-mask", "path": "elsewhere/out/merges/tall-mask", "validation_loss": 0.1, "sentence": "Use it."}
        results = {"schema_version": 2, "name": "x", "selected": {**about, **selected}}
        (tmp_path / "out/results.json").write_text(json.dumps(results))

    (tmp_path / "out/merges").mkdir(parents=True)
    Path(model).rename(tmp_path / "out/merges/tall-mask")
    write()
    assert "model.safetensors" in push(tmp_path / "out", "me/model", "--dry-run").stdout
    write(kind="nothing", name="base")
    refused(push(tmp_path / "out", "me/model", "--dry-run"), "recommends no model", "Use it.")
