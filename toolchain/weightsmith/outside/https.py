"""Sources at an address (`https://`): an archive, a GGUF file, or a list of files by SHA-256.

A checkpoint is several files, so an address is that of an archive, which is unpacked, or of a list
as the program sha256sum writes it. The list's own SHA-256 is the pin, and its files are beside it
or below: a folder that any web server can offer, with nothing to pack. There is no source without
a SHA-256, since an address says nothing of what is behind it tomorrow.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from urllib.parse import quote, urljoin

from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.ports import Progress
from weightsmith.core.values import Digest
from weightsmith.outside.http_files import HttpFiles, shown
from weightsmith.outside.remote import Broken, Place, RemoteFile, chosen_files
from weightsmith.recipe.sources import is_archive, is_listing, sha256_of

_LINE = re.compile(r"(?P<sha256>[0-9a-f]{64}) [ *](?P<path>.+)")
_LARGEST_LIST = 4 << 20
_HINT = "check the network and the proxy"


class HttpsRemote:
    """Files at an address; `http://` only on this machine."""

    packages = ()
    extra = ""
    where = ""

    def __init__(self, scheme: str = "https") -> None:
        self.scheme = scheme

    def pin_of(self, source: str, revision: str, sha256: str) -> str:
        """Return the address with the file's SHA-256."""
        del revision
        address, digest = sha256_of(source, sha256)
        return f"{address}#sha256={digest}"

    def open(self, source: str, revision: str, sha256: str, progress: Progress) -> Place:
        """List what is at the address."""
        del progress
        address, digest = sha256_of(source, sha256)
        files, pin = HttpFiles(shown(address)), self.pin_of(source, revision, sha256)
        name = address.rpartition("/")[2]
        if is_listing(name):
            found = _persistent_text(files, address)
            if hashlib.sha256(found).hexdigest() != digest:
                raise InputRefused(
                    f"{address} has the SHA-256 {hashlib.sha256(found).hexdigest()}, which is not "
                    "its pin",
                    hint="if the pin is its publisher's, the server has another list now, or a "
                    "proxy changes it: find out which before you change the pin",
                )
            rows = chosen_files(parse_list(found, shown(address)), shown(address))
            sized = tuple(_sized(files, address, one) for one in rows)

            def read(file: RemoteFile, start: int, end: int) -> Iterator[bytes]:
                return files.read(_beside(address, file.path), start, end)

            return Place(pin=pin, pinned=True, files=sized, read=read, hint=_HINT)
        only = RemoteFile(path=name, size=_size(files, address), digest=Digest(f"sha256:{digest}"))
        return Place(
            pin=pin,
            pinned=True,
            files=(only,),
            read=lambda _, start, end: files.read(address, start, end),
            hint=_HINT,
            is_archive=is_archive(name),
            pinned_bytes=True,
        )


def parse_list(data: bytes, where: str) -> tuple[RemoteFile, ...]:
    """Return the files of a list as sha256sum writes it; raises InputRefused for anything else."""
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError:
        raise InputRefused(
            f"{where} is not text in UTF-8", hint="write it with sha256sum"
        ) from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _LINE.fullmatch(line)
        if not row:
            raise InputRefused(
                f"{where}, line {number}: not a SHA-256 and a file's name: {line[:100]!r}",
                hint="write it with sha256sum, in the folder: sha256sum * > SHA256SUMS",
            )
        path = row["path"].removeprefix("./")
        found.append(RemoteFile(path=path, digest=Digest(f"sha256:{row['sha256']}")))
    return tuple(found)


def _beside(address: str, path: str) -> str:
    """Return the address of a file of a list: quoted, so that no name is another address."""
    return urljoin(address, "./" + quote(path))


def _sized(files: HttpFiles, address: str, file: RemoteFile) -> RemoteFile:
    size = _size(files, _beside(address, file.path))
    return RemoteFile(path=file.path, size=size, digest=file.digest)


def _size(files: HttpFiles, url: str) -> int:
    """Return a file's size, -1 if its server does not say it now."""
    try:
        return files.size(url) or -1  # some say 0 of any file, since they send none
    except Broken:
        return -1


def _persistent_text(files: HttpFiles, address: str) -> bytes:
    for _ in range(2):
        try:
            return files.text(address, _LARGEST_LIST)
        except Broken:
            continue
    try:
        return files.text(address, _LARGEST_LIST)
    except Broken as trouble:
        raise EnvironmentFailure(f"{shown(address)}: {trouble}", hint=_HINT) from None
