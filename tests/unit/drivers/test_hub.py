"""The hub reader against a small local server of the hub's API."""

import hashlib
import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tests.fakes.serving import serving
from toolchain.drivers.hub import HubReader
from toolchain.drivers.store import FileStore
from toolchain.errors import EnvironmentFailure, InputRefused
from toolchain.ports import Silent

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights" * 100,
    "pytorch_model.bin": b"pickle",
    "README.md": b"# model",
}


class Hub(BaseHTTPRequestHandler):
    """Serves one repository, `team/model`, at one commit; `team/secret` is gated."""

    fetched: ClassVar[list[str]] = []

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/team/secret"):
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/team/model"):
            self._api(path)
        elif path.startswith("/api/"):
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        else:
            self._file(body=True)

    def _api(self, path: str) -> None:
        if "/revision/" in path and path.rpartition("/")[2] not in ("main", COMMIT):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        if "/tree/" in path:
            rows = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in FILES.items()
            ]
            self._send(200, json.dumps(rows).encode())
            return
        siblings = [{"rfilename": name} for name in FILES]
        answer = {"id": "team/model", "modelId": "team/model", "sha": COMMIT, "siblings": siblings}
        self._send(200, json.dumps(answer).encode())

    def _file(self, *, body: bool) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        if f"/team/model/resolve/{COMMIT}/" not in self.path or name not in FILES:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if body:
            Hub.fetched.append(name)
        data = FILES[name]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self._send(200, data if body else b"", headers, length=len(data))

    def _send(
        self, status: int, data: bytes, headers: dict[str, str] | None = None, length: int = -1
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length if length >= 0 else len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    url = f"http://127.0.0.1:{server.server_port}"
    from huggingface_hub import constants

    # The client reads its variables when it is imported, which another test may have done.
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    Hub.fetched = []
    with serving(server):
        yield server


@pytest.fixture
def reader(tmp_path: Path) -> HubReader:
    return HubReader(FileStore(tmp_path / "store"))


def test_an_unpinned_repository_is_resolved_to_its_commit(hub, reader: HubReader) -> None:
    snapshot = reader.fetch("hf://team/model", "", "", Silent())

    assert snapshot.pin == f"hf://team/model@{COMMIT}"
    assert not snapshot.pinned
    names = {file.path for file in snapshot.tree.files}
    assert {"config.json", "model.safetensors"} <= names
    assert "pytorch_model.bin" not in names
    assert snapshot.tree.path("model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_pinned_one_comes_from_the_cache_without_the_hub(hub, reader: HubReader) -> None:
    assert reader.known("hf://team/model", COMMIT, "") is None
    first = reader.fetch("hf://team/model", COMMIT, "", Silent())
    assert first.pinned
    hub.shutdown()
    again = reader.known("hf://team/model", COMMIT, "")

    assert again is not None
    assert again.digest == first.digest
    assert Hub.fetched.count("model.safetensors") == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://team/absent", "team/absent"),
        ("hf://team/secret", "gated"),
        ("hf://team/model@nothing", "nothing"),
        ("hf://not/a/repository", "not/a/repository"),
    ],
)
def test_what_is_not_ours_to_read_is_refused(hub, reader, source: str, message: str) -> None:
    with pytest.raises(InputRefused, match=message) as caught:
        reader.fetch(source, "", "", Silent())
    assert caught.value.hint


def test_a_hub_that_is_down_is_an_environment_failure(
    hub, reader: HubReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr(time, "sleep", lambda _: None)  # half a minute between the client's tries
    with pytest.raises(EnvironmentFailure, match="could not be reached") as caught:
        reader.fetch("hf://team/model", COMMIT, "", Silent())
    assert "HF_ENDPOINT" in caught.value.hint
