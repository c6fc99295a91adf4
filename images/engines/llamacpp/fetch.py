"""Fetch the pinned llama.cpp source and unpack it, verified.

    python fetch.py --out DIR [--find-links DIR_OR_FILE]

The source is a package on a Python index, so a site's own mirror serves it too: PIP_INDEX_URL names
the index, SSL_CERT_FILE or PIP_CERT the certificates to trust. Without a network, --find-links (or
PIP_FIND_LINKS) names the package file or a folder that holds it. Only the standard library is used.
Exit codes: 0 done, 2 wrong usage, 3 the file is not the pinned one, 5 network or disk.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import http.client
import json
import os
import shutil
import ssl
import sys
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

HERE = Path(__file__).resolve().parent
SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"
TIMEOUT = 60.0
CHUNK = 1 << 20


class FetchError(Exception):
    """What is wrong and what to do, with the exit code for it."""

    code = 1


class RefusedError(FetchError):
    """The file is not what is pinned, or not safe to unpack."""

    code = 3


class UnreachableError(FetchError):
    """The index, the network or the disk does not do its part."""

    code = 5


@dataclass(frozen=True)
class Pin:
    """The one source archive that may be used."""

    package: str
    version: str
    sha256: str
    subfolder: str

    @property
    def filename(self) -> str:
        """The archive's name on an index."""
        return f"{self.package.replace('-', '_')}-{self.version}.tar.gz"

    @property
    def prefix(self) -> PurePosixPath:
        """The folder inside the archive that is wanted."""
        return PurePosixPath(self.filename.removesuffix(".tar.gz")) / self.subfolder


def read_pin(path: Path) -> Pin:
    """Read the pin from source.json."""
    data = json.loads(path.read_text())
    return Pin(*(data[name] for name in ("package", "version", "sha256", "subfolder")))


def trust() -> ssl.SSLContext:
    """Trust the certificates that the environment names, else the system's."""
    for name in ("SSL_CERT_FILE", "PIP_CERT"):
        path = os.environ.get(name)
        if path:
            if not Path(path).is_file():
                raise UnreachableError(f"{name}={path}: no such file; unset it or correct it")
            return ssl.create_default_context(cafile=path)
    return ssl.create_default_context()


def get(url: str, accept: str = "*/*") -> Any:
    """Open an address; the caller closes it."""
    request = urllib.request.Request(url, headers={"Accept": accept})
    split = urllib.parse.urlsplit(url)
    if split.username is not None:  # credentials in the index URL
        request = urllib.request.Request(
            split._replace(netloc=split.netloc.rpartition("@")[2]).geturl(),
            headers={"Accept": accept, "Authorization": basic(split)},
        )
    if split.scheme not in ("https", "http"):
        raise UnreachableError(f"{shown(url)}: only http and https are supported")
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT, context=trust())
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UnreachableError(
            f"cannot read {shown(url)}: {reason}; set PIP_INDEX_URL and SSL_CERT_FILE for this "
            "network, or give --find-links with a folder that holds the file"
        ) from error


def basic(split: urllib.parse.SplitResult) -> str:
    """Make the Authorization header for the user and password of an address."""
    pair = f"{urllib.parse.unquote(split.username or '')}:"
    pair += urllib.parse.unquote(split.password or "")
    return "Basic " + base64.b64encode(pair.encode()).decode()


def shown(url: str) -> str:
    """Show an address without a password in it."""
    split = urllib.parse.urlsplit(url)
    return split._replace(netloc=split.netloc.rpartition("@")[2]).geturl()


def locate(pin: Pin, index: str) -> str:
    """Ask the index for the archive's address."""
    page = f"{index.rstrip('/')}/{pin.package}/"
    with get(page, SIMPLE_JSON) as answer:
        base = answer.geturl()
        try:
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise UnreachableError(f"{shown(page)} broke off: {error}; run it again") from error
    try:
        files = json.loads(body)["files"]
        address = next(file["url"] for file in files if file["filename"] == pin.filename)
    except (ValueError, KeyError, TypeError):
        raise UnreachableError(
            f"{shown(page)} does not answer in the JSON form of the simple index (PEP 691): "
            "use another index, or download the file and give --find-links"
        ) from None
    except StopIteration:
        raise UnreachableError(
            f"{shown(page)} has no {pin.filename}: use another index, or give --find-links"
        ) from None
    return urllib.parse.urljoin(base, str(address))


def download(pin: Pin, index: str, target: Path) -> None:
    """Write the archive from the index to a file."""
    address = locate(pin, index)
    print(f"fetching {pin.filename} from {shown(address)}", file=sys.stderr)
    with get(address) as answer, target.open("wb") as out:
        try:
            shutil.copyfileobj(answer, out, CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise UnreachableError(f"{shown(address)} broke off: {error}; run it again") from error


def find_local(pin: Pin, places: list[str], required: bool) -> Path | None:
    """Find the archive among local files and folders."""
    for place in map(Path, places):
        candidate = place / pin.filename if place.is_dir() else place
        if candidate.name == pin.filename and candidate.is_file():
            return candidate
    if required:
        raise UnreachableError(
            f"no {pin.filename} at {', '.join(places)}: put it there, "
            f"e.g. with pip download --no-deps --no-binary :all: {pin.package}=={pin.version}"
        )
    return None


def check(pin: Pin, archive: Path) -> None:
    """Refuse an archive that is not the pinned one."""
    with archive.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != pin.sha256:
        raise RefusedError(
            f"{archive.name} has sha256 {found}, pinned is {pin.sha256}: it is broken or not the "
            "published file; delete it and fetch it again"
        )


def wanted(archive: tarfile.TarFile, prefix: PurePosixPath) -> Iterator[tarfile.TarInfo]:
    """Yield the members below the wanted folder, named relative to it; nothing unsafe."""
    for member in archive:
        path = PurePosixPath(member.name)
        if ".." in path.parts or path.is_absolute():
            raise RefusedError(f"the archive holds an unsafe path: {member.name!r}")
        if not path.is_relative_to(prefix) or path == prefix:
            continue
        if member.isdir() or member.isreg():
            member.name = str(path.relative_to(prefix))
            yield member
        elif not (member.issym() or member.islnk()):
            raise RefusedError(f"the archive holds a special file: {member.name!r}")


def unpack(archive: Path, prefix: PurePosixPath, target: Path) -> None:
    """Write the wanted folder's plain files; links are left out."""
    try:
        with tarfile.open(archive, "r:gz") as opened:
            for member in wanted(opened, prefix):
                path = target / member.name
                if member.isdir():
                    path.mkdir(parents=True, exist_ok=True)
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                source = opened.extractfile(member)
                assert source is not None
                with source, path.open("wb") as out:
                    shutil.copyfileobj(source, out, CHUNK)
                path.chmod(0o755 if member.mode & 0o100 else 0o644)
    except (tarfile.TarError, EOFError) as error:
        raise RefusedError(f"{archive.name} is not a readable archive: {error}") from error
    if not any(target.iterdir()):
        raise RefusedError(f"{archive.name} holds no {prefix}: the pin's subfolder is wrong")


def fetch(pin: Pin, out: Path, places: list[str], required: bool, index: str) -> None:
    """Fetch, verify and unpack the source; `out` appears only when all of it went well."""
    if out.exists():
        raise RefusedError(f"{out} exists: delete it or give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        archive = find_local(pin, places, required)
        if archive is None:
            archive = Path(scratch) / pin.filename
            download(pin, index, archive)
        check(pin, archive)
        tree = Path(scratch) / "tree"
        tree.mkdir()
        unpack(archive, pin.prefix, tree)
        tree.chmod(0o755)
        tree.rename(out)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Fetch the pinned llama.cpp source, verified.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--find-links", action="append", default=[], metavar="PLACE",
        help="the package file, or a folder that holds it; no network is used then",
    )  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Fetch the source; an error is one line and an exit code."""
    options = parse(arguments)
    places = options.find_links or os.environ.get("PIP_FIND_LINKS", "").split()
    index = os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple"
    try:
        pin = read_pin(HERE / "source.json")
        fetch(pin, options.out.absolute(), places, bool(options.find_links), index)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"error: {error}; check the path and the free space", file=sys.stderr)
        return UnreachableError.code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
