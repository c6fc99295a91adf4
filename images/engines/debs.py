"""Fetches pinned Debian packages and reads them, for the engines that are assembled from such.

Each engine's `debian.json` names a mirror, an archive of all releases for what the mirror has no
longer, and packages by machine, path and sha256. Nothing of a package is run.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import posixpath
import tarfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

TRIES = 4
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
"""Debian's name of a machine -> the compilers'."""


def packages_for(lock: dict, machine: str) -> list[dict]:
    """Return the lock's packages for a machine, `x86_64` or `aarch64`, and those for all."""
    (name,) = (name for name, own in MACHINES.items() if own == machine)
    own, every = f"_{name}.deb", "_all.deb"
    found = [package for package in lock["packages"] if package["path"].endswith((own, every))]
    if not any(package["path"].endswith(own) for package in found):
        raise SystemExit(f"error: no packages are pinned for {machine}")
    return found


def open_package(lock: dict, package: dict) -> tarfile.TarFile:
    """Return the files of one of the lock's packages."""
    return tarfile.open(fileobj=io.BytesIO(data_member(fetch(lock, package))))


def write(archive: tarfile.TarFile, member: str | tarfile.TarInfo, to: Path, mode: int) -> None:
    """Write one regular file of an archive, and the folders above it."""
    content = archive.extractfile(member)
    assert content is not None
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(content.read())
    to.chmod(mode)


def unpack(archive: tarfile.TarFile, wanted: Callable[[str], bool], out: Path) -> None:
    """Write the wanted files of a package as regular files; a link becomes its target."""
    members = {place(m.name): m for m in archive.getmembers() if not m.isdir()}
    for path in sorted(members):
        source = resolved(path, members) if wanted(path) else None
        if source is not None:
            write(archive, source, out / path, 0o755 if source.mode & 0o100 else 0o644)


def place(name: str) -> str:
    """Return where a file goes: /bin and /lib are parts of /usr in Debian."""
    path = posixpath.normpath(name.lstrip("./"))
    if path.startswith(".."):
        raise SystemExit(f"error: {name} leaves the image")
    return f"usr/{path}" if path.split("/")[0] in {"bin", "lib", "lib64", "sbin"} else path


def resolved(path: str, members: dict) -> tarfile.TarInfo | None:
    """Return the regular file behind a path; None where it lies outside the package."""
    for _ in range(8):
        member = members.get(path)
        if member is None or member.isreg():
            return member
        base = "" if member.linkname.startswith("/") or member.islnk() else posixpath.dirname(path)
        path = place(posixpath.join(base, member.linkname))
    return None


def fetch(lock: dict, package: dict) -> bytes:
    """Return a package's bytes from the mirror or Debian's archive of all releases."""
    mirror = os.environ.get("WEIGHTSMITH_DEBIAN_MIRROR", lock["mirror"]).rstrip("/")
    problem: object = None
    for place in [mirror] * TRIES + [lock["archive"]]:
        try:
            with urllib.request.urlopen(f"{place}/{package['path']}", timeout=60) as answer:
                data = answer.read()
        except (OSError, http.client.HTTPException) as error:
            problem = error
            time.sleep(0 if getattr(error, "code", 0) == 404 else 2)
            continue
        found = hashlib.sha256(data).hexdigest()
        if found == package["sha256"]:
            return data
        problem = f"its sha256 is {found}, not {package['sha256']}"
    raise SystemExit(f"error: {package['path']} cannot be had from {mirror}: {problem}")


def data_member(deb: bytes) -> bytes:
    """Return the member of an ar archive that holds a package's files (deb(5))."""
    at = 8
    while at < len(deb):
        name, size = deb[at : at + 16].decode().strip(), int(deb[at + 48 : at + 58])
        if name.rstrip("/").startswith("data.tar"):
            return deb[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise SystemExit("error: a Debian package without data.tar")
