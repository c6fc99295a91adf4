"""A model hub in this process: one repository at one commit, and what it says and sends of it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes.serving import Replying, Serving, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights" * 100,
    "pytorch_model.bin": b"pickle",
    "README.md": b"# model",
}


def git_id(data: bytes) -> str:
    """Return the name that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class FakeHub:
    def __init__(self) -> None:
        self.files = dict(FILES)
        """What it says that the commit holds."""
        self.sent: dict[str, bytes] = {}
        """What it sends of a file instead."""
        self.large = {"model.safetensors"}
        """Kept by Git LFS, with a SHA-256."""
        self.fetched: list[str] = []
        self.listing = True
        self.server: Serving
        self.url = ""

    def row(self, name: str) -> Mapping[str, object]:
        data = self.files[name]
        row = {"type": "file", "path": name, "size": len(data), "oid": git_id(data)}
        if name in self.large:
            oid = hashlib.sha256(data).hexdigest()
            pointer = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n"
            )
            lfs = {"oid": oid, "size": len(data), "pointerSize": len(pointer)}
            row |= {"oid": git_id(pointer.encode()), "lfs": lfs}
        return row


class _Handler(Replying):
    """Serves `team/model`; `team/secret` is gated."""

    state: FakeHub

    def do_HEAD(self) -> None:
        self._file()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/team/secret"):
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/team/model"):
            self._api(path)
        elif path.startswith("/api/"):
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        else:
            self._file()

    def _api(self, path: str) -> None:
        if "/revision/" in path and path.rpartition("/")[2] not in ("main", COMMIT):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        files = self.state.files
        if "/tree/" in path:
            rows = [self.state.row(name) for name in files]
            self.reply(200 if self.state.listing else 501, json.dumps(rows).encode())
            return
        siblings = [{"rfilename": name} for name in files]
        answer = {"id": "team/model", "modelId": "team/model", "sha": COMMIT, "siblings": siblings}
        self.reply(200, json.dumps(answer).encode())

    def _file(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        if f"/team/model/resolve/{COMMIT}/" not in self.path or name not in self.state.files:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.state.fetched.append(name)
        data = self.state.sent.get(name, self.state.files[name])
        stated = self.state.files[name]
        etag = hashlib.sha256(stated).hexdigest() if name in self.state.large else git_id(stated)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        self.reply(200, data, headers)


@contextmanager
def fake_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Serve a hub on a free loopback port, and let the hub's client ask it."""
    from huggingface_hub import constants

    state = FakeHub()
    state.server = Serving(_Handler, state=state)
    state.url = url = f"http://127.0.0.1:{state.server.server_port}"
    # The client reads its variables when it is imported, which another test may have done.
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving(state.server):
        yield state
