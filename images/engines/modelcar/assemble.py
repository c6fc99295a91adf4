"""Assembles the root file system of a modelcar from one pinned package: a shell and nothing else.

    python assemble.py --out FOLDER

KServe starts a modelcar with `sh -c "ln -sf … && sleep …"`. Debian's static busybox is all of that
in one program, whose shell finds its own commands. Needs Python alone, no root and no container
engine; the same pins give the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRIES = 4


def main() -> None:
    """Parse the arguments, and assemble."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--find-links", default="", help="accepted for every engine, not needed")
    out = parser.parse_args().out
    lock = json.loads((HERE / "debian.json").read_text("utf-8"))
    print("[1/2] Debian's busybox", flush=True)
    with tarfile.open(fileobj=io.BytesIO(data_member(fetch(lock)))) as archive:
        for source, target in lock["files"].items():
            content = archive.extractfile(f"./{source}")
            assert content is not None
            place = out / target
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content.read())
            place.chmod(0o755 if target.startswith("bin/") else 0o644)
    print("[2/2] done", flush=True)


def fetch(lock: dict) -> bytes:
    """Return the package's bytes from the mirror or Debian's archive of all releases."""
    mirror = os.environ.get("WEIGHTSMITH_DEBIAN_MIRROR", lock["mirror"]).rstrip("/")
    problem: object = None
    for place in [mirror] * TRIES + [lock["archive"]]:
        try:
            with urllib.request.urlopen(f"{place}/{lock['path']}", timeout=60) as answer:
                data = answer.read()
        except (OSError, urllib.error.URLError) as error:
            problem = error
            time.sleep(0 if getattr(error, "code", 0) == 404 else 2)
            continue
        found = hashlib.sha256(data).hexdigest()
        if found == lock["sha256"]:
            return data
        problem = f"its sha256 is {found}, not {lock['sha256']}"
    raise SystemExit(f"error: {lock['path']} cannot be had from {mirror}: {problem}")


def data_member(deb: bytes) -> bytes:
    """Return the member of an ar archive that holds a package's files (deb(5))."""
    at = 8
    while at < len(deb):
        name, size = deb[at : at + 16].decode().strip(), int(deb[at + 48 : at + 58])
        if name.rstrip("/").startswith("data.tar"):
            return deb[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise SystemExit("error: a Debian package without data.tar")


if __name__ == "__main__":
    main()
