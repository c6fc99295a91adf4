"""Sources on ModelScope (`modelscope://owner/name`), by its API's requests for lists and files.

https://github.com/modelscope/modelscope_hub (src/modelscope_hub/_legacy_api.py). Its client is not
used: it brings a cache and a download of its own, and a list has a SHA-256 for each file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from urllib.parse import quote, urlencode, urlsplit

from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.ports import Progress
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Digest, JsonValue
from weightsmith.oci.references import is_loopback
from weightsmith.outside.http_files import HttpFiles
from weightsmith.outside.remote import Broken, Place, RemoteFile, list_pin, require_pin
from weightsmith.recipe.sources import LIST_PIN, MODELSCOPE

_PUBLIC = "https://www.modelscope.cn"
_BRANCH = "master"
_LARGEST = 16 << 20
_MOST = 3000
"""Files that it lists; it says nothing if there are more."""
_TOKEN = "set MODELSCOPE_API_TOKEN to a token that may read it"  # noqa: S105 - a hint
_HINT = "check the network, MODELSCOPE_ENDPOINT and the proxy"


class ModelScopeRemote:
    """Repositories of MODELSCOPE_ENDPOINT, with the token of MODELSCOPE_API_TOKEN."""

    scheme = "modelscope"
    packages = ()
    extra = ""
    where = ""

    def pin_of(self, source: str, revision: str, sha256: str) -> str:
        """Return the source with the digest of its list."""
        del sha256
        return f"{source}@{revision}" if LIST_PIN.fullmatch(revision) else ""

    def open(self, source: str, revision: str, sha256: str, progress: Progress) -> Place:
        """List a repository."""
        del sha256, progress
        found = MODELSCOPE.fullmatch(source)
        if not found:
            raise AssertionError("a recipe's sources are checked")
        pinned = revision if LIST_PIN.fullmatch(revision) else ""
        branch = found["revision"] or (revision if not pinned else "") or _BRANCH
        files = HttpFiles(f"modelscope://{found['name']}", _login(), login=_TOKEN)
        root = f"{_endpoint()}/api/v1/models/{quote(found['name'])}"
        asked = urlencode({"Revision": branch, "Recursive": "True"})
        try:
            reply = files.text(f"{root}/repo/files?{asked}", _LARGEST)
        except Broken as trouble:
            raise EnvironmentFailure(f"{source}: {trouble}", hint=_HINT) from None
        rows = parse_files(reply, source)
        digest = list_pin(rows)
        require_pin(source, pinned, digest)

        def read(file: RemoteFile, start: int, end: int) -> Iterator[bytes]:
            asked = urlencode({"Revision": branch, "FilePath": file.path})
            return files.read(f"{root}/repo?{asked}", start, end)

        return Place(
            pin=f"{source}@{digest}",
            pinned=bool(pinned),
            files=rows,
            read=read,
            hint=_HINT,
        )


def parse_files(data: bytes, source: str) -> tuple[RemoteFile, ...]:
    """Return the files of a repository's list.

    Raises EnvironmentFailure for a reply that is none, InputRefused for what it says is not there
    and for a file without a SHA-256.
    """
    try:
        reply = parse(data, largest=_LARGEST)
        said: JsonValue = reply.get("Data") if isinstance(reply, dict) else None
        rows = said.get("Files") if isinstance(said, dict) else said
    except ValueError:
        rows = None
    if not isinstance(rows, list):
        raise EnvironmentFailure(f"{source}: invalid reply from {_endpoint()}", hint=_HINT)
    if len(rows) >= _MOST:
        raise InputRefused(
            f"{source} has {_MOST} files or more, of which not all are listed",
            hint="download it, and give its folder as the source",
        )
    return tuple(_file(row, source) for row in rows if not _is_folder(row))


def _is_folder(row: JsonValue) -> bool:
    return isinstance(row, dict) and row.get("Type") == "tree"


def _file(row: JsonValue, source: str) -> RemoteFile:
    fields: Mapping[str, JsonValue] = row if isinstance(row, dict) else {}
    path, size, sha256 = fields.get("Path"), fields.get("Size"), fields.get("Sha256")
    try:
        digest = Digest(f"sha256:{sha256}")
    except ValueError:
        digest = None
    if not isinstance(path, str) or type(size) is not int or size < 0 or digest is None:
        raise InputRefused(
            f"{source}: its list has a file without path, size or SHA-256: {str(path)[:100]!r}",
            hint="download it, and give its folder as the source",
        )
    return RemoteFile(path=path, size=size, digest=digest)


def _endpoint() -> str:
    """Return the address of ModelScope, without credentials."""
    named = os.environ.get("MODELSCOPE_ENDPOINT") or _PUBLIC
    address = named if "://" in named else f"https://{named}"
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port, parts = "", None, urlsplit(_PUBLIC)
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host))):
        raise UsageError(
            "MODELSCOPE_ENDPOINT is not an https:// address", hint="correct it, or unset it"
        )
    return f"{parts.scheme}://{host if ':' not in host else f'[{host}]'}" + (
        f":{port}" if port else ""
    )


def _login() -> Mapping[str, str]:
    """Return the headers of a token, which older servers take as a cookie."""
    token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
    if not token:
        return {}
    if not token.isascii() or not token.isprintable() or ";" in token or " " in token:
        raise UsageError("MODELSCOPE_API_TOKEN is no token", hint="correct it, or unset it")
    return {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"}
