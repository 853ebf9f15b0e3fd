"""`ganq push --to hf://…` up to the requests: a small HTTP server stands where the Hub is."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ganq.sharing import hub
from jobs.errors import ConfigError, ServerUnavailableError, SpecError

pytest.importorskip("huggingface_hub", reason="the extra ganq[hub] is not installed")


class Hub(ThreadingHTTPServer):
    """Answers as the Hub does to an upload of small files, and keeps what arrives."""

    refuses = False

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.header: dict[str, Any] = {}
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refuses or self.headers.get("Authorization") != "Bearer hf_test":
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer(200, {"url": f"{self.server.url}/ada/faces"})
        elif self.path == "/api/models/ada/faces/preupload/main":
            names = [one["path"] for one in json.loads(body)["files"]]
            self._answer(
                200,
                {
                    "files": [
                        {"path": one, "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                        for one in names
                    ]
                },
            )
        elif self.path.startswith("/api/models/ada/faces/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.server.header = line["value"]
                else:
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = f"{self.server.url}/ada/faces/commit/{'c' * 40}"
            self._answer(200, {"commitUrl": commit, "commitOid": "c" * 40, "success": True})
        else:
            self._answer(200, {"errors": [], "warnings": []})

    def _answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    (model / "samples").mkdir(parents=True)
    (model / "README.md").write_text("---\nlicense: other\n---\n# faces\n")
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (model / "samples" / "epoch-0004.png").write_bytes(b"\x89PNG")
    return model


def test_a_folder_arrives_as_one_commit_with_its_bytes(server: Hub, folder: Path) -> None:
    assert hub.repository("model/") is None
    assert hub.repository("hf://ada/faces") == "ada/faces"
    commit = hub.upload(folder, "ada/faces", "Epoch 4", private=True)
    assert commit == f"{server.url}/ada/faces/commit/{'c' * 40}"
    [created] = server.created
    assert (created["organization"], created["name"]) == ("ada", "faces")
    assert "private" in json.dumps(created)  # a key, or a value of `visibility`: that depends on the version
    assert server.header["summary"] == "Epoch 4"
    assert server.files == {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_hub_that_refuses_or_is_away_or_has_no_such_name_is_said(
    server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("hf://faces", "hf://a/b/c", "hf://", "hf://a b/c"):
        with pytest.raises(SpecError, match="is not a repository"):
            hub.repository(name)
    server.refuses = True
    with pytest.raises(ConfigError, match="refuses to write ada/faces") as caught:
        hub.upload(folder, "ada/faces", "Epoch 4", private=False)
    assert "hf auth login" in str(caught.value.hint)
    server.shutdown()
    server.server_close()
    with pytest.raises(ServerUnavailableError, match="cannot be reached"):
        hub.upload(folder, "ada/faces", "Epoch 4", private=False)
