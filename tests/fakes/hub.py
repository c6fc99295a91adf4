"""Model hubs in this process: one repository to be read, and one that is written to.

https://github.com/huggingface/huggingface_hub (hf_api.py, _commit_api.py, lfs.py) and
https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import yaml

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
        self.sizes: dict[str, int] = {}
        """Sizes that it states instead of the right ones."""
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
        if path == "/api/models":
            mine = "author=team" in self.path
            self.reply(200, json.dumps([{"id": "team/model"}] if mine else []).encode())
        elif path.startswith("/api/models/team/secret"):
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/team/model"):
            self._api(path)
        elif path.startswith("/api/"):
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        else:
            self._file()

    def do_POST(self) -> None:
        """Say which of some files there are, and how large."""
        asked = parse_qs(self.body().decode())["paths"]
        rows = [self.state.row(name) for name in asked if name in self.state.files]
        rows = [row | {"size": self.state.sizes.get(str(row["path"]), row["size"])} for row in rows]
        self.reply(200, json.dumps(rows).encode(), {"Content-Type": "application/json"})

    def _api(self, path: str) -> None:
        if path.endswith(("/commits/main", f"/commits/{COMMIT}")):
            row = {"id": COMMIT, "authors": [], "date": "2026-03-01T00:00:00.000Z"}
            row |= {"title": "made", "message": ""}
            self.reply(200, json.dumps([row]).encode())
            return
        if ("/revision/" in path or "/commits/" in path) and path.rpartition("/")[2] not in (
            "main",
            COMMIT,
        ):
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


TOKEN = "hf_a-token-that-may-write"
READER = "hf_a-token-that-may-read"
_LARGE = (".safetensors", ".gguf")
_LICENSES = {"apache-2.0", "mit", "llama3", "other"}
"""Some that the hub's check of a card accepts."""


@dataclass
class Repository:
    private: bool = True
    commits: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.gguf lfs\n"})
    large: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)

    def add(self, message: str) -> str:
        self.messages.append(message)
        self.commits.append(hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest())
        return self.commits[-1]


@dataclass
class WritableHub:
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Large files, by SHA-256."""
    received: list[str] = field(default_factory=list)
    """The large files that were sent."""
    requests: list[str] = field(default_factory=list)
    fail: dict[str, int] = field(default_factory=dict)
    """Part of a request's line -> status to answer with."""
    drop: str = ""
    """A file that commits lose."""


class _Refused(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(status)
        self.status, self.code = status, code


class _Writing(Replying):
    protocol_version = "HTTP/1.1"
    state: WritableHub

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.state.requests.append(f"{self.command} {path}")
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        body = b"".join(self._chunks()) if chunked else self.body()
        try:
            for part, status in self.state.fail.items():
                if part in f"{self.command} {path}":
                    raise _Refused(status)
            said, status, headers = self._reply(path, body), 200, {}
        except _Refused as refused:
            said, status, headers = {}, refused.status, {"X-Error-Code": refused.code}
        headers["Content-Type"] = "application/json"
        self.reply(status, json.dumps(said).encode(), {k: v for k, v in headers.items() if v})

    do_GET = do_POST = do_PUT = answer  # noqa: N815 - the names http.server calls

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _reply(self, path: str, body: bytes) -> Any:
        if path.startswith("/lfs/"):
            return self._large_file(path, body)
        self._sign_in(write=self.command == "POST")
        routes = (
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate),
            (r"/api/models/(?P<name>[^/]+/[^/]+)", self._info),
            (r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", self._tree),
            (r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/main", self._modes),
            (r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/api/models/(?P<name>[^/]+/[^/]+)/commit/main", self._commit),
        )
        for pattern, action in routes:
            if found := re.fullmatch(pattern, path):
                return action(body, **found.groupdict())
        raise _Refused(404)

    def _sign_in(self, *, write: bool) -> None:
        said = self.headers.get("Authorization", "")
        if said not in (f"Bearer {TOKEN}", f"Bearer {READER}"):
            raise _Refused(401)
        if write and said != f"Bearer {TOKEN}":
            raise _Refused(403)

    def _repository(self, name: str) -> Repository:
        if name not in self.state.repositories:
            raise _Refused(404, "RepoNotFound")
        return self.state.repositories[name]

    def _create(self, body: bytes) -> Any:
        said = json.loads(body)
        name = f"{said['organization']}/{said['name']}"
        if said["organization"] != "team":
            raise _Refused(403)
        if name in self.state.repositories:
            raise _Refused(409)
        private = said.get("visibility") == "private" or said.get("private") is True
        self.state.repositories[name] = Repository(private=private)
        self.state.repositories[name].add("initial commit")
        return {"url": f"{self.state.url}/{name}"}

    def _validate(self, body: bytes) -> Any:
        content = json.loads(body)["content"]
        front = yaml.safe_load(content.split("---")[1])
        if front.get("license", "other") not in _LICENSES:
            raise _Refused(400)
        return {"errors": [], "warnings": []}

    def _info(self, body: bytes, name: str) -> Any:
        repository = self._repository(name)
        siblings = [{"rfilename": path} for path in repository.files]
        return {"id": name, "sha": repository.commits[-1], "siblings": siblings}

    def _tree(self, body: bytes, name: str, revision: str) -> Any:
        repository = self._repository(name)
        rows = []
        for path, data in repository.files.items():
            row: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
            row["oid"] = git_id(data)
            if path in repository.large:
                oid = hashlib.sha256(data).hexdigest()
                row["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
            rows.append(row)
        return rows

    def _modes(self, body: bytes, name: str) -> Any:
        self._repository(name)
        paths = [row["path"] for row in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(_LARGE) else "regular" for path in paths}
        rows = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]
        return {"files": rows}

    def _batch(self, body: bytes, name: str) -> Any:
        self._repository(name)
        rows = []
        for row in json.loads(body)["objects"]:
            found = dict(row)
            if row["oid"] not in self.state.blobs:
                upload = {"href": f"{self.state.url}/lfs/{row['oid']}?signature=s3cret"}
                found["actions"] = {"upload": upload}
            rows.append(found)
        return {"transfer": "basic", "objects": rows}

    def _large_file(self, path: str, body: bytes) -> Any:
        oid = path.removeprefix("/lfs/")
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400)
        self.state.blobs[oid] = body
        self.state.received.append(oid)
        return {}

    def _commit(self, body: bytes, name: str) -> Any:
        repository = self._repository(name)
        rows = [json.loads(line) for line in body.splitlines()]
        header = rows.pop(0)["value"]
        if header.get("parentCommit", repository.commits[-1]) != repository.commits[-1]:
            raise _Refused(412)
        files, large = dict(repository.files), set(repository.large)
        for row in rows:
            value = row["value"]
            path = value["path"]
            if path == self.state.drop:
                continue
            if row["key"] == "deletedFile":
                del files[path]
                large.discard(path)
            elif row["key"] == "lfsFile":
                files[path] = self.state.blobs[value["oid"]]
                large.add(path)
            else:
                files[path] = base64.b64decode(value["content"])
        repository.files, repository.large = files, large
        oid = repository.add(header["summary"])
        return {"commitOid": oid, "commitUrl": f"{self.state.url}/{name}/commit/{oid}"}


@contextmanager
def writable_hub(monkeypatch: pytest.MonkeyPatch, token: str = TOKEN) -> Iterator[WritableHub]:
    """Serve a hub on a free loopback port, and let the hub's client write to it."""
    from huggingface_hub import constants

    state = WritableHub()
    server = Serving(_Writing, state=state)
    state.url = f"http://127.0.0.1:{server.server_port}"
    for name, value in environment(state, token).items():
        monkeypatch.setenv(name, value)
    # The client reads its variables when it is imported, which another test may have done.
    monkeypatch.setattr(constants, "ENDPOINT", state.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving(server):
        yield state


def environment(hub: WritableHub, token: str = TOKEN) -> Mapping[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": token}
