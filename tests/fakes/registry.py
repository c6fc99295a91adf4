"""A registry in this process, with the faults that real ones have."""

import base64
import gzip
import hashlib
import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, urlsplit

from weightsmith.oci.references import Reference

from tests.fakes.serving import Replying, Serving, serving


class FakeRegistry:
    """State that tests look at and set; `faults` are used up one request at a time."""

    def __init__(self) -> None:
        self.blobs: dict[tuple[str, str], bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.uploads: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.connections = 0
        """How many were opened."""
        self.authorizations: list[tuple[str, str]] = []
        self.watch: Callable[[str, str], None] = lambda method, path: None
        """Told of each request (method, path) before it is answered."""
        self.faults: list[tuple[str, str, str]] = []
        """Method, part of the path, and `reset`, `half`, `norange`, `digest`, `full`, a status,
        `short`, `redirect:URL`, `place:URL`: where an upload goes on, `keep:N`: an upload broken
        after N bytes, which stay; `spoil`: changed."""
        self.auth = ""
        """Empty, `basic` or `bearer`."""
        self.user, self.password = "ann", "s3cret-password"
        self.tokens: set[str] = set()
        self.tokens_given = 0
        self.token_lasts = 300
        self.chunk_min = 0
        self.largest_body = 0
        self.mount_allowed = True
        self.trouble = ""
        """What faults say besides."""
        self.immutable_tags = False
        self.keeps_first = False
        """A blob that is there stays as it is, whatever is uploaded."""
        self.page = 1000
        """Names in one page of a list, whatever is asked for."""
        self.has_catalog = True
        self.referrers: dict[tuple[str, str], bytes] | None = None
        """Repository and subject -> what the referrers API answers; None without the API."""
        self.url = ""
        self.lock = threading.Lock()
        self.upload_numbers = itertools.count(1)

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    def expire_tokens(self) -> None:
        self.tokens.clear()

    def counts(self) -> Counter[str]:
        return Counter(method for method, _ in self.log)

    def fault(self, method: str, path: str) -> str:
        with self.lock:
            for row in self.faults:
                if row[0] == method and row[1] in path:
                    self.faults.remove(row)
                    return row[2]
        return ""


class _Handler(Replying):
    protocol_version = "HTTP/1.1"
    state: FakeRegistry

    def setup(self) -> None:
        super().setup()
        with self.state.lock:
            self.state.connections += 1

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.reply(status, body, {key.replace("_", "-"): value for key, value in headers.items()})

    def fail(self, status: int, code: str, message: str = "", **headers: str) -> None:
        body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
        self.answer(status, body, **headers)

    def handle_one(self) -> None:
        state = self.state
        path = urlsplit(self.path).path
        state.log.append((self.command, self.path))
        state.watch(self.command, path)
        state.authorizations.append((path, self.headers.get("Authorization", "")))
        fault = state.fault(self.command, self.path)
        if fault == "reset":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
            return self.reset()
        if path == "/token":
            return self.token(fault)
        if state.auth and not self.authorized():
            self.body()
            return self.challenge()
        if fault.startswith("redirect:"):
            self.body()
            return self.answer(307, Location=fault.removeprefix("redirect:"))
        if fault.startswith("place:"):
            return self.answer(202, Location=fault.removeprefix("place:"))
        if fault == "full":
            self.body()
            return self.answer(500, b'{"errors":[{"code":"UNKNOWN","detail":{"Err":28}}]}')
        if fault.isdigit():
            self.body()
            extra = {"Retry_After": "7"} if fault == "429" else {}
            secret = self.headers.get("Authorization", "").partition(" ")[2]
            return self.fail(int(fault), "TROUBLE", f"bad moment {secret}{state.trouble}", **extra)
        return self.route(path, parse_qs(urlsplit(self.path).query), fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = handle_one  # noqa: N815 - the names http.server calls

    def authorized(self) -> bool:
        kind, _, value = self.headers.get("Authorization", "").partition(" ")
        if self.state.auth == "basic":
            wanted = f"{self.state.user}:{self.state.password}".encode()
            return kind == "Basic" and base64.b64decode(value) == wanted
        return kind == "Bearer" and value in self.state.tokens

    def challenge(self) -> None:
        header = 'Basic realm="x"'
        if self.state.auth == "bearer":
            header = f'Bearer realm="{self.state.url}/token",service="fake",scope="wrong"'
        self.fail(401, "UNAUTHORIZED", "authentication required", WWW_Authenticate=header)

    def token(self, fault: str) -> None:
        wanted = base64.b64encode(f"{self.state.user}:{self.state.password}".encode()).decode()
        form = self.body().decode()
        given = self.headers.get("Authorization", "")
        identity = f"refresh_token={self.state.password}" in form
        if (given and given != f"Basic {wanted}") or (form and not identity) or fault == "401":
            return self.fail(401, "UNAUTHORIZED", "wrong password")
        self.state.tokens_given += 1
        token = f"token-{self.state.tokens_given}-hush"
        self.state.tokens.add(token)
        body = json.dumps({"token": token, "expires_in": self.state.token_lasts}).encode()
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            return self.answer(200, gzip.compress(body), Content_Encoding="gzip")
        return self.answer(200, body)

    def route(self, path: str, query: dict[str, list[str]], fault: str) -> None:
        state = self.state
        if path == "/v2/_catalog" and state.has_catalog:
            return self.names(path, query, "repositories", {name for name, _ in state.manifests})
        if found := re.fullmatch(r"/v2/(.+)/tags/list", path):
            own = {tag for name, tag in state.manifests if name == found[1]}
            if not own:
                return self.fail(404, "NAME_UNKNOWN")
            return self.names(path, query, "tags", {tag for tag in own if ":" not in tag})
        found = re.fullmatch(r"/v2/(.+)/referrers/(.+)", path)
        if found and state.referrers is not None:
            empty = b'{"schemaVersion": 2, "manifests": []}'
            return self.answer(200, state.referrers.get((found[1], found[2]), empty))
        if found := re.fullmatch(r"/v2/(.+)/manifests/([^/]+)", path):
            return self.manifest(found[1], found[2], fault)
        if found := re.fullmatch(r"/v2/(.+)/blobs/uploads/(.*)", path):
            return self.upload(found[1], found[2], query, fault)
        if found := re.fullmatch(r"/v2/(.+)/blobs/([^/]+)", path):
            return self.blob(found[1], found[2], fault)
        return self.fail(404, "NAME_UNKNOWN")

    def names(self, path: str, query: dict[str, list[str]], key: str, all_: set[str]) -> None:
        last = query.get("last", [""])[0]
        rows = sorted(name for name in all_ if name > last)
        size = min(self.state.page, int(query.get("n", ["1000"])[0]))
        link = f'<{path}?n={size}&last={rows[size - 1]}>; rel="next"' if rows[size:] else ""
        more = {"Link": link} if link else {}
        self.answer(200, json.dumps({key: rows[:size]}).encode(), **more)

    def manifest(self, repository: str, name: str, fault: str) -> None:
        if self.command == "PUT":
            data = self.body()
            subject = json.loads(data).get("subject") or {}
            if subject and (repository, subject["digest"]) not in self.state.manifests:
                # Not by the specification, but Cloudflare's registry asks for it.
                return self.fail(400, "BLOB_UNKNOWN", "unknown subject")
            digest = "sha256:" + hashlib.sha256(data).hexdigest()
            there = name != digest and (repository, name) in self.state.manifests
            if self.state.immutable_tags and there:
                return self.fail(400, "TAG_INVALID", "the tag is immutable")
            for key in (name, digest):
                self.state.manifests[repository, key] = self.headers["Content-Type"], data
            return self.answer(201, Docker_Content_Digest=_wrong(digest) if fault else digest)
        found = self.state.manifests.get((repository, name))
        if not found:
            return self.fail(404, "MANIFEST_UNKNOWN")
        data = found[1] + b" " if fault == "digest" else found[1]
        return self.answer(200, data, Content_Type=found[0])

    def blob(self, repository: str, digest: str, fault: str) -> None:
        data = self.state.blobs.get((repository, digest))
        if data is None:
            return self.fail(404, "BLOB_UNKNOWN")
        if fault == "short":
            data = data[:7]
        if fault == "digest":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault == "half":
            self.close_connection = True
            return self.reply(200, data[: len(data) // 2], {"Content-Length": str(len(data))})
        ranges = "" if fault == "norange" else self.headers.get("Range", "")
        if part := re.fullmatch(r"bytes=(\d+)-(\d+)", ranges):
            return self.answer(206, data[int(part[1]) : int(part[2]) + 1])
        return self.answer(200, data)

    def upload(self, repository: str, name: str, query: dict[str, list[str]], fault: str) -> None:
        if self.command == "POST":
            return self.open_upload(repository, query)
        if fault.startswith("keep:"):
            length = int(self.headers.get("Content-Length") or 0)
            kept = min(length, int(fault.removeprefix("keep:")))
            self.state.uploads[name] += self.rfile.read(kept)
            return self.reset()
        data = self.body()
        if name not in self.state.uploads:
            return self.fail(404, "BLOB_UPLOAD_UNKNOWN")
        if self.command == "DELETE":
            del self.state.uploads[name]
            return self.answer(204)
        if self.command == "GET":
            if fault == "spoil":
                self.state.uploads[name] = self.state.uploads[name][::-1]
            there = max(0, len(self.state.uploads[name]) - 1)
            place = f"/v2/{repository}/blobs/uploads/{name}?_state=a%2Bb%3D"
            return self.answer(204, Location=place, Range=f"0-{there}")
        if self.state.largest_body and len(data) > self.state.largest_body:
            return self.fail(413, "SIZE_INVALID")
        self.state.uploads[name] += data
        place = f"/v2/{repository}/blobs/uploads/{name}?_state=a%2Bb%3D"
        if self.command == "PATCH":
            start = int((self.headers.get("Content-Range") or "0-").partition("-")[0])
            if start != len(self.state.uploads[name]) - len(data):
                return self.fail(416, "RANGE_INVALID")
            return self.answer(202, Location=place)
        whole = self.state.uploads.pop(name)
        digest = "sha256:" + hashlib.sha256(whole).hexdigest()
        if digest != query["digest"][0] or query.get("_state") != ["a+b="]:
            return self.fail(400, "DIGEST_INVALID", "provided digest did not match")
        if not (self.state.keeps_first and (repository, digest) in self.state.blobs):
            self.state.blobs[repository, digest] = whole
        return self.answer(201, Docker_Content_Digest=_wrong(digest) if fault else digest)

    def open_upload(self, repository: str, query: dict[str, list[str]]) -> None:
        if "mount" in query and self.state.mount_allowed:
            data = self.state.blobs.get((query["from"][0], query["mount"][0]))
            if data is not None:
                self.state.blobs[repository, query["mount"][0]] = data
                return self.answer(201)
        name = f"u{next(self.state.upload_numbers)}"  # however many begin at once
        self.state.uploads[name] = b""
        extra = {"OCI_Chunk_Min_Length": str(self.state.chunk_min)} if self.state.chunk_min else {}
        place = f"/v2/{repository}/blobs/uploads/{name}?_state=a%2Bb%3D"
        return self.answer(202, b"", Location=place, **extra)


def _wrong(digest: str) -> str:
    return "sha256:" + digest[:6:-1]


def at(fake: FakeRegistry, text: str = "team/app:1") -> Reference:
    return Reference.parse(f"{fake.host}/{text}")


@contextmanager
def fake_registry() -> Iterator[FakeRegistry]:
    state = FakeRegistry()
    with serving(Serving(_Handler, state=state)) as state.url:
        yield state
